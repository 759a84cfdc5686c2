"""The verbs that one function of `api` does: inspect, plan, quantize, relayout, verify, launch, synth."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from mimoquant.cli.files import check_page, check_profile, write_page
from mimoquant.cli.options import (
    BaseModelOption,
    ContainerOption,
    DataColumnOption,
    DataOption,
    DenseOption,
    DeviceOption,
    Engine,
    Gpu,
    GpuMemoryOption,
    InputScalesOption,
    JsonOption,
    KeepSourceOption,
    Layout,
    MendOption,
    ObjectiveOption,
    Qkv,
    QkvDtype,
    QuietOption,
    RecipeOption,
    RefineLayersOption,
    RefineOption,
    ResumeOption,
    SequencesOption,
    Server,
    TokensOption,
    UnknownOption,
    VersionOption,
    option_value,
)
from mimoquant.cli.terminal import Lines, Progress, print_document, printed_last, tell, watcher


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.", metavar="CKPT")],
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Say what a checkpoint holds. Reads headers only."""
    from mimoquant import api
    from mimoquant.report import verb_text

    print_document(api.inspect(checkpoint, allow_unknown=allow_unknown), verb_text.layout_text, as_json)


def plan(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The folder that quantize would write; its disk is asked for room.", metavar="DIR"
        ),
    ] = None,
    device: DeviceOption = "auto",
    gpu_memory: GpuMemoryOption = None,
    data: DataOption = None,
    data_column: DataColumnOption = None,
    sequences: SequencesOption = None,
    tokens: TokensOption = None,
    refine: RefineOption = None,
    refine_layer: RefineLayersOption = None,
    objective: ObjectiveOption = None,
    container: ContainerOption = None,
    dense: DenseOption = None,
    input_scales: InputScalesOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also tell the time, by a rehearsal on some experts.")
    ] = False,
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Show what quantize would do, need and write. Sizes are to the byte; only headers are read, and with --measure
    some experts."""
    from mimoquant import api
    from mimoquant.report import verb_text

    if measure:
        tell("note: rehearsing the plan's steps on one chunk of experts")
    facts = api.plan(
        source,
        recipe,
        out=out,
        device=device,
        gpu_memory=gpu_memory,
        data=data,
        data_column=data_column,
        sequences=sequences,
        tokens=tokens,
        refine=refine,
        refine_layer=refine_layer,
        objective=option_value(objective),
        container=option_value(container),
        dense=option_value(dense),
        input_scales=option_value(input_scales),
        measure=measure,
        allow_unknown=allow_unknown,
    )
    print_document(facts, verb_text.plan_text, as_json)


def quantize(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist.", metavar="DIR")],
    device: DeviceOption = "auto",
    gpu_memory: GpuMemoryOption = None,
    resume: ResumeOption = False,
    data: DataOption = None,
    data_column: DataColumnOption = None,
    sequences: SequencesOption = None,
    tokens: TokensOption = None,
    refine: RefineOption = None,
    refine_layer: RefineLayersOption = None,
    objective: ObjectiveOption = None,
    container: ContainerOption = None,
    dense: DenseOption = None,
    input_scales: InputScalesOption = None,
    base_model: BaseModelOption = None,
    mend_json: MendOption = False,
    keep_source: KeepSourceOption = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that shows what calibration reached.", metavar="FILE")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace of the run to this file.", metavar="FILE")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Write the 4-bit checkpoint. The folder appears only when it is complete; an interrupted run can be resumed."""
    from mimoquant.assembly.choices import CalibrationChoice, OutputChoice, PlanChoice
    from mimoquant.assembly.plans import QuantizeRun, data_notes
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team
    from mimoquant.report import coverage_page, verb_text

    calibration = CalibrationChoice(data, sequences, tokens, refine, refine_layer, data_column, option_value(objective))
    output = OutputChoice(option_value(dense), option_value(input_scales), base_model, mend_json)
    choice = PlanChoice(recipe, option_value(container), allow_unknown, calibration, output)
    with Team.from_environment(resolve_device(device)) as team:
        run = QuantizeRun(source, choice, out, team, gpu_memory=gpu_memory, resume=resume)
        if html is not None:
            check_page(html, run.plan, out)
        if profile is not None:
            check_profile(profile, run.plan, out)
        with Progress(run.plan, team.size, run.timeline) if team.leads else contextlib.nullcontext() as progress:
            if team.leads:
                notes = (f"note: {note}" for note in (*run.plan.notes, *data_notes(run.plan)))
                for line in [*notes, *verb_text.planned_lines(run.engines)]:
                    tell(line)
            advance, walked = (progress.advance, progress.walked) if progress else (None, None)
            document = run.execute(advance, walked, watcher(team.leads).note)
    if not team.leads:
        return
    with printed_last(document, verb_text.quantize_text, as_json):
        if profile is not None:
            write_page(profile, run.timeline.chrome_trace(), "--profile")
        if html is not None:
            write_page(html, coverage_page.coverage_page(document))


