"""What a DFlash drafter's folder says of itself, from config.json and headers: sizes, tensors, which backbone it fits.

Key idea: a drafter is a small transformer that has no embedding and no head; both are the backbone's, and so are the
hidden states that it is conditioned on. So a drafter means something only beside a backbone: `misfit` says why one
does not go with it. As in `geometry`, a value whose meaning is not known here stops the run, and so does an unknown key
of `dflash_config`, where its variants (convolutions, selectors, projectors) announce themselves.

vLLM 0.32 and SGLang 0.5.23 do not read everything alike:
* The window: vLLM takes `swa_window_size`, or `sliding_window` under `layer_types`; SGLang the latter only. A config
  with `use_swa` and without `layer_types`, such as MiMo-V2.5-DFlash, has no window there: see `windows_by_layer_types`.
  Both lose `sliding_window` in transformers 5 unless `use_sliding_window` is true.
* `backbone_rotary_base` is read by neither: `rope_theta` turns keys of the context and of the block.
* Sliding layers are causal inside the block unless `is_causal` is false, in both.
* mask_embedding.pt: vLLM also takes a bare tensor, SGLang the object with two keys only. Only that is taken here.
* The vocabulary: vLLM drafts the first `vocab_size` ids, SGLang all that the head has. The published Pro drafter says
  152064 beside a head of 152576 rows, whose last are padding.

Left out: causal drafters, mixed layers, drafters with a vocabulary or weights of another form, the names `encoder.*`.
Source: the two engines' DFlash models, the published config and the tensors' names and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.index import CheckpointIndex, open_index, read_json_inside
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.geometry import Geometry

FOLDER = "dflash"  # where a checkpoint keeps its drafter
MASK_FILE = "mask_embedding.pt"
ARCHITECTURE = "DFlashDraftModel"
MAX_LAYERS = 256

_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "architectures": ([ARCHITECTURE],),
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "is_causal": (False, None),
    "is_neox_style": (True, None),
    "use_gemma_norm": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
_KNOWN_DFLASH: dict[str, tuple[Any, ...]] = {
    "causal": (False, None),
    "use_aux_hidden_state": (True, None),
}
# read below, or of no consequence for the forward
_OTHER_DFLASH_KEYS = {
    "target_layer_ids",
    "mask_token_id",
    "mask_token",
    "block_size",
    "num_target_layers",
    "use_swa",
    "swa_window_size",
    "attention_value_scale",
    "attention_sink_bias",
    "num_anchors",
    "loss_decay_gamma",
    "backbone_rotary_base",
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Drafter:
    """A drafter's numbers. `captured`: backbone layers, counted from 0, after which hidden states are taken, rising."""

    folder: Path
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    rope_theta: float
    rotary_dim: int
    window: int | None
    windows_by_layer_types: bool
    block: int  # tokens of a block, of which the first is known
    captured: tuple[int, ...]
    target_layers: int | None
    mask_token: int
    value_scale: float
    sink: bool

    @property
    def depth(self) -> int:
        """How many tokens a block drafts."""
        return self.block - 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        hidden, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        of_layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
            **({"self_attn.attention_sink_bias": (self.heads,)} if self.sink else {}),
            "mlp.gate_proj.weight": (self.intermediate, hidden),
            "mlp.up_proj.weight": (self.intermediate, hidden),
            "mlp.down_proj.weight": (hidden, self.intermediate),
        }
        return {
            "fc.weight": (hidden, len(self.captured) * hidden),
            "hidden_norm.weight": (hidden,),
            "norm.weight": (hidden,),
            **{f"layers.{n}.{name}": shape for n in range(self.layers) for name, shape in of_layer.items()},
        }

    def misfit(self, backbone: Geometry) -> str | None:
        """Why this drafter cannot draft for a backbone, in words that follow "does not fit the backbone: "."""
        for name, ours, theirs in (
            ("hidden_size", self.hidden, backbone.hidden),
            ("num_target_layers", self.target_layers, backbone.layers),
        ):
            if ours not in (None, theirs):
                return f"its {name} is {ours}, the backbone's is {theirs}"
        if self.captured[-1] >= backbone.layers:
            return (
                f"it captures layer {self.captured[-1]}, the backbone's {backbone.layers} end at {backbone.layers - 1}"
            )
        if self.vocab > backbone.vocab:
            return f"its vocab_size is {self.vocab}, the backbone's is {backbone.vocab}"
        if self.mask_token >= backbone.vocab:
            return f"its mask token is {self.mask_token}, the backbone's vocab_size is {backbone.vocab}"
        return None

    def check_fits(self, backbone: Geometry, where: Path | str) -> None:
        """Raise CheckpointError where it does not fit the backbone of the checkpoint `where`."""
        if problem := self.misfit(backbone):
            raise CheckpointError(
                f"{self.folder}: does not fit the backbone {where}: {problem}",
                hint="a drafter is trained for one model; take the one that was published with it",
            )


