"""config.json's keys, wherever transformers' versions put them; two places that contradict are an error.

Key idea: every key that changes the forward pass either is read or has a row here with the values that this program
knows; any other value stops the run. Versions of transformers moved rope's numbers (rope_theta, rope_scaling,
rope_parameters flat and by layer type), the dtype (torch_dtype, dtype) and, for models with towers, all of the text
model's keys (text_config).
Reference: transformers 4.57 to 5.24, the published configs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mimoquant.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"

# key → the values whose meaning this program knows (None: the key may be absent or null)
KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "n_group": (1, None),
    "topk_group": (1, None),
    "norm_topk_prob": (True,),
    "n_shared_experts": (None, 0),
    "routed_scaling_factor": (None, 1, 1.0),
    "tie_word_embeddings": (False, None),
    "attention_bias": (False, None),
    "attention_projection_layout": (None, "split", "fused_qkv"),
    "add_full_attention_sink_bias": (None, False, True),
    "add_swa_attention_sink_bias": (None, False, True),
    # how the router's weight is stored; its product is float32 in every engine, and here
    "moe_router_dtype": (None, "float32", "bfloat16"),
    # what no model of this family has, and what would be another forward
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "clip_qkv": (None,),
    "swiglu_limit": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, True),
    "rope_interleave": (None, False),
    "rope_local_base_freq": (None,),
    "attn_temperature_tuning": (None, False),
    "hybrid_block_size": (None,),
    "first_k_dense_replace": (None,),
    "kv_lora_rank": (None,),
    "q_lora_rank": (None,),
    "index_topk": (None,),
    "zero_expert_num": (None, 0),
    "num_shared_experts": (None, 0),
    "shared_expert_intermediate_size": (None, 0),
    "decoder_sparse_step": (None, 1),
    "mlp_only_layers": (None, []),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "swa_rope_scaling": (None,),
    "qkv_bias": (None, False),
    "use_qkv_bias": (None, False),
    "scale_emb": (None, 1, 1.0),
    "scale_depth": (None,),
    "num_hash_layers": (None, 0),
}
OLD_QUANTIZATION = "compression_config"
_DTYPES = ("bfloat16", "float32")
# one meaning under two names; the first is the published one
_TWINS = (
    ("layernorm_epsilon", "rms_norm_eps"),
    ("sliding_window_size", "sliding_window"),
    ("torch_dtype", "dtype"),
    ("n_routed_experts", "num_experts", "num_local_experts"),
    ("num_experts_per_tok", "moe_topk"),
)
# what a nested text_config names otherwise than the whole model does, and what is no part of the forward
_OF_ITS_OWN = {"model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "id2label"}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base of global and of sliding-window layers, and the part of a head that is turned."""

    theta: float
    sliding_theta: float
    partial_factor: float