def relayout(
    source: Annotated[Path, typer.Argument(help="A checkpoint, published or written here.", metavar="SOURCE")],
    qkv: Annotated[Qkv, typer.Option(help="How q, k and v shall lie on disk.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it must not exist.", metavar="DIR")],
    tp: Annotated[
        int | None,
        typer.Option(min=1, help="Chunks of the interleaved layout; by default as many as KV heads.", metavar="N"),
    ] = None,
    dtype: Annotated[
        QkvDtype, typer.Option(help="What q, k and v are stored in: as in the source, or bf16 also where they are FP8.")
    ] = QkvDtype.SOURCE,
    base_model: BaseModelOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Write q, k and v in another layout. Exactly, or not at all; everything else is copied byte for byte."""
    from mimoquant.assembly.plans import RelayoutRun
    from mimoquant.report import verb_text

    run = RelayoutRun(
        source,
        out,
        qkv=qkv.value,
        tp=tp,
        bf16=dtype is QkvDtype.BF16,
        resume=resume,
        allow_unknown=allow_unknown,
        base_model=base_model,
    )
    with Progress(run.plan) as progress:
        for line in [*(f"note: {note}" for note in run.plan.notes), *verb_text.planned_lines(run.engines)]:
            tell(line)
        document = run.execute(progress.advance, watcher().note)
    print_document(document, verb_text.relayout_text, as_json)


def verify(
    out: Annotated[Path, typer.Argument(help="The folder that quantize or relayout wrote.", metavar="OUT")],
    source: Annotated[
        Path | None, typer.Option("--source", help="The checkpoint it was made from.", metavar="SOURCE")
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="Check what this engine would refuse or corrupt.")] = None,
    engine_version: VersionOption = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Check for this tensor parallelism; with --engine.", metavar="N")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prove a checkpoint against its source, value by value. Or, with --engine, against what an engine accepts."""
    from mimoquant import api
    from mimoquant.errors import CheckpointError
    from mimoquant.report import verb_text

    facts = api.verify(
        out, source, engine=engine.value if engine else None, engine_version=engine_version, tp=tp, progress=Lines()
    )
    print_document(facts, verb_text.verify_text, as_json)
    if not facts["ok"] and source is None:
        raise CheckpointError(
            f"{out}: libraries that read it object (problems: {len(facts['problems'])})",
            hint="the lines above name them: put the files right, or fetch them again",
        )
    if not facts["ok"]:
        raise CheckpointError(
            f"{out}: is not what its recipe says (problems: {len(facts['problems'])})",
            hint="the lines above name them; fetch these files again, or write the folder anew",
        )
    if engine is not None and not facts["engine"]["ok"]:
        failed = [problem for problem in facts["engine"]["problems"] if problem["verdict"] != "warning"]
        raise CheckpointError(f"{out}: {engine.value} would refuse or corrupt it (problems: {len(failed)})")


def launch(
    out: Annotated[Path, typer.Argument(help="A folder that quantize wrote, or a release itself.", metavar="OUT")],
    engine: Annotated[Server, typer.Option(help="The engine that serves.")],
    gpu: Annotated[Gpu, typer.Option(help="The kind of GPU.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs, over all nodes.", metavar="N")],
    mtp: Annotated[bool, typer.Option("--mtp", help="Speculative decoding by the checkpoint's MTP layers.")] = False,
    dflash: Annotated[
        Path | None, typer.Option(help="Speculative decoding by this DFlash draft model.", metavar="DIR")
    ] = None,
    deepep: Annotated[
        bool, typer.Option("--deepep", help="SGLang: pass tokens to experts by DeepEP, for many requests at once.")
    ] = False,
    engine_version: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the command that serves a checkpoint. It names parallelism, back ends, context and parsers; reads headers
    only."""
    from mimoquant import api
    from mimoquant.report.verb_text import launch_text

    made = api.launch(
        out, engine.value, gpu.value, gpus, mtp=mtp, dflash=dflash, deepep=deepep, engine_version=engine_version
    )
    print_document(made, launch_text, as_json)


def synth(
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.", metavar="DIR")],
    layout: Annotated[Layout, typer.Option(help="The published on-disk format to imitate.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Convert this bf16 checkpoint instead of drawing weights.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; the first is dense.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed experts per layer.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the model, in channels.")] = None,
    expert_intermediate: Annotated[int | None, typer.Option(min=1, help="Width inside an expert, in channels.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Vocabulary size.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a small checkpoint in a real on-disk format. Random or converted: for tests, demos and bug reports."""
    from mimoquant import api
    from mimoquant.report import verb_text

    facts = api.synth(
        out,
        layout.value,
        source=source,
        seed=seed,
        layers=layers,
        experts=experts,
        hidden=hidden,
        expert_intermediate=expert_intermediate,
        vocab=vocab,
    )
    print_document(facts, verb_text.synth_text, as_json)
