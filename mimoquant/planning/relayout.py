"""qkv in another layout, everything else byte for byte: the plan of `relayout`, and the texts it writes.

Key idea: a relayout is a plan whose recipe quantizes nothing. Experts, packed or not, and all other tensors are copied;
a layer's qkv is a `Reorder`. So the run, its journal, resume and `verify` are those of `quantize`.

    interleaved   one qkv_proj, [Q_0|K_0|V_0|Q_1|...] in tp chunks; published: as many as num_key_value_heads
    canonical     one qkv_proj, [Q|K|V], which is one chunk
    split         q_proj, k_proj, v_proj

How many chunks a fused tensor has cannot be seen in bf16. `tp_size` in the index's metadata says it, where Xiaomi's own
files have it; no engine looks there (vLLM and SGLang take num_key_value_heads), so it changes nothing but what we read.

FP8 stays FP8 where each 128-row block of the target takes its rows from one scale row. A kind of layer is exact

    published kind                     chunk: q, k, v rows      to split    to canonical   to other chunks
    V2.5 global (4 KV heads)           3072, 192, 128           no: v       no             no (1, 2)
    V2.5 sliding, MTP (8 KV heads)     3072, 384, 256           yes         yes            yes (1, 2)
    V2.5-Pro, both kinds (8 KV heads)  3072, 192, 128           no: v       no             no (1, 2, 4)
    V2-Flash global, split             k blocked by heads       -           no: k          no (2, 4)
    V2-Flash sliding, MTP, split       k, v on whole blocks     -           yes            yes (2, 4)

and since a checkpoint has one layout, no published one can change it in FP8: k's last 64 rows of a chunk share a block
with v's first 64. `--dtype bf16` is exact for all. Left out: FP8 from bf16, which would quantize; MXFP8 qkv.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mimoquant.__version__ import SCHEMA_VERSION, __version__
from mimoquant.checkpoint.folders import resolve_inside
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME, MODELOPT_CONFIG_NAME, side_files
from mimoquant.checkpoint.index import open_index, read_json_inside
from mimoquant.checkpoint.writer import Entry, file_order
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.config_keys import drop_text_key, set_text_key
from mimoquant.model.geometry import Geometry
from mimoquant.model.layout import PROJECTIONS, ModelLayout, Weight, read_layout
from mimoquant.model.qkv import possible_chunks
from mimoquant.model.releases import check_repository, is_repository, is_revision
from mimoquant.planning.plan import Plan
from mimoquant.planning.recipe import Recipe
from mimoquant.planning.reorder import Reorder, reorder
from mimoquant.planning.settings_beside import read_config
from mimoquant.planning.units import Copy, Step, lay_out, layer_of
from mimoquant.weights.container import NATIVE, ignore_qkv

SPLIT, CANONICAL, INTERLEAVED = LAYOUTS = ("split", "canonical", "interleaved")
RECORD_NAME = "relayout.json"
_NOTHING = Recipe("relayout", "rtn", groups=(), ignore=(), scale_search="absmax")
_HEADING = "## Layout of qkv"
_QKV_ROLES = ("qkv", "q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class RelayoutPlan(Plan):
    """Everything a relayout will do. `target`: the geometry that the output will be read with."""

    target: Geometry
    qkv: str
    bf16: bool
    base_model: str | None
    source_revision: str | None

    def record(self) -> dict[str, Any]:
        """What was asked for, and of which source: `OUT/relayout.json`."""
        named = {"base_model": self.base_model, "source_revision": self.source_revision}
        return {
            "schema_version": SCHEMA_VERSION,
            "mimoquant": __version__,
            "qkv": self.qkv,
            "tp": self.target.qkv_chunks if self.qkv == INTERLEAVED else None,
            "bf16": self.bf16,
            "source_headers_sha256": self.layout.index.headers_fingerprint(),
        } | {key: value for key, value in named.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        return {key: str(value) for key, value in self.record().items()}

    @property
    def moved(self) -> list[Reorder]:
        return [step for unit in self.units for step in unit.steps if isinstance(step, Reorder)]


def make_relayout(
    source: Path | str,
    qkv: str,
    *,
    tp: int | None = None,
    bf16: bool = False,
    allow_unknown: bool = False,
    base_model: str | None = None,
    source_revision: str | None = None,
) -> RelayoutPlan:
    """Plan a relayout. Reads headers and config.json only.

    Args:
        qkv: one of LAYOUTS. tp: chunks of `interleaved`; None: num_key_value_heads.
        bf16: qkv in FP8 becomes bf16. Otherwise its codes and scales are kept.
        base_model: the source's repository on the Hub, for the card; None: what the source's card says.
        source_revision: ORG/NAME@COMMIT that the source is.
    Raises:
        UsageError: nothing would change, the heads do not split, FP8 cannot be kept. CheckpointError: the source.
    """
    index = open_index(source)
    config = read_config(index)
    layout = read_layout(index, config, allow_unknown=allow_unknown, packed=True)
    target, fp8 = _target(layout, qkv, tp), _fp8_qkv(layout)
    dequantized = bf16 and fp8
    before = layout.geometry
    if (before.fused_qkv, before.qkv_chunks) == (target.fused_qkv, target.qkv_chunks) and not dequantized:
        chunks = f" over {target.qkv_chunks}" if qkv == INTERLEAVED else ""
        raise UsageError(f"{source}: qkv is {qkv}{chunks} already, nothing would change")
    steps = {
        name: tuple(sorted(_steps(layout, target, name, bf16=bf16), key=lambda step: file_order(step.entries[0])))
        for name in layout.units
    }
    carried = side_files(index.folder, index.file_sizes).sizes
    for name in (
        "recipe.yaml",
        FINGERPRINTS_NAME,
        MODELOPT_CONFIG_NAME,
    ):  # how its experts were made, on what, and what they are
        if (index.folder / name).is_file():
            carried[name] = resolve_inside(index.folder, name).stat().st_size
    plan = RelayoutPlan(
        layout,
        _NOTHING,
        NATIVE,
        {},
        {},
        lay_out(steps, index.folder),
        carried,
        [],
        {},
        target=target,
        qkv=qkv,
        bf16=bf16,
        base_model=None if base_model is None else check_repository(base_model),
        source_revision=source_revision,
    )
    metadata = {key: value for key, value in index.metadata.items() if key != "tp_size"}
    metadata |= {"total_size": plan.tensor_bytes} | ({"tp_size": target.qkv_chunks} if target.fused_qkv else {})
    return replace(plan, config=_config(plan), index_metadata=metadata, notes=_notes(plan))


def _fp8_qkv(layout: ModelLayout) -> bool:
    """Whether any q, k, v is FP8. Raises UsageError where that cannot be relaid."""
    fp8 = any(w.scale for weights in layout.units.values() for w in weights if w.role in _QKV_ROLES)
    if fp8 and layout.geometry.mxfp8:
        raise UsageError(
            f"{layout.index.folder}: its qkv is FP8 in ModelOpt's container, whose quantized_layers would no longer "
            "hold",
            hint="quantize its source anew, with --dense bf16 for split q, k, v",
        )
    return fp8


def _target(layout: ModelLayout, qkv: str, tp: int | None) -> Geometry:
    geometry = layout.geometry
    published = geometry.global_attention.kv_heads
    if qkv != INTERLEAVED:
        if tp is not None:
            raise UsageError(f"--tp {tp}: is about --qkv {INTERLEAVED}, not {qkv}")
        return replace(geometry, fused_qkv=qkv == CANONICAL, qkv_chunks=1 if qkv == CANONICAL else published)
    chunks, possible = tp or published, possible_chunks(geometry)
    if chunks not in possible:
        kinds = ", ".join(
            f"{kind.heads} heads with {kind.kv_heads} KV heads"
            for kind in (geometry.global_attention, geometry.sliding_attention)
        )
        raise UsageError(
            f"--tp {chunks}: {layout.index.folder} has {kinds}, which do not split over {chunks} chunks",
            hint=f"give {' or '.join(map(str, possible))}",
        )
    return replace(geometry, fused_qkv=True, qkv_chunks=chunks)


def _steps(layout: ModelLayout, target: Geometry, unit: str, *, bf16: bool) -> Iterator[Step]:
    layer = layer_of(unit)
    sliding = layer is None or layout.geometry.sliding[layer]  # MTP layers are sliding
    attentions: dict[str, list[Weight]] = {}
    for weight in layout.units[unit]:
        if weight.role in _QKV_ROLES:
            attentions.setdefault(weight.name.rpartition("self_attn.")[0], []).append(weight)
        else:
            yield from _copies(weight)
    for weights in attentions.values():
        yield from reorder(weights, layout.geometry, target, sliding=sliding, bf16=bf16)
    if layer is not None and layout.geometry.moe[layer]:
        for expert in range(layout.geometry.experts):
            for projection in PROJECTIONS:
                yield from _copies(layout.expert(layer, expert, projection))


def _copies(weight: Weight) -> Iterator[Copy]:
    for info in weight.infos:
        yield Copy(weight, info, (Entry(info.name, info.dtype, info.shape),))


def _config(plan: RelayoutPlan) -> dict[str, Any]:
    """config.json for the new layout. MTP's qkv has two names: vLLM's, which is that of the files, and SGLang's."""
    out = copy.deepcopy(plan.layout.config)
    if plan.target.fused_qkv:
        set_text_key(out, "attention_projection_layout", "fused_qkv")
    elif plan.target.model_type == "mimo_v2_flash":  # as published; older engines do not know "split"
        drop_text_key(out, "attention_projection_layout")
    else:
        set_text_key(out, "attention_projection_layout", "split")
    stems = [step.weight.name.rpartition(".self_attn.")[0] for step in plan.moved if step.entries[0].dtype == "BF16"]
    if plan.layout.geometry.fp8 and stems:
        if any(stem.startswith("model.mtp.") for stem in stems):
            stems.append("model.decoder")
        ignore_qkv(out, stems)
    return out


