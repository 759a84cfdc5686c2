"""Verbs: parse, call, print, exit code.

Key idea: stdout carries data (text, or one JSON document with --json), stderr everything else. Errors become one
sentence, a hint and an exit code in one place. Nothing heavy is imported before a verb runs, so --help is instant.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import mimoquant
from mimoquant.choices import Container, Engine, Gpu, Layout, Server
from mimoquant.errors import MimoquantError, is_out_of_memory
from mimoquant.page_files import check_page, check_profile, check_writable, write_page
from mimoquant.progress import Lines, Progress, tell
from mimoquant.sensitivity_cli import sensitivity

if TYPE_CHECKING:
    from mimoquant.calibration.tokens import TokenSet
    from mimoquant.plan import Plan

EXIT_INTERRUPTED = 130
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


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
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            if ctx.invoked_subcommand == "quantize":
                typer.echo("hint: run the same command again with --resume to go on where it stopped", err=True)
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
            raise typer.Exit(4 if error.errno in _DISK_TROUBLE else 2) from None


def _raise_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="4-bit MiMo-V2 checkpoints: streamed, exact, proven. Only the routed experts are quantized.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe's name, or a recipe file.", metavar="NAME|FILE")
]
VersionOption = Annotated[
    str | None, typer.Option(help="Of the engine; by default the newest that is known here.", metavar="X")
]
UnknownOption = Annotated[bool, typer.Option("--allow-unknown", help="Copy tensors that have no known role.")]
ContainerOption = Annotated[
    Container | None, typer.Option(help="How the experts are stored; by default what fits the format.")
]
app.command()(sensitivity)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mimoquant {mimoquant.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    return None


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.", metavar="CKPT")],
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Say what a checkpoint holds. Reads headers only."""
    from mimoquant import describe
    from mimoquant.checkpoint.index import open_index
    from mimoquant.model.layout import read_layout
    from mimoquant.plan import read_config

    index = open_index(checkpoint)
    layout = read_layout(index, read_config(index), allow_unknown=allow_unknown, packed=True)
    _print(describe.layout_facts(layout), describe.layout_text, as_json)


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    container: ContainerOption = None,
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Show what quantize would do and how large the result is, to the byte. Reads headers only."""
    from mimoquant import describe

    _print(describe.plan_facts(_plan(source, recipe, container, allow_unknown, {})), describe.plan_text, as_json)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", metavar="DIR")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; the same bytes without calibration.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    data: Annotated[
        list[str] | None, typer.Option(help="What to calibrate on, instead of the recipe's.", metavar="SET|FILE")
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Of calibration tokens, at most.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of each sequence.")] = None,
    container: ContainerOption = None,
    html: Annotated[Path | None, typer.Option(help="Write what calibration reached here.", metavar="FILE")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the run here.", metavar="FILE")] = None,
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Write the 4-bit checkpoint. The folder appears only when it is complete; an interrupted run can be resumed."""
    from mimoquant import coverage_page, describe, pipeline
    from mimoquant.devices import resolve_device
    from mimoquant.team import Team
    from mimoquant.timeline import Timeline

    begin = time.monotonic()
    changed = {"data": tuple(data) if data else None, "sequences": sequences, "tokens": tokens}
    changed = {key: value for key, value in changed.items() if value is not None}
    with Team.from_environment(resolve_device(device)) as team:
        made = _plan(source, recipe, container, allow_unknown, changed, team.device)
        if html is not None:
            check_page(html, made, out)
        if profile is not None:
            check_profile(profile, made, out)
        timeline = Timeline()
        with Progress(made, team.size) if team.leads else contextlib.nullcontext() as progress:
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
def verify(
    out: Annotated[Path, typer.Argument(help="What quantize wrote.", metavar="OUT")],
    source: Annotated[
        Path | None, typer.Option("--source", help="The checkpoint it was made from.", metavar="SOURCE")
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="Fail on what this engine would refuse or corrupt.")] = None,
    engine_version: VersionOption = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism to check for.", metavar="N")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a checkpoint against its source, value by value; or, with --engine, against what an engine accepts."""
    from mimoquant import describe
    from mimoquant.errors import CheckpointError, UsageError

    if source is None and engine is None:
        raise UsageError(f"there is nothing to hold {out} against", hint="give --source, --engine, or both")
    if engine is None and (engine_version or tp):
        raise UsageError("--engine-version and --tp are about an --engine", hint="name one, such as --engine vllm")
    facts: dict[str, Any] = {"schema_version": 1, "out": str(out), "ok": True, "problems": []}
    if source is not None:
        from mimoquant.verify import verify as run

        facts |= run(out, source, progress=Lines()).as_json()
    if engine is not None and facts["ok"]:  # what a damaged file would do in an engine is nobody's question
        from mimoquant.serving.check import engine_facts
        from mimoquant.serving.facts import read_served

        facts["engine"] = engine_facts(read_served(out), engine.value, engine_version, tp)
    _print(facts, describe.verify_text, as_json)
    if not facts["ok"]:
        raise CheckpointError(f"{out}: is not what its recipe says (problems: {len(facts['problems'])})")
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
    """Print the command that serves a checkpoint: parallelism, back ends, context, parsers. Reads headers only."""
    from mimoquant.serving.facts import read_served
    from mimoquant.serving.launch import launch as make
    from mimoquant.serving.launch import launch_text

    made = make(read_served(out), engine.value, gpu.value, gpus, version=engine_version, mtp=mtp, dflash=dflash)
    _print(made.as_json(), launch_text, as_json)


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
    data: Annotated[
        list[str] | None,
        typer.Option(help="A shipped set, or .jsonl, .txt, .npy, dataset folder; repeatable.", metavar="SET|FILE"),
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="At most so many; by default all.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each sequence.")] = 512,
    max_kl: Annotated[float | None, typer.Option(min=0, help="Exit with 5 if J is above this.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another candidate, compared on the same tokens.")] = None,
    noise_floor: Annotated[bool, typer.Option(help="Measure what the reference differs from itself.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    html: Annotated[Path | None, typer.Option(help="Write the report page here.", metavar="FILE")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure symmetric KL of a checkpoint (or a server) against its bf16 reference, on held-out tokens."""
    from mimoquant import report_page, server_text
    from mimoquant.errors import QualityError

    begin = time.monotonic()
    _check_candidate(candidate, server, {"--model": model, "--top-k": top_k}, {"--baseline": baseline, "--html": html})
    if html is not None:
        check_writable(html, tuple(folder for folder in (reference, candidate, baseline) if folder is not None))
    where = (reference, data or ["heldout-v1"], sequences, tokens)
    if candidate is not None:
        facts = _evaluate(*where, candidate, baseline, noise_floor, device)
    else:
        facts = _evaluate_server(*where, str(server), model, top_k, device)
    if facts is None:  # another rank tells
        return
    if facts.get("activations_quantized"):
        tell(f"note: {candidate}: its config quantizes activations too; J is of its weights alone")
    facts["max_kl"], j = max_kl, facts["j"]["mean"]
    facts["passed"] = None if max_kl is None else j <= max_kl
    facts["elapsed_s"] = round(time.monotonic() - begin, 3)
    facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if html is not None:
        write_page(html, report_page.eval_page(facts))
    _print(facts, report_page.eval_text if candidate is not None else server_text.server_text, as_json)
    if max_kl is not None and j > max_kl:
        least = "at least " if facts.get("server", {}).get("is_lower_bound") else ""
        over = f"{least}{j:.5f} nats a token, {j - max_kl:.5f} above the gate of {max_kl}"
        raise QualityError(f"{facts['candidate']}: J is {over}")


def _check_candidate(
    candidate: Path | None, server: str | None, of_server: dict[str, Any], of_candidate: dict[str, Any]
) -> None:
    from mimoquant.errors import UsageError

    if candidate is None and server is None:
        raise UsageError(
            "there is nothing to compare the reference with", hint="give a CANDIDATE folder, or --server URL"
        )
    if candidate is not None and server is not None:
        raise UsageError(f"{candidate} and --server {server}: only one of them can be the candidate")
    for option, value in (of_candidate if candidate is None else of_server).items():
        if value is not None:
            raise UsageError(f"{option} cannot go with {'--server' if candidate is None else 'a CANDIDATE folder'}")


def _load_tokens(
    reference: Path, data: list[str], sequences: int | None, tokens: int, vocab: int, leads: bool = True
) -> TokenSet:
    from mimoquant.calibration.tokens import load_tokens

    loaded = load_tokens(data, reference, sequences=sequences, tokens=tokens, vocab=vocab)
    if loaded.left_out and leads:
        tell(f"note: too few tokens for one sequence of {tokens}: {', '.join(loaded.left_out)}")
    return loaded


def _evaluate(
    reference: Path,
    data: list[str],
    sequences: int | None,
    tokens: int,
    candidate: Path,
    baseline: Path | None,
    noise_floor: bool,
    device: str,
) -> dict[str, Any] | None:
    from mimoquant.calibration.tokenizer import load_tokenizer
    from mimoquant.devices import resolve_device
    from mimoquant.errors import CheckpointError
    from mimoquant.evaluation.evaluate import eval_kl as run
    from mimoquant.evaluation.evaluate import open_layout
    from mimoquant.team import Team

    place, lines = resolve_device(device), Lines()
    with Team.from_environment(place) as team:
        loaded = _load_tokens(reference, data, sequences, tokens, open_layout(reference).geometry.vocab, team.leads)
        try:
            decode = load_tokenizer(reference).decode
        except CheckpointError:  # data that came as ids needs no tokenizer; the worst tokens are shown as ids then
            decode = None
        shown = (lambda layer, layers: lines(f"layer {layer}", layer + 1, layers)) if team.leads else None
        facts = run(reference, candidate, loaded, baseline=baseline, device=place, noise_floor=noise_floor,
                    decode=decode, progress=shown, team=team)  # fmt: skip
    return facts if team.leads else None


def _evaluate_server(
    reference: Path,
    data: list[str],
    sequences: int | None,
    tokens: int,
    url: str,
    model: str | None,
    top_k: int | None,
    device: str,
) -> dict[str, Any]:
    from mimoquant.devices import resolve_device
    from mimoquant.evaluation.evaluate import open_layout
    from mimoquant.evaluation.served import eval_server
    from mimoquant.evaluation.server import connect

    place, vocab = resolve_device(device), open_layout(reference).geometry.vocab
    # before the data: a typing error is told soon
    server = connect(url, model, top_k=top_k, tokens=tokens, vocab=vocab)
    if top_k is None:
        tell(f"note: {server.engine} is asked for {server.top_k} ids a position")
    loaded, lines = _load_tokens(reference, data, sequences, tokens, vocab), Lines()
    return eval_server(reference, server, loaded, device=place,
                       progress=lambda layer, layers: lines(f"layer {layer}", layer + 1, layers),
                       asked=lambda done, all_: lines(f"sequence {done}", done, all_))  # fmt: skip


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.", metavar="DIR")],
    layout: Annotated[Layout, typer.Option(help="The published on-disk format to imitate.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Convert this bf16 checkpoint instead of drawing weights.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers (the first is dense).")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Routed experts a layer.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Model width.")] = None,
    expert_intermediate: Annotated[int | None, typer.Option(min=1, help="Width inside an expert.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Vocabulary size.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a small checkpoint in a real on-disk format, random or converted: for tests, demos and bug reports."""
    from mimoquant import describe
    from mimoquant.errors import UsageError
    from mimoquant.synth import SynthSizes
    from mimoquant.synth import synth as run

    given = {"layers": layers, "experts": experts, "hidden": hidden, "expert_intermediate": expert_intermediate,
             "vocab": vocab}  # fmt: skip
    chosen = {key: value for key, value in given.items() if value is not None}
    if source is not None and chosen:
        raise UsageError(
            f"--from takes the sizes of {source}; --{next(iter(chosen)).replace('_', '-')} cannot go with it"
        )
    report = run(out, layout.value, source=source, sizes=None if source else SynthSizes(**chosen), seed=seed)
    _print({"schema_version": 1, "out": str(out), **asdict(report)}, describe.synth_text, as_json)


def _plan(
    source: Path,
    recipe: str,
    container: Container | None,
    allow_unknown: bool,
    calibration: dict[str, Any],
    device: str = "cpu",
) -> Plan:
    from mimoquant.plan import CHUNK_BYTES, CUDA_CHUNK_BYTES, make_plan
    from mimoquant.recipe import load_recipe

    loaded = load_recipe(recipe).calibrated_on(calibration)
    large = loaded.calibrated and device.startswith("cuda")
    return make_plan(source, loaded, container=container.value if container else None, allow_unknown=allow_unknown,
                     chunk_bytes=CUDA_CHUNK_BYTES if large else CHUNK_BYTES)  # fmt: skip


def _print(facts: dict[str, Any], to_text: Any, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2) if as_json else to_text(facts))


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:  # before the verb had begun, or a second time while the first was being told
        sys.exit(EXIT_INTERRUPTED)
