"""Layouts and plans → the documents of `inspect`, `plan` and `relayout`.

Key idea: text is made from the documents too (`report`), so the two cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.checkpoint.hf_files import CONFIG_NAME
from mimoquant.checkpoint.journal import JournalLine, free_bytes
from mimoquant.checkpoint.remote import named, revision_of
from mimoquant.machine.memory import Machine
from mimoquant.model.drafter import FOLDER, carried_drafter
from mimoquant.model.geometry import Attention, Geometry
from mimoquant.model.layout import ModelLayout
from mimoquant.model.releases import release_of
from mimoquant.model.rounding import left_out_of_j
from mimoquant.planning.documents import (
    AttentionSizes,
    CarriedDrafter,
    Change,
    EngineCheck,
    ForkNeeds,
    HubReads,
    InspectDocument,
    MachineMemory,
    PlanDocument,
    PlannedShard,
    RelayoutDocument,
    RunEstimate,
    WalkBackNeeds,
    WrittenShard,
)
from mimoquant.planning.needs import (
    disk_bytes,
    largest_chunk,
    left_bytes,
    lighter_on_disk,
    near_bytes,
    needs,
    refusal,
    states_place,
    walk_back_needs,
)
from mimoquant.planning.notes import hub_notes
from mimoquant.planning.plan import Plan
from mimoquant.planning.relayout import RelayoutPlan
from mimoquant.planning.side_json import json_faults
from mimoquant.planning.stored import config_notes, stored_weights
from mimoquant.wording import left_out_note, size

if TYPE_CHECKING:
    from mimoquant.planning.needs import Estimate


def layout_facts(layout: ModelLayout) -> InspectDocument:
    """`inspect`."""
    geometry, index = layout.geometry, layout.index
    split, parted = expert_placement(layout)
    release = release_of(layout)
    return InspectDocument(
        schema_version=SCHEMA_VERSION,
        checkpoint=named(index.folder),
        model_type=geometry.model_type,
        release=release.name if release else None,
        repositories=list(release.repositories) if release else [],
        files=len(index.file_sizes),
        tensors=len(index.tensors),
        size_bytes=index.size_bytes,
        weights=stored_weights(layout),
        layers=geometry.layers,
        global_layers=[n for n, sliding in enumerate(geometry.sliding) if not sliding],
        moe_layers=geometry.moe_layers,
        hidden=geometry.hidden,
        experts=geometry.experts,
        top_k=geometry.top_k,
        expert_intermediate=geometry.expert_intermediate,
        attention={"global": _attention(geometry.global_attention), "sliding": _attention(geometry.sliding_attention)},
        qkv=qkv_text(geometry),
        mtp_layers=layout.mtp_layers,
        drafter=drafter_facts(layout),
        bytes_by_role={role: dict(sizes) for role, sizes in role_sizes(layout).items()},
        layers_with_an_expert_in_two_files=split,
        weights_parted_from_their_scale=parted,
        unknown_tensors=layout.unknown,
        notes=[*config_notes(layout), *left_out_note(left_out_of_j(layout))],
    )


def _attention(kind: Attention) -> AttentionSizes:
    return {
        "heads": kind.heads,
        "kv_heads": kind.kv_heads,
        "head_dim": kind.head_dim,
        "v_head_dim": kind.v_head_dim,
    }


def qkv_text(geometry: Geometry) -> str:
    """How q, k and v lie on disk."""
    if not geometry.fused_qkv:
        return "split"
    return "fused [Q|K|V]" if geometry.qkv_chunks == 1 else f"fused, {geometry.qkv_chunks} interleaved ranks"


def drafter_facts(layout: ModelLayout) -> CarriedDrafter | None:
    """The drafter in the checkpoint's folder; `problem`: why it could not be used, if so."""
    drafter, problem = carried_drafter(layout.index.folder, layout.geometry)
    if problem and (faults := json_faults(layout, [f"{FOLDER}/{CONFIG_NAME}"])):
        problem = f"{faults[0].text}; {faults[0].hint}"
    if drafter is None:
        return {"problem": problem} if problem else None
    return {
        "problem": problem,
        "layers": drafter.layers,
        "block_size": drafter.block,
        "window": drafter.window,
        "captured_layers": list(drafter.captured),
    }


