"""What every tensor of a MiMo-V2 checkpoint is.

Key idea: the architecture is data. From config.json the tables below generate every tensor name the checkpoint must
have, with its role and shape; what is in the files is then compared with that. So a missing tensor, an unknown one and
a wrong shape are all found, and nothing is guessed from a name pattern. MTP layers are counted from the files, because
the published configs do not mention them. Towers (vision, audio, speech) pass through by prefix.

Left out: fine-tunes that rename tensors. Source: the published configs and indexes of V2-Flash, V2.5 and V2.5-Pro.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mimoquant.checkpoint.index import CheckpointIndex, TensorInfo
from mimoquant.errors import CheckpointError
from mimoquant.model.geometry import FP8_BLOCK, MXFP8_BLOCK, Attention, Geometry, read_geometry
from mimoquant.model.qkv import with_chunks

TOWER_PREFIXES = ("visual.", "audio_encoder.", "speech_embeddings.")
PROJECTIONS = ("gate", "up", "down")

_CODES = ("I32", "U8")  # of 4 bits, eight or two together
_PACKED_SUFFIXES = (
    "weight_scale",
    "weight_zero_point",
    "weight_global_scale",
    "weight_shape",
    "weight_scale_2",
    "input_scale",
    "input_global_scale",
)
# scales of keys and values in a cache, as llm-compressor, ModelOpt and older tools name them
_CACHE_SCALES = ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "k_proj.output_scale", "v_proj.output_scale")
_NORM, _ROUTER, _PLAIN, _SCALED = ("BF16", "F32"), ("F32", "BF16"), ("BF16",), ("F8_E4M3", "BF16")


@dataclass(frozen=True, slots=True)
class Weight:
    """One logical tensor: its values, and the FP8 block scales that belong to them."""

    name: str
    role: str
    info: TensorInfo
    scale: TensorInfo | None = None
    packed: tuple[TensorInfo, ...] = ()  # what a 4-bit expert has beside its codes (`info`)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Every tensor on disk that belongs to this weight."""
        return (self.info, *((self.scale,) if self.scale else ()), *self.packed)

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.infos)

    def loaded_bytes(self, *, as_codes: bool) -> int:
        """What it takes in memory: as stored, but for 4 bits that are not wanted `as_codes` but as bf16."""
        return self.size_bytes if as_codes or not self.packed else 4 * self.info.size_bytes


@dataclass(frozen=True)
class ModelLayout:
    """A checkpoint, understood. `units` maps unit name → non-expert weights; experts are reached by `expert`."""

    index: CheckpointIndex
    config: dict[str, Any]
    geometry: Geometry
    units: dict[str, list[Weight]]
    mtp_layers: int
    experts: dict[tuple[int, int, str], Weight] = field(repr=False)
    unknown: list[str] = field(default_factory=list)

    def expert(self, layer: int, expert: int, projection: str) -> Weight:
        return self.experts[layer, expert, projection]

    @property
    def ragged_qkv_layers(self) -> tuple[int, ...]:
        """Layers with split FP8 q, k, v of which q or k is not in whole blocks of 128 rows (V2-Flash's global ones)."""
        return tuple(
            dict.fromkeys(
                layer
                for layer in range(self.geometry.layers)
                for weight in self.units[f"layer {layer}"]
                if weight.role in ("q", "k")
                and weight.scale
                and weight.scale.shape[0] * FP8_BLOCK != weight.info.shape[0]
            )
        )


