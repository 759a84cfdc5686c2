"""What the verbs print: facts as plain data (for --json), and the same facts as text.

Key idea: text is made from the JSON facts, so the two cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimoquant.checkpoint.journal import JournalLine, free_bytes
from mimoquant.errors import RecipeError
from mimoquant.mixing.mixtures import formats_of
from mimoquant.mixing.needs import Forks, fork_needs, forward_passes, state_bytes
from mimoquant.model.drafter import carried_drafter
from mimoquant.model.geometry import Geometry
from mimoquant.model.layout import ModelLayout
from mimoquant.output.quantize_report import SCHEMA_VERSION, layers_of_formats, size
from mimoquant.planning.needs import Machine, largest_chunk, needs, refusal
from mimoquant.planning.plan import Plan, ranges
from mimoquant.planning.relayout import RelayoutPlan
from mimoquant.planning.units import Experts, Shapes
from mimoquant.serving.check import engine_lines, planned_facts, planned_lines
from mimoquant.serving.served import planned

if TYPE_CHECKING:
    from mimoquant.run.rehearsal import Estimate


def layout_facts(layout: ModelLayout) -> dict[str, Any]:
    """`inspect`."""
    geometry, index = layout.geometry, layout.index
    split, parted = expert_placement(layout)
    attention = {"global": geometry.global_attention, "sliding": geometry.sliding_attention}
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": str(index.folder),
        "model_type": geometry.model_type,
        "release": geometry.release,
        "files": len(index.file_sizes),
        "tensors": len(index.tensors),
        "size_bytes": index.size_bytes,
        "weights": _weights(layout),
        "layers": geometry.layers,
        "global_layers": [n for n, sliding in enumerate(geometry.sliding) if not sliding],
        "moe_layers": geometry.moe_layers,
        "hidden": geometry.hidden,
        "experts": geometry.experts,
        "top_k": geometry.top_k,
        "expert_intermediate": geometry.expert_intermediate,
        "attention": {
            kind: {"heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "v_head_dim": a.v_head_dim}
            for kind, a in attention.items()
        },
        "qkv": qkv_text(geometry),
        "mtp_layers": layout.mtp_layers,
        "drafter": drafter_facts(layout),
        "bytes_by_role": {role: dict(sizes) for role, sizes in role_sizes(layout).items()},
        "layers_with_an_expert_in_two_files": split,
        "weights_parted_from_their_scale": parted,
        "unknown_tensors": layout.unknown,
    }


def qkv_text(geometry: Geometry) -> str:
    """How q, k and v lie on disk."""
    if not geometry.fused_qkv:
        return "split"
    return "fused [Q|K|V]" if geometry.qkv_chunks == 1 else f"fused, {geometry.qkv_chunks} interleaved ranks"


def drafter_facts(layout: ModelLayout) -> dict[str, Any] | None:
    """The drafter in the checkpoint's folder; `problem`: why it could not be used, if so."""
    drafter, problem = carried_drafter(layout.index.folder, layout.geometry)
    if drafter is None:
        return {"problem": problem} if problem else None
    return {"problem": problem, "layers": drafter.layers, "block_size": drafter.block, "window": drafter.window,
            "captured_layers": list(drafter.captured)}  # fmt: skip


def drafter_text(facts: dict[str, Any]) -> str:
    """In one line."""
    if facts["problem"]:
        return f"cannot be used ({facts['problem']})"
    layers, window = ranges(facts["captured_layers"]), facts["window"] or "none"
    return (
        f"DFlash, {facts['layers']} layers, blocks of {facts['block_size']}, window {window}, reads states after "
        f"layers {layers}"
    )


def _weights(layout: ModelLayout) -> str:
    """What most of the checkpoint is stored in."""
    if any(weight.packed for weight in layout.experts.values()):
        return "4-bit experts"
    return "fp8 128x128" if layout.geometry.fp8 else "bf16"


