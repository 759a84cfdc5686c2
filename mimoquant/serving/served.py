"""What an engine cares about in a checkpoint: stored forms, what config.json declares, sizes. Headers only.

Key idea: the same facts come from a written folder (its index) and from a plan (its entries), so what `plan` warns of
is what `verify` would refuse.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from mimoquant.checkpoint.index import open_index, read_json_inside
from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import text_keys
from mimoquant.model.geometry import FP8_BLOCK, Attention, Geometry, read_geometry
from mimoquant.model.layout import PROJECTIONS, TOWER_PREFIXES, read_layout
from mimoquant.model.qkv import with_chunks
from mimoquant.model.rounding import INPUT_SCALE_SUFFIXES
from mimoquant.planning.plan import Plan
from mimoquant.planning.settings_beside import read_config, settings_beside
from mimoquant.planning.stored import absent_modules
from mimoquant.quant.formats import Format
from mimoquant.serving import contracts
from mimoquant.weights.container import COMPRESSED_TENSORS, MODELOPT, NATIVE, expert_tensors, shape_tensor

CHANNEL = -1
WIDEST_GROUP = 128  # of those that have a row for more than one
GENERATION_NAME = "generation_config.json"


class Tensor(Protocol):
    """A header's entry, read or planned."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """How one layer's experts lie on disk: a subject of `contracts.FORMATS`, or bf16 or fp8 if kept. `group_size`:
    CHANNEL where a row has one scale, as wide as it is."""

    subject: str
    group_size: int | None = None

    @property
    def words(self) -> str:
        if self.group_size == CHANNEL:
            return f"{self.subject} by channel"
        return f"{self.subject} g{self.group_size}" if self.group_size else self.subject


@dataclass(frozen=True)
class Served:
    """A checkpoint as engines see it. `experts`: MoE layer → stored forms found in it, one where it is sound."""

    name: str
    config: dict[str, Any]
    geometry: Geometry
    experts: dict[int, list[Stored]]
    missing: list[str]  # parts of a quantized expert that its format calls for
    linears: dict[str, str]  # module of every other matrix in decoder and MTP layers → dtype
    qkv: str  # a subject of contracts.QKV
    fp8_k_rows: frozenset[int]  # of split k_proj in FP8, in blocks of 128 rows
    mtp_layers: int
    towers: bool
    input_scales: bool = False  # whether experts have what rounds their activations to 4 bits
    cache_scales: bool = False  # whether layers have what rounds keys and values
    bytes_by_kind: Counter[str] = field(default_factory=Counter)  # experts, towers, mtp, rest
    settings_beside: dict[str, Any] | None = None  # of hf_quant_config.json
    answer_tokens: int | None = None  # that generation_config.json ends an answer at

    @cached_property
    def text(self) -> dict[str, Any]:
        """The text model's keys of config.json."""
        return text_keys(self.config, self.name)

    @cached_property
    def container(self) -> str:
        if self.geometry.mxfp8:
            return MODELOPT
        quantization = self.text.get("quantization_config") or {}
        return COMPRESSED_TENSORS if quantization.get("quant_method") == COMPRESSED_TENSORS else NATIVE

    @cached_property
    def asked(self) -> dict[tuple[str, str], Any]:
        """What was found of it before, by engine and version (`contradictions.of`): it is the same on all GPUs."""
        return {}

    @cached_property
    def absent(self) -> list[str]:
        """What quantization_config names and the model does not have; asked once for all engines and layouts."""
        return absent_modules(self.text.get("quantization_config") or {}, self.geometry)

    @cached_property
    def quantized_layers(self) -> dict[str, str]:
        """`layer_algos` of quantization_config; made once for all engines and layouts."""
        return layer_algos(self.text.get("quantization_config") or {})

    @property
    def modelopt_blocks(self) -> bool:
        """Whether ModelOpt's container has FP8 in 128x128 blocks beside the experts."""
        return self.geometry.mxfp8 and self.qkv != contracts.PLAIN_MXFP8 and "F8_E4M3" in self.linears.values()

    @cached_property
    def subjects(self) -> list[str]:
        """The formats that quantized layers have."""
        found = {form.subject for forms in self.experts.values() for form in forms}
        return sorted(found - {contracts.BF16, contracts.FP8})

    @property
    def subject(self) -> str:
        """What kernels run most experts by: a quantized format, else FP8, else bf16."""
        kinds = {form.subject for forms in self.experts.values() for form in forms}
        whole = contracts.FP8 if contracts.FP8 in kinds else contracts.BF16
        return next(iter(self.subjects), whole)

    @property
    def plain_sound(self) -> bool:
        """Whether there is an audio tower that engines build, in a checkpoint that is not quantized at all."""
        held = self.text.get("quantization_config") or self.config.get("quantization_config")
        return bool(not held and self.config.get("audio_config") and self.config.get("vision_config"))

    @property
    def bf16_router(self) -> bool:
        return self.text.get("moe_router_dtype") == "bfloat16"

    @cached_property
    def kept(self) -> dict[int, str]:
        """Layers whose experts are not in 4 bits."""
        kinds = {layer: forms[0].subject for layer, forms in self.experts.items() if len(forms) == 1}
        return {layer: kind for layer, kind in kinds.items() if kind in (contracts.BF16, contracts.FP8)}

    @property
    def declared_split(self) -> bool:
        return self.text.get("attention_projection_layout") == "split"

    @property
    def max_context(self) -> int:
        return int(self.text.get("max_position_embeddings") or 2**18)

    def kv_bytes(self, tp: int, value_bytes: int = 2) -> tuple[int, int]:
        """Bytes of KV cache a token takes on one GPU: in all global layers, in all sliding-window layers."""
        sliding = sum(self.geometry.sliding)
        layers = self.geometry.layers - sliding
        return (
            layers * _kv_bytes(self.geometry.global_attention, tp, value_bytes),
            sliding * _kv_bytes(self.geometry.sliding_attention, tp, value_bytes),
        )


