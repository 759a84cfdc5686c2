"""The engine for CPUs: runs `cpu_kernels` over stacks of experts, rows spread over threads.

Key idea: a task is a slab of rows of one expert, so that two cores or two hundred stay busy whatever the sizes are;
kernels release the interpreter lock. Torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.quant.cast import nonzero_blocks
from mimoquant.quant.formats import E2M1_VALUES, NVFP4_RANGE, Format, multipliers
from mimoquant.quant.kernels import encode_cpu as kernels
from mimoquant.quant.kernels.fp8_cpu import FP8_UNIT, dequantize_rows
from mimoquant.quant.kernels.pool import executor
from mimoquant.quant.stack import Audit, NonFiniteError, Stack

Array = npt.NDArray[Any]
# How far beyond the end of the grid, in scales, a value can lie when the scale is one that the search may choose: the
# range over the smallest scale, less the grid's end. int4: range 7.5 (15 asymmetric, where the zero point's rounding
# adds a half), smallest multiplier .45; mxfp4: mantissa below 1.75, or an exponent one lower; nvfp4: multiplier .6, and
# an E4M3 subnormal may be a third below what was wanted.
_OVERSHOOT = {
    ("int4", "absmax"): 0.54,
    ("int4", "mse"): 9.8,
    ("mxfp4", "absmax"): 1.001,
    ("mxfp4", "mse"): 10.001,
    ("nvfp4", "absmax"): 3.001,
    ("nvfp4", "mse"): 9.001,
}
_ASYMMETRIC_OVERSHOOT = {"absmax": 0.6, "mse": 19.0}


class CpuEngine:
    """Runs the kernels over stacks of experts, rows spread over threads.

    Arrays: values are uint8 (FP8 bits) or uint16 (bf16 bits) [E, O, I]; block scales float32 [E, R, C] or None.
    """

    name = "cpu"
    _SLAB = 512  # rows a task works on

    def __init__(self, threads: int | None = None, empty: Callable[..., Array] = np.empty) -> None:
        """`empty`: where memory for weights and for what they become is from."""
        self.threads = threads or len(os.sched_getaffinity(0))
        self._empty = empty
        self._pool = executor(self.threads)

    def close(self) -> None:
        self._pool.shutdown()

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """See `stack.Engine`."""
        return self._empty(shape, dtype)

    def encode(self, stacks: dict[str, Stack], fmt: Format, search: str) -> dict[str, dict[str, Array]]:
        """Quantize the projections of some experts; gate and up share nvfp4's global scale.

        Returns projection → part → array with leading E. Raises NonFiniteError naming projection and expert.
        """
        global_scales = self._global_scales(stacks, search, fmt) if fmt.name == "nvfp4" else {}
        tried = multipliers(fmt.name, search)
        begun = {p: self._begin(stack, fmt, tried, global_scales.get(p), None) for p, stack in stacks.items()}
        return {projection: _finish(projection, fmt, *work) for projection, work in begun.items()}

    def encode_weighted(
        self, stack: Stack, fmt: Format, tried: Sequence[float], global_scale_E: Array | None, weigh_EI: Array | None
    ) -> dict[str, Array]:
        """One stack, each column's squared error weighted by `weigh_EI` (float32) in the search over `tried`."""
        return _finish("", fmt, *self._begin(stack, fmt, tried, global_scale_E, weigh_EI))

    def _begin(
        self, stack: Stack, fmt: Format, tried: Sequence[float], global_scale_E: Array | None, importance: Array | None
    ) -> tuple[dict[str, Array], list[tuple[int, Future[int]]]]:
        """The parts of a stack, and the tasks (with their expert) that are filling them."""
        experts, rows, width = stack.values.shape
        parts = _empty_parts(fmt, experts, rows, width, self._empty)
        if global_scale_E is not None:
            parts["global_scale"] = global_scale_E.reshape(experts, 1)
        search = np.array(tried, np.float32)
        tasks = []
        for expert, begin, end in self._slabs(experts, rows):
            weigh = kernels.NO_IMPORTANCE if importance is None else importance[expert]
            task = self._pool.submit(_encode_rows, stack, fmt, search, weigh, parts, expert, begin, end)
            tasks.append((expert, task))
        return parts, tasks

    def audit(self, stack: Stack, fmt: Format, search: str, parts: dict[str, Array]) -> list[Audit]:
        """Hold stored parts (as `encode` returns them) against the source, expert by expert."""
        scale, table = _effective_scale(fmt, parts), _code_table(fmt)
        clip = _OVERSHOOT[fmt.name, search] if fmt.symmetric else _ASYMMETRIC_OVERSHOOT[search]
        zero = _zero_of(fmt, parts)
        experts, rows, _ = stack.values.shape
        tasks = []
        for e, begin, end in self._slabs(experts, rows):
            stored = (parts["codes"][e], scale[e], zero[e], table, np.float32(clip))
            tasks.append((e, self._pool.submit(_audit_rows, _source(stack, e), begin, end, stored)))
        audits = [Audit(0.0, 0, 0.0, 0.0)] * experts
        for expert, task in tasks:
            audits[expert] = audits[expert].merge(Audit(*task.result()))
        positive = [bool((np.isfinite(one) & (one > 0)).all()) for one in scale]
        return [audit._replace(scales_ok=ok) for audit, ok in zip(audits, positive, strict=True)]

    def distances(self, stack: Stack, fmt: Format, parts: dict[str, Array], *, signed: bool) -> list[Audit]:
        """How far stored parts are from the source, expert by expert, whatever their codes: an audit's `error2` and
        `weight2`. `signed`: whether scales may be negative."""
        scale, zero, table = _effective_scale(fmt, parts), _zero_of(fmt, parts), _code_table(fmt)[0]
        experts, rows, _ = stack.values.shape
        tasks = []
        for e, begin, end in self._slabs(experts, rows):
            stored = (parts["codes"][e], scale[e], zero[e], table)
            tasks.append((e, self._pool.submit(_distance_rows, _source(stack, e), begin, end, stored)))
        audits = [Audit(0.0, 0, 0.0, 0.0)] * experts
        for expert, task in tasks:
            audits[expert] = audits[expert].merge(Audit(0.0, 0, *task.result()))
        good = [bool((np.isfinite(one) & ((one != 0) if signed else (one > 0))).all()) for one in scale]
        return [audit._replace(scales_ok=ok) for audit, ok in zip(audits, good, strict=True)]

    def audit_cast(self, stack: Stack, fmt: Format, parts: dict[str, Array]) -> list[Audit]:
        """Hold parts against the MXFP4 they were cast from; `outside` counts blocks of 16 of other values."""
        assert stack.scales is not None
        wanted = np.repeat(_effective_scale(Format("mxfp4", 32), {"scale": stack.scales}), 2, axis=-1)
        scale, shape = np.repeat(_effective_scale(fmt, parts), fmt.group_size // 16, axis=-1), (*wanted.shape, 8)
        wrong = (parts["codes"].reshape(shape) != stack.values.reshape(shape)).max(-1)
        wrong |= (scale != wanted) & nonzero_blocks(stack.values, 8)
        audits = []
        for blocks, one in zip(wrong, scale, strict=True):
            positive = bool((np.isfinite(one) & (one > 0)).all())
            audits.append(Audit(0.0, int(blocks.sum()), 0.0, 0.0, positive))
        return audits

    def dequantize(self, values: Array, block_scales: Array, scale_row: Array) -> Array:
        """One FP8 matrix [O, I] as bf16 bits. Raises NonFiniteError."""
        rows = values.shape[0]
        out = self._empty(values.shape, np.uint16)
        tasks = [
            self._pool.submit(dequantize_rows, values, block_scales, scale_row, begin, end, out)
            for _, begin, end in self._slabs(1, rows)
        ]
        if sum(task.result() for task in tasks):
            raise NonFiniteError("", 0)
        return out

    def _slabs(self, experts: int, rows: int) -> Iterator[tuple[int, int, int]]:
        for expert in range(experts):
            for begin in range(0, rows, self._SLAB):
                yield expert, begin, min(begin + self._SLAB, rows)

    def _global_scales(self, stacks: dict[str, Stack], search: str, fmt: Format) -> dict[str, Array]:
        largest: dict[str, Array] = {}
        for projection, stack in stacks.items():
            experts, rows, width = stack.values.shape
            source = [_source(stack, expert) for expert in range(experts)]
            tasks = [self._pool.submit(_amax, source[expert], rows, width) for expert in range(experts)]
            results = [task.result() for task in tasks]
            bad = next((e for e, (_, count) in enumerate(results) if count), None)
            if bad is not None:
                raise NonFiniteError(projection, bad)
            largest[projection] = np.array([value for value, _ in results], np.float32)
        shared = np.maximum(largest["gate"], largest["up"])
        return {p: _nvfp4_global_scale(shared if p in ("gate", "up") else largest[p], search, fmt) for p in stacks}


def _amax(source: tuple[Array, ...], rows: int, width: int) -> tuple[float, int]:
    value, bad = kernels.amax_rows(*source, 0, rows, width)
    return float(value), int(bad)


def _source(stack: Stack, expert: int) -> tuple[Array, Array, Array, Array]:
    """The kernels' four source arguments for one expert."""
    values = stack.values[expert]
    if stack.scales is None:
        return kernels.NO8, values, kernels.NO_SCALES, kernels.NO_ROWS
    return values, kernels.NO16, stack.scales[expert], np.arange(values.shape[0]) // 128


def _audit_rows(
    source: tuple[Array, ...], begin: int, end: int, stored: tuple[Any, ...]
) -> tuple[float, int, float, float]:
    """`stored`: the kernel's arguments from `codes` on."""
    worst, outside, error2, weight2 = kernels.audit_rows(*source, begin, end, *stored)
    return float(worst), int(outside), float(error2), float(weight2)


def _distance_rows(source: tuple[Array, ...], begin: int, end: int, stored: tuple[Any, ...]) -> tuple[float, float]:
    """`stored`: the kernel's arguments from `codes` on."""
    error2, weight2 = kernels.error_rows(*source, begin, end, *stored)
    return float(error2), float(weight2)


def _effective_scale(fmt: Format, parts: dict[str, Array]) -> Array:
    """Stored scales as float32 multipliers [E, O, G]."""
    if fmt.name == "int4":
        return (parts["scale"].astype(np.uint32) << 16).view(np.float32)
    if fmt.name == "mxfp4":
        bits = parts["scale"].astype(np.uint32) << 23
        return np.where(bits == 0, np.uint32(1 << 22), bits).view(np.float32)
    byte = parts["scale"].astype(np.uint32)
    magnitude = ((byte & 0x7F) << 20).view(np.float32) * FP8_UNIT
    magnitude[(byte & 0x7F) == 0x7F] = np.nan
    with np.errstate(all="ignore"):
        scale: Array = np.where(byte & 0x80, -magnitude, magnitude) / parts["global_scale"].reshape(-1, 1, 1)
    return scale


def _code_table(fmt: Format) -> Array:
    """[3, 16]: grid value of each code and the ends of its rounding interval, in units of the scale."""
    if fmt.name == "int4":
        value = np.arange(-8.0, 8.0)
    else:
        positive = np.array(E2M1_VALUES)
        value = np.concatenate([positive, -positive])
    grid = np.unique(value)
    middle = np.concatenate([[-np.inf], (grid[:-1] + grid[1:]) / 2, [np.inf]])
    place = np.searchsorted(grid, value)
    return np.stack([value, middle[place], middle[place + 1]]).astype(np.float32)


def _zero_of(fmt: Format, parts: dict[str, Array]) -> Array:
    """Stored zero points as float32 [E, O, G]; 0 of symmetric formats."""
    if fmt.symmetric:
        return np.zeros(parts["scale"].shape, np.float32)
    return _unpack_zero_points(parts["zero_point"]).astype(np.float32)


def _unpack_zero_points(packed: Array) -> Array:
    experts, eighth, groups = packed.shape
    shifts = np.arange(0, 32, 4, dtype=np.uint32).reshape(1, 1, 8, 1)
    nibbles = (packed.view(np.uint32)[:, :, None, :] >> shifts) & 15
    zero: Array = nibbles.reshape(experts, eighth * 8, groups).astype(np.int8) - np.int8(8)
    return zero


def _empty_parts(fmt: Format, experts: int, rows: int, width: int, empty: Callable[..., Array]) -> dict[str, Array]:
    groups = width // fmt.group_size
    parts = {
        "codes": empty((experts, rows, width // 2), np.uint8),
        "scale": empty((experts, rows, groups), np.uint16 if fmt.name == "int4" else np.uint8),
    }
    if fmt.name == "int4":
        parts["zero_point"] = empty((experts, rows, groups), np.int8)
    return parts


def _finish(
    projection: str, fmt: Format, parts: dict[str, Array], tasks: list[tuple[int, Future[int]]]
) -> dict[str, Array]:
    for expert, task in tasks:
        if task.result():
            raise NonFiniteError(projection, expert)
    zero = parts.pop("zero_point", None)
    return parts if fmt.symmetric or zero is None else parts | {"zero_point": _pack_zero_points(zero)}


def _encode_rows(
    stack: Stack, fmt: Format, tried: Array, weigh: Array, parts: dict[str, Array], expert: int, begin: int, end: int
) -> int:
    source, codes, scale = _source(stack, expert), parts["codes"][expert], parts["scale"][expert]
    if fmt.name == "int4":
        zero = parts["zero_point"][expert]
        return int(
            kernels.encode_int4(*source, begin, end, fmt.group_size, fmt.symmetric, tried, weigh, codes, scale, zero)
        )
    if fmt.name == "mxfp4":
        return int(kernels.encode_mxfp4(*source, begin, end, len(tried) > 1, weigh, codes, scale))
    global_scale = np.float32(parts["global_scale"][expert, 0])
    return int(kernels.encode_nvfp4(*source, begin, end, tried, global_scale, weigh, codes, scale))


def _nvfp4_global_scale(amax: Array, search: str, fmt: Format) -> Array:
    """See `engine_torch.nvfp4_global_scale`."""
    with np.errstate(over="ignore"):
        scale = np.float32(NVFP4_RANGE[search] * 6.0) / np.maximum(amax, np.finfo(np.float32).tiny)
    scale[np.isinf(scale)] = 1
    return (scale.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32) if fmt.pow2_global else scale


def _pack_zero_points(zero: Array) -> Array:
    """int8 [E, O, G] → int32 [E, O/8, G]; see `engine_torch.pack_zero_points`."""
    experts, rows, groups = zero.shape
    nibbles = (zero + np.int8(8)).astype(np.uint32).reshape(experts, rows // 8, 8, groups)
    shifts = np.arange(0, 32, 4, dtype=np.uint32).reshape(1, 1, 8, 1)
    packed: Array = np.bitwise_or.reduce(nibbles << shifts, axis=2).view(np.int32)
    return packed
