"""config.json of a MiMo-V2 checkpoint → `Geometry`: the sizes that fix every tensor's shape.

Key idea: each key whose value could change what a weight means has a row with the values this program knows
(`config_keys`; those of quantization_config here); any other value stops the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import check_forward_keys, check_known, check_rope, text_keys

ARCHITECTURES = {"mimo_v2_flash": "MiMoV2FlashForCausalLM", "mimo_v2": "MiMoV2ForCausalLM"}
FP8_BLOCK, MXFP8_BLOCK = 128, 32

_KNOWN_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
    "store_dtype": ("fp8", None),
    "mxfp4_block_size": (32, None),
    "scale_fmt": (None,),
    "kv_cache_scheme": (None,),
    "modules_to_convert": (None,),
}
# Two names of one list, in the order in which vLLM reads them: SGLang's too, transformers'
IGNORE_LISTS = ("ignored_layers", "modules_to_not_convert")
_READ_METHODS = ("fp8", "compressed-tensors")
_MODELOPT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_mixed")
_KNOWN_MODELOPT: dict[str, tuple[Any, ...]] = {"quant_algo": ("MIXED_PRECISION", "NVFP4", "W4A16_NVFP4")}


@dataclass(frozen=True, slots=True)
class Attention:
    """Head geometry of one kind of layer (global or sliding-window)."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    sink: bool

    @property
    def rows(self) -> tuple[int, int, int]:
        """Output rows of q, k and v."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.v_head_dim


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes that config.json fixes."""

    model_type: str
    hidden: int
    layers: int
    dense_intermediate: int
    expert_intermediate: int
    experts: int
    top_k: int
    vocab: int
    qkv_chunks: int  # tensor-parallel ranks that a fused qkv is interleaved by; 1: it is [Q|K|V]
    fused_qkv: bool
    sliding: tuple[bool, ...]
    moe: tuple[bool, ...]
    global_attention: Attention
    sliding_attention: Attention
    quant_method: str | None  # of quantization_config; None: there is none

    @property
    def fp8(self) -> bool:
        """Whether config.json says that weights are FP8 with a scale for 128x128."""
        return self.quant_method == "fp8"

    @property
    def mxfp8(self) -> bool:
        """Whether weights beside the experts may be FP8 with an E8M0 scale for 32 of a row, or in blocks."""
        return self.quant_method in _MODELOPT_METHODS

    def attention(self, layer: int) -> Attention:
        return self.sliding_attention if self.sliding[layer] else self.global_attention

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer, sparse in enumerate(self.moe) if sparse]

    def expert_shape(self, projection: str) -> tuple[int, int]:
        """[out_features, in_features] of one expert's projection."""
        inner = self.expert_intermediate
        return (self.hidden, inner) if projection == "down" else (inner, self.hidden)