def plan_facts(
    plan: Plan,
    device: str,
    has: Machine,
    *,
    engines: list[EngineCheck],
    sensitivity: ForkNeeds | None,
    took: Estimate | None = None,
    folder: Path | None = None,
) -> PlanDocument:
    """`plan`. `engines`: what `planned_facts` says of it. `sensitivity`: what that verb would need. `took`: of a
    rehearsal, if there was one. `folder`: on whose disk the output would lie."""
    wants, refused = needs(plan, device), refusal(plan, device, has)
    free, release = None if folder is None else free_bytes(folder), release_of(plan.layout)
    refusals = [error for error in (plan.json_refusal, refused) if error]
    notes = [*plan.notes, *(f"quantize would refuse: {error}; {error.hint}" for error in refusals)]
    reads = hub_reads(plan, took)
    notes += hub_notes(reads, plan.source_bytes, free) if reads else []
    if free is not None and free < disk_bytes(plan, device, has):
        lighter = lighter_on_disk(plan, device, has, free)
        notes.append(f"{folder}: has room for {size(free)} only{f'; {lighter}' if lighter else ''}")
    return PlanDocument(
        schema_version=SCHEMA_VERSION,
        source=named(plan.layout.index.folder),
        release=release.name if release else None,
        recipe=plan.recipe.name,
        method=plan.recipe.method,
        scale_search=plan.recipe.scale_search,
        container=plan.container,
        formats=plan.layers_by_format,
        carve_outs={str(layer): kind for layer, kind in sorted(plan.carve_outs.items())},
        source_bytes=plan.source_bytes,
        output_bytes=plan.shard_bytes,
        output_tensor_bytes=plan.tensor_bytes,
        output_tensors=sum(len(unit.entries) for unit in plan.units),
        output_bytes_by_role=planned_sizes(plan),
        device=device,
        host_memory_bytes=wants.host_bytes,
        gpu_memory_bytes=wants.gpu_bytes + near_bytes(plan, device, has),
        machine=MachineMemory(host_bytes=has.host_bytes, host_free_bytes=has.host_free_bytes, gpu_bytes=has.gpu_bytes),
        experts_at_once=largest_chunk(plan),
        sensitivity=sensitivity,
        walk_back=_walk_back(plan, device, has, took),
        estimate=None if took is None else _estimated(took),
        shards=[PlannedShard(unit=unit.name, file=unit.file, size_bytes=unit.size_bytes) for unit in plan.units],
        side_files=plan.side_files,
        side_bytes=plan.side_bytes,
        drafter=drafter_facts(plan.layout),
        disk_free_bytes=free,
        hub=reads,
        notes=notes,
        engines=engines,
    )


def hub_reads(plan: Plan, took: Estimate | None) -> HubReads | None:
    """What quantize asks the Hub for beside headers; None of a source that is here."""
    if revision_of(plan.layout.index.folder) is None:
        return None
    total = plan.source_bytes + sum(_walked_bytes(plan))
    seconds = None if took is None else total / took.read_bytes_per_s
    return HubReads(bytes=total, times=round(total / plan.source_bytes, 2), seconds=seconds)


def _walked_bytes(plan: Plan) -> Iterator[int]:
    """What a run reads of its source again, to walk its tokens: what is beside the experts of each layer; with the
    objective kl first everything on the way to the loss, and back to the first layer that is quantized."""
    if plan.recipe.calibration is None:
        return
    layout = plan.layout
    beside = {unit: sum(weight.size_bytes for weight in weights) for unit, weights in layout.units.items()}
    yield beside["embeddings"] + sum(beside[f"layer {layer}"] for layer in range(layout.geometry.layers))
    if plan.recipe.objective != "kl":
        return
    experts = dict.fromkeys(range(layout.geometry.layers), 0)
    for (layer, _, _), weight in layout.experts.items():
        experts[layer] += weight.size_bytes
    yield beside["embeddings"] + beside["head"]
    for layer in experts:
        yield (beside[f"layer {layer}"] + experts[layer]) * (2 if layer > min(plan.formats) else 1)


