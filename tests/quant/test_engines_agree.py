"""The compiled CPU engine and the plain torch engine give the same bytes, and those bytes are right.

Inputs are made from a seed and a list of oddities, each of which spoils some rows, groups or elements. "Right" is
checked in float64 without either engine's arithmetic: every decoded value is the nearest of the 16 that its scale
offers, which is half a grid step inside the range and the grid's end outside.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimoquant.quant import engine_torch
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine, decode, dequantize_fp8
from mimoquant.quant.formats import NVFP4_RANGE, Format
from mimoquant.quant.stack import NonFiniteError, Stack

FORMATS = [Format("int4", size, symmetric) for size in (32, 64, 128) for symmetric in (True, False)] + [
    Format("mxfp4", 32),
    Format("nvfp4", 16),
    Format("nvfp4", 16, pow2_global=True),
]
CASES = [pytest.param(fmt, search, id=f"{fmt.label} {search}") for fmt in FORMATS for search in ("absmax", "mse")]
PROJECTIONS = ("gate", "up", "down")
ODDITIES = (
    "zero rows",
    "zero groups",
    "one-hot",
    "huge",
    "subnormal",
    "tiny",
    "equal",
    "negative zeros",
    "outliers",
    "ties",
    "positive",
    "saturated",
)
Parts = dict[str, dict[str, np.ndarray]]


CPUS = [CpuEngine(1), CpuEngine(3)]  # threads
TORCH = TorchEngine("cpu")


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()


def bf16_stack(rng: np.random.Generator, shape: tuple[int, int, int], oddities: list[str]) -> Stack:
    values = rng.normal(0, 0.02, shape).astype(np.float32)
    experts, rows, columns = shape
    for oddity in oddities:
        row = rng.integers(0, rows, max(1, rows // 6))
        where = (rng.integers(0, experts), row)
        if oddity == "zero rows":
            values[where] = 0
        elif oddity == "zero groups":
            start = int(rng.integers(0, columns // 16)) * 16
            values[rng.integers(0, experts), :, start : start + 32] = 0
        elif oddity == "one-hot":
            values[where] = 0
            values[(*where, rng.integers(0, columns, len(row)))] = rng.choice([-1.0, 1.0, 1e-3])
        elif oddity == "huge":
            values[where] = np.where(rng.random((len(row), columns)) < 0.1, rng.choice([-1e30, 1e30]), values[where])
        elif oddity == "subnormal":
            values[where] = (rng.integers(-127, 128, (len(row), columns)) * 2.0**-133).astype(np.float32)
        elif oddity == "tiny":
            values[where] *= np.float32(1e-20)
        elif oddity == "equal":
            values[where] = rng.choice([0.01, -0.01, 1.0, -7.5, 6.0])
        elif oddity == "negative zeros":
            values[rng.random(shape) < 0.05] = -0.0
        elif oddity == "outliers":
            values[rng.random(shape) < 0.002] *= 100
        elif oddity == "ties":
            values[where] = rng.integers(-24, 25, (len(row), columns)) / 4
        elif oddity == "positive":
            values[where] = np.abs(values[where])
        else:
            values[where] = rng.choice([-3.0, 3.0], (len(row), columns))
    return Stack(bf16_bits(values), None)


def fp8_stack(rng: np.random.Generator, shape: tuple[int, int, int], oddities: list[str]) -> Stack:
    experts, rows, columns = shape
    codes = (
        torch.from_numpy(rng.normal(0, 100, shape)).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    )
    scales = rng.uniform(1e-5, 3e-4, (experts, math.ceil(rows / 128), math.ceil(columns / 128))).astype(np.float32)
    for oddity in oddities:
        where = (rng.integers(0, experts), rng.integers(0, rows, max(1, rows // 6)))
        if oddity in ("zero rows", "zero groups"):
            codes[where] = 0
        elif oddity == "negative zeros":
            codes[rng.random(shape) < 0.05] = 0x80
        elif oddity == "saturated":
            codes[where] = rng.choice([0x7E, 0xFE], (len(where[1]), columns))
        elif oddity == "subnormal":
            codes[where] = rng.integers(0, 8, (len(where[1]), columns)) | rng.choice([0, 0x80])
        elif oddity in ("huge", "tiny"):
            scales[rng.integers(0, experts), rng.integers(0, scales.shape[1])] = 1e27 if oddity == "huge" else 1e-38
        elif oddity == "one-hot":
            codes[where] = 0
            codes[(*where, rng.integers(0, columns))] = 0x7E
        else:
            codes[where] = rng.integers(0, 0x7F)
    return Stack(codes, scales)


@st.composite
def expert_stacks(draw: st.DrawFn, group_size: int) -> dict[str, Stack]:
    """The three projections of some experts; sizes that are whole groups and little else."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = draw(st.integers(1, 3))
    step = math.lcm(group_size, 8)
    inner, hidden = (step * draw(st.integers(1, max(1, 200 // step))) for _ in range(2))
    oddities = draw(st.lists(st.sampled_from(ODDITIES), max_size=4))
    make = draw(st.sampled_from([bf16_stack, fp8_stack]))
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {p: make(rng, (experts, *shape), oddities) for p, shape in shapes.items()}


def assert_equal_bytes(ours: Parts, theirs: Parts) -> None:
    assert ours.keys() == theirs.keys() == set(PROJECTIONS)
    for projection, parts in ours.items():
        expected = set(theirs[projection]) | ({"zero_point"} & set(parts))  # the CPU kernel may keep an unused one
        assert set(parts) == expected
        for name, part in theirs[projection].items():
            assert parts[name].shape == part.shape, (projection, name)
            assert parts[name].tobytes() == part.tobytes(), (projection, name)


def bf16_values(stack: Stack) -> np.ndarray:
    """The stack's weights in float64."""
    values = torch.from_numpy(stack.values)
    if stack.scales is None:
        return values.view(torch.bfloat16).double().numpy()
    return dequantize_fp8(values.view(torch.float8_e4m3fn), torch.from_numpy(stack.scales)).double().numpy()


def tensors_of(parts: dict[str, np.ndarray], fmt: Format) -> dict[str, torch.Tensor]:
    dtype = {"int4": torch.bfloat16, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}[fmt.name]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    return tensors | {"scale": tensors["scale"].view(dtype)}


def grids(parts: dict[str, torch.Tensor], fmt: Format) -> np.ndarray:
    """The 16 values that each group may take, float64 [E, O, G, 16]."""
    scale = parts["scale"].double().numpy()
    if fmt.name == "int4":
        levels = np.arange(-8.0, 8.0)
        if not fmt.symmetric:
            levels = levels - engine_torch.unpack_zero_points(parts["zero_point"]).double().numpy()[..., None]
        return levels * scale[..., None]
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    if fmt.name == "mxfp4":
        scale = 2.0 ** (scale - 127)
    else:
        scale = (scale / parts["global_scale"].double().numpy()[..., None]).astype(np.float32).astype(np.float64)
    return np.concatenate([-e2m1, e2m1]) * scale[..., None]


def assert_nearest(stack: Stack, parts: dict[str, np.ndarray], fmt: Format) -> None:
    """Every decoded value is the grid point nearest to its weight, up to the float32 division's own rounding."""
    weights, tensors = bf16_values(stack), tensors_of(parts, fmt)
    decoded = decode(tensors, fmt).double().numpy()
    grouped = weights.reshape(*weights.shape[:2], -1, fmt.group_size)
    distance = np.abs(grouped[..., None] - grids(tensors, fmt)[..., None, :]).min(-1).reshape(weights.shape)
    slack = 1e-6 * np.abs(weights) + 1e-44
    assert (np.abs(decoded - weights) <= distance + slack).all()


def assert_distances(stack: Stack, parts: dict[str, np.ndarray], fmt: Format) -> None:
    """How far codes are that need not be the nearest, as `verify` sums it: here those of the next expert."""
    parts = {name: np.roll(part, 1, axis=0) for name, part in parts.items()}
    weights, decoded = bf16_values(stack), decode(tensors_of(parts, fmt), fmt).double().numpy()
    expected = ((decoded - weights) ** 2).sum((1, 2)), (weights**2).sum((1, 2))
    for cpu in CPUS:
        found = cpu.distances(stack, fmt, parts, signed=False)
        for name, sums in zip(("error2", "weight2"), expected, strict=True):
            np.testing.assert_allclose([getattr(one, name) for one in found], sums, rtol=1e-6, atol=1e-70)


@pytest.mark.parametrize(("fmt", "search"), CASES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_same_bytes_and_nearest_values(fmt: Format, search: str, data: st.DataObject) -> None:
    stacks = data.draw(expert_stacks(fmt.group_size))
    theirs = TORCH.encode(stacks, fmt, search)
    for cpu in CPUS:
        assert_equal_bytes(cpu.encode(stacks, fmt, search), theirs)
    for projection, stack in stacks.items():
        assert_nearest(stack, theirs[projection], fmt)
        assert_distances(stack, theirs[projection], fmt)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_every_oddity_at_once_over_several_slabs(fmt: Format) -> None:
    """More rows than a thread takes in one go, and the last FP8 block of rows and columns is partial."""
    rng = np.random.default_rng(7)
    for make in (bf16_stack, fp8_stack):
        stacks = {p: make(rng, (1, 552, 128 + fmt.group_size), list(ODDITIES)) for p in PROJECTIONS}
        for search in ("absmax", "mse"):
            theirs = TORCH.encode(stacks, fmt, search)
            for cpu in CPUS:
                assert_equal_bytes(cpu.encode(stacks, fmt, search), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_search_never_makes_a_group_worse(fmt: Format, data: st.DataObject) -> None:
    """Squared error of each group, in float64; the slack is what float32 sums and underflowing squares lose.

    For nvfp4 the two searches have different global scales by design, so groups are compared under one of them.
    """
    stacks = data.draw(expert_stacks(fmt.group_size))
    for stack in stacks.values():
        weights = bf16_values(stack)
        weight = torch.from_numpy(weights).to(torch.bfloat16)
        shared = engine_torch.nvfp4_global_scale(engine_torch.amax(weight), "mse", fmt)
        errors = {}
        for search in ("absmax", "mse"):
            decoded = decode(engine_torch.encode(weight, fmt, search, shared), fmt).double().numpy()
            squared = (decoded - weights) ** 2
            errors[search] = squared.reshape(*weights.shape[:2], -1, fmt.group_size).sum(-1)
        assert (errors["mse"] <= errors["absmax"] * (1 + 1e-5) + fmt.group_size * 1e-44).all()


def test_the_search_helps() -> None:
    """On normal weights it must gain something in every format, or it is not searching."""
    weight = torch.from_numpy(np.random.default_rng(0).normal(0, 0.02, (1, 64, 512))).to(torch.bfloat16)
    for fmt in FORMATS:
        error = {}
        for search in ("absmax", "mse"):
            scale = engine_torch.nvfp4_global_scale(engine_torch.amax(weight), search, fmt)
            decoded = decode(engine_torch.encode(weight, fmt, search, scale), fmt)
            error[search] = float((decoded - weight.float()).square().mean())
        assert error["mse"] < 0.99 * error["absmax"], fmt.label


@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_gate_and_up_share_the_global_scale(search: str) -> None:
    rng = np.random.default_rng(3)
    stacks = {p: bf16_stack(rng, (3, 16, 64), []) for p in PROJECTIONS}
    stacks["up"].values[1] = bf16_bits(rng.normal(0, 2, (16, 64)))
    stacks["down"].values[2] = 0
    largest = {p: np.abs(bf16_values(stack)).max(axis=(1, 2)) for p, stack in stacks.items()}
    shared = np.maximum(largest["gate"], largest["up"])
    for engine in (TORCH, *CPUS):
        parts = engine.encode(stacks, Format("nvfp4", 16), search)
        scales = {p: parts[p]["global_scale"] for p in PROJECTIONS}
        assert all(scale.shape == (3, 1) and scale.dtype == np.float32 for scale in scales.values())
        assert scales["gate"].tobytes() == scales["up"].tobytes()
        np.testing.assert_allclose(scales["gate"][:, 0], NVFP4_RANGE[search] * 6 / shared, rtol=1e-7)
        np.testing.assert_allclose(scales["down"][:2, 0], NVFP4_RANGE[search] * 6 / largest["down"][:2], rtol=1e-7)
        assert scales["down"][2, 0] == 1, "an expert of zeros needs no scaling"
        rounded = engine.encode(stacks, Format("nvfp4", 16, pow2_global=True), search)
        for projection, exact in scales.items():
            powers = np.exp2(np.floor(np.log2(exact.astype(np.float64))))
            np.testing.assert_array_equal(rounded[projection]["global_scale"], powers)


# NaNs come with any payload: a block of 0xFF bytes is what a failed disk or download leaves behind
NAN_SCALES = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFF8000, 0x7FFFFFFF, 0xFFFFFFFF]
BAD_SCALES = [pytest.param(bits, id=f"scale {bits:#010x}") for bits in (*NAN_SCALES, 0x7F800000, 0xFF800000)]


def spoiled(projection: str, expert: int, spoil: str | int) -> dict[str, Stack]:
    """Three experts, of which one has one bad value in one projection."""
    rng = np.random.default_rng(11)
    make = bf16_stack if isinstance(spoil, str) and spoil.startswith("bf16") else fp8_stack
    stacks = {p: make(rng, (3, 136, 160) if p != "down" else (3, 160, 160), []) for p in PROJECTIONS}
    values, scales = stacks[projection]
    if isinstance(spoil, int):
        assert scales is not None
        values[expert] = np.maximum(values[expert] & 0x7F, 1)  # not zero, so that an infinite scale gives infinity
        scales[expert, 1, 1] = np.array(spoil, np.uint32).view(np.float32)
    elif spoil == "product overflows":
        assert scales is not None
        values[expert, 130, 5], scales[expert, 1, 0] = 0x7E, 1e38
    else:
        values[expert, 133, 150] = int(spoil.split()[1], 16)
    return stacks


@pytest.mark.parametrize(
    "spoil",
    [
        "fp8 7f",
        "fp8 ff",
        "bf16 7fc0",
        "bf16 ffff",
        "bf16 7f81",
        "bf16 7f80",
        "bf16 ff80",
        "product overflows",
        *BAD_SCALES,
    ],
)
@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[1], FORMATS[-2], FORMATS[-1]], ids=lambda fmt: fmt.label)
def test_values_that_are_not_finite_are_named(fmt: Format, spoil: str | int) -> None:
    for projection, expert in (("gate", 0), ("up", 2), ("down", 1)):
        stacks = spoiled(projection, expert, spoil)
        for engine in (TORCH, *CPUS):
            with pytest.raises(NonFiniteError) as caught:
                engine.encode(stacks, fmt, "absmax")
            assert (caught.value.projection, caught.value.expert) == (projection, expert), engine.name


def test_the_first_bad_expert_is_the_one_that_is_named() -> None:
    stacks = spoiled("down", 2, "bf16 7fc0")
    stacks["down"].values[1, 0, 0] = 0x7F80
    stacks["up"].values[2, 5, 5] = 0xFF80
    for engine in (TORCH, *CPUS):
        with pytest.raises(NonFiniteError) as caught:
            engine.encode(stacks, Format("nvfp4", 16), "mse")
        assert (caught.value.projection, caught.value.expert) == ("up", 2)


def test_a_shape_that_the_format_cannot_hold_is_refused() -> None:
    for fmt, shape in ((Format("int4", 128), (8, 96)), (Format("mxfp4", 32), (12, 64)), (Format("nvfp4", 16), (8, 24))):
        assert fmt.misfit(*shape)
        with pytest.raises(ValueError, match=str(fmt.misfit(*shape))):
            engine_torch.encode(torch.zeros(1, *shape, dtype=torch.bfloat16), fmt, "absmax", torch.ones(1))
    for name, size in (("int4", 48), ("mxfp4", 16), ("nvfp4", 32), ("int8", 128)):
        with pytest.raises(ValueError, match=f"{name} has no group size {size}"):
            Format(name, size)
