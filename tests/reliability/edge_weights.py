"""Weights at the edges, and how engines are compared on them: for `test_numerics`, and for
`scripts/stress/check_numerics.py` where neither pytest nor numba is. Needs numpy and torch alone.
"""

from __future__ import annotations

import numpy as np
import torch

from mimoquant.quant.formats import Format
from mimoquant.quant.stack import Engine, NonFiniteError, Stack

FORMATS = [
    Format("int4", 32),
    Format("int4", 128),
    Format("int4", 128, symmetric=False),
    Format("mxfp4", 32),
    Format("nvfp4", 16),
    Format("nvfp4", 16, pow2_global=True),
]
SEARCHES = ("absmax", "mse")
WIDTH = 128
_ONE_HOT = np.eye(1, WIDTH, 5, dtype=np.float32)[0]
ROWS = {
    "zeros": np.zeros(WIDTH),
    "negative zeros": np.full(WIDTH, -0.0),
    "one-hot": _ONE_HOT,
    "negative one-hot": -_ONE_HOT,
    "1e30": np.where(np.arange(WIDTH) % 2, 1e30, -1e30),
    "1e38": np.full(WIDTH, 1e38),
    "subnormal": np.where(np.arange(WIDTH) % 3, 2.0**-133, -(2.0**-127)),
    "smallest normal": np.full(WIDTH, 2.0**-126),
    "all equal": np.full(WIDTH, 0.01),
    "all equal, negative": np.full(WIDTH, -0.75),
    "one above zeros": np.where(np.arange(WIDTH) == 127, 1e-30, 0.0),
}


def bf16_stack(row: np.ndarray) -> Stack:
    """One expert of eight such rows."""
    values = torch.from_numpy(np.tile(row.astype(np.float32), (1, 8, 1))).to(torch.bfloat16)
    return Stack(values.view(torch.uint16).numpy(), None)


def fp8_stack(code: int, scale: float) -> Stack:
    return Stack(np.full((1, 8, WIDTH), code, np.uint8), np.full((1, 1, 1), scale, np.float32))


def encoded(engine: Engine, stack: Stack, fmt: Format, search: str) -> dict[str, np.ndarray]:
    return engine.encode({"gate": stack, "up": stack, "down": stack}, fmt, search)["down"]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def outcome(engine: Engine, stack: Stack, fmt: Format, search: str) -> dict[str, np.ndarray] | None:
    """What an engine makes of it; None where it refuses values that are not finite."""
    try:
        return encoded(engine, stack, fmt, search)
    except NonFiniteError:
        return None


EDGES = {
    **{name: bf16_stack(row) for name, row in ROWS.items()},
    **{
        f"fp8 {code:02x} times {scale:g}": fp8_stack(code, scale)
        for code in (0x00, 0x01, 0x7E, 0xFE, 0x80)
        for scale in (0.0, -0.0, 3e-4, 1e-38, 1e27)
    },
}
NOT_FINITE = {
    "scale inf": fp8_stack(0x7E, float("inf")),
    "0 times inf": fp8_stack(0x00, float("inf")),
    "scale nan": fp8_stack(0x38, float("nan")),
    "code nan": fp8_stack(0x7F, 1.0),
    "product overflows": fp8_stack(0x7E, 3e38),
    "inf": bf16_stack(np.full(WIDTH, np.inf)),
    "nan": bf16_stack(np.full(WIDTH, np.nan)),
}
