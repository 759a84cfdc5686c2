"""The public functions, one for each verb of the command line: `import mimoquant; mimoquant.quantize(...)`.

Key idea: a function returns the document that its verb prints with `--json`, takes what the verb takes as options, and
raises where the verb exits: `mimoquant.errors.MimoquantError` has `exit_code` and `hint`. Nothing is printed.
Left out: several processes. A run that ranks share is started by torchrun with `-m mimoquant`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.errors import UsageError

if TYPE_CHECKING:
    from mimoquant.calibration.tokens import TokenSet
    from mimoquant.machine.memory import Machine
    from mimoquant.mixing.mixtures import Mixtures
    from mimoquant.planning.plan import Plan

Facts = dict[str, Any]  # plain data, as `--json` prints it
Folder = Path | str


def inspect(checkpoint: Folder, *, allow_unknown: bool = False) -> Facts:
    """What a checkpoint holds: layers, experts, dtypes, traps in its file layout. Reads headers only.

    Raises UsageError: no such folder. CheckpointError: it is broken, or of no known family.
    """
    from mimoquant.checkpoint.index import open_index
    from mimoquant.model.layout import read_layout
    from mimoquant.planning.facts import layout_facts
    from mimoquant.planning.plan import read_config

    index = open_index(checkpoint)
    return layout_facts(read_layout(index, read_config(index), allow_unknown=allow_unknown, packed=True))


def plan(
    source: Folder,
    recipe: str,
    *,
    out: Folder | None = None,
    device: str = "auto",
    gpu_memory: float | None = None,
    data: Sequence[str] | None = None,
    sequences: int | None = None,
    tokens: int | None = None,
    refine: int | None = None,
    refine_layer: Sequence[int] | None = None,
    container: str | None = None,
    measure: bool = False,
    allow_unknown: bool = False,
) -> Facts:
    """What `quantize` would do and need, and the result's size to the byte. Reads headers only.

    Args:
        recipe: a shipped recipe's name, or the path of a recipe file.
        gpu_memory: GB of the GPU's memory that may be used. out: on whose disk to look for room.
        data, sequences, tokens: what to calibrate on, where the recipe says otherwise. refine, refine_layer: as for
            `quantize`.
        measure: rehearse the plan's steps on one chunk of experts, to tell the time.
    Raises UsageError, RecipeError, CheckpointError.
    """
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.memory import machine
    from mimoquant.mixing.needs import sensitivity_facts
    from mimoquant.planning.facts import plan_facts
    from mimoquant.serving.check import planned_facts
    from mimoquant.serving.served import planned

    place = resolve_device(device)
    has = machine(place, gpu_memory)
    changes = calibration_changes(data, sequences, tokens, refine, refine_layer)
    made = fitted_plan(source, recipe, container, allow_unknown, changes, place, has)
    took = None
    if measure:
        from mimoquant.run.rehearsal import rehearse

        took = rehearse(made, place, None if out is None else Path(out))
    return plan_facts(
        made,
        place,
        has,
        engines=planned_facts(planned(made)),
        sensitivity=sensitivity_facts(made, place),
        took=took,
        folder=None if out is None else Path(out),
    )


def quantize(
    source: Folder,
    recipe: str,
    out: Folder,
    *,
    device: str = "auto",
    gpu_memory: float | None = None,
    resume: bool = False,
    data: Sequence[str] | None = None,
    sequences: int | None = None,
    tokens: int | None = None,
    refine: int | None = None,
    refine_layer: Sequence[int] | None = None,
    container: str | None = None,
    allow_unknown: bool = False,
    progress: Callable[[str, int, bool], None] | None = None,
) -> Facts:
    """Write the 4-bit checkpoint `out`, which appears when it is complete. Returns what `out`/report.json holds.

    Args:
        resume: continue what a killed run left in `out`.partial. The others: see `plan`.
        refine: rounds in which an expert's projections are chosen together at the end; refine_layer: only there.
        progress: called with (unit, its bytes that are written, whether it is finished); a unit is a shard.
    Raises UsageError, RecipeError: nothing was done. CheckpointError: bad data. QualityError: too many starved experts.
    StoppedError: the disk; resumable.
    """
    from mimoquant import pipeline
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.memory import machine
    from mimoquant.planning.needs import refusal

    place = resolve_device(device)
    has = machine(place, gpu_memory)
    changes = calibration_changes(data, sequences, tokens, refine, refine_layer)
    made = fitted_plan(source, recipe, container, allow_unknown, changes, place, has)
    if refused := refusal(made, place, has):
        raise refused
    told = (lambda unit, size_bytes, finished: progress(unit.name, size_bytes, finished)) if progress else None
    return pipeline.quantize(made, out, device=place, resume=resume, progress=told).as_json()


def relayout(
    source: Folder,
    out: Folder,
    *,
    qkv: str,
    tp: int | None = None,
    bf16: bool = False,
    resume: bool = False,
    allow_unknown: bool = False,
) -> Facts:
    """Write q, k and v in another layout (`split`, `canonical`, `interleaved`); all else is copied byte for byte.

    Args:
        tp: chunks of `interleaved`; by default the KV heads. bf16: an FP8 qkv becomes bf16.
    Raises UsageError: nothing would change, or not exactly. CheckpointError: the source. StoppedError: the disk.
    """
    from mimoquant import pipeline
    from mimoquant.planning.facts import relayout_facts
    from mimoquant.planning.relayout import make_relayout
    from mimoquant.serving.check import planned_facts
    from mimoquant.serving.served import planned

    made = make_relayout(source, qkv, tp=tp, bf16=bf16, allow_unknown=allow_unknown)
    finished = pipeline.execute(made, out, device="cpu", resume=resume)
    return relayout_facts(made, finished, planned_facts(planned(made)))


def verify(
    out: Folder,
    source: Folder | None = None,
    *,
    engine: str | None = None,
    engine_version: str | None = None,
    tp: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Facts:
    """Hold a checkpoint against its source, value by value, or against what an engine accepts, or both.

    What is wrong is told, not raised: `ok` and `problems`, and the same of `engine`, which is left out where files are
    damaged already.

    Args:
        engine: `vllm`, `sglang` or `transformers`. tp: tensor parallelism to check for.
        progress: called with (what is done, how many are done, how many there are).
    Raises UsageError: nothing to hold it against, or no output of this program. CheckpointError: the source is bad.
    """
    if source is None and engine is None:
        raise UsageError(f"there is nothing to hold {out} against", hint="give --source, --engine, or both")
    if engine is None and (engine_version or tp):
        raise UsageError("--engine-version and --tp are about an --engine", hint="name one, such as --engine vllm")
    facts: Facts = {"schema_version": SCHEMA_VERSION, "out": str(out), "ok": True, "problems": []}
    if source is not None:
        from mimoquant.output.verify import verify as run

        facts |= run(out, source, progress=progress).as_json()
    if engine is not None and facts["ok"]:  # what a damaged file would do in an engine is nobody's question
        from mimoquant.serving.check import engine_facts
        from mimoquant.serving.served import read_served

        facts["engine"] = engine_facts(read_served(out), engine, engine_version, tp)
    return facts


def launch(
    out: Folder,
    engine: str,
    gpu: str,
    gpus: int,
    *,
    mtp: bool = False,
    dflash: Folder | None = None,
    engine_version: str | None = None,
) -> Facts:
    """The command that serves a checkpoint on `gpus` of a kind (`h100`, ...), and what to expect. Reads headers only.

    Args:
        mtp: speculate with the checkpoint's MTP layers. dflash: speculate with this draft model.
    Raises UsageError: it does not fit there. CheckpointError: the engine would refuse or corrupt it.
    """
    from mimoquant.serving.launch import launch as make
    from mimoquant.serving.served import read_served

    draft = None if dflash is None else Path(dflash)
    return make(read_served(out), engine, gpu, gpus, version=engine_version, mtp=mtp, dflash=draft).as_json()


def eval_kl(
    reference: Folder,
    candidate: Folder,
    *,
    data: Sequence[str] = ("heldout-v1",),
    sequences: int | None = None,
    tokens: int = 512,
    baseline: Folder | None = None,
    noise_floor: bool = True,
    device: str = "auto",
) -> Facts:
    """Symmetric KL of a checkpoint against its reference on held-out tokens, in nats a token: `["j"]["mean"]`.

    Args:
        data: shipped sets or files. sequences: at most so many, of `tokens` each.
        baseline: another candidate, compared on the same tokens.
        noise_floor: measure what the reference differs from itself.
    Raises UsageError: data is missing, or the candidate was calibrated on it. CheckpointError: a checkpoint is bad, or
    the two are not one model.
    """
    from mimoquant.calibration.tokenizer import decoder_of
    from mimoquant.evaluation.eval_kl import eval_kl as run
    from mimoquant.machine.devices import resolve_device

    held = _held_out(reference, data, sequences, tokens)
    return run(
        reference,
        candidate,
        held,
        baseline=baseline,
        noise_floor=noise_floor,
        decode=decoder_of(Path(reference)),
        device=resolve_device(device),
    )


def eval_draft(
    reference: Folder,
    candidate: Folder,
    *,
    draft: Folder = "mtp",
    data: Sequence[str] = ("heldout-v1",),
    sequences: int | None = None,
    tokens: int = 512,
    depth: int | None = None,
    device: str = "auto",
) -> Facts:
    """How many drafted tokens a quantized backbone accepts, beside its reference.

    Args:
        draft: "mtp", each checkpoint's MTP layers, or the folder of a DFlash drafter.
        depth: MTP layers in the chain; by default all, at most 3. The others: see `eval_kl`.
    Raises UsageError: too deep, a drafter of another backbone, or shared data. CheckpointError: bad checkpoints.
    """
    from mimoquant.evaluation.eval_draft import eval_draft as run
    from mimoquant.machine.devices import resolve_device

    held = _held_out(reference, data, sequences, tokens)
    return run(reference, candidate, held, draft=str(draft), depth=depth, device=resolve_device(device))


def sensitivity(
    source: Folder,
    recipe: str,
    out: Folder,
    *,
    budget_bytes: int | None = None,
    target_kl: float | None = None,
    data: Sequence[str] = ("heldout-v1",),
    sequences: int = 56,
    tokens: int = 512,
    container: str | None = None,
    fp8: bool = True,
    any_format: bool = False,
    device: str = "auto",
    resume: bool = False,
    allow_unknown: bool = False,
) -> Facts:
    """Measure what each layer's quantization costs, and write the recipe `out` that spends bytes where they buy most.

    Args:
        budget_bytes: of the output's shards at most; by default what the recipe takes. target_kl: instead of it.
        fp8: whether a layer may stay FP8. any_format: whether int4 may stand beside MXFP4 and NVFP4.
        resume: take up what a killed run left beside `out`.
    Raises UsageError: nothing fits, or shared data. CheckpointError: bad data. QualityError: the target was missed.
    """
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.memory import machine
    from mimoquant.machine.team import Team
    from mimoquant.mixing.needs import fork_refusal
    from mimoquant.mixing.run import forks_of
    from mimoquant.mixing.run import sensitivity as run

    if budget_bytes is not None and target_kl is not None:
        raise UsageError(f"a budget of {budget_bytes} bytes and a target of {target_kl:g}: only one can be the limit")
    team = Team(resolve_device(device))
    held = _held_out(source, data, sequences, tokens)
    mixed = mixtures(
        Path(source), recipe, container, team.device, allow_unknown=allow_unknown, fp8=fp8, any_format=any_format
    )
    if refused := fork_refusal(forks_of(mixed, held, team), len(held.ids), team.device, machine(team.device)):
        raise refused
    return run(mixed, held, Path(out), budget_bytes=budget_bytes, target_j=target_kl, resume=resume, team=team)


def synth(
    out: Folder,
    layout: str,
    *,
    source: Folder | None = None,
    seed: int = 0,
    layers: int | None = None,
    experts: int | None = None,
    hidden: int | None = None,
    expert_intermediate: int | None = None,
    vocab: int | None = None,
) -> Facts:
    """Write a small checkpoint in a published on-disk format (`flash`, `v2.5`, `pro`): for tests, demos, bug reports.

    Args:
        source: convert this bf16 checkpoint, which then says all sizes. seed: of random weights.
    Raises UsageError: `out` exists, or sizes that cannot be. CheckpointError: the source. StoppedError: the disk.
    """
    from mimoquant.synthetic.checkpoint import SynthSizes
    from mimoquant.synthetic.checkpoint import synth as run

    given = {
        "layers": layers,
        "experts": experts,
        "hidden": hidden,
        "expert_intermediate": expert_intermediate,
        "vocab": vocab,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    if source is not None and chosen:
        option = next(iter(chosen)).replace("_", "-")
        raise UsageError(f"--from takes the sizes of {source}; --{option} cannot go with it")
    sizes = SynthSizes(**chosen) if source is None else None
    report = run(Path(out), layout, source=None if source is None else Path(source), sizes=sizes, seed=seed)
    return {"schema_version": SCHEMA_VERSION, "out": str(out), **asdict(report)}


# --- what the command line shares -------------------------------------------------------------------------------------


def calibration_changes(
    data: Sequence[str] | None,
    sequences: int | None,
    tokens: int | None,
    refine: int | None = None,
    refine_layer: Sequence[int] | None = None,
) -> Facts:
    """What a caller says of calibration, where the recipe says otherwise."""
    given = {
        "data": tuple(data) if data else None,
        "sequences": sequences,
        "tokens": tokens,
        "reconstruct": refine,
        "reconstruct_layers": tuple(refine_layer) if refine_layer else None,
    }
    return {key: value for key, value in given.items() if value is not None}


def fitted_plan(
    source: Folder,
    recipe: str,
    container: str | None,
    allow_unknown: bool,
    calibration: Facts,
    device: str,
    has: Machine,
    ranks: int = 1,
) -> Plan:
    """The plan in chunks that fit a machine; `calibration` from `calibration_changes`."""
    from mimoquant.planning.needs import fitting_plan
    from mimoquant.planning.plan import make_plan
    from mimoquant.planning.recipe import load_recipe

    loaded = load_recipe(recipe).calibrated_on(calibration)
    return fitting_plan(
        lambda size: make_plan(source, loaded, container=container, allow_unknown=allow_unknown, chunk_bytes=size),
        device,
        has,
        ranks,
    )


def mixtures(
    source: Path, recipe: str, container: str | None, device: str, *, allow_unknown: bool, fp8: bool, any_format: bool
) -> Mixtures:
    """What each layer can become, for `sensitivity`. One container holds all formats; it is the default for them."""
    from mimoquant.mixing.mixtures import Mixtures
    from mimoquant.planning.plan import CHUNK_BYTES, CUDA_CHUNK_BYTES, make_plan
    from mimoquant.planning.recipe import load_recipe
    from mimoquant.weights.container import COMPRESSED_TENSORS

    loaded = load_recipe(recipe)
    chunk_bytes = CUDA_CHUNK_BYTES if device.startswith("cuda") else CHUNK_BYTES
    container = container or (COMPRESSED_TENSORS if any_format else None)
    made = make_plan(source, loaded, container=container, allow_unknown=allow_unknown, chunk_bytes=chunk_bytes)
    return Mixtures(made, chunk_bytes, fp8=fp8, any_format=any_format)


def _held_out(reference: Folder, data: Sequence[str], sequences: int | None, tokens: int) -> TokenSet:
    from mimoquant.calibration.tokens import load_tokens
    from mimoquant.evaluation.eval_kl import open_layout

    vocab = open_layout(Path(reference)).geometry.vocab
    return load_tokens(data, Path(reference), sequences=sequences, tokens=tokens, vocab=vocab)
