"""Write a small checkpoint in one of the three formats that MiMo-V2 models are published in.

Key idea: a source gives logical matrices (q, k, v apart, one expert's projection) by name, and a layout says how they
lie on disk: what is FP8, what is fused and interleaved, which tensor is in which file. So a random checkpoint and a
converted bf16 one take the same path, and equal seeds give equal models in all layouts. Every file is laid out before
the first tensor is made, so tensors may come in any order and memory is bounded by the largest one.

    flash   split q, k, v; per layer one file, and one each for the experts' gate+up and down
    v2.5    fused qkv; files by expert rank, cut between an `up_proj.weight` and its own scale; vision and audio towers
    pro     fused qkv; one file a rank, layer 2 torn over two; text only; JSON files with CRLF line ends

The tensor names are written out here a second time, beside `model.layout`: a checkpoint made from the table that reads
it could not show a mistake in that table. Left out: tokenizers (copied from a source, never made up) and remote code.
Source: the published configs and indexes of V2-Flash, V2.5 and V2.5-Pro.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.checkpoint.hf_files import CONFIG_NAME, copy_side_files, side_files
from mimoquant.checkpoint.index import INDEX_NAME, open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry, fsync_folder
from mimoquant.errors import MimoquantError, StoppedError, UsageError, is_disk_trouble
from mimoquant.model.geometry import ARCHITECTURES, FP8_BLOCK, Geometry, read_geometry
from mimoquant.model.layout import TOWER_PREFIXES
from mimoquant.synthetic.documents import SynthDocument
from mimoquant.synthetic.files import PLACEMENTS, ShardFiles
from mimoquant.synthetic.towers import SMALL, TowerSizes, tower_config, tower_tensors
from mimoquant.synthetic.weights import PATTERNS, ConvertedWeights, RandomWeights, encode_fp8
from mimoquant.weights.stored import not_finite

Array = npt.NDArray[Any]
LAYOUTS = {"flash": "mimo_v2_flash", "v2.5": "mimo_v2", "pro": "mimo_v2"}
_FIXED_CONFIG: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "layernorm_epsilon": 1e-05,
    "use_cache": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "swa_rope_theta": 10000,
    "partial_rotary_factor": 0.334,
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "n_shared_experts": None,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class SynthSizes:
    """Sizes of a random checkpoint. The defaults make 14 MB and keep every structure of the real ones."""

    layers: int = 6
    hidden: int = 256
    experts: int = 16
    top_k: int = 4
    expert_intermediate: int = 128
    dense_intermediate: int = 512
    vocab: int = 1024
    heads: int = 8
    kv_heads: int = 2
    swa_kv_heads: int | None = None  # of sliding-window layers; None: twice kv_heads where the heads allow it
    head_dim: int = 48
    v_head_dim: int = 32
    window: int = 64
    mtp_layers: int = 3

    @property
    def sliding_kv_heads(self) -> int:
        return self.swa_kv_heads or self.kv_heads * (1 if self.heads % (2 * self.kv_heads) else 2)


@dataclass(frozen=True)
class SynthReport:
    """What was written; see `SynthDocument` for the fields."""

    layout: str
    tensors: int
    files: int
    size_bytes: int
    trap: tuple[str, ...]

    def as_json(self, out: Path | str) -> SynthDocument:
        return SynthDocument(
            schema_version=SCHEMA_VERSION,
            out=str(out),
            layout=self.layout,
            tensors=self.tensors,
            files=self.files,
            size_bytes=self.size_bytes,
            trap=list(self.trap),
        )


@dataclass(frozen=True, slots=True)
class _Stored:
    """One weight on disk, made of `parts` (logical name, shape). FP8 blocks of 128 rows restart at each of `ranks`."""

    name: str
    dtype: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    ranks: int = 1

    @property
    def entries(self) -> list[Entry]:
        shape = (sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:])
        entries = [Entry(self.name, self.dtype, shape)]
        if self.dtype == "F8_E4M3":
            scale_rows = self.ranks * math.ceil(shape[0] // self.ranks / FP8_BLOCK)
            entries.append(Entry(f"{self.name}_scale_inv", "F32", (scale_rows, math.ceil(shape[1] / FP8_BLOCK))))
        return entries


def synth(
    out: Path,
    layout: str,
    *,
    source: Path | None = None,
    sizes: SynthSizes | None = None,
    towers: TowerSizes = SMALL,
    seed: int = 0,
) -> SynthReport:
    """Write a checkpoint folder `out` in `layout`: random, or converted from the bf16 checkpoint `source`.

    FP8 weights have float32 scales, amax / 448 of each 128 x 128 block, and are rounded to nearest even. Towers are
    always random. Same seed, same bytes.
    Raises:
        UsageError: `out` exists, an unknown layout, sizes that cannot be, a source that is not plain bf16.
        CheckpointError: the source is no sound checkpoint of this family. StoppedError: the disk.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout!r} is unknown (known: {', '.join(LAYOUTS)})")
    if source is not None and sizes is not None:
        raise UsageError("sizes cannot be chosen when converting", hint="leave out --from, or the size options")
    for folder in (out, out.with_name(f"{out.name}.partial")):
        if folder.exists() or folder.is_symlink():
            raise UsageError(f"{folder}: exists already", hint="choose another folder, or remove it")
    if source is not None:
        with CheckpointReader(open_index(source)) as reader:
            converted = ConvertedWeights(reader)
            return _synth(out, layout, converted.config, converted, towers, seed)
    sizes = sizes or SynthSizes()
    return _synth(out, layout, _random_config(sizes, layout), RandomWeights(seed, sizes.mtp_layers), towers, seed)