def layout_text(facts: dict[str, Any]) -> str:
    release = f" ({facts['release']})" if facts["release"] else ""
    lines = [
        f"{facts['model_type']}{release}, {facts['weights']}, {size(facts['size_bytes'])} "
        f"in {facts['tensors']} tensors, {facts['files']} files",
        f"layers    {facts['layers']}, of which {len(facts['moe_layers'])} with {facts['experts']} routed experts "
        f"(top {facts['top_k']}, width {facts['hidden']} x {facts['expert_intermediate']})",
        f"attention qkv {facts['qkv']}; global in layers {ranges(facts['global_layers'])}, sliding window elsewhere",
        f"MTP       {facts['mtp_layers'] or 'no'} layers",
        *([f"drafter   {drafter_text(facts['drafter'])}"] if facts["drafter"] else []),
        "",
        *table(
            ("weights", "dtype", "size"),
            [(role, dtype, size(count)) for role, sizes in facts["bytes_by_role"].items()
             for dtype, count in sorted(sizes.items())],
        ),
    ]  # fmt: skip
    if facts["layers_with_an_expert_in_two_files"]:
        lines += [
            "",
            f"note: experts of layer {', '.join(facts['layers_with_an_expert_in_two_files'])} lie in two files",
        ]
    parted = facts["weights_parted_from_their_scale"]
    if parted:
        lines += [f"note: {len(parted)} weights lie in another file than their scale, first {parted[0]}"]
    if facts["unknown_tensors"]:
        lines += [f"note: {len(facts['unknown_tensors'])} unknown tensors, first {facts['unknown_tensors'][0]}"]
    return "\n".join(lines)


def plan_facts(
    plan: Plan, device: str, has: Machine, took: Estimate | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """`plan`. `took`: of a rehearsal, if there was one. `folder`: on whose disk the output would lie."""
    wants, refused = needs(plan, device), refusal(plan, device, has)
    free = None if folder is None else free_bytes(folder)
    notes = [*plan.notes, *([f"quantize would refuse: {refused}; {refused.hint}"] if refused else [])]
    if free is not None and free < plan.shard_bytes + plan.side_bytes:
        notes.append(f"{folder}: has room for {size(free)} only")
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(plan.layout.index.folder),
        "recipe": plan.recipe.name,
        "method": plan.recipe.method,
        "scale_search": plan.recipe.scale_search,
        "container": plan.container,
        "formats": plan.layers_by_format,
        "carve_outs": {str(layer): kind for layer, kind in sorted(plan.carve_outs.items())},
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "output_tensor_bytes": plan.tensor_bytes,
        "output_tensors": sum(len(unit.entries) for unit in plan.units),
        "output_bytes_by_role": planned_sizes(plan),
        "device": device,
        "host_memory_bytes": wants.host_bytes,
        "gpu_memory_bytes": wants.gpu_bytes,
        "machine": asdict(has),
        "experts_at_once": largest_chunk(plan),
        "sensitivity": _sensitivity_facts(plan, device),
        "estimate": None
        if took is None
        else asdict(took) | dict(zip(("bound_by", "total_s"), took.bound, strict=True)),
        "shards": [{"unit": unit.name, "file": unit.file, "size_bytes": unit.size_bytes} for unit in plan.units],
        "side_files": plan.side_files,
        "side_bytes": plan.side_bytes,
        "drafter": drafter_facts(plan.layout),
        "disk_free_bytes": free,
        "notes": notes,
        "engines": planned_facts(planned(plan)),
    }


def _sensitivity_facts(plan: Plan, device: str) -> dict[str, Any] | None:
    """What `sensitivity` would need for this recipe, on as many tokens as it takes by itself; None where it refuses."""
    try:
        forks = Forks(plan, len(formats_of(plan)))
    except RecipeError:
        return None
    wants = fork_needs(forks, device)
    return {"forward_passes": forward_passes(forks), "tokens": forks.tokens, "host_memory_bytes": wants.host_bytes,
            "gpu_memory_bytes": wants.gpu_bytes, "resume_bytes": 2 * state_bytes(forks)}  # fmt: skip