def _walk_back(plan: Plan, device: str, has: Machine, took: Estimate | None) -> WalkBackNeeds | None:
    states, calibration = states_place(plan, device, has), plan.recipe.calibration
    wants = walk_back_needs(plan, device, states=states)
    if wants is None or calibration is None or calibration.fisher is None:
        return None
    facts = WalkBackNeeds(
        tokens=calibration.fisher_sequences * calibration.tokens,
        draws=calibration.fisher_draws,
        states=states,
        states_bytes=wants.states_bytes,
        file_bytes=wants.file_bytes,
        left_bytes=left_bytes(plan),
        host_memory_bytes=wants.host_bytes,
        gpu_memory_bytes=wants.gpu_bytes,
    )
    if took is not None:
        facts["computing_s"] = took.walking_back_s
    return facts


def _estimated(took: Estimate) -> RunEstimate:
    bound_by, longest_s = took.bound
    return RunEstimate(
        reading_s=took.reading_s,
        computing_s=took.computing_s,
        writing_s=took.writing_s,
        read_bytes_per_s=took.read_bytes_per_s,
        write_bytes_per_s=took.write_bytes_per_s,
        bound_by=bound_by,
        starting_s=took.starting_s,
        total_s=took.starting_s + longest_s,
    )


def relayout_facts(
    plan: RelayoutPlan,
    finished: dict[str, JournalLine],
    engines: list[EngineCheck],
    *,
    out: Path | str,
    elapsed_s: float,
    found_finished: bool,
) -> RelayoutDocument:
    """`relayout`. `engines`: what `planned_facts` says of it."""
    after = (entry.dtype for step in plan.moved for entry in step.entries if entry.name.endswith("weight"))
    return RelayoutDocument(
        schema_version=SCHEMA_VERSION,
        source=named(plan.layout.index.folder),
        qkv=Change(before=qkv_text(plan.layout.geometry), after=qkv_text(plan.target)),
        dtypes=Change(before=_dtypes(step.weight.info.dtype for step in plan.moved), after=_dtypes(after)),
        layers=len({step.weight.name for step in plan.moved}),
        source_bytes=plan.source_bytes,
        output_bytes=plan.shard_bytes,
        notes=plan.notes,
        shards=written_shards(plan, finished),
        engines=engines,
        out=str(out),
        elapsed_s=elapsed_s,
        found_finished=found_finished,
    )


def written_shards(plan: Plan, finished: dict[str, JournalLine]) -> list[WrittenShard]:
    """The journal's shards, in the plan's order."""
    lines = (finished[unit.name] for unit in plan.units)
    return [
        WrittenShard(unit=line.unit, file=line.file, size_bytes=line.size_bytes, sha256=line.sha256) for line in lines
    ]


def _dtypes(dtypes: Iterable[str]) -> str:
    return ", ".join(sorted(set(dtypes)))


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
            sizes[_kind(unit.name, step.role)] += sum(entry.size_bytes for entry in step.entries)
    return dict(sizes)


def _kind(unit: str, role: str) -> str:
    if unit in ("mtp", "towers", "unknown"):
        return {"mtp": "MTP layers", "towers": "vision, audio, speech", "unknown": "unknown"}[unit]
    kinds = {
        "router": "router",
        "router_bias": "router",
        "norm": "norms",
        "dense": "dense MLP",
        "embedding": "embeddings, lm_head",
        "lm_head": "embeddings, lm_head",
        "expert": "routed experts",
    }
    return kinds.get(role, "attention")