def open_drafter(folder: Path | str) -> tuple[Drafter, CheckpointIndex]:
    """Read a drafter's config and headers; every tensor is there, in its shape, and no other.

    Raises UsageError: no drafter's folder. CheckpointError: it is not well formed, or of a kind not known here.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: has no config.json, so it is no draft model")
    drafter = read_drafter(read_json_inside(folder, "config.json"), folder)
    index = open_index(folder)
    expected = drafter.shapes()
    for name in sorted(expected.keys() | index.tensors.keys()):
        info = index.tensors.get(name)
        if info is None or name not in expected:
            raise CheckpointError(f"{folder}: the tensor {name} {'is missing' if info is None else 'is unknown'}")
        if info.shape != expected[name] or info.dtype not in ("BF16", "F32"):
            raise CheckpointError(
                f"{folder}: {name} is {info.dtype}{list(info.shape)}, expected is BF16{list(expected[name])}"
            )
    return drafter, index


def carried_drafter(folder: Path, backbone: Geometry) -> tuple[Drafter | None, str | None]:
    """The drafter that a checkpoint's folder carries, and what is wrong with it; it is carried over all the same."""
    if not (folder / FOLDER / "config.json").is_file():
        return None, None
    try:
        drafter, _ = open_drafter(folder / FOLDER)
    except CheckpointError as error:
        return None, str(error)
    problem = drafter.misfit(backbone)
    return drafter, problem and f"{drafter.folder}: does not fit the backbone: {problem}"


def read_drafter(config: dict[str, Any], folder: Path) -> Drafter:
    """A drafter's numbers. Raises CheckpointError naming key, value and what is known."""
    where, special = f"{folder}/config.json", config.get("dflash_config")
    if not isinstance(special, dict):
        raise CheckpointError(f"{where}: has no dflash_config, so it is no DFlash drafter")
    _check_values(config, special, where)
    layers = _size("num_hidden_layers", where, config)
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{where}: num_hidden_layers is {layers}, more than any drafter has ({MAX_LAYERS})")
    window, by_types = _window(config, special, where)
    block = _same("block_size", special, config, where)
    if type(block) is not int or not 2 <= block <= (window or block):
        raise CheckpointError(f"{where}: block_size is {block!r}, expected from 2 to the window of {window}")
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{where}: rope_parameters {rope} is unknown (known: the default type)")
    heads, kv_heads, head_dim, rotary_dim = _heads(config, rope, where)
    return Drafter(
        folder=folder,
        hidden=_size("hidden_size", where, config),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_size("intermediate_size", where, config),
        vocab=_size("vocab_size", where, config),
        eps=_number("rms_norm_eps", where, config),
        rope_theta=_number("rope_theta", where, config, rope),
        rotary_dim=rotary_dim,
        window=window,
        windows_by_layer_types=by_types,
        block=block,
        captured=_captured(special, where),
        target_layers=_same("num_target_layers", special, config, where),
        mask_token=_size("mask_token_id", where, special, above=-1),
        value_scale=_number("attention_value_scale", where, special, default=1.0),
        sink=bool(_same("attention_sink_bias", special, config, where, other="add_swa_attention_sink_bias")),
    )


