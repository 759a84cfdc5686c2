"""vision_config, audio_config and the placeholders' ids of config.json, typed.

Key idea: as for the text model, a key that changes a tower's forward either is read or has the values that are known
here; any other stops the run. They are read when media are used: a text-only run does not ask.
Reference: the published configs of V2.5 and V2.6; engines' defaults for what those leave out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mimoquant.errors import CheckpointError
from mimoquant.model.config_keys import check_known, number, same, text_keys

FULL, ROWS, COLUMNS = -1, 0, 1  # what a vision block attends over: everything, a window along rows, along columns
_HEAD_DIM = 64  # of vision where config.json does not say, as published and as in every engine
_IDS = {
    "image": "image_token_id",
    "audio": "audio_token_id",
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "audio_start": "audio_start_token_id",
    "audio_end": "audio_end_token_id",
}
_KNOWN_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (None, True),
    "rope_theta": (None, 10000),
    "rms_norm_eps": (None, 1e-6),
    "num_position_embeddings": (None,),
    "deepstack_visual_indexes": (None, []),
}
_KNOWN_AUDIO: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "projection_layers": (2,),
    "input_full_attention": (True,),
    "rms_norm_eps": (None, 1e-6),
    "hidden_act": (None, "silu"),
    "rope_scaling": (None,),
}


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision transformer's sizes. `kinds`: of each block, FULL, ROWS or COLUMNS; `window`: patches to either side.

    Patches are `patch` pixels square and `temporal_patch` frames deep; `merge` x `merge` of them become one token.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    patch: int
    temporal_patch: int
    merge: int
    out_hidden: int
    kinds: tuple[int, ...]
    window: int
    sinks: bool  # whether blocks with a window have them

    @property
    def patch_width(self) -> int:
        """Values of one patch."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def merged(self) -> int:
        """Width of the patches that become one token."""
        return self.hidden * self.merge**2


@dataclass(frozen=True, slots=True)
class AudioConfig:
    """The audio encoder's sizes: `group` frames of a code from each codebook become one token."""

    code_counts: tuple[int, ...]  # of each codebook
    group: int
    layers: int
    hidden: int
    heads: int
    intermediate: int
    out_hidden: int
    rope_theta: float
    last_norm: bool

    @property
    def codebooks(self) -> int:
        return len(self.code_counts)

    @property
    def grouped(self) -> int:
        """Width of the frames that become one token."""
        return self.hidden * self.group


@dataclass(frozen=True, slots=True)
class MediaIds:
    """Token ids that stand for media and around them; None where config.json tells none."""

    image: int | None
    audio: int | None
    vision_start: int | None
    vision_end: int | None
    audio_start: int | None
    audio_end: int | None


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """What config.json tells of towers; None where there is none."""

    vision: VisionConfig | None
    audio: AudioConfig | None
    ids: MediaIds
    where: str

    def need_vision(self) -> VisionConfig:
        """Raises CheckpointError where the model takes no pictures."""
        if self.vision is None:
            raise CheckpointError(f"{self.where}: has no vision_config, so this model takes no pictures")
        return self.vision

    def need_audio(self) -> AudioConfig:
        """Raises CheckpointError where the model takes no sound."""
        if self.audio is None:
            raise CheckpointError(f"{self.where}: has no audio_config, so this model takes no sound")
        return self.audio

    def need_id(self, name: str) -> int:
        """One of `MediaIds`. Raises CheckpointError where config.json does not tell it."""
        value: int | None = getattr(self.ids, name)
        if value is None:
            raise CheckpointError(f"{self.where}: has no {_IDS[name]}, at its top or in processor_config")
        return value


def read_tower_config(config: dict[str, Any], where: str) -> TowerConfig:
    """Read and check what config.json tells of towers.

    Raises CheckpointError naming key, value and what is known, or two places that contradict.
    """
    keys = text_keys(config, where)
    vision, audio = (_object(config, name, where) for name in ("vision_config", "audio_config"))
    _check_positions(keys, where)
    return TowerConfig(
        None if vision is None else _vision(vision, f"{where}: vision_config"),
        None if audio is None else _audio(audio, f"{where}: audio_config"),
        _ids(config, where),
        where,
    )


def _object(config: dict[str, Any], name: str, where: str) -> dict[str, Any] | None:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where}: {name} is {type(value).__name__}, expected an object")
    return value or None


def _check_positions(keys: dict[str, Any], where: str) -> None:
    """Image and audio tokens stand at positions like text's; models with several a token have other keys."""
    for name in ("rope_scaling", "rope_parameters"):
        told = keys.get(name)
        if isinstance(told, dict) and told.get("mrope_section") is not None:
            raise CheckpointError(f"{where}: {name}.mrope_section is {told['mrope_section']!r}, known is absent")


def _size(keys: dict[str, Any], where: str, *names: str, default: int | None = None) -> int:
    found = [(name, keys[name]) for name in names if keys.get(name) is not None]
    for name, value in found[1:]:
        if not same(value, found[0][1]):
            raise CheckpointError(f"{where}.{found[0][0]} is {found[0][1]!r} and {name} is {value!r}: which holds?")
    value = found[0][1] if found else default
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{where}.{names[0]} is {value!r}, expected a positive whole number")
    return value