def read_layout(
    index: CheckpointIndex, config: dict[str, Any], *, allow_unknown: bool = False, packed: bool = False
) -> ModelLayout:
    """Match every tensor of the index with the table of its architecture. `packed`: experts may be in 4 bits already.

    Raises CheckpointError for a missing or unknown tensor, a wrong shape or dtype, a weight without its scale.
    """
    where = str(index.folder)
    geometry = read_geometry(config, f"{where}/config.json", packed=packed)
    geometry = with_chunks(geometry, index.tensors, index.metadata, where)
    left = dict(index.tensors)
    claim = _Claims(left, geometry, where)
    take_expert = claim.take_packed if packed else claim.take
    units: dict[str, list[Weight]] = {
        "embeddings": [claim.take("model.embed_tokens.weight", "embedding", _PLAIN, (geometry.vocab, geometry.hidden))]
    }
    experts: dict[tuple[int, int, str], Weight] = {}
    for layer in range(geometry.layers):
        units[f"layer {layer}"] = [claim.take(*row) for row in layer_rows(geometry, layer)]
        if packed:
            units[f"layer {layer}"] += claim.take_cache_scales(f"model.layers.{layer}")
        if geometry.moe[layer]:
            for expert in range(geometry.experts):
                for projection in PROJECTIONS:
                    name = f"{expert_module(layer, expert, projection)}.weight"
                    shape = geometry.expert_shape(projection)
                    experts[layer, expert, projection] = take_expert(name, "expert", _SCALED, shape)
    units["head"] = [
        claim.take("model.norm.weight", "norm", _NORM, (geometry.hidden,)),
        claim.take("lm_head.weight", "lm_head", _PLAIN, (geometry.vocab, geometry.hidden)),
    ]
    mtp_layers = _count_mtp(left)
    units["mtp"] = [claim.take(*row) for i in range(mtp_layers) for row in mtp_rows(geometry, i)]
    if packed:
        for i in range(mtp_layers):
            units["mtp"] += claim.take_cache_scales(f"model.mtp.layers.{i}")
    units["towers"] = [
        Weight(name, "tower", left.pop(name)) for name in sorted(left) if name.startswith(TOWER_PREFIXES)
    ]
    unknown = sorted(left)
    if unknown and not allow_unknown:
        _refuse_left_over_scales(unknown, index, where)
        raise CheckpointError(
            f"{where}: {len(unknown)} tensors have no known role, first {unknown[0]} {list(left[unknown[0]].shape)}",
            hint="--allow-unknown copies them as they are",
        )
    if packed:
        _refuse_strange(unknown, where)
    units["unknown"] = [Weight(name, "unknown", left[name]) for name in unknown]
    units = {name: weights for name, weights in units.items() if weights}
    return ModelLayout(index, config, geometry, units, mtp_layers, experts, unknown)


def _refuse_left_over_scales(unknown: list[str], index: CheckpointIndex, where: str) -> None:
    """Scales of FP8 beside weights that are no longer FP8: the files do not tell whether they were multiplied in."""
    found = [
        name for name in unknown if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in index.tensors
    ]
    if found:
        weight = index.tensors[found[0].removesuffix("_scale_inv")]
        raise CheckpointError(
            f"{where}: {len(found)} weights are no longer FP8 and have a scale of FP8 beside them, first {weight.name} "
            f"in {weight.dtype} with {found[0]}: nothing tells whether it was multiplied in",
            hint="where it was, take the scales out of shards and index; where not, cast the weights again from FP8",
        )


def _refuse_strange(unknown: list[str], where: str) -> None:
    """What an expert has beside codes and scales may change them, as `weight_g_idx` does: columns in another order."""
    strange = [name for name in unknown if ".mlp.experts." in name and ".input_" not in name]
    if strange:
        raise CheckpointError(
            f"{where}: {strange[0]} belongs to an expert, and what it means for its weight is unknown"
        )


Row = tuple[str, str, tuple[str, ...], tuple[int, ...]]  # name, role, dtypes, shape


def _attention_rows(geometry: Geometry, prefix: str, attention: Attention) -> Iterator[Row]:
    hidden, rows = geometry.hidden, attention.rows
    if geometry.fused_qkv:
        yield f"{prefix}self_attn.qkv_proj.weight", "qkv", _SCALED, (sum(rows), hidden)
    else:
        for letter, count in zip("qkv", rows, strict=True):
            yield f"{prefix}self_attn.{letter}_proj.weight", letter, _SCALED, (count, hidden)
    yield f"{prefix}self_attn.o_proj.weight", "o", _SCALED, (hidden, attention.heads * attention.v_head_dim)
    if attention.sink:
        yield f"{prefix}self_attn.attention_sink_bias", "sink", _NORM, (attention.heads,)