def _notes(plan: RelayoutPlan) -> list[str]:
    dequantized = sum(step.scale_rows is not None for step in plan.moved)
    kept = sum(step.entries[0].dtype == "F8_E4M3" for step in plan.moved)
    notes = []
    if dequantized:
        notes.append(f"qkv of {dequantized} layers becomes bf16: the product of FP8 code and scale, rounded once")
    if kept:
        notes.append(f"qkv of {kept} layers stays FP8: codes and scales are moved, nothing is computed")
    if plan.layout.unknown:
        notes.append(
            f"{len(plan.layout.unknown)} unknown tensors are copied as they are, first {plan.layout.unknown[0]}"
        )
    return notes


def relayout_texts(plan: RelayoutPlan) -> dict[str, str]:
    """The small files that only a relayout writes: its record, and the source's model card with what was done."""
    folder, card = plan.layout.index.folder, ""
    if (folder / "README.md").is_file():
        card = resolve_inside(folder, "README.md").read_text(encoding="utf-8", errors="replace")
    card = card.partition(_HEADING)[0].rstrip("\n")  # of an earlier relayout, what it said is past
    chunks = f" in {plan.target.qkv_chunks} chunks" if plan.qkv == INTERLEAVED else ""
    if plan.base_model is not None:
        card = _with_base_model(card, plan.base_model)
    said = [
        *([card, ""] if card else []),
        _HEADING,
        "",
        f"`mimoquant relayout` {__version__} wrote q, k and v as `{plan.qkv}`{chunks}, whatever else is said "
        "of their layout. Every other tensor is the source's, byte for byte.",
        "",
        *(f"- {note}" for note in plan.notes),
        *([""] if plan.notes else []),
        "`mimoquant verify THIS --source SOURCE`, SOURCE being what was relaid, proves the files.",
    ]
    return {RECORD_NAME: json.dumps(plan.record(), indent=2), "README.md": "\n".join(said)}


