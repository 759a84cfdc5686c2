"""MXFP4 → NVFP4: the same values bit by bit, decoded here in float64 without our code; and what cannot be cast."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoquant.quant.cast import InexactError, cast, exponents, nonzero_blocks
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
    parts = cast(stacks, NVFP4)
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
        cast(stacks | {"up": stack(np.random.default_rng(1), SHAPES["up"], 138, 138)}, NVFP4)
    assert (caught.value.projection, caught.value.expert, caught.value.blocks) == ("gate", 0, 16)


def test_blocks_too_far_below_are_counted() -> None:
    stacks = some(110, 120)
    assert stacks["down"].scales is not None
    stacks["down"].scales[1, :3] = 102
    stacks["down"].scales[1, 5] = 120
    with pytest.raises(InexactError) as caught:
        cast(stacks, NVFP4)
    assert (caught.value.projection, caught.value.expert, caught.value.blocks) == ("down", 1, 3)


@settings(max_examples=40, deadline=None)
@given(top=st.integers(0, 250), zeros=st.sampled_from([0, 0.3, 1]), seed=st.integers(0, 2**16))
def test_scales_are_those_of_plain_loops_byte_by_byte(top: int, zeros: float, seed: int) -> None:
    """Blocks of zeros too, which lie anywhere and get the nearer end of the range."""
    stacks, rng = some(max(0, top - 17), top, seed), np.random.default_rng(seed)
    for held in stacks.values():
        assert held.scales is not None
        dead = rng.random(held.scales.shape) < zeros
        held.values.reshape(*held.values.shape[:2], -1, 16)[dead] = rng.choice([0x00, 0x80, 0x88], (dead.sum(), 16))
        held.scales[dead] = rng.integers(0, 255, dead.sum())
    parts = cast(stacks, NVFP4)
    largest = {p: [[k for k, live in blocks(held, e) if live] for e in range(2)] for p, held in stacks.items()}
    for projection, held in stacks.items():
        shared = ("gate", "up") if projection != "down" else ("down",)
        for expert in range(2):
            top = max((k for p in shared for k in largest[p][expert]), default=135)
            exponents = [min(max(k - max(top, 9) + 8, -9), 8) for k, _ in blocks(held, expert)]
            wanted = torch.tensor([2.0**e for e in exponents]).to(torch.float8_e4m3fn).view(torch.uint8)
            found = torch.from_numpy(parts[projection]["scale"][expert]).reshape(-1, 2)
            assert torch.equal(found, wanted[:, None].expand(-1, 2))
            assert parts[projection]["global_scale"][expert, 0] == 2.0 ** (135 - max(top, 9))


def blocks(held: Stack, expert: int) -> list[tuple[int, bool]]:
    """Exponent of each block of an expert, and whether any of its values is not zero."""
    assert held.scales is not None
    codes = held.values[expert].reshape(-1, 16) & 0x77
    return list(zip(held.scales[expert].reshape(-1).tolist(), codes.any(1).tolist(), strict=True))


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
    assert cast(stacks, NVFP4)["down"]["global_scale"][0, 0] == 1


@pytest.mark.parametrize("block_bytes", [8, 16])
def test_blocks_of_zeros_are_found_wherever_they_lie(block_bytes: int) -> None:
    """More of them than are looked at together, a value in the first byte, in the last, or nowhere."""
    codes = np.full((2, 9000, 2 * block_bytes), 0x80, np.uint8)
    wanted = np.zeros((2, 9000, 2), bool)
    for place in ((0, 0, 0), (1, 7383, 1), (1, 7384, 0), (1, 8999, 1)):
        codes.reshape(2, 9000, 2, block_bytes)[place][place[2] - 1] = 0x81
        wanted[place] = True
    np.testing.assert_array_equal(nonzero_blocks(codes, block_bytes), wanted)


def test_an_exponent_that_is_nan_is_refused() -> None:
    stacks = some(110, 120)
    assert stacks["up"].scales is not None
    stacks["up"].scales[1, 2, 0] = 255
    with pytest.raises(NonFiniteError) as caught:
        cast(stacks, NVFP4)
    assert (caught.value.projection, caught.value.expert) == ("up", 1)


def test_the_audit_sees_every_other_value() -> None:
    stacks = some(110, 120)
    engine, parts = CpuEngine(1), cast(stacks, NVFP4)["gate"]
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


# --- and back ---------------------------------------------------------------------------------------------------------


def test_mxfp4_as_mxfp4_is_what_it_was() -> None:
    stacks = some(0, 254)
    for projection, parts in cast(stacks, Format("mxfp4", 32)).items():
        assert parts["codes"] is stacks[projection].values and parts["scale"] is stacks[projection].scales
    scales = stacks["up"].scales
    assert scales is not None
    scales[0, 0, 0] = 255
    with pytest.raises(NonFiniteError):
        cast(stacks, Format("mxfp4", 32))


@settings(max_examples=60, deadline=None)
@given(low=st.integers(0, 237), span=st.integers(0, 17), seed=st.integers(0, 2**16))
def test_exponents_come_back(low: int, span: int, seed: int) -> None:
    stacks = some(low, low + span, seed)
    for projection, parts in cast(stacks, NVFP4).items():
        divisor = parts["global_scale"].astype(np.float64)
        ratio = np.concatenate([np.ones_like(divisor), divisor], axis=1)
        found, lost = exponents(parts["codes"], parts["scale"], ratio)
        stored = stacks[projection].scales
        assert stored is not None
        live = ((stacks[projection].values & 0x77).reshape(*found.shape, 16) > 0).any(-1)
        assert not lost.any()
        np.testing.assert_array_equal(found[live], stored[live])
        assert (found[~live] == 127).all()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**16), divisor=st.sampled_from([1.0, 1.5, 0.875, 3.0, 2.0**120, 448 * 6 / 0.37, 0.0]))
def test_what_is_no_power_of_two_is_counted(seed: int, divisor: float) -> None:
    """Against exact fractions: a block goes back where both its halves have one power of two, or are zero."""
    rng = np.random.default_rng(seed)
    scale = rng.choice(np.array([0x38, 0x38, 0x3C, 0x40, 0x3E, 0x00, 0x01, 0x7E, 0x7F, 0xB8], np.uint8), (1, 4, 4))
    codes = rng.integers(0, 256, (1, 4, 32), dtype=np.uint8) * (rng.random((1, 4, 4)) < 0.8).repeat(8, -1)
    found, lost = exponents(codes, scale, np.array([[1.0, np.float32(divisor)]]))
    values = torch.from_numpy(scale).view(torch.float8_e4m3fn).double().numpy()
    wrong = 0
    for row in range(4):
        for block in range(2):
            wanted = set()
            for half in (0, 1):
                at = 2 * block + half
                if (codes[0, row, 8 * at : 8 * at + 8] & 0x77).any():
                    wanted.add(power_of(values[0, row, at], float(np.float32(divisor))))
            if None in wanted or len(wanted) > 1:
                wrong += 1
            else:
                assert int(found[0, row, block]) - 127 == (wanted.pop() if wanted else 0)
    assert lost.tolist() == [wrong]


def power_of(scale: float, divisor: float) -> int | None:
    """k where scale / divisor is 2^k that E8M0 has."""
    if not divisor or not np.isfinite(scale) or scale <= 0:
        return None
    ratio = Fraction(scale) / Fraction(divisor)
    return next((k for k in range(-127, 128) if ratio == Fraction(2) ** k), None)
