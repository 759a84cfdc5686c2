"""Verbs: parse, call, print, exit code.

Key idea: stdout carries data (text, or one JSON document with --json), stderr everything else. Errors become one
sentence, a hint and an exit code in one place. Nothing heavy is imported before a verb runs, so --help is instant.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mimoquant.cli.choices import Container, Engine, Gpu, Qkv, QkvDtype, Server
from mimoquant.cli.eval_draft import eval_draft
from mimoquant.cli.files import check_page, check_profile, write_page
from mimoquant.cli.options import (
    ContainerOption,
    DataOption,
    DeviceOption,
    GpuMemoryOption,
    HeldOutOption,
    HeldOutSequencesOption,
    HeldOutTokensOption,
    JsonOption,
    PlaceOption,
    QuietOption,
    RecipeOption,
    RefineLayersOption,
    RefineOption,
    ResumeOption,
    SequencesOption,
    TokensOption,
    UnknownOption,
    VersionOption,
)
from mimoquant.cli.sensitivity import sensitivity
from mimoquant.cli.synth_cli import synth
from mimoquant.cli.terminal import RESUMABLE, Lines, Progress, tell
from mimoquant.errors import MimoquantError, is_disk_trouble, is_out_of_memory
from mimoquant.machine.team import refuse_ranks

EXIT_INTERRUPTED = 130
_RESUMABLE_VERBS = ("quantize", "relayout")  # the others note on the interrupt when they are
_SHARED_VERBS = ("quantize", "eval-kl", "eval-draft", "sensitivity")  # among ranks


class _Group(TyperGroup):
    """Turns errors and interrupts into a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        signal.signal(signal.SIGTERM, _raise_interrupt)
        # A plan is some 10^5 small objects that all live to the end; at the default threshold the collector would
        # walk over them hundreds of times (a third of the time that planning takes).
        gc.set_threshold(100_000, 20, 100)
        try:
            return super().invoke(ctx)
        except MimoquantError as error:
            if not error.told:
                typer.echo(f"error: {error}", err=True)
            if error.hint and not error.told:
                typer.echo(f"hint: {error.hint}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            typer.echo("interrupted", err=True)
            if ctx.invoked_subcommand in _RESUMABLE_VERBS or RESUMABLE in getattr(interrupt, "__notes__", ()):
                typer.echo(f"hint: {RESUMABLE}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            tell(f"error: out of memory ({str(error).partition(chr(10))[0]})")
            if ctx.invoked_subcommand == "quantize":
                tell("hint: go on with --resume where there is more; fewer --sequences need less, plan says how much")
            raise typer.Exit(4) from None
        except OSError as error:
            # what no module foresaw: a path too long, a folder that may not be entered, a full disk under stdout
            where = f"{error.filename}: " if error.filename else ""
            tell(f"error: {where}{error.strerror or error}")
            raise typer.Exit(4 if is_disk_trouble(error) else 2) from None


def _raise_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="4-bit MiMo-V2 checkpoints: streamed, exact, proven. Only the routed experts are quantized.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from mimoquant.cli.versions import version_text

        typer.echo(version_text())
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it, and the libraries' versions.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in _SHARED_VERBS:
        refuse_ranks(str(ctx.invoked_subcommand))


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.", metavar="CKPT")],
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Say what a checkpoint holds. Reads headers only."""
    from mimoquant import api
    from mimoquant.planning import facts as describe

    _print(api.inspect(checkpoint, allow_unknown=allow_unknown), describe.layout_text, as_json)


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where quantize would write.", metavar="DIR")] = None,
    device: DeviceOption = "auto",
    gpu_memory: GpuMemoryOption = None,
    data: DataOption = None,
    sequences: SequencesOption = None,
    tokens: TokensOption = None,
    refine: RefineOption = None,
    refine_layer: RefineLayersOption = None,
    container: ContainerOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Rehearse one chunk of experts to tell the time.")] = False,
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Show what quantize would do, need and write. Sizes are to the byte; reads headers only, or with --measure also
    some experts."""
    from mimoquant import api
    from mimoquant.planning import facts as describe

    if measure:
        tell("note: rehearsing the plan's steps on one chunk of experts")
    facts = api.plan(
        source, recipe, out=out, device=device, gpu_memory=gpu_memory, data=data, sequences=sequences, tokens=tokens,
        refine=refine, refine_layer=refine_layer, container=_value(container), measure=measure,
        allow_unknown=allow_unknown,
    )  # fmt: skip
    _print(facts, describe.plan_text, as_json)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", metavar="DIR")],
    device: DeviceOption = "auto",
    gpu_memory: GpuMemoryOption = None,
    resume: ResumeOption = False,
    data: DataOption = None,
    sequences: SequencesOption = None,
    tokens: TokensOption = None,
    refine: RefineOption = None,
    refine_layer: RefineLayersOption = None,
    container: ContainerOption = None,
    html: Annotated[Path | None, typer.Option(help="Write what calibration reached here.", metavar="FILE")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the run here.", metavar="FILE")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Write the 4-bit checkpoint. The folder appears only when it is complete; an interrupted run can be resumed."""
    from mimoquant import api, pipeline
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team
    from mimoquant.machine.timeline import Timeline
    from mimoquant.planning import facts as describe
    from mimoquant.planning.needs import machine, refusal
    from mimoquant.report import coverage_page

    begin = time.monotonic()
    with Team.from_environment(resolve_device(device)) as team:
        has = machine(team.device, gpu_memory)
        has = replace(has, gpu_bytes=min(team.gather(has.gpu_bytes)))  # chunks must be the same everywhere
        changes = api.calibration_changes(data, sequences, tokens, refine, refine_layer)
        made = api.fitted_plan(source, recipe, _value(container), allow_unknown, changes, team.device, has, team.size)
        refused = refusal(made, team.device, has, team.size)
        if refused:
            raise refused
        if html is not None:
            check_page(html, made, out)
        if profile is not None:
            check_profile(profile, made, out)
        timeline = Timeline()
        with Progress(made, team.size, timeline) if team.leads else contextlib.nullcontext() as progress:
            for note in made.notes if team.leads else ():
                tell(f"note: {note}")
            report = pipeline.quantize(made, out, resume=resume, team=team, timeline=timeline,
                                       progress=progress.advance if progress else None)  # fmt: skip
    if not team.leads:
        return
    facts = {**report.as_json(), "out": str(out), "elapsed_s": round(time.monotonic() - begin, 3),
             "bound_by": dict(zip(("what", "share"), timeline.bound, strict=True))}  # fmt: skip
    if profile is not None:
        write_page(profile, timeline.chrome_trace(), "--profile")
    if html is not None:
        write_page(html, coverage_page.coverage_page(facts))
    _print(facts, describe.quantize_text, as_json)


@app.command()
def relayout(
    source: Annotated[Path, typer.Argument(help="A checkpoint, published or written here.", metavar="SOURCE")],
    qkv: Annotated[Qkv, typer.Option(help="How q, k and v shall lie on disk.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", metavar="DIR")],
    tp: Annotated[
        int | None, typer.Option(min=1, help="Chunks of interleaved; by default the KV heads.", metavar="N")
    ] = None,
    dtype: Annotated[QkvDtype, typer.Option(help="bf16: of an FP8 qkv too.")] = QkvDtype.SOURCE,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Write q, k and v in another layout. Exactly or not at all; every other tensor is copied byte for byte."""
    from mimoquant import pipeline
    from mimoquant.planning import facts as describe
    from mimoquant.planning.relayout import make_relayout
    from mimoquant.serving.check import planned_facts, planned_lines
    from mimoquant.serving.served import planned

    begin = time.monotonic()
    made = make_relayout(source, qkv.value, tp=tp, bf16=dtype is QkvDtype.BF16, allow_unknown=allow_unknown)
    engines = planned_facts(planned(made))
    with Progress(made) as progress:
        for line in [*(f"note: {note}" for note in made.notes), *planned_lines(engines)]:
            tell(line)
        finished = pipeline.execute(made, out, device="cpu", resume=resume, progress=progress.advance)
    facts = {**describe.relayout_facts(made, finished, engines), "out": str(out),
             "elapsed_s": round(time.monotonic() - begin, 3)}  # fmt: skip
    _print(facts, describe.relayout_text, as_json)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="What quantize or relayout wrote.", metavar="OUT")],
    source: Annotated[
        Path | None, typer.Option("--source", help="The checkpoint it was made from.", metavar="SOURCE")
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="Fail on what this engine would refuse or corrupt.")] = None,
    engine_version: VersionOption = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism to check for.", metavar="N")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Prove a checkpoint against its source, value by value. Or, with --engine, against what an engine accepts."""
    from mimoquant import api
    from mimoquant.errors import CheckpointError
    from mimoquant.planning import facts as describe

    facts = api.verify(out, source, engine=engine.value if engine else None, engine_version=engine_version, tp=tp,
                       progress=Lines())  # fmt: skip
    _print(facts, describe.verify_text, as_json)
    if not facts["ok"]:
        raise CheckpointError(
            f"{out}: is not what its recipe says (problems: {len(facts['problems'])})",
            hint="the lines above name them; fetch these files again, or write the folder anew",
        )
    if engine is not None and not facts["engine"]["ok"]:
        failed = [problem for problem in facts["engine"]["problems"] if problem["verdict"] != "warning"]
        raise CheckpointError(f"{out}: {engine.value} would refuse or corrupt it (problems: {len(failed)})")


@app.command()
def launch(
    out: Annotated[Path, typer.Argument(help="What quantize wrote.", metavar="OUT")],
    engine: Annotated[Server, typer.Option(help="The server.")],
    gpu: Annotated[Gpu, typer.Option(help="The kind of GPU.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many, over all nodes.", metavar="N")],
    mtp: Annotated[bool, typer.Option("--mtp", help="Speculate with the checkpoint's MTP layers.")] = False,
    dflash: Annotated[Path | None, typer.Option(help="Speculate with this draft model.", metavar="DIR")] = None,
    engine_version: VersionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the command that serves a checkpoint. It names parallelism, back ends, context and parsers; reads headers
    only."""
    from mimoquant import api
    from mimoquant.serving.launch import launch_text

    made = api.launch(out, engine.value, gpu.value, gpus, mtp=mtp, dflash=dflash, engine_version=engine_version)
    _print(made, launch_text, as_json)


@app.command("eval-kl")
def eval_kl(
    reference: Annotated[Path, typer.Argument(help="The published checkpoint.", metavar="REFERENCE")],
    candidate: Annotated[
        Path | None, typer.Argument(help="The quantized one, by any tool; or give --server.", metavar="CANDIDATE")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Score this vLLM or SGLang server instead; J is a lower bound.", metavar="URL")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The server's name for it, if it serves several.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Ids a position; by default 256 or what is allowed.")] = None,
    data: HeldOutOption = None,
    sequences: HeldOutSequencesOption = None,
    tokens: HeldOutTokensOption = 512,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Exit with 5 if J is above this.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another candidate, compared on the same tokens.")] = None,
    noise_floor: Annotated[bool, typer.Option(help="Measure what the reference differs from itself.")] = True,
    device: PlaceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the JSON here; makes it resumable.", metavar="FILE")
    ] = None,
    resume: ResumeOption = False,
    html: Annotated[Path | None, typer.Option(help="Write the report page here.", metavar="FILE")] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write --max-kl's outcome here as JUnit XML.", metavar="FILE")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the outcome into CANDIDATE's README.md.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure symmetric KL of a checkpoint or server. The reference is the published one in bf16, the tokens held out.

    With --out a killed evaluation can be resumed after its last layer: meanwhile FILE.partial holds the hidden states,
    up to 8 bytes x width for each token and checkpoint.
    """
    from mimoquant.cli import eval_kl
    from mimoquant.errors import QualityError
    from mimoquant.report import changes_card, eval_page, server_text

    begin = time.monotonic()
    eval_kl.check_candidate(
        candidate, server, {"--model": model, "--top-k": top_k},
        {"--baseline": baseline, "--html": html, "--out": out, "--resume": resume or None},
    )  # fmt: skip
    eval_kl.check_outcome(reference, candidate, max_kl, junit, card)
    where = (reference, data or ["heldout-v1"], sequences, tokens)
    if candidate is not None:
        facts = eval_kl.evaluate(*where, candidate, baseline, noise_floor, device, out, resume, html)
    else:
        facts = eval_kl.evaluate_server(*where, str(server), model, top_k, device)
    if facts is None:  # another rank tells
        return
    if facts.get("activations_quantized"):
        tell(f"note: {candidate}: its config quantizes activations too; J is of its weights alone")
    facts["max_kl"], j, broken = max_kl, facts["j"]["mean"], facts["nonfinite_share"]
    facts["passed"] = None if max_kl is None else j <= max_kl and not broken
    facts["elapsed_s"] = round(time.monotonic() - begin, 3)
    facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if html is not None:
        write_page(html, eval_page.eval_page(facts, changes_card.changes_part(Path(facts["candidate"]))))
    _print(facts, eval_page.eval_text if candidate is not None else server_text.server_text, as_json)
    eval_kl.write_outcome(facts, candidate, junit, card)
    if max_kl is not None and j > max_kl:
        least = "at least " if facts.get("server", {}).get("is_lower_bound") else ""
        over = f"{least}{j:.5f} nats a token, {j - max_kl:.5f} above the gate of {max_kl}"
        raise QualityError(f"{facts['candidate']}: J is {over}")
    if max_kl is not None and broken:
        raise QualityError(f"{facts['candidate']}: {100 * broken:.3g} % of the rows are not finite, J leaves them out")


app.command()(sensitivity)
app.command("eval-draft")(eval_draft)
app.command()(synth)


def _value(container: Container | None) -> str | None:
    return container.value if container else None


def _print(facts: dict[str, Any], to_text: Any, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2) if as_json else to_text(facts))


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:  # before the verb had begun, or a second time while the first was being told
        sys.exit(EXIT_INTERRUPTED)