def _with_base_model(card: str, name: str) -> str:
    """A card whose front matter names this base model and no other."""
    lines = card.split("\n")
    end = lines.index("---", 1) if lines[0] == "---" and "---" in lines[1:] else 0
    front, rest = (lines[1:end], lines[end + 1 :]) if end else ([], lines)
    kept, dropping = [], False
    for line in front:
        dropping = line.startswith("base_model:") or (dropping and line.startswith(("-", " ")))  # or one of its list
        kept += [] if dropping else [line]
    return "\n".join(["---", *kept, f"base_model: {name}", "---", *rest]).rstrip("\n")


def plan_again(out: Path, source: Path | str) -> RelayoutPlan:
    """The plan that `out`'s record tells of. Raises CheckpointError where the record is damaged."""
    record = read_json_inside(out, RECORD_NAME, max_bytes=1_000_000)
    qkv, tp, bf16, base = (record.get(key) for key in ("qkv", "tp", "bf16", "base_model"))
    named, read = base is None or (isinstance(base, str) and is_repository(base)), record.get("source_revision")
    named = named and (read is None or (isinstance(read, str) and is_revision(read)))
    if qkv not in LAYOUTS or not isinstance(bf16, bool) or not (tp is None or type(tp) is int) or not named:
        raise CheckpointError(
            f"{out / RECORD_NAME}: is damaged (qkv {qkv!r}, tp {tp!r}, bf16 {bf16!r}, base_model {base!r})"
        )
    before, now = record.get("source_headers_sha256"), open_index(source).headers_fingerprint()
    if before != now:
        raise CheckpointError(
            f"{out}: was not made from {source}: the headers of its source had sha256 {str(before)[:12]}..., "
            f"here they have {now[:12]}...",
            hint="give the checkpoint that relayout read; what that was made from is proven by its own verify",
        )
    return make_relayout(source, qkv, tp=tp, bf16=bf16, allow_unknown=True, base_model=base, source_revision=read)
