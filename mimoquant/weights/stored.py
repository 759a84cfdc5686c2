"""Weights as the model sees them: stacks of experts as stored, anything else as bf16.

Key idea: this is the one place that joins the reader with roles and numbers: which bytes a layer's experts are, which
scale row an FP8 row has, and how a fused qkv becomes q, k and v.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import DTYPE_BYTES, TensorInfo
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError
from mimoquant.model.geometry import FP8_BLOCK, Geometry
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight
from mimoquant.model.qkv import Indexes, deinterleave_rows, scale_row_of
from mimoquant.quant import cast
from mimoquant.quant.expand import expand
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import Engine, NonFiniteError, Stack
from mimoquant.weights.container import expert_tensors

Array = npt.NDArray[Any]


def read_experts(
    reader: CheckpointReader,
    layout: ModelLayout,
    layer: int,
    begin: int,
    end: int,
    empty: Callable[..., Array] = np.empty,
    *,
    as_codes: bool = False,
) -> dict[str, Stack]:
    """Experts begin..end of a layer: projection → stack, in memory from `empty`.

    `as_codes`: experts in 4 bits, as codes of MXFP4 with its exponents, for a cast. Otherwise they are bf16, exactly;
    FP8 and bf16 are as stored.
    """
    begun = _codes if as_codes else _stack
    return _read(
        reader, {p: begun([layout.expert(layer, e, p) for e in range(begin, end)], empty) for p in PROJECTIONS}
    )


@dataclass(frozen=True, slots=True)
class _Begun:
    """A stack before its bytes are read: which go where, and what it is then."""

    wanted: list[tuple[TensorInfo, Array]]
    stack: Callable[[], Stack]


def _read(reader: CheckpointReader, begun: dict[str, _Begun]) -> dict[str, Stack]:
    """Everything at once, so that what lies side by side in a file is read together."""
    reader.read_many(itertools.chain.from_iterable(one.wanted for one in begun.values()))
    return {name: one.stack() for name, one in begun.items()}


def read_stack(reader: CheckpointReader, weights: list[Weight], empty: Callable[..., Array] = np.empty) -> Stack:
    return _read(reader, {"": _stack(weights, empty)})[""]


def _stack(weights: list[Weight], empty: Callable[..., Array]) -> _Begun:
    if any(bool(weight.packed) != bool(weights[0].packed) for weight in weights):
        raise CheckpointError(f"{weights[0].name}: its neighbours are stored otherwise; a layer's experts are alike")
    if weights[0].packed:
        codes = _codes(weights, np.empty)
        return _Begun(codes.wanted, lambda: expanded(codes.stack(), empty))
    fp8 = weights[0].scale is not None
    if any((weight.scale is not None) != fp8 for weight in weights):
        raise CheckpointError(f"{weights[0].name}: its neighbours have another dtype; a layer's experts must share one")
    values = empty((len(weights), *weights[0].info.shape), np.uint8 if fp8 else np.uint16)
    wanted = _into([weight.info for weight in weights], values)
    if weights[0].scale is None:
        return _Begun(wanted, lambda: Stack(values, None))
    scales = empty((len(weights), *weights[0].scale.shape), np.float32)
    wanted += _into([weight.scale for weight in weights if weight.scale], scales)
    return _Begun(wanted, lambda: Stack(values, scales))


def _into(infos: list[TensorInfo], targets: Array) -> list[tuple[TensorInfo, Array]]:
    """Each tensor's bytes and where they go, [tensors, ...]."""
    return [(info, target.reshape(-1).view(np.uint8)) for info, target in zip(infos, targets, strict=True)]


def expanded(codes: Stack, empty: Callable[..., Array] = np.empty) -> Stack:
    """MXFP4 as bf16."""
    assert codes.scales is not None
    values = empty((*codes.values.shape[:2], 2 * codes.values.shape[2]), np.uint16)
    expand(codes.values, codes.scales, values)
    return Stack(values, None)


