"""Weights at the edges, one row each: what every format makes of them is defined (`quant/formats.py`) and the same on
every engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edge_weights import (
    EDGES,
    FORMATS,
    NOT_FINITE,
    ROWS,
    SEARCHES,
    bf16_stack,
    encoded,
    fp8_stack,
    outcome,
    same,
)

from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine, decode
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import NonFiniteError, Stack

cases = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.label}{' pow2' * fmt.pow2_global}")
searches = pytest.mark.parametrize("search", SEARCHES)


def values_of(parts: dict[str, np.ndarray], fmt: Format) -> np.ndarray:
    """The values as readers compute them."""
    kinds = {"int4": torch.bfloat16, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    tensors["scale"] = tensors["scale"].view(kinds[fmt.name])
    return decode(tensors, fmt).numpy()[0]


@cases
@searches
@pytest.mark.parametrize("name", ROWS)
def test_rows_at_the_edges(name: str, search: str, fmt: Format) -> None:
    engine, stack = CpuEngine(1), bf16_stack(ROWS[name])
    parts = encoded(engine, stack, fmt, search)
    assert same(parts, encoded(TorchEngine("cpu"), stack, fmt, search))
    values, wanted = values_of(parts, fmt), torch.from_numpy(stack.values).view(torch.bfloat16).float().numpy()[0]
    assert np.isfinite(values).all()
    largest = np.abs(wanted).max()
    (audit,) = engine.audit(stack, fmt, search, parts)
    if fmt.symmetric or largest > 2.0**-120:  # below, bf16 cannot hold an asymmetric scale to its last digits
        assert audit.scales_ok and audit.outside == 0, audit
    engine.close()
    if name.removeprefix("negative ") == "zeros":
        zero = 0x88 if fmt.name == "int4" and fmt.symmetric else 0
        assert (values == 0).all() and not np.signbit(values).any() and (parts["codes"] == zero).all()
    elif largest > 1e-30:
        assert np.abs(values - wanted).max() <= largest / 5
        assert ((values == 0) >= (wanted == 0)).all(), "zeros stay zeros"
    else:
        assert np.abs(values - wanted).max() <= 2 * largest, "what underflows does not grow"


ZERO_SCALES = {"int4": np.uint16(0x3C00), "mxfp4": np.uint8(0), "nvfp4": np.uint8(0x20)}  # 2^-7, 2^-127, .125


@cases
@searches
@pytest.mark.parametrize(
    "stack",
    [fp8_stack(0x7E, 0.0), fp8_stack(0xFE, -0.0), fp8_stack(0x80, 3.0)],
    ids=["scale 0", "scale -0", "codes -0"],
)
def test_a_scale_of_zero_makes_a_row_of_zeros(stack: Stack, search: str, fmt: Format) -> None:
    """Their scale is compressed-tensors' for zeros, and the global scale 1, or its own power of two."""
    parts = encoded(CpuEngine(1), stack, fmt, search)
    assert same(parts, encoded(TorchEngine("cpu"), stack, fmt, search))
    assert (parts["scale"].view(ZERO_SCALES[fmt.name].dtype) == ZERO_SCALES[fmt.name]).all()
    assert (values_of(parts, fmt) == 0).all()
    if fmt.name == "nvfp4":
        assert np.isfinite(parts["global_scale"]).all() and (parts["global_scale"] > 0).all()


@cases
@pytest.mark.parametrize("code", [0x7E, 0xFE])
def test_saturated_fp8(code: int, fmt: Format) -> None:
    """All of a row at 448 times its scale: the largest level everywhere, within its error."""
    stack = fp8_stack(code, 3e-4)
    for search in SEARCHES:
        parts = encoded(CpuEngine(1), stack, fmt, search)
        assert same(parts, encoded(TorchEngine("cpu"), stack, fmt, search))
        values, wanted = values_of(parts, fmt), (448 if code == 0x7E else -448) * 3e-4
        assert len(np.unique(values)) == 1 and abs(values[0, 0] / wanted - 1) < 0.15


@cases
@searches
@pytest.mark.parametrize("stack", NOT_FINITE.values(), ids=NOT_FINITE)
def test_what_is_not_finite_is_refused(stack: Stack, search: str, fmt: Format) -> None:
    for engine in (CpuEngine(1), TorchEngine("cpu")):
        with pytest.raises(NonFiniteError):
            encoded(engine, stack, fmt, search)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@cases
@searches
def test_a_gpu_makes_the_same_of_all_of_them(search: str, fmt: Format) -> None:
    cpu, gpu = CpuEngine(1), TorchEngine("cuda")
    for stack in EDGES.values():
        assert same(encoded(cpu, stack, fmt, search), encoded(gpu, stack, fmt, search))
    for stack in NOT_FINITE.values():
        assert outcome(gpu, stack, fmt, search) is None