def _dense_rows(geometry: Geometry, prefix: str) -> Iterator[Row]:
    hidden, inner = geometry.hidden, geometry.dense_intermediate
    for projection, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{prefix}mlp.{projection}_proj.weight", "dense", _SCALED, shape


def layer_rows(geometry: Geometry, layer: int) -> Iterator[Row]:
    """What a decoder layer has beside its experts."""
    prefix, hidden = f"model.layers.{layer}.", geometry.hidden
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{norm}.weight", "norm", _NORM, (hidden,)
    yield from _attention_rows(geometry, prefix, geometry.attention(layer))
    if geometry.moe[layer]:
        yield f"{prefix}mlp.gate.weight", "router", _ROUTER, (geometry.experts, hidden)
        yield f"{prefix}mlp.gate.e_score_correction_bias", "router_bias", _ROUTER, (geometry.experts,)
    else:
        yield from _dense_rows(geometry, prefix)


def mtp_rows(geometry: Geometry, i: int) -> Iterator[Row]:
    """What MTP layer `i` has."""
    prefix, hidden = f"model.mtp.layers.{i}.", geometry.hidden
    yield f"{prefix}eh_proj.weight", "mtp_projection", _SCALED, (hidden, 2 * hidden)
    for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
        yield f"{prefix}{norm}.weight", "norm", _NORM, (hidden,)
    yield from _attention_rows(geometry, prefix, geometry.sliding_attention)
    yield from _dense_rows(geometry, prefix)


def _count_mtp(names: dict[str, TensorInfo]) -> int:
    indexes = {
        int(part)
        for name in names
        if name.startswith("model.mtp.layers.")
        for part in [name.split(".")[3]]
        if part.isdecimal()
    }
    return max(indexes) + 1 if indexes and max(indexes) < 64 else 0