def _codes(weights: list[Weight], empty: Callable[..., Array]) -> _Begun:
    scale = [packed_scale(weight) for weight in weights]
    codes = empty((len(weights), *weights[0].info.shape), np.uint8)
    scales = empty((len(weights), *scale[0].shape), np.uint8)
    wanted = _into([weight.info for weight in weights], codes) + _into(scale, scales)
    if scale[0].dtype == "U8":
        return _Begun(wanted, lambda: Stack(codes, scales))
    factors = np.empty((len(weights), 1), np.float32)
    wanted += _into([_global_scale(weight) for weight in weights], factors)

    def stack() -> Stack:
        pairs = zip(weights, factors[:, 0].tolist(), strict=True)
        whole = np.array([(f, 1.0) if part_name(_global_scale(w)) == "multiplier" else (1.0, f) for w, f in pairs])
        found, lost = cast.exponents(codes, scales, whole, empty)
        if lost.any():
            expert = int(np.flatnonzero(lost)[0])
            raise CheckpointError(
                f"{weights[expert].name}: MXFP4 cannot hold it exactly, {lost[expert]} of its blocks of 32 have two "
                "scales, or one that is no power of two",
                hint="only NVFP4 that was cast from MXFP4 can go back",
            )
        return Stack(codes, found)

    return _Begun(wanted, stack)


def _global_scale(weight: Weight) -> TensorInfo:
    """Of an expert in NVFP4: what its block scales are multiplied (`multiplier`) or divided by."""
    parts = {part_name(info): info for info in weight.packed}
    return parts.get("multiplier") or parts["global_scale"]


def part_name(info: TensorInfo) -> str:
    """`...gate_proj.weight_global_scale` → `global_scale`; ModelOpt's `weight_scale_2` → `multiplier`."""
    suffix = info.name.rpartition(".")[2].removeprefix("weight_")
    return "multiplier" if suffix == "scale_2" else suffix


def packed_scale(weight: Weight) -> TensorInfo:
    """The block scales of a 4-bit expert."""
    return next(info for info in weight.packed if part_name(info) == "scale")


def packed_format(weight: Weight) -> Format:
    """The format of a 4-bit expert, from what is stored of it.

    Raises CheckpointError for a combination of dtypes that is none of ours.
    """
    infos = {part_name(info): info for info in weight.packed}
    scale, rows, zero = infos["scale"], weight.info.shape[0], infos.get("zero_point")
    if scale.dtype == "F8_E4M3" and not infos.keys() & {"global_scale", "multiplier"}:
        missing = "weight_scale_2" if weight.info.name.endswith(".weight") else "weight_global_scale"
        raise CheckpointError(f"{weight.info.name}: NVFP4 scales need a {missing}, which is missing")
    if zero is not None and zero.dtype != "I32":
        raise CheckpointError(f"{zero.name}: is {zero.dtype}; packed zero points are I32")
    group = weight.info.size_bytes * 2 // rows * rows // (scale.size_bytes // DTYPE_BYTES[scale.dtype])
    try:
        if scale.dtype == "U8":
            return Format("mxfp4", group)
        if scale.dtype == "F8_E4M3":
            return Format("nvfp4", group)
        return Format("int4", group, symmetric=zero is None)
    except ValueError as error:
        raise CheckpointError(f"{weight.info.name}: {error} (scale {scale.dtype}{list(scale.shape)})") from error


def read_parts(
    reader: CheckpointReader, names: Iterable[str], experts: int, fmt: Format, container: str, geometry: Geometry
) -> dict[str, dict[str, Array]]:
    """Quantized experts as they are stored: projection → part → [experts, ...], as an engine takes them.

    Args:
        names: the tensors of the experts, in the order in which they are written.
    """
    ordered = iter(names)
    parts: dict[str, dict[str, list[Array]]] = {p: {} for p in PROJECTIONS}
    kinds = {"BF16": np.uint16, "F32": np.float32}
    for _ in range(experts):
        for projection in PROJECTIONS:
            shape = geometry.expert_shape(projection)
            layout = fmt.parts(*shape)
            for tensor in expert_tensors(container, fmt, *shape):
                dtype = np.int32 if tensor.part == "zero_point" else kinds.get(layout[tensor.part][0], np.uint8)
                values = reader.read(next(ordered)).view(dtype).reshape(layout[tensor.part][1])
                parts[projection].setdefault(tensor.part, []).append(tensor.turned(values))
    return {p: {part: np.stack(arrays) for part, arrays in held.items()} for p, held in parts.items()}


def rounded(values: Array, info: TensorInfo) -> Array:
    """Float32 as `bf16_bits`. Raises CheckpointError where one is not finite, or too large
    for bf16."""
    refuse_non_finite(info, values)
    out = bf16_bits(values)
    refuse_non_finite(info, out, "BF16")
    return out


def bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bf16 values, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def dequantize(stack: Stack, weight: Weight, geometry: Geometry, engine: Engine) -> Array:
    """One matrix as bf16 bits [O, I]. Raises CheckpointError where a value is not finite."""
    values: Array = stack.values[0]
    if stack.scales is None:
        return values
    scales = stack.scales[0]
    scale_row = scale_rows(weight.role, values.shape[0], scales.shape[0], geometry)
    try:
        return engine.dequantize(values, scales, scale_row)
    except NonFiniteError as error:
        raise not_finite(weight.name) from error


def lost_blocks(codes: Array, scales: Array, scale_row: Indexes, bits: Array) -> tuple[int, int]:
    """FP8 blocks that bf16 cannot hold: those of which all values became zero, and others of which none is normal.

    Args:
        codes [O, I], scales [R, C], scale_row [O]: as stored. bits: the product in bf16, [O, I].
    """
    zeroed = rough = 0
    for row, column in np.argwhere((scales != 0) & (np.abs(scales) < _SMALL_IN_BF16)).tolist():
        part = np.flatnonzero(scale_row == row), slice(column * FP8_BLOCK, (column + 1) * FP8_BLOCK)
        if not (codes[part] & 0x7F).any() or (bits[part] & 0x7F80).any():
            continue
        held = bool((bits[part] & 0x7FFF).any())
        zeroed, rough = zeroed + (not held), rough + held
    return zeroed, rough


def scale_rows(role: str, rows: int, count: int, geometry: Geometry) -> Indexes:
    """For each of a weight's `rows`, which of its `count` scale rows applies."""
    plain = -(-rows // FP8_BLOCK)
    ranked = role == "qkv" or (role in ("q", "k", "v") and count != plain)
    return scale_row_of(rows, count, geometry.qkv_chunks, ranked=ranked)


def split_qkv(fused: Array, geometry: Geometry, *, sliding: bool) -> tuple[Array, Array, Array]:
    """A fused, interleaved qkv [rows, I] as q, k, v."""
    rows = (geometry.sliding_attention if sliding else geometry.global_attention).rows
    ordered = fused[deinterleave_rows(rows, geometry.qkv_chunks)]
    return ordered[: rows[0]], ordered[rows[0] : rows[0] + rows[1]], ordered[rows[0] + rows[1] :]


def not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: holds NaN or Inf, or its scale makes it so",
        hint="the source is damaged: download that file again; what was written so far can be kept with --resume",
    )


def refuse_non_finite(info: TensorInfo, block: Array, dtype: str | None = None) -> None:
    """Raises CheckpointError for NaN or Inf in (a part of) a tensor's bytes, as they are stored or in `dtype`.

    They have all exponent bits set; E4M3, which has no Inf, all bits but the sign; E8M0, which is stored as U8, all
    bits. Codes have neither. Read as integers with and without a sign they are the largest of all, so two maxima find
    them, in pieces that stay in a cache.
    """
    dtype = dtype or info.dtype
    e8m0 = dtype == "F8_E8M0" or (dtype == "U8" and info.name.endswith(("_scale", "_scale_inv")))
    kind, least = ("u1", 0xFF) if e8m0 else _NOT_FINITE.get(dtype, ("", 0))
    if not kind:
        return
    bits = block.reshape(-1).view(kind)
    signed, sign = bits.view(kind.replace("u", "i")), 0 if e8m0 else 1 << (8 * bits.itemsize - 1)
    step = _PIECE_BYTES // bits.itemsize
    for begin in range(0, len(bits), step):
        piece = slice(begin, begin + step)
        if bits[piece].max() >= least | sign or (sign and signed[piece].max() >= least):
            raise not_finite(info.name)


_PIECE_BYTES = 2**18
_SMALL_IN_BF16 = 2.0**-117  # from here on E4M3's least code, 2^-9, is normal in bf16 too
_NOT_FINITE = {  # the unsigned integers, and the least that is not finite among those without a sign
    "BF16": ("u2", 0x7F80),
    "F16": ("u2", 0x7C00),
    "F32": ("u4", 0x7F800000),
    "F64": ("u8", 0x7FF0000000000000),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x7C),
}
