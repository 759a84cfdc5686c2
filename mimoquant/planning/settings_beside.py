"""hf_quant_config.json: what ModelOpt says of a checkpoint beside config.json, and where the two contradict each other.

Key idea: older exports have their settings there alone, newer ones in both; engines read config.json's, and the file
where those are incomplete. So the file completes config.json as it does for engines, and each setting in which the two
differ is told with both values, because whoever reads the other file serves another model.

Reference: vLLM 0.32 (`get_quant_config` in model_loader/weight_utils.py), SGLang 0.5.23 (the same name), ModelOpt's
`convert_hf_quant_config_format`, which renames `exclude_modules` and `kv_cache_quant_algo` on the way to config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.hf_files import CONFIG_NAME, MODELOPT_CONFIG_NAME
from mimoquant.checkpoint.index import CheckpointIndex, read_json_inside
from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import drop_text_key, text_keys
from mimoquant.wording import many

_MAX_BYTES = 50_000_000
_MIXED = "MIXED_PRECISION"
_LISTS = ("ignore", "exclude_modules", "modules_to_not_convert")


def read_config(index: CheckpointIndex) -> dict[str, Any]:
    """config.json of a checkpoint folder; with what ModelOpt says beside it, where config.json does not say it.

    Raises CheckpointError for either file where it is no JSON, and for the second where it is needed and says nothing.
    """
    config = read_json_inside(index.folder, CONFIG_NAME, max_bytes=_MAX_BYTES)
    told = text_keys(config, str(index.folder / CONFIG_NAME)).get("quantization_config")
    beside = index.folder / MODELOPT_CONFIG_NAME
    if not beside.is_file() or not (told is None or (isinstance(told, dict) and lacks_layers(told))):
        return config
    settings = _settings(read_json_inside(index.folder, MODELOPT_CONFIG_NAME, max_bytes=_MAX_BYTES))
    if settings is None:
        raise CheckpointError(f"{beside}: has no quantization with a quant_algo, so it says nothing of the weights")
    drop_text_key(config, "quantization_config")
    config["quantization_config"] = settings
    return config


def lacks_layers(told: dict[str, Any]) -> bool:
    """Whether config.json has ModelOpt's mixed precision without saying which layer is in what: engines then read all
    of it from the file beside."""
    return str(told.get("quant_algo")).upper() == _MIXED and "quantized_layers" not in told


def lacks_cache(told: dict[str, Any]) -> bool:
    """Whether config.json has mixed precision without saying what keys and values are cached in: SGLang then reads all
    of it from the file beside."""
    said = "kv_cache_quant_algo" in told or "kv_cache_scheme" in told
    return lacks_layers(told) or (str(told.get("quant_algo")).upper() == _MIXED and not said)


def settings_beside(folder: Path) -> dict[str, Any] | None:
    """What the file beside config.json says, if it is there and says anything."""
    if not (folder / MODELOPT_CONFIG_NAME).is_file():
        return None
    try:
        return _settings(read_json_inside(folder, MODELOPT_CONFIG_NAME, max_bytes=_MAX_BYTES))
    except CheckpointError:
        return None  # where it is needed, `read_config` says so


def settings_notes(folder: Path, config: dict[str, Any]) -> list[str]:
    """What contradicts, a sentence each."""
    beside = settings_beside(folder)
    told = text_keys(config, str(folder / CONFIG_NAME)).get("quantization_config")
    if beside is None or not isinstance(told, dict):
        return []
    reads = "vLLM reads the first, SGLang the second" if lacks_cache(told) else "engines read the first"
    return [f"{text}: {reads}" for text in contradictions(told, beside)]


def contradictions(told: dict[str, Any], beside: dict[str, Any]) -> list[str]:
    """Each setting that config.json and the file beside it give differently, with both values. What only one of them
    says is none where engines take it from either."""
    return [
        f"{what} in quantization_config of config.json, {other} in {MODELOPT_CONFIG_NAME}"
        for what, other in _differences(told, beside)
    ]


def _settings(document: dict[str, Any]) -> dict[str, Any] | None:
    told = document.get("quantization", document)
    return {"quant_method": "modelopt"} | told if isinstance(told, dict) and told.get("quant_algo") else None


def _differences(told: dict[str, Any], beside: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The values that differ, each as words: config.json's, the other file's."""
    method = str(told.get("quant_method", "modelopt"))
    if not method.startswith("modelopt"):
        yield f"quant_method is {method!r}", f"quant_algo is {beside['quant_algo']!r}"
        return
    first, second = _algo(told), _algo(beside)
    if first != second:
        yield f"quant_algo is {told.get('quant_algo')!r}", f"{beside['quant_algo']!r}"
    first, second = _cache(told), _cache(beside)
    if first != second:
        yield f"the KV cache is in {first}", f"in {second}"
    sizes, others = _group_sizes(told), _group_sizes(beside)
    if sizes and others and sizes != others:
        yield f"group_size is {_joined(sizes)}", _joined(others)
    names, more = _excluded(told), _excluded(beside)
    if odd := sorted(names ^ more):
        has = ("names", "does not") if odd[0] in names else ("does not name", "does")
        yield (
            f"ignore, of {many(len(names), 'module')}, {has[0]} {odd[0]}",
            f"exclude_modules, of {many(len(more), 'module')}, {has[1]}",
        )
    yield from _layer_differences(told.get("quantized_layers"), beside.get("quantized_layers"))


def _layer_differences(layers: Any, others: Any) -> Iterator[tuple[str, str]]:
    if not (isinstance(layers, dict) and isinstance(others, dict)):
        return  # one that is missing is taken from the other
    odd = sorted(name for name in layers.keys() | others.keys() if _of(layers, name) != _of(others, name))
    if odd:
        name, more = odd[0], f" (and {len(odd) - 1} more differ)" if len(odd) > 1 else ""
        yield f"quantized_layers has {name} as {_of(layers, name)}", f"as {_of(others, name)}{more}"


def _of(layers: dict[str, Any], name: str) -> str:
    entry = layers.get(name)
    algo = entry.get("quant_algo") if isinstance(entry, dict) else None
    return str(algo).upper() if algo else "nothing"


def _algo(settings: dict[str, Any]) -> str:
    return str(settings.get("quant_algo")).upper()


def _cache(settings: dict[str, Any]) -> str:
    """What keys and values are cached in, under either name."""
    scheme = settings.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        bits = scheme.get("num_bits")
        return f"{'FP' if scheme.get('type', 'float') == 'float' else 'INT'}{bits}".replace("FP4", "NVFP4")
    algo = str(scheme or settings.get("kv_cache_quant_algo") or "auto").upper()
    return "16 bits" if algo in ("AUTO", "NONE") else algo


def _group_sizes(settings: dict[str, Any]) -> set[Any]:
    """Of the whole, or of its groups; those of `quantized_layers` go with the layers."""
    groups = settings.get("config_groups")
    parts = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [part["weights"] for part in parts if isinstance(part.get("weights"), dict)]
    found = [settings.get("group_size"), *(part.get("group_size") for part in weights)]
    return {size for size in found if isinstance(size, int)}


def _joined(sizes: set[Any]) -> str:
    return " and ".join(map(str, sorted(sizes)))


def _excluded(settings: dict[str, Any]) -> set[str]:
    names: Any = next((settings[key] for key in _LISTS if settings.get(key)), [])
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
