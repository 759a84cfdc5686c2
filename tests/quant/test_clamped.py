"""Groups that have no scale are all found, and no others: against a count from the values alone, group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimoquant.quant.clamped import Clamped, clamped
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine, decode, stored_parts
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import Stack
from mimoquant.run.chunk_facts import clamped_on_device

FORMATS = [
    Format("int4", 32),
    Format("int4", 128, symmetric=False),
    Format("mxfp4", 32),
    Format("nvfp4", 16),
    Format("nvfp4", 16, pow2_global=True),
]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.label}{'-pow2' * fmt.pow2_global}")
WIDTH, ROWS = 256, 64


def of_bf16(values: np.ndarray) -> Stack:
    weights = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    return Stack(weights.view(torch.uint16).numpy(), None)


def values_of(stack: Stack) -> np.ndarray:
    return TorchEngine("cpu").bf16(stack).to(torch.float64).numpy()


def counted(stack: Stack, fmt: Format, search: str) -> tuple[dict[int, Clamped], dict[str, np.ndarray]]:
    parts = CpuEngine(1).encode({"gate": stack, "up": stack, "down": stack}, fmt, search)["down"]
    held = stored_parts(parts, fmt, torch.device("cpu"))
    found = clamped(stack, parts, fmt)
    assert found == clamped(stack, parts, fmt, nearest=False), "what is looked at besides changes nothing"
    assert found == clamped_on_device(TorchEngine("cpu").bf16(stack), held, fmt), (
        "what a calibrated run counts is the same"
    )
    return found, parts


def by_group(values: np.ndarray, fmt: Format) -> np.ndarray:
    return values.reshape(*values.shape[:2], -1, fmt.group_size)


def zeroed(stack: Stack, parts: dict[str, np.ndarray], fmt: Format) -> np.ndarray:
    """[E] groups that are zero and were not."""
    after = by_group(decode(stored_parts(parts, fmt, torch.device("cpu")), fmt).numpy(), fmt)
    before = by_group(values_of(stack), fmt)
    return np.asarray(((after == 0).all(-1) & (before != 0).any(-1)).sum((1, 2)))


def group_sizes_apart(lowest: float, highest: float, seed: int = 1) -> Stack:
    """Groups whose sizes are powers of ten from `lowest` to `highest`, some of zeros."""
    random = np.random.default_rng(seed)
    size = 10 ** random.uniform(lowest, highest, (2, ROWS, WIDTH // 16, 1))
    size *= random.uniform(size=size.shape) > 0.1
    return of_bf16((random.uniform(-1, 1, (2, ROWS, WIDTH // 16, 16)) * size).reshape(2, ROWS, WIDTH))


@formats
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize(("lowest", "highest"), [(-2, -1), (-9, -1), (-40, -36), (-40, 38)])
def test_every_group_that_vanished_is_counted(fmt: Format, search: str, lowest: float, highest: float) -> None:
    stack = group_sizes_apart(lowest, highest)
    found, parts = counted(stack, fmt, search)
    wanted = zeroed(stack, parts, fmt)
    assert {expert: one.zeroed for expert, one in found.items() if one.zeroed} == {
        expert: int(count) for expert, count in enumerate(wanted) if count
    }
    if (lowest, highest) == (-2, -1):
        assert not found
    assert all(one.groups == ROWS * WIDTH // fmt.group_size and one.share <= 1 for one in found.values())


@formats
def test_ordinary_weights_have_none_though_some_scales_are_those_of_zeros(fmt: Format) -> None:
    stack = of_bf16(np.random.default_rng(3).normal(0, 0.02, (2, 128, 1024)))
    found, parts = counted(stack, fmt, "absmax")
    assert not found
    if fmt.name == "int4" and fmt.group_size == 32:
        assert (parts["scale"] == 0x3C00).any()


def one_group(rest: float, group: np.ndarray | float, width: int) -> Stack:
    values = np.full((1, 8, WIDTH), rest)
    values[0, 3, :width] = group
    return of_bf16(values)


# Smallest sizes by hand. NVFP4: with 448 * 6 over the largest, a group that wants less than 2^-10 becomes zero and one
# that wants less than 2^-9 / 2 is none that plain rounding gives the least. MXFP4: 2^-127 wants amax of 3.5 * 2^-127;
# half of its least code, .25 * 2^-127, is zero. int4: amax / 7.5 rounds to 0 below 2^-134.
@pytest.mark.parametrize(
    ("fmt", "rest", "group", "wanted"),
    [
        (Format("nvfp4", 16), 1.0, 1.2 * 2.0**-19, (0, 0)),
        (Format("nvfp4", 16), 1.0, 1.1 * 2.0**-19, (1, 0)),
        (Format("mxfp4", 32), 1.0, 3.5 * 2.0**-127, (0, 0)),
        (Format("mxfp4", 32), 1.0, 3.0 * 2.0**-127, (0, 1)),
        (Format("mxfp4", 32), 1.0, 2.0**-129, (1, 0)),
        (Format("int4", 32), 1.0, 2.0**-130, (0, 0)),
        (Format("int4", 32), 1.0, 2.0**-133, (1, 0)),
        (Format("int4", 32, symmetric=False), 1.0, 2.0**-128, (0, 0)),
        (Format("int4", 32, symmetric=False), 1.0, 2.0**-133, (1, 0)),
        (Format("nvfp4", 16), 1.0, 0.0, (0, 0)),
        (Format("nvfp4", 16), 1.0, -0.0, (0, 0)),
        (Format("int4", 32), 1.0, 0.0, (0, 0)),
        (Format("mxfp4", 32), 1.0, 0.0, (0, 0)),
    ],
)
def test_where_the_ends_are(fmt: Format, rest: float, group: float, wanted: tuple[int, int]) -> None:
    found, _ = counted(one_group(rest, group, fmt.group_size), fmt, "absmax")
    assert tuple(found.get(0, Clamped(0, 0, 0, 1)))[:2] == wanted


@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_a_whole_matrix_too_small_for_a_global_scale(search: str) -> None:
    stack = of_bf16(np.full((1, 8, WIDTH), 1e-36))
    found, _ = counted(stack, Format("nvfp4", 16), search)
    assert found[0].zeroed == found[0].groups == 8 * WIDTH // 16
    assert not counted(stack, Format("mxfp4", 32), search)[0] and not counted(stack, Format("int4", 128), search)[0]


@formats
def test_what_reads_as_inf(fmt: Format) -> None:
    """The largest bf16 value is rounded up to 2^128, or down; as bf16 reads the codes, not as we think they should."""
    largest = float(torch.finfo(torch.bfloat16).max)
    stack = one_group(largest, -largest, WIDTH)
    found, parts = counted(stack, fmt, "absmax")
    read = decode(stored_parts(parts, fmt, torch.device("cpu")), fmt).to(torch.bfloat16)
    wanted = int(torch.isinf(read).reshape(8, -1, fmt.group_size).any(-1).sum())
    assert found.get(0, Clamped(0, 0, 0, 1)).infinite == wanted
    assert fmt.name != "mxfp4" or wanted


def test_a_scale_above_the_largest_is_clamped() -> None:
    """As where a method chooses scales for other weights than these, or others wrote the global scale."""
    stack = one_group(0.5, 1.0, 16)
    found, parts = counted(stack, Format("nvfp4", 16), "absmax")
    assert not found
    parts["scale"][0, 3, 1] = 0x7E
    assert not clamped(stack, parts, Format("nvfp4", 16))
    larger = Stack(of_bf16(values_of(stack) * 1.25).values, None)
    assert clamped(larger, parts, Format("nvfp4", 16))[0] == Clamped(0, 1, 0, 8 * WIDTH // 16)


def test_fp8_is_judged_with_its_scales() -> None:
    """Of four blocks of 128 x 128 one is far smaller than the others; codes of zero in it are no fault."""
    random = np.random.default_rng(5)
    values = random.integers(0x28, 0x40, (1, 256, 256)).astype(np.uint8)
    values[0, 128:, :64] = 0
    scales = np.array([[[1.0, 1.0], [1e-9, 1.0]]], np.float32)
    found, parts = counted(Stack(values, scales), Format("nvfp4", 16), "absmax")
    assert found == {0: Clamped(128 * 4, 0, 0, 256 * 16)}
    assert zeroed(Stack(values, scales), parts, Format("nvfp4", 16)).tolist() == [128 * 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@formats
def test_a_gpu_counts_the_same(fmt: Format) -> None:
    """Only what is asked for leaves it: codes and weights of the groups whose scale is suspicious."""
    stack = group_sizes_apart(-44, -20)
    found, parts = counted(stack, fmt, "absmax")
    held = stored_parts(parts, fmt, torch.device("cuda"))
    assert found == clamped_on_device(TorchEngine("cuda").bf16(stack), held, fmt)
