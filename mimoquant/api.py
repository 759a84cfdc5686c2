"""The public functions, one for each verb of the command line: `import mimoquant; mimoquant.quantize(...)`.

Key idea: a function returns the document that its verb prints with `--json` (a plain dict, whose fields are described
in the `documents` of the folder that makes it), takes what the verb takes as options, and raises where the verb exits:
`mimoquant.errors.MimoquantError` has `exit_code` and `hint`. Nothing is printed, and nothing is put together here: that
is `assembly`, which the command line shares.
Left out: several processes. A run that ranks share is started by torchrun with `-m mimoquant`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.assembly.files import at_home
from mimoquant.errors import UsageError
from mimoquant.evaluation.documents import EvalDraftDocument, EvalFolderDocument, EvalServerDocument
from mimoquant.mixing.documents import SensitivityDocument
from mimoquant.output.documents import QuantizeDocument, VerifyDocument
from mimoquant.planning.documents import InspectDocument, PlanDocument, RelayoutDocument
from mimoquant.serving.documents import LaunchDocument
from mimoquant.shipped import HELD_OUT_SET, HELD_OUT_TOKENS, SENSITIVITY_SEQUENCES
from mimoquant.synthetic.documents import SynthDocument

Folder = Path | str


@at_home
def inspect(checkpoint: Folder, *, allow_unknown: bool = False) -> InspectDocument:
    """What a checkpoint holds: layers, experts, dtypes, traps in its file layout. Reads headers only.

    Raises UsageError: no such folder. CheckpointError: it is broken, or of no known family.
    """
    from mimoquant.checkpoint.index import open_index
    from mimoquant.model.layout import read_layout
    from mimoquant.planning.facts import layout_facts
    from mimoquant.planning.settings_beside import read_config

    index = open_index(checkpoint)
    return layout_facts(read_layout(index, read_config(index), allow_unknown=allow_unknown, packed=True))


@at_home
def plan(
    source: Folder,
    recipe: str,
    *,
    out: Folder | None = None,
    device: str = "auto",
    gpu_memory: float | None = None,
    data: Sequence[str] | None = None,
    data_column: str | None = None,
    sequences: int | None = None,
    tokens: int | None = None,
    refine: int | None = None,
    refine_layer: Sequence[int] | None = None,
    objective: str | None = None,
    container: str | None = None,
    dense: str | None = None,
    input_scales: str | None = None,
    measure: bool = False,
    allow_unknown: bool = False,
) -> PlanDocument:
    """What `quantize` would do and need, and the result's size to the byte. Reads headers only.

    Args:
        recipe: a shipped recipe's name, or the path of a recipe file.
        gpu_memory: GB of the GPU's memory that may be used. out: on whose disk to look for room.
        data, sequences, tokens: what to calibrate on, where the recipe says otherwise; data_column: of its records,
            only that is read. refine, refine_layer, objective: as for `quantize`.
        dense: in ModelOpt's container, whether FP8 beside the experts stays ("fp8") or becomes "bf16".
            input_scales: of NVFP4 experts' activations: "none", "unit" (1), or "calibrated".
        measure: rehearse the plan's steps on one chunk of experts, to tell the time.
    Raises UsageError, RecipeError, CheckpointError.
    """
    from mimoquant.assembly.choices import CalibrationChoice, OutputChoice, PlanChoice
    from mimoquant.assembly.plans import plan_document

    calibration = CalibrationChoice(data, sequences, tokens, refine, refine_layer, data_column, objective)
    choice = PlanChoice(recipe, container, allow_unknown, calibration, OutputChoice(dense, input_scales))
    folder = None if out is None else Path(out)
    return plan_document(source, choice, device=device, gpu_memory=gpu_memory, folder=folder, measure=measure)


@at_home
def quantize(
    source: Folder,
    recipe: str,
    out: Folder,
    *,
    device: str = "auto",
    gpu_memory: float | None = None,
    resume: bool = False,
    data: Sequence[str] | None = None,
    data_column: str | None = None,
    sequences: int | None = None,
    tokens: int | None = None,
    refine: int | None = None,
    refine_layer: Sequence[int] | None = None,
    objective: str | None = None,
    container: str | None = None,
    dense: str | None = None,
    input_scales: str | None = None,
    base_model: str | None = None,
    mend_json: bool = False,
    keep_source: Folder | None = None,
    allow_unknown: bool = False,
    progress: Callable[[str, int, bool], None] | None = None,
) -> QuantizeDocument:
    """Write the 4-bit checkpoint `out`, which appears when it is complete. Returns `out`/report.json and what it took.

    Args:
        resume: continue what a killed run left in `out`.partial. The others: see `plan`.
        base_model: what the card names as such: the source's repository on the Hub, where its files do not tell.
        mend_json: write JSON files that have a comma too many without it; they are refused otherwise.
        keep_source: where a source on the Hub is kept, as an ordinary checkpoint.
        refine: rounds in which an expert's projections are chosen together at the end; refine_layer: only there.
        objective: what codes are chosen for, `kl` or `output`, where the recipe says otherwise.
        progress: called with (unit, its bytes that are written, whether it is finished); a unit is a shard.
    Raises UsageError, RecipeError: nothing was done. CheckpointError: bad data. QualityError: too many starved experts.
    StoppedError: the disk; resumable.
    """
    from mimoquant.assembly.choices import CalibrationChoice, OutputChoice, PlanChoice
    from mimoquant.assembly.plans import QuantizeRun
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team

    calibration = CalibrationChoice(data, sequences, tokens, refine, refine_layer, data_column, objective)
    output = OutputChoice(dense, input_scales, base_model, mend_json)
    choice = PlanChoice(recipe, container, allow_unknown, calibration, output)
    run = QuantizeRun(source, choice, out, Team(resolve_device(device)), gpu_memory=gpu_memory, resume=resume)
    told = (lambda unit, size_bytes, finished: progress(unit.name, size_bytes, finished)) if progress else None
    return run.execute(told)


@at_home
def relayout(
    source: Folder,
    out: Folder,
    *,
    qkv: str,
    tp: int | None = None,
    bf16: bool = False,
    resume: bool = False,
    allow_unknown: bool = False,
    base_model: str | None = None,
) -> RelayoutDocument:
    """Write q, k and v in another layout (`split`, `canonical`, `interleaved`); all else is copied byte for byte.

    Args:
        tp: chunks of `interleaved`; by default the KV heads. bf16: an FP8 qkv becomes bf16. base_model: as for
            `quantize`.
    Raises UsageError: nothing would change, or not exactly. CheckpointError: the source. StoppedError: the disk.
    """
    from mimoquant.assembly.plans import RelayoutRun

    run = RelayoutRun(
        source,
        out,
        qkv=qkv,
        tp=tp,
        bf16=bf16,
        resume=resume,
        allow_unknown=allow_unknown,
        base_model=base_model,
    )
    return run.execute()


@at_home
def verify(
    out: Folder,
    source: Folder | None = None,
    *,
    engine: str | None = None,
    engine_version: str | None = None,
    tp: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyDocument:
    """Hold a checkpoint against its source, value by value, or against what an engine accepts, or both. Either way
    the libraries that read it are asked: safetensors, compressed-tensors, transformers.

    What is wrong is told, not raised: `ok` and `problems`, and the same of `engine`, which is left out where files are
    damaged already.

    Args:
        engine: `vllm`, `sglang` or `transformers`. tp: tensor parallelism to check for.
        progress: called with (what is done, how many are done, how many there are).
    Raises UsageError: nothing to hold it against, or no output of this program. CheckpointError: the source is bad.
    """
    if source is None and engine is None:
        from mimoquant.assembly.plans import source_on_hub

        known = f" ({out} was made from {place})" if (place := source_on_hub(Path(out))) else ""
        raise UsageError(f"there is nothing to hold {out} against", hint=f"give --source, --engine, or both{known}")
    if engine is None and (engine_version or tp):
        raise UsageError("--engine-version and --tp are about an --engine", hint="name one, such as --engine vllm")
    document = VerifyDocument(schema_version=SCHEMA_VERSION, out=str(out), ok=True, problems=[])
    if source is not None:
        from mimoquant.output.verify import verify as run

        document = run(out, source, progress=progress).as_json()
    if engine is not None and document["ok"]:  # what a damaged file would do in an engine is nobody's question
        from mimoquant.serving.check import engine_facts
        from mimoquant.serving.served import read_served

        served = read_served(out)
        document["engine"] = engine_facts(served, engine, engine_version, tp)
        if source is None:  # with it, they were asked
            from mimoquant.checkpoint.index import open_index
            from mimoquant.output.libraries import ask_libraries

            document["problems"] = ask_libraries(open_index(out), served.geometry).problems
            document["ok"] = not document["problems"]
    return document


@at_home
def launch(
    out: Folder,
    engine: str,
    gpu: str,
    gpus: int,
    *,
    mtp: bool = False,
    dflash: Folder | None = None,
    deepep: bool = False,
    engine_version: str | None = None,
) -> LaunchDocument:
    """The command that serves a checkpoint on `gpus` of a kind (`h100`, ...), and what to expect. Reads headers only.

    Args:
        mtp: speculate with the checkpoint's MTP layers. dflash: speculate with this draft model.
        deepep: have SGLang pass tokens to experts by DeepEP.
    Raises UsageError: it does not fit there. CheckpointError: the engine would refuse or corrupt it.
    """
    from mimoquant.serving.launch import launch as make
    from mimoquant.serving.served import read_served

    draft = None if dflash is None else Path(dflash)
    return make(read_served(out), engine, gpu, gpus, version=engine_version, mtp=mtp, dflash=draft, deepep=deepep)


@at_home
def eval_kl(
    reference: Folder,
    candidate: Folder | None = None,
    *,
    server: str | None = None,
    model: str | None = None,
    top_k: int | None = None,
    data: Sequence[str] = (HELD_OUT_SET,),
    data_column: str | None = None,
    sequences: int | None = None,
    tokens: int = HELD_OUT_TOKENS,
    max_kl: float | None = None,
    baseline: Folder | None = None,
    noise_floor: bool = True,
    activations: str | None = None,
    dense_activations: str | None = None,
    kv: str | None = None,
    as_served: str | None = None,
    reference_as_served: bool = False,
    device: str = "auto",
    out: Folder | None = None,
    resume: bool = False,
) -> EvalFolderDocument | EvalServerDocument:
    """Symmetric KL of a checkpoint against its reference on held-out tokens, in nats a token: `["j"]["mean"]`.

    Args:
        candidate: the quantized folder, by any tool. server: the address of a running vLLM or SGLang instead of it;
            J is a lower bound then.
        model: the server's name for it, if it serves several. top_k: ids to ask it for at a position.
        data: shipped sets, files or folders; data_column: of their records, only that is read. sequences: at most so
            many, of `tokens` each.
        max_kl: the limit that `passed` is about; nothing is raised where J is above it.
        baseline: another candidate, compared on the same tokens.
        noise_floor: measure what the reference differs from itself.
        activations, dense_activations, kv: round what goes into routed experts ("none", "fp8", "mxfp8", "mxfp4",
            "nvfp4"), into FP8 matrices beside them, and into the KV cache ("none", "fp8"), as kernels do.
        as_served: round what an engine's kernels round on a kind of GPU, such as "vllm:b200", instead.
        reference_as_served: round the reference too.
        out: a file for what was measured, as JSON; it makes the evaluation resumable.
        resume: take up what a killed evaluation left beside `out`.
    Raises UsageError: data is missing, the candidate was calibrated on it, or options cannot go together.
    CheckpointError: a checkpoint is bad, the two are not one model, or the server fails. StoppedError: the disk.
    """
    from mimoquant.assembly import evaluations
    from mimoquant.assembly.choices import EvaluationChoice, RoundingChoice, ServerChoice, Watcher
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team

    folder = None if candidate is None else Path(candidate)
    rounding = RoundingChoice(activations, dense_activations, kv, as_served, reference_as_served)
    of_candidate = {"--baseline": baseline, "--out": out, "--resume": resume or None, **rounding.given()}
    evaluations.check_candidate(folder, server, {"--model": model, "--top-k": top_k}, of_candidate)
    choice = EvaluationChoice(data, sequences, tokens, noise_floor, max_kl, data_column, rounding)
    if folder is None:
        asked = ServerChoice(str(server), model, top_k)
        return evaluations.evaluate_server(Path(reference), asked, choice, device, Watcher())
    return evaluations.evaluate_folder(
        Path(reference),
        folder,
        choice,
        Team(resolve_device(device)),
        baseline=None if baseline is None else Path(baseline),
        file=evaluations.evaluation_file(out, resume),
        watcher=Watcher(),
    )


@at_home
def eval_draft(
    reference: Folder,
    candidate: Folder,
    *,
    draft: Folder = "mtp",
    data: Sequence[str] = (HELD_OUT_SET,),
    data_column: str | None = None,
    sequences: int | None = None,
    tokens: int = HELD_OUT_TOKENS,
    depth: int | None = None,
    activations: str | None = None,
    dense_activations: str | None = None,
    kv: str | None = None,
    as_served: str | None = None,
    reference_as_served: bool = False,
    device: str = "auto",
) -> EvalDraftDocument:
    """How many drafted tokens a quantized backbone accepts, beside its reference.

    Args:
        draft: each checkpoint's MTP layers, "mtp" in a chain, "mtp-backbone" as SGLang runs them; or the folder of a
            DFlash drafter.
        depth: MTP layers in the chain; by default all, at most 3.
        activations, dense_activations, kv, as_served, reference_as_served: of the backbones; these and the others: see
            `eval_kl`.
    Raises UsageError: too deep, a drafter of another backbone, or shared data. CheckpointError: bad checkpoints.
    """
    from mimoquant.assembly.choices import EvaluationChoice, RoundingChoice, Watcher
    from mimoquant.assembly.evaluations import evaluate_draft
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team

    rounding = RoundingChoice(activations, dense_activations, kv, as_served, reference_as_served)
    return evaluate_draft(
        Path(reference),
        Path(candidate),
        EvaluationChoice(data, sequences, tokens, column=data_column, rounding=rounding),
        Team(resolve_device(device)),
        draft=str(draft),
        depth=depth,
        watcher=Watcher(),
    )


@at_home
def sensitivity(
    source: Folder,
    recipe: str,
    out: Folder,
    *,
    budget_bytes: int | None = None,
    target_kl: float | None = None,
    data: Sequence[str] = (HELD_OUT_SET,),
    data_column: str | None = None,
    sequences: int = SENSITIVITY_SEQUENCES,
    tokens: int = HELD_OUT_TOKENS,
    container: str | None = None,
    fp8: bool = True,
    any_format: bool = False,
    objective: str | None = None,
    activations: str | None = None,
    dense_activations: str | None = None,
    kv: str | None = None,
    as_served: str | None = None,
    reference_as_served: bool = False,
    quick: bool = False,
    device: str = "auto",
    resume: bool = False,
    allow_unknown: bool = False,
) -> SensitivityDocument:
    """Measure what each layer's quantization costs, and write the recipe `out` that spends bytes where they buy most.

    Args:
        budget_bytes: what the output's shards may weigh; by default what the recipe takes. target_kl: J that the
            fewest bytes have to keep, instead of it.
        fp8: whether a layer may stay FP8. any_format: whether int4 may stand beside MXFP4 and NVFP4. objective: as for
            `quantize`.
        activations, dense_activations, kv, as_served, reference_as_served: see `eval_kl`; of what is quantized.
        quick: predict what layers cost by the Fisher matrix; no forks, and no J is measured, so no `target_kl`.
        resume: take up what a killed run left beside `out`.
    Raises UsageError: nothing fits, or shared data. CheckpointError: bad data. QualityError: the target was missed.
    """
    from mimoquant.assembly.choices import EvaluationChoice, LimitChoice, MixtureChoice, RoundingChoice, Watcher
    from mimoquant.assembly.mixing import choose_mixture
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team

    if budget_bytes is not None and target_kl is not None:
        raise UsageError(f"a budget of {budget_bytes} bytes and a target of {target_kl:g}: only one can be the limit")
    rounding = RoundingChoice(activations, dense_activations, kv, as_served, reference_as_served)
    return choose_mixture(
        Path(source),
        Path(out),
        MixtureChoice(recipe, container, allow_unknown, fp8, any_format, objective),
        EvaluationChoice(data, sequences, tokens, column=data_column, rounding=rounding),
        LimitChoice(budget_bytes, target_kl, quick),
        Team(resolve_device(device)),
        resume=resume,
        watcher=Watcher(),
    )


@at_home
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
) -> SynthDocument:
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
    return report.as_json(out)
