"""MXFP4 → NVFP4: the same values bit by bit, decoded here in float64 without our code; and what cannot be cast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoquant.quant.cast import InexactError, cast
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import NonFiniteError, Stack

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NVFP4 = Format("nvfp4", 16)
SHAPES = {"gate": (2, 8, 64), "up": (2, 8, 64), "down": (2, 16, 32)}


def stack(rng: np.random.Generator, shape: tuple[int, int, int], low: int, high: int) -> Stack:
    """Random codes, exponents in low..high (biased, both ends)."""
    experts, rows, width = shape
    codes = rng.integers(0, 256, (experts, rows, width // 2), dtype=np.uint8)
    return Stack(codes, rng.integers(low, high + 1, (experts, rows, width // 32), dtype=np.uint8))


def some(low: int, high: int, seed: int = 0) -> dict[str, Stack]:
    rng = np.random.default_rng(seed)
    return {projection: stack(rng, shape, low, high) for projection, shape in SHAPES.items()}


def values(codes: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    nibbles = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
    return E2M1[nibbles] * np.repeat(scale, group, axis=-1)


def source_values(held: Stack) -> np.ndarray:
    assert held.scales is not None
    return values(held.values, np.ldexp(1.0, held.scales.astype(np.int64) - 127), 32)


def cast_values(parts: dict[str, np.ndarray]) -> np.ndarray:
    scale = torch.from_numpy(parts["scale"]).view(torch.float8_e4m3fn).double().numpy()
    return values(parts["codes"], scale / parts["global_scale"].astype(np.float64)[..., None], 16)


def assert_equal(stacks: dict[str, Stack]) -> None:
    parts = cast(stacks)
    for projection, held in stacks.items():
        np.testing.assert_array_equal(cast_values(parts[projection]).view(np.int64), source_values(held).view(np.int64))
        assert (np.frexp(parts[projection]["global_scale"])[0] == 0.5).all(), "a power of two"
    assert parts["gate"]["global_scale"].tobytes() == parts["up"]["global_scale"].tobytes()


@settings(max_examples=60, deadline=None)
@given(low=st.integers(0, 237), span=st.integers(0, 17), seed=st.integers(0, 2**16))
def test_values_are_equal_bit_by_bit(low: int, span: int, seed: int) -> None:
    """Over all of E8M0 but NaN, the signs of zeros too."""
    assert_equal(some(low, low + span, seed))


def test_gate_and_up_count_together() -> None:
    stacks = some(120, 120) | {"up": stack(np.random.default_rng(1), SHAPES["up"], 137, 137)}
    assert_equal(stacks)
    with pytest.raises(InexactError) as caught:
        cast(stacks | {"up": stack(np.random.default_rng(1), SHAPES["up"], 138, 138)})
    assert (caught.value.projection, caught.value.expert, caught.value.blocks) == ("gate", 0, 16)


def test_blocks_too_far_below_are_counted() -> None:
    stacks = some(110, 120)
    assert stacks["down"].scales is not None
    stacks["down"].scales[1, :3] = 102
    stacks["down"].scales[1, 5] = 120
    with pytest.raises(InexactError) as caught:
        cast(stacks)
    assert (caught.value.projection, caught.value.expert, caught.value.blocks) == ("down", 1, 3)


@pytest.mark.parametrize("exponent", [0, 102, 200, 254])
def test_a_block_of_zeros_does_not_count(exponent: int) -> None:
    stacks = some(110, 120)
    down = stacks["down"]
    assert down.scales is not None
    down.scales[1, 3], down.values[1, 3] = exponent, np.arange(16) % 2 * 0x88  # zeros of either sign
    assert_equal(stacks)


def test_an_expert_of_zeros_is_not_scaled() -> None:
    stacks = some(110, 120)
    stacks["down"].values[0] = 0x80
    assert_equal(stacks)
    assert cast(stacks)["down"]["global_scale"][0, 0] == 1


def test_an_exponent_that_is_nan_is_refused() -> None:
    stacks = some(110, 120)
    assert stacks["up"].scales is not None
    stacks["up"].scales[1, 2, 0] = 255
    with pytest.raises(NonFiniteError) as caught:
        cast(stacks)
    assert (caught.value.projection, caught.value.expert) == ("up", 1)


def test_the_audit_sees_every_other_value() -> None:
    stacks = some(110, 120)
    engine, parts = CpuEngine(1), cast(stacks)["gate"]
    assert [audit.outside for audit in engine.audit_cast(stacks["gate"], NVFP4, parts)] == [0, 0]
    for part, damage, wrong in (("codes", 0x08, 1), ("scale", 0x01, 1), ("global_scale", 1, 32)):
        broken = parts | {part: parts[part].copy()}
        if part == "global_scale":
            broken[part][1] *= 2
        else:
            broken[part][1, 0, 0] ^= damage
        assert [audit.outside for audit in engine.audit_cast(stacks["gate"], NVFP4, broken)] == [0, wrong]
    broken = parts | {"scale": np.full_like(parts["scale"], 0x7F)}
    assert not any(audit.scales_ok for audit in engine.audit_cast(stacks["gate"], NVFP4, broken))
    engine.close()