def _flag(keys: dict[str, Any], name: str, where: str) -> bool:
    value = keys.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}.{name} is {value!r}, expected true or false")
    return value


def _vision(keys: dict[str, Any], where: str) -> VisionConfig:
    check_known(keys, _KNOWN_VISION, where)
    heads = _size(keys, where, "num_heads")
    out = VisionConfig(
        hidden=_size(keys, where, "hidden_size"),
        intermediate=_size(keys, where, "intermediate_size"),
        heads=heads,
        kv_heads=_size(keys, where, "num_key_value_heads", default=heads),
        head_dim=_size(keys, where, "qk_channels", "kv_channels", default=_HEAD_DIM),
        channels=_size(keys, where, "in_chans", "in_channels", default=3),
        patch=_size(keys, where, "patch_size", "spatial_patch_size"),
        temporal_patch=_size(keys, where, "temporal_patch_size"),
        merge=_size(keys, where, "spatial_merge_size"),
        out_hidden=_size(keys, where, "out_hidden_size"),
        kinds=_kinds(keys, where),
        window=_size(keys, where, "visual_token_window_size"),
        sinks=_flag(keys, "use_sink", where),
    )
    groups = keys.get("num_query_groups")
    if heads % out.kv_heads or (groups is not None and not same(groups, heads // out.kv_heads)):
        raise CheckpointError(
            f"{where}: {heads} heads, {out.kv_heads} key-value heads and num_query_groups {groups!r} do not go together"
        )
    if out.head_dim % 4:
        raise CheckpointError(f"{where}: heads of {out.head_dim} do not split into halves of pairs, which rope turns")
    return out


def _kinds(keys: dict[str, Any], where: str) -> tuple[int, ...]:
    """Each block's kind. It stands in two places: full blocks are listed besides, and engines read both."""
    depth, kinds, full = (
        _size(keys, where, "depth"),
        keys.get("vit_window_attn_types"),
        keys.get("fullatt_block_indexes"),
    )
    if not isinstance(kinds, list) or len(kinds) != depth or any(kind not in (FULL, ROWS, COLUMNS) for kind in kinds):
        raise CheckpointError(
            f"{where}.vit_window_attn_types is {kinds!r}, expected {depth} of -1, 0 and 1, one a block"
        )
    listed = [block for block, kind in enumerate(kinds) if kind == FULL]
    if full != listed:
        raise CheckpointError(
            f"{where}: fullatt_block_indexes is {full!r}, and vit_window_attn_types makes it {listed}: which holds?"
        )
    return tuple(kinds)


def _audio(keys: dict[str, Any], where: str) -> AudioConfig:
    check_known(keys, _KNOWN_AUDIO, where)
    hidden, heads = _size(keys, where, "input_local_dim"), _size(keys, where, "input_local_attn_heads")
    head_dim = _size(keys, where, "input_local_head_dim", default=max(1, hidden // heads))
    if heads * head_dim != hidden or head_dim % 2:
        raise CheckpointError(f"{where}: {heads} heads of {head_dim} do not make up an input_local_dim of {hidden}")
    return AudioConfig(
        code_counts=_code_counts(keys, where),
        group=_size(keys, where, "group_size"),
        layers=_size(keys, where, "input_local_layers"),
        hidden=hidden,
        heads=heads,
        intermediate=_size(keys, where, "input_local_intermediate_size"),
        out_hidden=_size(keys, where, "out_hidden_size"),
        rope_theta=number(keys, where, "rope_theta"),
        last_norm=_flag(keys, "add_post_norm", where),
    )


def _code_counts(keys: dict[str, Any], where: str) -> tuple[int, ...]:
    """speech_vocab_size: a number for all codebooks, as published in a string, or one for each, joined by dashes."""
    codebooks, told = _size(keys, where, "audio_channels"), keys.get("speech_vocab_size")
    parts = str(told).split("-") if isinstance(told, str | int) and not isinstance(told, bool) else []
    sizes = [int(part) for part in parts if part.isascii() and part.isdecimal() and 0 < len(part) < 10]
    if len(sizes) != len(parts) or len(sizes) not in (1, codebooks) or 0 in sizes:
        raise CheckpointError(
            f"{where}.speech_vocab_size is {told!r}, expected a number of codes, or {codebooks} of them"
        )
    return tuple(sizes) if len(sizes) == codebooks else (sizes[0],) * codebooks


def _ids(config: dict[str, Any], where: str) -> MediaIds:
    """V2.5 has the ids of sound in processor_config only, V2.6 at the top too. Where both tell one, they agree."""
    beside = _object(config, "processor_config", where) or {}
    out: dict[str, int | None] = {}
    for name, key in _IDS.items():
        told = [(place, keys[key]) for place, keys in (("", config), ("processor_config.", beside)) if key in keys]
        told = [(place, value) for place, value in told if value is not None]
        for place, value in told:
            if type(value) is not int or value < 0:
                raise CheckpointError(f"{where}: {place}{key} is {value!r}, expected a token's id")
            if value != told[0][1]:
                raise CheckpointError(f"{where}: {key} is {told[0][1]} and {place}{key} is {value}: which holds?")
        out[name] = told[0][1] if told else None
    return MediaIds(**out)