def _synth(
    out: Path,
    layout: str,
    config: dict[str, Any],
    origin: RandomWeights | ConvertedWeights,
    tower_sizes: TowerSizes,
    seed: int,
) -> SynthReport:
    config = _published_config(config, layout, tower_sizes)
    geometry = read_geometry(config, str(out))
    _check_geometry(geometry)
    stored = list(stored_tensors(geometry, origin.mtp_layers))
    if layout == "v2.5":
        stored += [_plain(name, *shape) for name, shape in tower_tensors(geometry.hidden, tower_sizes)]
    place, partial = functools.partial(PLACEMENTS[layout], geometry), out.with_name(f"{out.name}.partial")
    towers = RandomWeights(seed, 0)
    try:
        partial.mkdir(parents=True)
    except OSError as error:  # apart from the rest: a folder that is not ours must stay
        raise _unwritable(partial, error) from error
    try:
        files = ShardFiles(
            partial, [entry for one in stored for entry in one.entries], place, metadata=layout == "flash"
        )
        for one in stored:
            _put(files, one, towers if one.name.startswith(TOWER_PREFIXES) else origin)
        line_end = "\r\n" if layout == "pro" else "\n"
        for name, content in ((CONFIG_NAME, config), (INDEX_NAME, files.index(layout, geometry.qkv_chunks))):
            (partial / name).write_text(json.dumps(content, indent=2), encoding="utf-8", newline=line_end)
        if isinstance(origin, ConvertedWeights):
            copy_side_files(origin.folder, partial, side_files(origin.folder, origin.reader.index.file_sizes).sizes)
        _publish(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(partial, error) from error
        raise
    weights = [one.name for one in stored if one.dtype == "F8_E4M3"]
    trap = tuple(name for name in weights if place(name) != place(f"{name}_scale_inv"))
    return SynthReport(layout, len(files.weight_map), len(files.sizes), sum(files.sizes.values()), trap)


def _unwritable(folder: Path, error: OSError) -> MimoquantError:
    text = f"{folder}: cannot be written ({error.strerror})"
    if is_disk_trouble(error):
        return StoppedError(text, hint="make room, or choose another folder")
    return UsageError(text, hint="choose another folder")


def _publish(partial: Path, out: Path) -> None:
    """Make every file durable, then give the folder its name."""
    for path in filter(Path.is_file, partial.iterdir()):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    fsync_folder(partial)
    os.rename(partial, out)
    fsync_folder(out.parent)


def _check_geometry(geometry: Geometry) -> None:
    for what, have, least in (("layers", geometry.layers, 3), ("experts", geometry.experts, 2)):
        if have < least:
            raise UsageError(f"{what} is {have}, the published structure needs at least {least}")
    if geometry.top_k > geometry.experts:
        raise UsageError(f"top_k is {geometry.top_k}, but there are {geometry.experts} experts")
    hint = "heads must be a multiple of both kv head counts, and swa_kv_heads one of kv_heads"
    for attention in (geometry.global_attention, geometry.sliding_attention):
        heads, kv_heads, ranks = attention.heads, attention.kv_heads, geometry.qkv_chunks
        if heads % kv_heads:
            raise UsageError(f"{heads} query heads do not divide by {kv_heads} kv heads", hint=hint)
        if heads % ranks or kv_heads % ranks:
            rows = attention.rows[:2]
            raise UsageError(
                f"{rows[0]} q rows and {rows[1]} k rows do not split by head over {ranks} ranks", hint=hint
            )


# --- what is in a checkpoint


def stored_tensors(geometry: Geometry, mtp_layers: int) -> Iterator[_Stored]:
    """What the checkpoint has, in the order in which its values are drawn."""
    hidden, experts = geometry.hidden, geometry.experts
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield _plain(name, geometry.vocab, hidden)
    yield _plain("model.norm.weight", hidden)
    for layer in range(geometry.layers):
        prefix = f"model.layers.{layer}."
        yield _plain(f"{prefix}input_layernorm.weight", hidden)
        yield _plain(f"{prefix}post_attention_layernorm.weight", hidden)
        yield from _attention(geometry, f"{prefix}self_attn.", sliding=geometry.sliding[layer])
        if not geometry.moe[layer]:
            yield from _mlp(f"{prefix}mlp.", geometry.dense_intermediate, hidden)
            continue
        yield _plain(f"{prefix}mlp.gate.weight", experts, hidden, dtype="F32")
        yield _plain(f"{prefix}mlp.gate.e_score_correction_bias", experts, dtype="F32")
        for expert in range(experts):
            yield from _mlp(f"{prefix}mlp.experts.{expert}.", geometry.expert_intermediate, hidden)
    for i in range(mtp_layers):
        prefix = f"model.mtp.layers.{i}."
        yield _plain(f"{prefix}eh_proj.weight", hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            yield _plain(f"{prefix}{norm}.weight", hidden)
        yield from _attention(geometry, f"{prefix}self_attn.", sliding=True)
        yield from _mlp(f"{prefix}mlp.", geometry.dense_intermediate, hidden)


def _plain(name: str, *shape: int, dtype: str = "BF16") -> _Stored:
    return _Stored(name, dtype, ((name, shape),))


def _mlp(prefix: str, inner: int, hidden: int) -> Iterator[_Stored]:
    yield _plain(f"{prefix}gate_proj.weight", inner, hidden, dtype="F8_E4M3")
    yield _plain(f"{prefix}up_proj.weight", inner, hidden, dtype="F8_E4M3")
    yield _plain(f"{prefix}down_proj.weight", hidden, inner, dtype="F8_E4M3")


def _attention(geometry: Geometry, prefix: str, *, sliding: bool) -> Iterator[_Stored]:
    attention = geometry.sliding_attention if sliding else geometry.global_attention
    hidden, chunks, rows = geometry.hidden, geometry.qkv_chunks, attention.rows
    parts = tuple((f"{prefix}{letter}_proj.weight", (rows[i], hidden)) for i, letter in enumerate("qkv"))
    if geometry.fused_qkv:
        yield _Stored(f"{prefix}qkv_proj.weight", "F8_E4M3", parts, chunks)
    else:
        for part in parts:  # blocked rank by rank only where that changes the number of scale rows: global k_proj
            one, ranked = _Stored(part[0], "F8_E4M3", (part,)), _Stored(part[0], "F8_E4M3", (part,), chunks)
            yield one if one.entries == ranked.entries else ranked
    yield _plain(f"{prefix}o_proj.weight", hidden, attention.heads * attention.v_head_dim)
    if attention.sink:
        yield _plain(f"{prefix}attention_sink_bias", attention.heads)


# --- config.json


def _random_config(sizes: SynthSizes, layout: str) -> dict[str, Any]:
    for name, value in asdict(sizes).items():
        least = 0 if name == "mtp_layers" else 1
        if value is not None and not least <= value < 2**31:
            raise UsageError(f"{name} is {value}, must be at least {least} and below {2**31}")
    if sizes.layers > 4096 or sizes.mtp_layers > 64:
        raise UsageError(f"{sizes.layers} layers and {sizes.mtp_layers} MTP layers are more than 4096 and 64")
    stride = 8 if layout == "pro" else 6
    ends = (0, sizes.layers - 1)
    return {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.dense_intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "v_head_dim": sizes.v_head_dim,
        "swa_num_attention_heads": sizes.heads,
        "swa_num_key_value_heads": sizes.sliding_kv_heads,
        "swa_head_dim": sizes.head_dim,
        "swa_v_head_dim": sizes.v_head_dim,
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.expert_intermediate,
        "sliding_window": sizes.window,
        "sliding_window_size": sizes.window,
        "attention_chunk_size": sizes.window,
        "rope_theta": 5000000 if layout == "flash" else 10000000,
        "attention_value_scale": 0.612 if layout == "pro" else 0.707,
        "hybrid_layer_pattern": [int(i not in ends and i % stride != stride - 1) for i in range(sizes.layers)],
        "moe_layer_freq": [int(i > 0) for i in range(sizes.layers)],
    } | _FIXED_CONFIG


def _published_config(config: dict[str, Any], layout: str, tower_sizes: TowerSizes) -> dict[str, Any]:
    """`config` made to declare a layout; flash also gets the keys that transformers reads."""
    model_type = LAYOUTS[layout]
    out: dict[str, Any] = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    replaced = {*out, "dtype", "torch_dtype", "attention_projection_layout"}
    if config.get("model_type") != model_type:
        replaced.add("auto_map")  # it names the classes of the other model type
    out |= {key: value for key, value in config.items() if key not in replaced}
    if layout == "flash":
        rope = {"rope_type": "default", "partial_rotary_factor": out.get("partial_rotary_factor")}
        thetas = {"full_attention": out.get("rope_theta"), "sliding_attention": out.get("swa_rope_theta")}
        said_again = {
            "rms_norm_eps": out.get("layernorm_epsilon"),
            "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in out[PATTERNS[0]]],
            "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in out[PATTERNS[1]]],
            "rope_parameters": {kind: rope | {"rope_theta": theta} for kind, theta in thetas.items()},
        }
        out = said_again | out
    else:
        out["attention_projection_layout"] = "fused_qkv"
    if layout == "v2.5":
        out |= tower_config(out["hidden_size"], out["vocab_size"], tower_sizes)
    out["dtype" if layout == "v2.5" else "torch_dtype"] = "bfloat16"
    modules = [*(f"layers.{layer}" for layer in range(out["num_hidden_layers"])), "decoder"]
    store_dtype = {"store_dtype": "fp8"} if layout == "v2.5" else {}
    out["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        **store_dtype,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "ignored_layers": [f"model.{module}.self_attn.o_proj" for module in modules],
    }
    return out


# --- values


def _put(files: ShardFiles, stored: _Stored, origin: RandomWeights | ConvertedWeights) -> None:
    matrices = [origin.read(name, shape, stored.dtype) for name, shape in stored.parts]
    if stored.dtype != "F8_E4M3":
        files.put(stored.name, matrices[0])
        return
    values, scales = [], []
    for rank in range(stored.ranks):
        rows = [matrix[len(matrix) * rank // stored.ranks :][: len(matrix) // stored.ranks] for matrix in matrices]
        encoded = encode_fp8(np.concatenate(rows) if len(rows) > 1 else rows[0])
        values.append(encoded[0])
        scales.append(encoded[1])
    if not all(np.isfinite(scale).all() for scale in scales):
        raise not_finite(stored.name)
    files.put(stored.name, np.concatenate(values))
    files.put(f"{stored.name}_scale_inv", np.concatenate(scales))
