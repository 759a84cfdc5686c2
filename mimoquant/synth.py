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
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mimoquant.checkpoint.hf_files import CONFIG_NAME, copy_side_files, side_files
from mimoquant.checkpoint.index import DTYPE_BYTES, INDEX_NAME, open_index, read_json_object, resolve_inside
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry, fsync_folder
from mimoquant.errors import CheckpointError, StoppedError, UsageError
from mimoquant.layer_weights import not_finite, split_qkv
from mimoquant.model.layout import ARCHITECTURES, FP8_BLOCK, TOWER_PREFIXES, Geometry, read_geometry, read_layout

Array = npt.NDArray[Any]
LAYOUTS = {"flash": "mimo_v2_flash", "v2.5": "mimo_v2", "pro": "mimo_v2"}
_E4M3_MAX = np.float32(448)
_BAND = 1024  # rows that are drawn together
_LARGE_CHANNELS = 64  # one input channel in so many is 10 to 20 times larger
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.(\w+)$")
_PATTERNS = ("hybrid_layer_pattern", "moe_layer_freq")  # a source may have them in transformers' words only
_FIXED_CONFIG: dict[str, Any] = {
    "hidden_act": "silu", "max_position_embeddings": 4096, "initializer_range": 0.02, "layernorm_epsilon": 1e-05,
    "use_cache": True, "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
    "swa_rope_theta": 10000, "partial_rotary_factor": 0.334, "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True, "n_shared_experts": None, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": None,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_TOWER_CONFIG: dict[str, Any] = {  # as published: speech_vocab_size is a string
    "audio_config": {"audio_channels": 2, "group_size": 4, "input_local_attn_heads": 4, "input_local_dim": 32,
                     "input_local_head_dim": 8, "input_local_intermediate_size": 64, "input_local_layers": 2,
                     "projection_layers": 2, "speech_vocab_size": "16", "speech_zeroemb_idx": "15"},
    "vision_config": {"depth": 2, "fullatt_block_indexes": [0], "hidden_act": "silu", "hidden_size": 32, "in_chans": 3,
                      "intermediate_size": 64, "num_heads": 4, "num_key_value_heads": 1, "patch_size": 4,
                      "spatial_merge_size": 2, "temporal_patch_size": 2, "use_sink": True},
}  # fmt: skip


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
    """What was written: `tensors` in `files` shards of `size_bytes`; `trap`: weights parted from their scale."""

    layout: str
    tensors: int
    files: int
    size_bytes: int
    trap: tuple[str, ...]


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
    out: Path, layout: str, *, source: Path | None = None, sizes: SynthSizes | None = None, seed: int = 0
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
            converted = _Converted(reader)
            return _synth(out, layout, converted.config, converted, seed)
    sizes = sizes or SynthSizes()
    return _synth(out, layout, _random_config(sizes, layout), _Random(seed, sizes.mtp_layers), seed)


def _synth(out: Path, layout: str, config: dict[str, Any], origin: _Random | _Converted, seed: int) -> SynthReport:
    config = _published_config(config, layout)
    geometry = read_geometry(config, str(out))
    _check_geometry(geometry)
    stored = list(_stored(geometry, origin.mtp_layers))
    if layout == "v2.5":
        stored += _towers(geometry.hidden)
    place, partial = functools.partial(_PLACEMENTS[layout], geometry), out.with_name(f"{out.name}.partial")
    towers = _Random(seed, 0)
    try:
        partial.mkdir(parents=True)
    except OSError as error:  # apart from the rest: a folder that is not ours must stay
        raise _unwritable(partial, error) from error
    try:
        files = _Files(partial, [entry for one in stored for entry in one.entries], place, metadata=layout == "flash")
        for one in stored:
            _put(files, one, towers if one.name.startswith(TOWER_PREFIXES) else origin)
        line_end = "\r\n" if layout == "pro" else "\n"
        for name, content in ((CONFIG_NAME, config), (INDEX_NAME, files.index(layout, geometry.qkv_chunks))):
            (partial / name).write_text(json.dumps(content, indent=2), encoding="utf-8", newline=line_end)
        if isinstance(origin, _Converted):
            copy_side_files(origin.folder, partial, side_files(origin.folder))
        _publish(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(partial, error) from error
        raise
    weights = [one.name for one in stored if one.dtype == "F8_E4M3"]
    trap = tuple(name for name in weights if place(name) != place(f"{name}_scale_inv"))
    return SynthReport(layout, len(files.weight_map), len(files.sizes), sum(files.sizes.values()), trap)


def _unwritable(folder: Path, error: OSError) -> StoppedError:
    return StoppedError(f"{folder}: cannot be written ({error.strerror})", hint="make room, or choose another folder")


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


def _stored(geometry: Geometry, mtp_layers: int) -> Iterator[_Stored]:
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


def _towers(hidden: int) -> Iterator[_Stored]:
    """Vision, audio and speech, tiny, with every kind of tensor of the real ones (sinks on windowed blocks only)."""
    mlp = {"mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
    local = "audio_encoder.input_local_transformer."
    for i in range(2):
        for name, shape in ({"attn.qkv": (96, 32), "attn.proj": (32, 64)} | mlp).items():
            yield _plain(f"visual.blocks.{i}.{name}.weight", *shape)
            yield _plain(f"visual.blocks.{i}.{name}.bias", shape[0])
        for name in ("norm1.weight", "norm2.weight", *(["attn.sinks"] if i else [])):
            yield _plain(f"visual.blocks.{i}.{name}", 4 if name == "attn.sinks" else 32)
        for name, shape in (mlp | {f"self_attn.{letter}_proj": (32, 32) for letter in "qkvo"}).items():
            yield _plain(f"{local}layers.{i}.{name}.weight", *shape)
        for name in (*(f"self_attn.{letter}_proj.bias" for letter in "qkv"), "input_layernorm.weight",
                     "post_attention_layernorm.weight"):  # fmt: skip
            yield _plain(f"{local}layers.{i}.{name}", 32)
        yield _plain(f"speech_embeddings.{i}.weight", 16, 32)
    yield _plain("visual.patch_embed.proj.weight", 32, 3, 2, 4, 4)
    for name, shape in (("visual.merger.mlp", (128, 128)), ("audio_encoder.projection.mlp", (256, 128))):
        yield _plain(f"{name}.0.weight", *shape)
        yield _plain(f"{name}.2.weight", hidden, shape[0])
    for name in ("visual.merger.ln_q.weight", f"{local}norm.weight"):
        yield _plain(name, 32)


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
        "vocab_size": sizes.vocab, "hidden_size": sizes.hidden, "intermediate_size": sizes.dense_intermediate,
        "num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim, "v_head_dim": sizes.v_head_dim, "swa_num_attention_heads": sizes.heads,
        "swa_num_key_value_heads": sizes.sliding_kv_heads, "swa_head_dim": sizes.head_dim,
        "swa_v_head_dim": sizes.v_head_dim, "n_routed_experts": sizes.experts, "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.expert_intermediate, "sliding_window": sizes.window,
        "sliding_window_size": sizes.window, "attention_chunk_size": sizes.window,
        "rope_theta": 5000000 if layout == "flash" else 10000000,
        "attention_value_scale": 0.612 if layout == "pro" else 0.707,
        "hybrid_layer_pattern": [int(i not in ends and i % stride != stride - 1) for i in range(sizes.layers)],
        "moe_layer_freq": [int(i > 0) for i in range(sizes.layers)],
    } | _FIXED_CONFIG | (_TOWER_CONFIG if layout == "v2.5" else {})  # fmt: skip


def _published_config(config: dict[str, Any], layout: str) -> dict[str, Any]:
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
            "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in out[_PATTERNS[0]]],
            "mlp_layer_types": ["sparse" if sparse else "dense" for sparse in out[_PATTERNS[1]]],
            "rope_parameters": {kind: rope | {"rope_theta": theta} for kind, theta in thetas.items()},
        }
        out = said_again | out
    else:
        out["attention_projection_layout"] = "fused_qkv"
    out["dtype" if layout == "v2.5" else "torch_dtype"] = "bfloat16"
    modules = [*(f"layers.{layer}" for layer in range(out["num_hidden_layers"])), "decoder"]
    store_dtype = {"store_dtype": "fp8"} if layout == "v2.5" else {}
    out["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", **store_dtype,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "ignored_layers": [f"model.{module}.self_attn.o_proj" for module in modules],
    }  # fmt: skip
    return out


# --- which file a tensor is in

Placement = Callable[[str], str]


def _experts_per_rank(geometry: Geometry) -> int:
    ranks = 2 if geometry.experts < 64 else 8 if geometry.experts < 384 else 32
    return math.ceil(geometry.experts / ranks)


def _place_flash(geometry: Geometry, name: str) -> str:
    if match := _EXPERT.match(name):
        return f"model_{match[1]}_linear_fc{2 if match[3] == 'down' else 1}.safetensors"
    if match := re.match(r"model\.layers\.(\d+)\.", name):
        return f"model_{match[1]}.safetensors"
    part = "mtp" if name.startswith("model.mtp.") else "embedding" if "embed_tokens" in name else "final"
    return f"model_{part}.safetensors"


def _place_v25(geometry: Geometry, name: str) -> str:
    """The trap: the writer's cut falls into the last layer but one, inside the last expert's `up_proj` of each rank."""
    per_rank, cut = _experts_per_rank(geometry), geometry.layers - 2
    match = _EXPERT.match(name)
    if not match:
        return f"model_{'mtp' if name.startswith('model.mtp.') else 'pp0_ep0_shard1'}.safetensors"
    layer, expert, projection = int(match[1]), int(match[2]), match[3]
    late = layer > cut or (layer == cut and projection == "down")
    if layer == cut and projection == "up" and match[4] == "weight_scale_inv":
        late = expert % per_rank == per_rank - 1 or expert == geometry.experts - 1
    return f"model_pp0_ep{expert // per_rank}_shard{int(late)}.safetensors"


def _place_pro(geometry: Geometry, name: str) -> str:
    if match := _EXPERT.match(name):
        return f"model_pp0_ep{int(match[2]) // _experts_per_rank(geometry)}_shard0.safetensors"
    if name.startswith("model.mtp."):
        return "model_mtp.safetensors"
    early = re.match(r"model\.(embed_tokens\.|layers\.([01]\.|2\.(input_layernorm|self_attn)\.))", name)
    return f"model_pp0_ep0_shard{0 if early else 1}.safetensors"


_PLACEMENTS = {"flash": _place_flash, "v2.5": _place_v25, "pro": _place_pro}


class _Files:
    """All shards of a checkpoint, laid out at once and then filled in any order."""

    def __init__(self, folder: Path, entries: list[Entry], place: Placement, metadata: bool) -> None:
        self.weight_map = {entry.name: place(entry.name) for entry in entries}
        self.sizes: dict[str, int] = {}
        self._total_bytes = sum(entry.size_bytes for entry in entries)
        self._ranges: dict[str, tuple[Path, int, int]] = {}
        shards: dict[str, list[Entry]] = {}
        for entry in entries:
            shards.setdefault(self.weight_map[entry.name], []).append(entry)
        for file, members in shards.items():
            members.sort(key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name))  # as the safetensors library does
            header = _header(members, metadata)
            offset = len(header)
            for entry in members:
                self._ranges[entry.name] = folder / file, offset, entry.size_bytes
                offset += entry.size_bytes
            self.sizes[file] = offset
            with (folder / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(offset)

    def put(self, name: str, data: Array) -> None:
        path, offset, size = self._ranges.pop(name)
        if data.nbytes != size:
            raise ValueError(f"{name}: {data.nbytes} bytes where {size} belong")
        with path.open("r+b") as handle:
            handle.seek(offset)
            handle.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def index(self, layout: str, tp_size: int) -> dict[str, Any]:
        """The index file's content. Every tensor must have been put."""
        if self._ranges:
            raise ValueError(f"{len(self._ranges)} tensors were never written, first {min(self._ranges)}")
        metadata: dict[str, Any] = {"total_size": self._total_bytes}
        if layout != "flash":
            metadata = {"save_format": "fp8", **metadata, "tp_size": tp_size}
        return {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))}