def plan_text(facts: dict[str, Any]) -> str:
    formats = "; ".join(f"{label} in layers {ranges(layers)}" for label, layers in facts["formats"].items())
    kept = ", ".join(f"layer {layer} stays {kind}" for layer, kind in facts["carve_outs"].items()) or "none"
    before, after = facts["source_bytes"], facts["output_bytes"]
    largest = max(facts["shards"], key=lambda shard: shard["size_bytes"])
    return "\n".join(
        [
            f"recipe     {facts['recipe']}: {facts['method']}, scales by {facts['scale_search']}",
            f"experts    {formats}",
            f"carve-outs {kept}",
            f"container  {facts['container']}",
            f"size       {size(before)} -> {size(after)} ({after / before:.1%}), {after} bytes in "
            f"{len(facts['shards'])} shards, the largest {size(largest['size_bytes'])} ({largest['unit']})",
            *_demands(facts),
            f"beside     {len(facts['side_files'])} other files are copied, {size(facts['side_bytes'])}",
            *([f"drafter    {drafter_text(facts['drafter'])}"] if facts["drafter"] else []),
            "",
            *table(
                ("weights", "output"),
                [(role, size(count)) for role, count in facts["output_bytes_by_role"].items()],
            ),
            *(["", *(f"note: {note}" for note in facts["notes"])] if facts["notes"] else []),
            *planned_lines(facts["engines"]),
        ]
    )


def _demands(facts: dict[str, Any]) -> list[str]:
    """Lines on memory and time, and on those of `sensitivity`."""
    has, took = facts["machine"], facts["estimate"]
    lines = [f"memory     at most about {size(facts['host_memory_bytes'])} of host memory "
             f"(here {size(has['host_bytes'])}, free {size(has['host_free_bytes'])})"]  # fmt: skip
    if facts["gpu_memory_bytes"]:
        lines.append(f"GPU        at most about {size(facts['gpu_memory_bytes'])} of its memory (here "
                     f"{size(has['gpu_bytes'])}), {facts['experts_at_once']} experts at once")  # fmt: skip
    if facts["disk_free_bytes"] is not None:
        lines.append(f"disk       {size(facts['output_bytes'] + facts['side_bytes'])}, free are "
                     f"{size(facts['disk_free_bytes'])}")  # fmt: skip
    if took:
        lines.append(f"time       about {duration(took['total_s'])}, bound by {took['bound_by']}: computing "
                     f"{duration(took['computing_s'])}, reading {duration(took['reading_s'])} at "
                     f"{size(int(took['read_bytes_per_s']))}/s, writing {duration(took['writing_s'])} at "
                     f"{size(int(took['write_bytes_per_s']))}/s")  # fmt: skip
    if forks := facts["sensitivity"]:
        gpu = f" and {size(forks['gpu_memory_bytes'])} of a GPU's" if forks["gpu_memory_bytes"] else ""
        lines.append(f"forks      sensitivity would take {forks['forward_passes']:.1f} forward passes of "
                     f"{forks['tokens']} tokens, at most about {size(forks['host_memory_bytes'])} of host memory{gpu}, "
                     f"{size(forks['resume_bytes'])} to resume from")  # fmt: skip
    return lines


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def quantize_text(facts: dict[str, Any]) -> str:
    before, after, seconds = facts["source_bytes"], facts["output_bytes"], facts["elapsed_s"]
    formats = layers_of_formats(facts["formats"])
    return "\n".join(
        [
            f"wrote      {facts['out']}: {len(facts['shards'])} shards, {size(after)} ({after / before:.1%} of source)",
            f"experts    {formats} ({facts['method']}, scales by {facts['scale_search']}), {facts['container']}",
            *([f"coverage   {coverage_text(facts['calibration'])}"] if facts["calibration"] else []),
            f"time       {seconds:.1f} s, {size(int(before / max(seconds, 1e-3)))}/s of source; bound by "
            f"{facts['bound_by']['what']} ({facts['bound_by']['share']:.0%})",
        ]
    )