def _kv_bytes(attention: Attention, tp: int, value_bytes: int) -> int:
    heads = max(1, attention.kv_heads // tp)  # where there are fewer than ranks, each rank has one
    return heads * (attention.head_dim + attention.v_head_dim) * value_bytes


def layer_algos(settings: dict[str, Any]) -> dict[str, str]:
    """Of ModelOpt's `quantized_layers`, module → its own entry, else the first one of a module inside it."""
    layers = settings.get("quantized_layers")
    entries = layers.items() if isinstance(layers, dict) else ()
    algos = {key: str(entry.get("quant_algo")).upper() for key, entry in entries if isinstance(entry, dict)}
    named: dict[str, str] = {}
    for key, algo in algos.items():
        head = key.rpartition(".")[0]
        while head and head not in named:  # else what it lies in is named, too
            named[head] = algo
            head = head.rpartition(".")[0]
    return named | algos


def read_served(folder: Path | str) -> Served:
    """Facts of a checkpoint folder.

    Raises UsageError, CheckpointError: not a sound checkpoint of this family (as `inspect` does).
    """
    index = open_index(folder)
    config = read_config(index)
    read_layout(index, config, allow_unknown=True, packed=True)  # nothing is missing, nothing is misshapen
    facts = served(config, index.tensors, str(folder), index.metadata)
    beside = settings_beside(index.folder)
    return replace(facts, settings_beside=beside, answer_tokens=_answer_tokens(index.folder))


def planned(plan: Plan) -> Served:
    """Facts of what a plan will write."""
    entries = {entry.name: entry for unit in plan.units for entry in unit.entries}
    facts = served(plan.config, entries, str(plan.layout.index.folder), plan.index_metadata)
    return replace(facts, answer_tokens=_answer_tokens(plan.layout.index.folder))


def _answer_tokens(folder: Path) -> int | None:
    """`max_new_tokens` of generation_config.json, which vLLM takes for a limit of every answer."""
    if not (folder / GENERATION_NAME).is_file():
        return None
    try:
        value = read_json_inside(folder, GENERATION_NAME).get("max_new_tokens")
    except CheckpointError:  # what is no JSON is told where side files are looked at
        return None
    return value if type(value) is int else None


def served(config: dict[str, Any], tensors: Mapping[str, Tensor], name: str, metadata: dict[str, Any]) -> Served:
    """Facts from config.json, headers and the index's metadata."""
    geometry = with_chunks(read_geometry(config, f"{name}/config.json", packed=True), tensors, metadata, name)
    missing: list[str] = []
    experts = {layer: _stored_forms(layer, geometry, tensors, missing) for layer in geometry.moe_layers}
    beside = {key: tensor for key, tensor in tensors.items() if ".mlp.experts." not in key}  # some hundreds of 240,000
    linears = {key.removesuffix(".weight"): tensor.dtype for key, tensor in beside.items() if _is_linear(key)}
    fp8_k_rows = frozenset(
        tensor.shape[0]
        for key, tensor in beside.items()
        if key.endswith("self_attn.k_proj.weight") and f"{key}_scale_inv" in beside
    )
    mtp = {key.split(".")[3] for key in beside if key.startswith("model.mtp.layers.")}
    sizes = Counter(experts=sum(tensor.size_bytes for tensor in tensors.values()))
    for key, tensor in beside.items():
        sizes[_kind(key)] += tensor.size_bytes
        sizes["experts"] -= tensor.size_bytes
    return Served(
        name,
        config,
        geometry,
        experts,
        missing,
        linears,
        _qkv(geometry, tensors),
        fp8_k_rows,
        len(mtp),
        any(key.startswith(TOWER_PREFIXES) for key in beside),
        any(key.endswith(INPUT_SCALE_SUFFIXES) for key in tensors),
        any(key.endswith((".k_scale", ".v_scale")) for key in beside),
        sizes,
    )


def _is_linear(key: str) -> bool:
    return key.startswith(("model.layers.", "model.mtp.")) and key.endswith("_proj.weight")


def _kind(key: str) -> str:
    if key.startswith(TOWER_PREFIXES):
        return "towers"
    return "mtp" if key.startswith("model.mtp.") else "rest"


def _qkv(geometry: Geometry, tensors: Mapping[str, Tensor]) -> str:
    prefix = f"model.layers.{geometry.sliding.index(False) if False in geometry.sliding else 0}.self_attn."
    if geometry.fused_qkv:
        if tensors[f"{prefix}qkv_proj.weight"].dtype != "F8_E4M3":
            return contracts.CANONICAL_BF16 if geometry.qkv_chunks == 1 else contracts.FUSED_BF16
        if tensors[f"{prefix}qkv_proj.weight_scale_inv"].dtype == "U8":
            return contracts.PLAIN_MXFP8
        published = geometry.qkv_chunks == geometry.global_attention.kv_heads
        return contracts.FUSED_FP8 if published else contracts.OTHER_FP8
    scale = tensors.get(f"{prefix}k_proj.weight_scale_inv")
    rows = tensors[f"{prefix}k_proj.weight"].shape[0]
    return contracts.RANKED_SPLIT if scale and scale.shape[0] != -(-rows // FP8_BLOCK) else contracts.SPLIT


def _stored_forms(layer: int, geometry: Geometry, tensors: Mapping[str, Tensor], missing: list[str]) -> list[Stored]:
    forms: dict[Stored, None] = {}
    shapes = {projection: geometry.expert_shape(projection) for projection in PROJECTIONS}
    for expert in range(geometry.experts):
        for projection, shape in shapes.items():
            module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
            form = _stored(module, shape[1], tensors)
            if form.subject in _FORMATS and form.group_size is None:
                missing.append(f"{module}.weight_scale")
                continue
            forms.setdefault(form)
            missing += [name for part in _parts(form, shape) if (name := f"{module}.{part}") not in tensors]
    return list(forms)


def _stored(module: str, width: int, tensors: Mapping[str, Tensor]) -> Stored:
    packed, weight = tensors.get(f"{module}.weight_packed"), tensors.get(f"{module}.weight")
    scale = tensors.get(f"{module}.weight_scale")
    group = width // scale.shape[1] if scale and len(scale.shape) == 2 and scale.shape[1] else None
    if packed and packed.dtype == "I32":
        group = CHANNEL if group == width and width > WIDEST_GROUP else group
        asymmetric = f"{module}.weight_zero_point" in tensors
        return Stored(contracts.INT4_ASYMMETRIC if asymmetric else contracts.INT4, group)
    if packed:
        return Stored(contracts.CT_MXFP4 if scale and scale.dtype == "U8" else contracts.CT_NVFP4, group)
    if weight and weight.dtype == "U8":
        return Stored(contracts.MO_NVFP4 if scale and scale.dtype == "F8_E4M3" else contracts.NATIVE_MXFP4, group)
    return Stored(contracts.FP8 if weight and weight.dtype == "F8_E4M3" else contracts.BF16)


_FORMATS = {
    contracts.INT4: "int4",
    contracts.INT4_ASYMMETRIC: "int4",
    contracts.CT_MXFP4: "mxfp4",
    contracts.CT_NVFP4: "nvfp4",
    contracts.NATIVE_MXFP4: "mxfp4",
    contracts.MO_NVFP4: "nvfp4",
}


@functools.lru_cache
def _parts(form: Stored, shape: tuple[int, int]) -> tuple[str, ...]:
    """Behind the dot: every tensor that such an expert's matrix of this shape must have."""
    if form.subject not in _FORMATS:
        return ()
    try:
        fmt = Format(_FORMATS[form.subject], form.group_size or 0, form.subject != contracts.INT4_ASYMMETRIC)
    except ValueError:  # a group size that this program does not write; the check names it
        return ()
    container = {contracts.NATIVE_MXFP4: NATIVE, contracts.MO_NVFP4: MODELOPT}.get(form.subject, COMPRESSED_TENSORS)
    suffixes = tuple(stored.suffix for stored in expert_tensors(container, fmt, *shape))
    return (*suffixes, "weight_shape") if shape_tensor(container, fmt) else suffixes