def _number(key: str, where: str, *parts: dict[str, Any], default: float | None = None, above: float = 0) -> float:
    """The first of `parts` that has the key says it."""
    value = next((part[key] for part in parts if part.get(key) is not None), default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < 2**62:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a number above {above}")
    return float(value)


def _size(key: str, where: str, part: dict[str, Any], above: int = 0) -> int:
    value = _number(key, where, part, above=above)
    if type(part[key]) is not int or value >= 2**31:
        raise CheckpointError(f"{where}: {key} is {part[key]!r}, expected a whole number")
    return int(value)


def _heads(config: dict[str, Any], rope: dict[str, Any], where: str) -> tuple[int, int, int, int]:
    """Query heads, key-value heads, their width, and how much of it is turned."""
    heads, kv_heads, head_dim = (
        _size(key, where, config) for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    v_head_dim = config.get("v_head_dim", head_dim)
    turned = int(head_dim * _number("partial_rotary_factor", where, config, rope, default=1.0))
    if heads % kv_heads or v_head_dim != head_dim or not 0 < turned <= head_dim or turned % 2:
        raise CheckpointError(
            f"{where}: {heads} heads over {kv_heads} key-value heads of {head_dim} and {v_head_dim} channels, {turned} "
            f"of them turned, is no attention known here"
        )
    return heads, kv_heads, head_dim, turned


def _check_values(config: dict[str, Any], special: dict[str, Any], where: str) -> None:
    known = [(config, "", _KNOWN_VALUES), (special, "dflash_config.", _KNOWN_DFLASH)]
    known.append(
        (
            config,
            "",
            {
                "target_hidden_size": (None, config.get("hidden_size")),
                "draft_vocab_size": (None, config.get("vocab_size")),
            },
        )
    )
    for part, prefix, values in known:
        for key, good in values.items():
            if part.get(key) not in good:
                expected = " or ".join("absent" if value is None else repr(value) for value in good)
                raise CheckpointError(f"{where}: {prefix}{key} is {part.get(key)!r}, known is {expected}")
    unknown = sorted(special.keys() - _OTHER_DFLASH_KEYS - _KNOWN_DFLASH.keys())
    if unknown:
        raise CheckpointError(f"{where}: dflash_config.{unknown[0]} is not known, so its drafts could be others")


def _same(key: str, special: dict[str, Any], config: dict[str, Any], where: str, other: str | None = None) -> Any:
    """A value that two places may hold. Engines differ in which they take, so both must say the same."""
    found = [value for value in (special.get(key), config.get(other or key)) if value is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise CheckpointError(f"{where}: dflash_config.{key} is {found[0]!r}, {other or key} beside it {found[1]!r}")
    return found[0] if found else None


def _window(config: dict[str, Any], special: dict[str, Any], where: str) -> tuple[int | None, bool]:
    """The window, if layers have one, and whether `layer_types` says so too."""
    types = config.get("layer_types")
    if types is not None and not any(types == [kind] * config["num_hidden_layers"] for kind in _LAYER_TYPES):
        raise CheckpointError(f"{where}: layer_types is {types!r}, known is one of {_LAYER_TYPES} for every layer")
    sliding = types is not None and types[0] == "sliding_attention"
    if sliding and config.get("is_causal") is None and special.get("causal") is None:
        raise CheckpointError(f"{where}: sliding layers without is_causal are causal to engines, known is false")
    if sliding and config.get("use_sliding_window") is not True:
        raise CheckpointError(f"{where}: layer_types slide without use_sliding_window, so engines find no window")
    if not sliding and not special.get("use_swa"):
        return None, False
    window = _same("swa_window_size", special, config, where, other="sliding_window")
    if type(window) is not int or not 0 < window < 2**31:
        raise CheckpointError(f"{where}: swa_window_size is {window!r}, expected a positive whole number")
    return window, sliding


def _captured(special: dict[str, Any], where: str) -> tuple[int, ...]:
    """Rising, because engines join hidden states in the order of the layers, whatever the list's."""
    layers = special.get("target_layer_ids")
    if not isinstance(layers, list) or not layers or any(type(n) is not int or n < 0 for n in layers):
        raise CheckpointError(f"{where}: dflash_config.target_layer_ids is {layers!r}, expected layers of the backbone")
    if layers != sorted(set(layers)):
        raise CheckpointError(f"{where}: dflash_config.target_layer_ids {layers} do not rise")
    return tuple(layers)