def relayout_facts(
    plan: RelayoutPlan, finished: dict[str, JournalLine], engines: list[dict[str, Any]]
) -> dict[str, Any]:
    """`relayout`. `engines`: what `planned_facts` says of it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": str(plan.layout.index.folder),
        "qkv": {"before": qkv_text(plan.layout.geometry), "after": qkv_text(plan.target)},
        "dtypes": {"before": _dtypes(step.weight.info.dtype for step in plan.moved),
                   "after": _dtypes(entry.dtype for step in plan.moved for entry in step.entries
                                    if entry.name.endswith("weight"))},
        "layers": len({step.weight.name for step in plan.moved}),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "notes": plan.notes,
        "shards": [finished[unit.name].as_plain() for unit in plan.units],
        "engines": engines,
    }  # fmt: skip


def _dtypes(dtypes: Iterable[str]) -> str:
    return ", ".join(sorted(set(dtypes)))


def relayout_text(facts: dict[str, Any]) -> str:
    qkv, dtypes, after = facts["qkv"], facts["dtypes"], facts["output_bytes"]
    return "\n".join(
        [
            f"wrote      {facts['out']}: {len(facts['shards'])} shards, {size(after)} "
            f"({after / facts['source_bytes']:.1%} of source)",
            f"qkv        {qkv['before']}, {dtypes['before']} -> {qkv['after']}, {dtypes['after']} "
            f"in {facts['layers']} layers",
            f"time       {facts['elapsed_s']:.1f} s, {size(int(after / max(facts['elapsed_s'], 1e-3)))}/s",
        ]
    )


def coverage_text(layers: dict[str, dict[str, Any]]) -> str:
    """What the calibration tokens reached and gained, in one line."""
    c = coverage(layers.values())
    least, low, median = map(token_count, c["tokens"])
    weakest, strongest = c["lambda"]
    changed = c["topk_changed"][0] if c["topk_changed"] else 0.0
    routed = f"; top-k changed for {100 * changed:.3g} % of tokens" if changed else ""
    return (
        f"tokens per expert {least} min, {low} p5, {median} median; {c['starved']} of {c['experts']} starved, "
        f"{c['without_tokens']} without; lambda {weakest:.3g} to {strongest:.3g}; "
        f"relMSE {c['relmse_plain'][0]:.3g} -> {c['relmse'][0]:.3g}{routed}"
    )


def coverage(layers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`calibrated.LayerFacts` of one or more layers as figures over all their experts.

    tokens and effective: minimum, 5th percentile, median. lambda: least and most. relmse and relmse_plain: mean, worst.
    topk_changed: mean and worst of the layers whose norm was folded, None without such a layer.
    """
    layers = list(layers)
    every = {
        name: [value for facts in layers for value in facts[name]]
        for name in ("tokens", "effective", "shrunk", "relmse_plain", "relmse")
    }
    figures: dict[str, Any] = {name: sum(facts[name] for facts in layers) for name in ("starved", "damped", "rounded")}
    for name in ("tokens", "effective"):
        figures[name] = [float(value) for value in np.quantile(every[name], (0.0, 0.05, 0.5))]
    for name in ("relmse_plain", "relmse"):
        figures[name] = [float(np.mean(every[name])), float(np.max(every[name]))]
    changed = [facts["topk_changed"] for facts in layers if "topk_changed" in facts]
    return figures | {
        "topk_changed": [float(np.mean(changed)), max(changed)] if changed else None,
        "experts": len(every["tokens"]),
        "without_tokens": every["tokens"].count(0),
        "lambda": [min(every["shrunk"]), max(every["shrunk"])],
    }


def token_count(value: float) -> str:
    """A number of tokens; between two of them, with a decimal."""
    return f"{value:.1f}".removesuffix(".0")