def text_keys(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The text model's keys: the top level and, where there is one, `text_config`.

    Raises CheckpointError where a key stands in both with two values, or the quantization under its old name.
    """
    nested = config.get("text_config")
    for place in (config, nested):
        if isinstance(place, dict) and place.get(OLD_QUANTIZATION):
            _refuse_old_quantization(place, where)
    if nested is None:
        return config
    if not isinstance(nested, dict):
        raise CheckpointError(f"{where}: text_config is {type(nested).__name__}, expected an object")
    merged = {key: value for key, value in config.items() if key != "text_config"}
    for key, value in nested.items():
        above = merged.get(key)
        if above is None:
            merged[key] = value
        elif value is not None and key not in _OF_ITS_OWN and not same(above, value):
            raise CheckpointError(f"{where}: {key} is {above!r} at the top and {value!r} in text_config")
    return merged


def _refuse_old_quantization(keys: dict[str, Any], where: str) -> None:
    """Engines do not agree on it: vLLM reads it where the new name is absent, SGLang and transformers never do."""
    both = keys.get("quantization_config")
    if both and both == keys[OLD_QUANTIZATION]:
        return
    beside = "beside another quantization_config" if both else "and no quantization_config"
    raise CheckpointError(
        f"{where}: has {OLD_QUANTIZATION}, its old name, {beside}; vLLM reads it, SGLang and transformers do not",
        hint=f"delete {OLD_QUANTIZATION}" if both else f"rename {OLD_QUANTIZATION} to quantization_config",
    )


def set_text_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Write a key of the text model where it stands; at the top level if it stands nowhere."""
    nested = config.get("text_config")
    places = [place for place in (config, nested) if isinstance(place, dict) and key in place]
    for place in places or [config]:
        place[key] = value


def drop_text_key(config: dict[str, Any], key: str) -> None:
    """Delete a key of the text model wherever it stands."""
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            place.pop(key, None)


def same(one: Any, other: Any) -> bool:
    """Equal as config values: 1 is 1.0, but true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def check_known(keys: dict[str, Any], known: dict[str, tuple[Any, ...]], where: str, prefix: str = "") -> None:
    """Raises CheckpointError for the first key that has none of its known values."""
    for key, values in known.items():
        value = keys.get(key)
        if not any(same(value, good) for good in values):
            expected = " or ".join("absent" if good is None else repr(good) for good in values)
            raise CheckpointError(f"{where}: {prefix}{key} is {value!r}, known is {expected}")


def check_forward_keys(keys: dict[str, Any], where: str) -> None:
    """Hold what changes the forward against what is known, and names of one thing against each other.

    Raises CheckpointError naming key, value and what is known, or both places and both values.
    """
    check_known(keys, KNOWN_VALUES, where)
    for names in _TWINS:
        told = [(name, _plain_dtype(keys[name])) for name in names if keys.get(name) is not None]
        for name, value in told[1:]:
            if not same(told[0][1], value):
                raise CheckpointError(f"{where}: {told[0][0]} is {told[0][1]!r} and {name} is {value!r}: which holds?")
    for name in ("torch_dtype", "dtype"):
        if keys.get(name) is not None and _plain_dtype(keys[name]) not in _DTYPES:
            raise CheckpointError(f"{where}: {name} is {keys[name]!r}, known is {' or '.join(_DTYPES)}")


def _plain_dtype(value: Any) -> Any:
    """`torch.bfloat16` → `bfloat16`, as some versions wrote it."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def number(keys: dict[str, Any], where: str, *names: str, default: float | None = None) -> float:
    """The first of these keys that is there. Raises CheckpointError for what is no positive number."""
    value = next((keys[name] for name in names if keys.get(name) is not None), default)
    return _positive(value, " or ".join(names), where)


def read_rope(keys: dict[str, Any], where: str) -> Rope:
    """Rope's numbers from every place that versions have for them.

    Raises CheckpointError as `check_rope`, and for a number that stands nowhere.
    """
    told = check_rope(keys, where)
    for name, value in told.items():
        if value is None:
            raise CheckpointError(f"{where}: {name} is None, expected a positive number")
    theta, sliding_theta, partial_factor = (value or 0.0 for value in told.values())
    return Rope(theta, sliding_theta, partial_factor)


def check_rope(keys: dict[str, Any], where: str) -> dict[str, float | None]:
    """What is told of rope_theta, swa_rope_theta and partial_rotary_factor; None where nothing is.

    Raises CheckpointError for a type other than the default wherever it stands, for what is not known there, and for
    two places that contradict.
    """
    dicts = list(_rope_dicts(keys, where))
    for place, values, _ in dicts:
        _check_rope_values(values, f"{where}: {place}")

    def told(top: str, inner: str, kinds: tuple[str | None, ...]) -> float | None:
        found = [(top, keys[top])] if keys.get(top) is not None else []
        found += [
            (f"{place}.{inner}", values[inner])
            for place, values, kind in dicts
            if kind in kinds and values.get(inner) is not None
        ]
        for name, value in found[1:]:
            if not same(found[0][1], value):
                raise CheckpointError(
                    f"{where}: {found[0][0]} is {found[0][1]!r} and {name} is {value!r}: which holds?"
                )
        return _positive(found[0][1], found[0][0], where) if found else None

    return {  # a flat dictionary speaks for global layers; sliding ones have their theta beside it
        "rope_theta": told("rope_theta", "rope_theta", (None, FULL)),
        "swa_rope_theta": told("swa_rope_theta", "rope_theta", (SLIDING,)),
        "partial_rotary_factor": told("partial_rotary_factor", "partial_rotary_factor", (None, FULL, SLIDING)),
    }


def _rope_dicts(keys: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """(place, its values, the layer type they are for) of every dictionary that tells of rope."""
    for name in ("rope_scaling", "rope_parameters"):
        value = keys.get(name)
        if value is None or value == {}:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {name} {value!r} is unknown (known: the default type)")
        by_type = {kind: inner for kind, inner in value.items() if isinstance(inner, dict)}
        for kind, inner in by_type.items():
            if kind not in (FULL, SLIDING):
                raise CheckpointError(f"{where}: {name}.{kind} is for no kind of layer that is known here")
            yield f"{name}.{kind}", inner, kind
        flat = {key: inner for key, inner in value.items() if key not in by_type}
        if flat or not by_type:
            yield name, flat, None


def _check_rope_values(values: dict[str, Any], where: str) -> None:
    kinds = [values[key] for key in ("rope_type", "type") if values.get(key) is not None]
    # by layer type, a flat rest and a bare theta need not name the type; alone it must
    if any(kind != "default" for kind in kinds) or not (kinds or values.get("rope_theta") is not None):
        raise CheckpointError(f"{where} {values} is unknown (known: the default type)")
    strange = [key for key in values if key not in _ROPE_KEYS and values[key] is not None]
    if strange:
        raise CheckpointError(f"{where}.{strange[0]} is {values[strange[0]]!r}, not known beside the default type")


def _positive(value: Any, name: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"{where}: {name} is {value!r}, expected a positive number")
    return float(value)
