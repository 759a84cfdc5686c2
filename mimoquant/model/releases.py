"""Which published model a checkpoint is, and which repository on the Hub its files can be from.

Key idea: sizes do not tell releases apart, since V2.6-Flash has V2.5's and V2.6-Pro has V2.5-Pro's. So a release also
has marks: values in config.json and towers in the files, which conversions keep; and how Xiaomi's own files say that
they are stored (`store_dtype`, the index's `save_format`). A conversion keeps a release's name. A repository is named
where the files are as published, and only where one alone has such files.

Left out: fine-tunes in a release's form, which nothing in the headers shows; their makers name them (`--base-model`).
Source: the published configs and indexes; of V2.6-Pro's config what is known of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from mimoquant.errors import UsageError
from mimoquant.model.config_keys import same, text_keys
from mimoquant.model.layout import ModelLayout, Weight

_ATTENTION = ("qkv", "q", "k", "v")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Release:
    """A published model. `repositories`: on the Hub, those whose files differ in nothing but weights' values; none
    where the files at hand are a conversion."""

    name: str
    repositories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Marks:
    """What tells a release. `kept`: config.json's keys with their values, None: absent. `store_dtype`, `save_format`:
    what the published quantization_config and index may say."""

    release: Release
    sizes: tuple[str, int, int, int]  # model_type, hidden, layers, experts
    towers: bool
    kept: dict[str, Any]
    store_dtype: tuple[str | None, ...]
    save_format: tuple[str | None, ...]


_FLASH, _PRO = ("mimo_v2", 4096, 48, 256), ("mimo_v2", 6144, 70, 384)
_FP8: tuple[tuple[str | None, ...], ...] = (("fp8", None), ("fp8", None))
_MXFP4: tuple[tuple[str | None, ...], ...] = (("mxfp4",), ("mxfp4",))


def _alike(name: str, *kinds: str) -> Release:
    return Release(name, tuple(f"XiaomiMiMo/{name}{kind}" for kind in kinds or ("",)))


_RELEASES = (
    _Marks(_alike("MiMo-V2-Flash"), ("mimo_v2_flash", 4096, 48, 256), False, {"layernorm_epsilon": 1e-5}, *_FP8),
    _Marks(
        _alike("MiMo-V2.5"),
        _FLASH,
        True,
        {"layernorm_epsilon": 1e-5, "moe_router_dtype": None, "num_nextn_predict_layers": None},
        *_FP8,
    ),
    _Marks(_alike("MiMo-V2.5-Pro"), _PRO, False, {"layernorm_epsilon": 1e-5, "moe_router_dtype": None}, *_FP8),
    _Marks(  # RL and MOPD: other weights, the same headers
        _alike("MiMo-V2.6-Flash", "-RL", "-MOPD"),
        _FLASH,
        True,
        {"layernorm_epsilon": 1e-6, "moe_router_dtype": "bfloat16", "num_nextn_predict_layers": 3},
        *_MXFP4,
    ),
    _Marks(
        _alike("MiMo-V2.6-Pro", "-RL", "-MOPD"),
        _PRO,
        True,
        {"layernorm_epsilon": 1e-5, "moe_router_dtype": "bfloat16"},
        *_MXFP4,
    ),
)


def release_of(layout: ModelLayout) -> Release | None:
    """The release that a checkpoint is, or was converted from; None where that cannot be told."""
    geometry, keys = layout.geometry, text_keys(layout.config, str(layout.index.folder))
    sizes = (geometry.model_type, geometry.hidden, geometry.layers, geometry.experts)
    quantization = keys.get("quantization_config") or {}
    for marks in _RELEASES:
        if marks.sizes != sizes or marks.towers != ("towers" in layout.units):
            continue
        if not all(same(keys.get(key), value) for key, value in marks.kept.items()):
            continue
        published = (
            quantization.get("quant_method") == "fp8"
            and quantization.get("store_dtype") in marks.store_dtype
            and layout.index.metadata.get("save_format") in marks.save_format
        )
        return marks.release if published else replace(marks.release, repositories=())
    return None


def stored_as(layout: ModelLayout) -> str:
    """What a checkpoint's experts and attention are stored in, in words: what a J against it is a J against."""
    sample = next(iter(layout.experts.values()))
    dtypes = {weight.info.dtype for weights in layout.units.values() for weight in weights if weight.role in _ATTENTION}
    experts = _experts_in(sample)
    attention = "FP8" if "F8_E4M3" in dtypes else "float32" if "F32" in dtypes else "bf16"
    told = experts if experts == attention else f"{experts} experts, {attention} attention"
    release = release_of(layout)
    return f"{told}, as released" if release and release.repositories else told


def _experts_in(weight: Weight) -> str:
    if not weight.packed:
        return {"F8_E4M3": "FP8", "BF16": "bf16"}.get(weight.info.dtype, weight.info.dtype)
    if weight.info.dtype == "I32":
        return "int4"
    return "NVFP4" if any(part.dtype == "F8_E4M3" for part in weight.packed) else "MXFP4"


def base_model(layout: ModelLayout, named: str | None) -> str | None:
    """The repository that a checkpoint is from: what its user says, else what its files leave no doubt about."""
    release = release_of(layout)
    return named or (release.repositories[0] if release and len(release.repositories) == 1 else None)


def base_model_note(layout: ModelLayout, named: str | None) -> str | None:
    """Why a card names no base model, where a release is known all the same; in words."""
    release = release_of(layout)
    if release is None or base_model(layout, named):
        return None
    why = f"the headers of {' and '.join(release.repositories)} are alike"
    if not release.repositories:
        why = f"the source is {release.name} by its sizes and settings, and not as it was published"
    return f"the card names no base model: {why}; --base-model NAME says which it is"


def is_repository(name: str) -> bool:
    """Whether this is `owner/model`, as the Hub names repositories."""
    return _REPOSITORY.fullmatch(name) is not None


def is_revision(text: str) -> bool:
    """Whether this is `owner/model@commit`."""
    name, _, commit = text.partition("@")
    return is_repository(name) and re.fullmatch(r"[0-9a-f]{7,64}", commit) is not None


def check_repository(name: str) -> str:
    """`name`. Raises UsageError where it is no repository's."""
    if not is_repository(name):
        raise UsageError(
            f"--base-model {name}: is no repository's name",
            hint="give owner/model as the Hub has it, such as XiaomiMiMo/MiMo-V2.6-Flash-RL",
        )
    return name