def verify_text(facts: dict[str, Any], limit: int = 20) -> str:
    lines = _proof_lines(facts, limit) if "checked" in facts else []
    return "\n".join([*lines, *(engine_lines(facts["engine"]) if "engine" in facts else [])])


def _proof_lines(facts: dict[str, Any], limit: int) -> list[str]:
    """What `verify --source` found."""
    problems = facts["problems"]
    checked = ", ".join(f"{count} {what}" for what, count in facts["checked"].items())
    lines = [
        f"{'ok' if facts['ok'] else 'FAILED'}         {facts['out']}",
        f"checked    {checked}; {size(facts['bytes_checked'])} read",
        *(
            [f"rounding   worst {facts['worst_rounding']:.4f} half steps ({facts['worst_rounding_tensor']})"]
            if facts["worst_rounding_tensor"]
            else []
        ),
        *(
            [
                f"error      relMSE {facts['mean_relative_error']:.3e} over all experts, worst "
                f"{facts['worst_relative_error']:.3e} ({facts['worst_relative_error_tensor'] or 'none'})"
            ]
            if facts["checked"].get("quantized tensors")
            else []
        ),
        *(f"unproven   {text}" for text in facts["unproven"]),
        *(f"problem    {problem}" for problem in problems[:limit]),
    ]
    if len(problems) > limit:
        lines.append(f"problem    ... and {len(problems) - limit} more (--json lists all)")
    return lines


def synth_text(facts: dict[str, Any]) -> str:
    counts = f"{facts['tensors']} tensors, {facts['files']} files, {size(facts['size_bytes'])}"
    return f"wrote {facts['out']}: {facts['layout']}, {counts}"


def expert_placement(layout: ModelLayout) -> tuple[list[str], list[str]]:
    """(layers with an expert that lies in two files, weights parted from their scale): what trips file-wise readers."""
    split_layers, parted = set(), []
    files: dict[tuple[int, int], str] = {}
    for (layer, expert, _), weight in layout.experts.items():
        if weight.scale is not None and weight.scale.file != weight.info.file:
            parted.append(weight.name)
        if files.setdefault((layer, expert), weight.info.file) != weight.info.file:
            split_layers.add(layer)
    return [str(layer) for layer in sorted(split_layers)], parted


def role_sizes(layout: ModelLayout) -> dict[str, Counter[str]]:
    """Bytes by kind of weight and dtype, scales counted with their weight's kind."""
    sizes: dict[str, Counter[str]] = {}
    for unit, weights in layout.units.items():
        for weight in weights:
            kind = _kind(unit, weight.role)
            for info in weight.infos:
                sizes.setdefault(kind, Counter())[info.dtype] += info.size_bytes
    for weight in layout.experts.values():
        for info in weight.infos:
            sizes.setdefault("routed experts", Counter())[info.dtype] += info.size_bytes
    return sizes


def planned_sizes(plan: Plan) -> dict[str, int]:
    """Output bytes by kind of weight."""
    sizes: Counter[str] = Counter()
    for unit in plan.units:
        for step in unit.steps:
            kind = "routed experts" if isinstance(step, Experts | Shapes) else _kind(unit.name, step.weight.role)
            sizes[kind] += sum(entry.size_bytes for entry in step.entries)
    return dict(sizes)


def _kind(unit: str, role: str) -> str:
    if unit in ("mtp", "towers", "unknown"):
        return {"mtp": "MTP layers", "towers": "vision, audio, speech", "unknown": "unknown"}[unit]
    kinds = {"router": "router", "router_bias": "router", "norm": "norms", "dense": "dense MLP",
             "embedding": "embeddings, lm_head", "lm_head": "embeddings, lm_head"}  # fmt: skip
    return kinds.get(role, "attention")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns, the last one right-aligned."""
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=False)), row[-1].rjust(widths[-1])])
        for row in every
    ]