class _Claims:
    """Takes expected tensors out of what the files hold, checking each."""

    def __init__(self, left: dict[str, TensorInfo], geometry: Geometry, where: str) -> None:
        self.left, self.geometry, self.where = left, geometry, where

    def take(self, name: str, role: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Weight:
        info = self.left.pop(name, None)
        if info is None:
            codes = name + "_packed"
            if role != "expert" and codes in self.left:
                raise CheckpointError(f"{self.where}: {codes}: is quantized, which only routed experts may be")
            raise CheckpointError(
                f"{self.where}: {name} is missing, which config.json calls for",
                hint="the download is incomplete, or config.json belongs to another checkpoint",
            )
        if self.geometry.mxfp8 and "BF16" in dtypes:  # others' exports may be in float32, which engines round
            dtypes = tuple(dict.fromkeys((*dtypes, "F32")))
        if info.dtype not in dtypes:
            raise CheckpointError(f"{self.where}: {name} is {info.dtype}, expected {' or '.join(dtypes)}")
        if info.shape != shape:
            raise CheckpointError(
                f"{self.where}: {name} has shape {list(info.shape)}, config.json makes it {list(shape)}"
            )
        if info.dtype != "F8_E4M3":
            return Weight(name, role, info)
        return Weight(name, role, info, self._take_scale(name, role, shape))

    def take_packed(self, name: str, role: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Weight:
        """An expert's weight in any form: 4-bit codes (either container), compressed-tensors' FP8, or as `take`."""
        module = name.removesuffix(".weight")
        plain, scale = self.left.get(name), self.left.get(f"{module}.weight_scale")
        codes = self.left.get(f"{module}.weight_packed") or (plain if plain and plain.dtype == "U8" else None)
        if codes is None:
            if plain and plain.dtype == "F8_E4M3" and scale:  # a carve-out: FP8 under compressed-tensors' name
                blocks = tuple(math.ceil(size / FP8_BLOCK) for size in shape)
                if (plain.shape, scale.dtype, scale.shape) != (shape, "F32", blocks):
                    raise CheckpointError(
                        f"{self.where}: {name} is F8_E4M3{list(plain.shape)} with scales {scale.dtype}"
                        f"{list(scale.shape)}, known is F8_E4M3{list(shape)} with F32{list(blocks)}"
                    )
                del self.left[name], self.left[scale.name]
                return Weight(name, role, plain, scale)
            return self.take(name, role, dtypes, shape)
        rows, width = shape
        if codes.dtype not in _CODES:
            raise CheckpointError(f"{self.where}: {codes.name} is {codes.dtype}, codes are {' or '.join(_CODES)}")
        if codes.shape[0] != rows or codes.size_bytes != rows * width // 2:
            raise CheckpointError(
                f"{self.where}: {codes.name} is {codes.dtype}{list(codes.shape)}, which is not 4 bits of {list(shape)}"
            )
        if scale is None:
            raise CheckpointError(f"{self.where}: {codes.name} has no {module}.weight_scale")
        self.left.pop(codes.name)
        parts = (self.left.pop(f"{module}.{suffix}", None) for suffix in _PACKED_SUFFIXES)
        return Weight(name, role, codes, packed=tuple(info for info in parts if info))

    def take_cache_scales(self, module: str) -> Iterator[Weight]:
        """What a cache of keys and values is scaled by: a number for the whole of a layer, where it is there."""
        for suffix in _CACHE_SCALES:
            name = f"{module}.self_attn.{suffix}"
            info = self.left.pop(name, None)
            if info is None:
                continue
            if info.dtype not in _NORM or math.prod(info.shape) != 1:
                found = f"{info.dtype}{list(info.shape)}"
                raise CheckpointError(
                    f"{self.where}: {name} is {found}, a scale of the KV cache is one number, BF16 or F32"
                )
            yield Weight(name, "cache_scale", info)

    def _take_scale(self, name: str, role: str, shape: tuple[int, ...]) -> TensorInfo:
        scale = self.left.pop(f"{name}_scale_inv", None)
        if scale is None:
            raise CheckpointError(f"{self.where}: {name} is FP8 but {name}_scale_inv is missing")
        if self.geometry.mxfp8 and (scale.dtype, scale.shape) == ("U8", (shape[0], shape[1] // MXFP8_BLOCK)):
            return scale
        blocks = self.geometry.fp8 or self.geometry.mxfp8 or self.geometry.quant_method is None  # unsaid: the files say
        if not blocks:
            raise CheckpointError(f"{self.where}: {name} is FP8, config.json has no quantization_config for it")
        allowed = [(rows, math.ceil(shape[1] / FP8_BLOCK)) for rows in scale_row_counts(self.geometry, role, shape[0])]
        if scale.dtype != "F32" or scale.shape not in allowed:
            mxfp8 = f" or U8{[shape[0], shape[1] // MXFP8_BLOCK]}" if self.geometry.mxfp8 else ""
            raise CheckpointError(
                f"{self.where}: {name}_scale_inv is {scale.dtype}{list(scale.shape)}, expected F32"
                f"{' or '.join(str(list(blocks)) for blocks in allowed)}{mxfp8}"
            )
        return scale


def scale_row_counts(geometry: Geometry, role: str, rows: int) -> list[int]:
    """Numbers of scale rows that an FP8 weight of this role may have.

    A fused qkv is always blocked rank by rank; split q, k, v are when that changes the count (V2-Flash's global k).
    """
    plain, ranked = math.ceil(rows / FP8_BLOCK), geometry.qkv_chunks * math.ceil(rows / geometry.qkv_chunks / FP8_BLOCK)
    if role == "qkv":
        return [ranked]
    return [plain, ranked] if role in ("q", "k", "v") and ranked != plain else [plain]


def expert_module(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"


def norm_name(layer: int) -> str:
    """The norm that a layer's router and experts see."""
    return f"model.layers.{layer}.post_attention_layernorm.weight"


def router_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"