def read_geometry(config: dict[str, Any], where: str, *, packed: bool = False) -> Geometry:
    """Check config.json against the known set and read the sizes. `packed`: experts may be in 4 bits already.

    Raises CheckpointError naming key, value and what is known.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is unknown (known: {', '.join(ARCHITECTURES)})",
            hint="mimoquant quantizes the MiMo-V2 family only",
        )
    named = config.get("architectures")
    if not (isinstance(named, list) and named and all(isinstance(name, str) for name in named)):
        raise CheckpointError(
            f"{where}: architectures is {named!r}, expected a list such as {[ARCHITECTURES[model_type]]}",
            hint="engines find the model's code by it",
        )
    config = text_keys(config, where)
    check_forward_keys(config, where)
    check_rope(config, where)
    _check_conversion(config, where)
    method = _quant_method(config, where, packed=packed)

    def size(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or not 0 < value < 2**31:
            raise CheckpointError(f"{where}: {key} is {value!r}, expected a positive whole number")
        return value

    layers = size("num_hidden_layers")
    if layers > 4096:
        raise CheckpointError(f"{where}: num_hidden_layers is {layers}, more than any model of this family")
    geometry = Geometry(
        model_type=model_type,
        hidden=size("hidden_size"),
        layers=layers,
        dense_intermediate=size("intermediate_size"),
        expert_intermediate=size("moe_intermediate_size"),
        experts=size("n_routed_experts"),
        top_k=size("num_experts_per_tok"),
        vocab=size("vocab_size"),
        qkv_chunks=1
        if method in _MODELOPT_METHODS
        else size("num_key_value_heads"),  # ModelOpt's releases undo the interleaving
        fused_qkv=config.get("attention_projection_layout") == "fused_qkv",
        sliding=_pattern(config, "hybrid_layer_pattern", "layer_types", "sliding_attention", layers, where),
        moe=_pattern(config, "moe_layer_freq", "mlp_layer_types", "sparse", layers, where),
        global_attention=Attention(
            size("num_attention_heads"),
            size("num_key_value_heads"),
            size("head_dim"),
            size("v_head_dim"),
            bool(config.get("add_full_attention_sink_bias", False)),
        ),
        sliding_attention=Attention(
            size("swa_num_attention_heads"),
            size("swa_num_key_value_heads"),
            size("swa_head_dim"),
            size("swa_v_head_dim"),
            bool(config.get("add_swa_attention_sink_bias", False)),
        ),
        quant_method=method,
    )
    for attention in (geometry.global_attention, geometry.sliding_attention):
        if geometry.fused_qkv and any(count % geometry.qkv_chunks for count in attention.rows):
            raise CheckpointError(
                f"{where}: the fused qkv's {attention.rows} rows do not split over {geometry.qkv_chunks} ranks"
            )
    return geometry


def _check_conversion(config: dict[str, Any], where: str) -> None:
    """What a converter says of the order of qkv's rows: only the one that ModelOpt's exports have anyway is known."""
    told = config.get("conversion_metadata") or {}
    if not isinstance(told, dict):
        raise CheckpointError(f"{where}: conversion_metadata is {type(told).__name__}, expected an object")
    check_known(told, {"qkv_layout": ("global_q_k_v", None)}, where, "conversion_metadata.")


def _quant_method(config: dict[str, Any], where: str, *, packed: bool) -> str | None:
    """What quantization_config declares, each of its keys held against the known values."""
    quantization = config.get("quantization_config")
    if quantization is None or quantization == {}:
        return None
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{where}: quantization_config is not an object")
    if quantization.get("quant_method") not in (*_READ_METHODS, *_MODELOPT_METHODS):
        raise CheckpointError(
            f"{where}: quantization_config.quant_method is {quantization.get('quant_method')!r}, "
            f"known are {', '.join(map(repr, _READ_METHODS))} and ModelOpt's",
            hint="weights as GPTQ, AWQ, AutoRound, mlx, Quark or bitsandbytes store them are not read: dequantize them "
            "with the tool that wrote them; where it is left over beside bf16 or FP8 weights, delete it",
        )
    method, known = quantization.get("quant_method"), _KNOWN_QUANTIZATION
    elsewhere = method == "compressed-tensors" or method in _MODELOPT_METHODS
    if not packed and (elsewhere or quantization.get("store_dtype") == "mxfp4"):
        said = "store_dtype 'mxfp4'" if method == "fp8" else f"quant_method {method!r}"
        raise CheckpointError(
            f"{where}: the experts are quantized already, quantization_config says ({said})",
            hint="quantize starts from published files or bf16; mxfp4-cast brings back what was cast from them; "
            "where the files are bf16 and this is left over, delete it",
        )
    if method == "compressed-tensors":
        known = {}
        _check_transforms(quantization.get("transform_config"), where)
    elif elsewhere:
        known = _KNOWN_MODELOPT
    elif packed:
        known = known | {"store_dtype": (*known["store_dtype"], "mxfp4")}
    check_known(quantization, known, where, "quantization_config.")
    if method == "fp8":
        _check_ignored(quantization, where)
    return str(method)


def _check_ignored(quantization: dict[str, Any], where: str) -> None:
    """The list of what stays in bf16 has two names; where both are filled, they agree."""
    told: dict[str, list[str]] = {}
    for key in IGNORE_LISTS:
        names = quantization.get(key) or []
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise CheckpointError(f"{where}: quantization_config.{key} must be a list of modules' names")
        if names:
            told[key] = names
    if len(told) == 2:
        first, second = (set(names) for names in told.values())
        if odd := sorted(first ^ second):
            raise CheckpointError(
                f"{where}: quantization_config has {' and '.join(told)}, of {len(first)} and {len(second)} modules, "
                f"and {odd[0]} is in one only: which holds?",
                hint="they are two names of one list, of which engines read one: delete the other",
            )


def _check_transforms(transforms: Any, where: str) -> None:
    """Rotations inside the weights are what they are; one that an engine applies to activations must not be missed."""
    if isinstance(transforms, list):
        for item in transforms:
            _check_transforms(item, where)
    if isinstance(transforms, dict):
        location = transforms.get("location", "weight_")
        if not str(location).startswith("weight_"):
            raise CheckpointError(
                f"{where}: transform_config rotates activations (location {location!r}), not known here"
            )
        _check_transforms(list(transforms.values()), where)


def _pattern(
    config: dict[str, Any], key: str, other_key: str, other_true: str, layers: int, where: str
) -> tuple[bool, ...]:
    """A per-layer yes/no list, in the published form (0/1) or transformers' (names); where both stand, they agree."""
    value, names = config.get(key), config.get(other_key)
    named = [1 if name == other_true else 0 for name in names] if isinstance(names, list) else None
    if value is None:
        key, value = (other_key, named) if named is not None else (key, value)
    if not isinstance(value, list) or len(value) != layers or any(item not in (0, 1) for item in value):
        length = len(value) if isinstance(value, list) else "no list"
        raise CheckpointError(f"{where}: {key} must be {layers} zeros and ones, one a layer (found {length})")
    if named is not None and [int(item) for item in value] != named:
        if len(named) != layers:
            raise CheckpointError(f"{where}: {other_key} names {len(named)} layers, num_hidden_layers is {layers}")
        layer = next(n for n in range(layers) if int(value[n]) != named[n])
        raise CheckpointError(
            f"{where}: layer {layer} is {value[layer]} in {key} and {config[other_key][layer]!r} in {other_key}: "
            "which holds?"
        )
    return tuple(bool(item) for item in value)