def _header(entries: list[Entry], metadata: bool) -> bytes:
    """A safetensors header. The published V2.5 and Pro files have no metadata in theirs."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    begin = 0
    for entry in entries:
        end = begin + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (begin, end)}
        begin = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


# --- values


def _put(files: _Files, stored: _Stored, origin: _Random | _Converted) -> None:
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


def encode_fp8(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """float32 [O, I] → E4M3 bits [O, I] and float32 scales [ceil(O / 128), ceil(I / 128)]; scale = amax / 448."""
    rows, width = weight.shape
    starts = np.arange(0, width, FP8_BLOCK)
    values = np.empty(weight.shape, np.uint8)
    scales = np.empty((math.ceil(rows / FP8_BLOCK), len(starts)), np.float32)
    for i, begin in enumerate(range(0, rows, FP8_BLOCK)):
        band = weight[begin : begin + FP8_BLOCK]
        amax = np.maximum.reduceat(np.abs(band).max(axis=0), starts)
        scales[i] = np.where(amax == 0, np.float32(1), amax / _E4M3_MAX)  # a block of zeros: any scale will do
        with np.errstate(invalid="ignore"):  # the caller sees Inf in the scales
            scaled = torch.from_numpy(band / np.repeat(scales[i], FP8_BLOCK)[:width])
        values[begin : begin + FP8_BLOCK] = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return values, scales


class _Random:
    """Random tensors, whose bytes depend on seed, name and shape only: SFC64 bits, looked up in normal quantiles.

    numpy promises that its bit streams stay the same over versions, not its distributions; this is also faster.
    """

    def __init__(self, seed: int, mtp_layers: int) -> None:
        self.seed, self.mtp_layers = seed, mtp_layers

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """A logical tensor as bf16 bits (`dtype` BF16) or as float32 (F32, F8_E4M3)."""
        digest = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        stream = np.random.SFC64(int.from_bytes(digest[:16], "little"))
        rows, width = shape[0], math.prod(shape[1:])
        mean, gain = _statistics(stream, name, shape)
        out: Array = np.empty((rows, width), np.uint16 if dtype == "BF16" else np.float32)
        for begin in range(0, rows, _BAND):
            count = min(_BAND, rows - begin)
            raw = stream.random_raw(math.ceil(count * width / 4)).astype("<u8", copy=False).view("<u2")
            band = np.take(_normal_quantiles(), raw[: count * width].reshape(count, width))
            band *= gain
            band += mean
            out[begin : begin + count] = _bf16_bits(band) if dtype == "BF16" else band
        return out.reshape(shape)


def _statistics(stream: np.random.SFC64, name: str, shape: tuple[int, ...]) -> tuple[np.float32, Array]:
    """(mean, standard deviation of each column).

    Projections have a few large input channels, which bring most of an output's variance: the others get half of the
    usual 1 / sqrt(in).
    """
    width = math.prod(shape[1:])
    if len(shape) == 1:
        norm = "norm" in name or name.endswith("ln_q.weight")
        kinds = (("e_score_correction_bias", 0.01), ("sink", 0.5), ("norm", 0.1), ("ln_q", 0.1), ("", 0.02))
        std = next(std for part, std in kinds if part in name)
        return np.float32(1 if norm else 0), np.array([std], np.float32)
    if not name.endswith("_proj.weight") or name.startswith(TOWER_PREFIXES):
        return np.float32(0), np.full(width, 0.02, np.float32)
    gain = np.full(width, 0.5 / math.sqrt(width), np.float32)
    large = max(1, width // _LARGE_CHANNELS)
    draws = stream.random_raw(2 * large)
    gain[draws[:large] % np.uint64(width)] *= (10 + draws[large:] % np.uint64(11)).astype(np.float32)
    return np.float32(0), gain


@functools.cache
def _normal_quantiles() -> npt.NDArray[np.float32]:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**16)], np.float32)


def _bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


class _Converted:
    """The tensors of a bf16 checkpoint of this family; a fused qkv is taken apart."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader, self.folder = reader, reader.index.folder
        config = read_json_object(resolve_inside(self.folder, CONFIG_NAME))
        quantization = config.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UsageError(
                f"{self.folder}: is quantized already ({method})", hint="only a bf16 checkpoint is converted"
            )
        layout = read_layout(reader.index, config)
        if towers := layout.units.get("towers"):
            raise UsageError(
                f"{self.folder}: holds {len(towers)} vision, audio or speech tensors, which are not converted",
                hint="remove them; v2.5 gets small random ones",
            )
        self.geometry, self.mtp_layers = layout.geometry, layout.mtp_layers
        patterns = zip(_PATTERNS, (self.geometry.sliding, self.geometry.moe), strict=True)
        self.config = config | {key: [int(value) for value in values] for key, values in patterns}

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """As `_Random.read`; the shape is the source's own."""
        match = re.search(r"self_attn\.([qkv])_proj\.weight$", name)
        if self.geometry.fused_qkv and match:
            layer = re.match(r"model\.layers\.(\d+)\.", name)  # MTP layers are sliding
            sliding = self.geometry.sliding[int(layer[1])] if layer else True
            fused = self._values(f"{name[: match.start(1)]}qkv_proj.weight", dtype)
            return split_qkv(fused, self.geometry, sliding=sliding)["qkv".index(match[1])]
        return self._values(name, dtype)

    def _values(self, name: str, dtype: str) -> Array:
        info, raw = self.reader.index.tensors[name], self.reader.read(name)
        if dtype == "BF16":
            if info.dtype != "BF16":
                raise CheckpointError(f"{self.folder}: {name} is {info.dtype}, but every layout holds it as BF16")
            return raw.view(np.uint16).reshape(info.shape)
        if info.dtype == "F32":
            return raw.view(np.float32).reshape(info.shape)
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(info.shape)
