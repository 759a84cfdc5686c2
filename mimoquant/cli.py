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
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import mimoquant
from mimoquant.errors import MimoquantError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from mimoquant.plan import Plan, Unit

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
            typer.echo(f"error: {error}", err=True)
            if error.hint:
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
        except OSError as error:
            # what no module foresaw: a path too long, a folder that may not be entered, a full disk under stdout
            where = f"{error.filename}: " if error.filename else ""
            _tell(f"error: {where}{error.strerror or error}")
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
UnknownOption = Annotated[bool, typer.Option("--allow-unknown", help="Copy tensors that have no known role.")]


class Container(StrEnum):
    """`--container`; None lets recipe, format and source decide."""

    COMPRESSED_TENSORS = "compressed-tensors"
    NATIVE = "native"


class Layout(StrEnum):
    """`synth --layout`: the published on-disk formats."""

    FLASH = "flash"
    V25 = "v2.5"
    PRO = "pro"


ContainerOption = Annotated[
    Container | None, typer.Option(help="How the experts are stored; by default what fits the format.")
]


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

    _print(describe.plan_facts(_plan(source, recipe, container, allow_unknown)), describe.plan_text, as_json)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: RecipeOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; must not exist.", metavar="DIR")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; the bytes are the same.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    container: ContainerOption = None,
    as_json: JsonOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Write the 4-bit checkpoint. The folder appears only when it is complete; an interrupted run can be resumed."""
    from mimoquant import describe, pipeline

    begin = time.monotonic()
    made = _plan(source, recipe, container, allow_unknown)
    for note in made.notes:
        _tell(f"note: {note}")
    with _Progress(made) as progress:
        report = pipeline.quantize(made, out, device=device, resume=resume, progress=progress.advance)
    facts = {**report.as_json(), "out": str(out), "elapsed_s": round(time.monotonic() - begin, 3)}
    _print(facts, describe.quantize_text, as_json)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="What quantize wrote.", metavar="OUT")],
    source: Annotated[Path, typer.Option("--source", help="The checkpoint it was made from.", metavar="SOURCE")],
    as_json: JsonOption = False,
) -> None:
    """Prove a written checkpoint against its source: files, hashes, every tensor, every value."""
    from mimoquant import describe
    from mimoquant.errors import CheckpointError
    from mimoquant.verify import verify as run

    report = run(out, source, progress=_Lines())
    _print(report.as_json() | {"out": str(out)}, describe.verify_text, as_json)
    if not report.ok:
        raise CheckpointError(f"{out}: is not what its recipe says, {len(report.problems)} problems were found")


@app.command("eval-kl")
def eval_kl(
    reference: Annotated[Path, typer.Argument(help="The published checkpoint.", metavar="REFERENCE")],
    candidate: Annotated[Path, typer.Argument(help="The quantized one, by any tool.", metavar="CANDIDATE")],
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
    """Measure symmetric KL of a checkpoint against its bf16 reference: full vocabulary, held-out tokens."""
    from mimoquant import report_page
    from mimoquant.errors import QualityError

    begin = time.monotonic()
    facts = _evaluate(reference, candidate, data or ["heldout-v1"], sequences, tokens, baseline, noise_floor, device)
    facts["max_kl"], j = max_kl, facts["j"]["mean"]
    facts["passed"] = None if max_kl is None else j <= max_kl
    facts["elapsed_s"] = round(time.monotonic() - begin, 3)
    facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if html is not None:
        _write_page(html, report_page.eval_page(facts))
    _print(facts, report_page.eval_text, as_json)
    if max_kl is not None and j > max_kl:
        raise QualityError(f"{candidate}: J is {j:.5f} nats a token, {j - max_kl:.5f} above the gate of {max_kl}")


def _evaluate(
    reference: Path,
    candidate: Path,
    data: list[str],
    sequences: int | None,
    tokens: int,
    baseline: Path | None,
    noise_floor: bool,
    device: str,
) -> dict[str, Any]:
    from mimoquant.calibration.tokenizer import load_tokenizer
    from mimoquant.calibration.tokens import load_tokens
    from mimoquant.devices import resolve_device
    from mimoquant.errors import CheckpointError
    from mimoquant.evaluation.evaluate import eval_kl as run
    from mimoquant.evaluation.evaluate import open_layout

    place = resolve_device(device)
    vocab = open_layout(reference).geometry.vocab
    loaded = load_tokens(data, reference, sequences=sequences, tokens=tokens, vocab=vocab)
    if loaded.left_out:
        _tell(f"note: too few tokens for one sequence of {tokens}: {', '.join(loaded.left_out)}")

    lines = _Lines()
    try:
        decode = load_tokenizer(reference).decode
    except CheckpointError:  # data that came as ids needs no tokenizer; the worst tokens are shown as ids then
        decode = None
    return run(reference, candidate, loaded, baseline=baseline, device=place, noise_floor=noise_floor, decode=decode,
               progress=lambda layer, layers: lines(f"layer {layer}", layer + 1, layers))  # fmt: skip


def _write_page(path: Path, page: str) -> None:
    from mimoquant.errors import UsageError

    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {path}: cannot be written ({error.strerror})") from error


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


def _plan(source: Path, recipe: str, container: Container | None, allow_unknown: bool) -> Plan:
    from mimoquant.plan import make_plan
    from mimoquant.recipe import load_recipe

    chosen = container.value if container else None
    return make_plan(source, load_recipe(recipe), container=chosen, allow_unknown=allow_unknown)


def _print(facts: dict[str, Any], to_text: Any, as_json: bool) -> None:
    typer.echo(json.dumps(facts, indent=2) if as_json else to_text(facts))


class _Progress:
    """stderr: one bar with rate and time left on a terminal, one line a finished unit elsewhere."""

    def __init__(self, made: Plan) -> None:
        self.units, self.total = len(made.units), made.shard_bytes
        self.finished = 0
        self.done: dict[str, int] = {}
        self.begin = time.monotonic()
        self.kept = 0  # bytes that an earlier run had written
        self.bar: Bar | None = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                       TimeRemainingColumn())  # fmt: skip
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("quantizing", total=self.total)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, unit: Unit, size_bytes: int, finished: bool) -> None:
        """Called by the run; `size_bytes` of the unit are written."""
        from mimoquant.report import size

        self.done[unit.name] = size_bytes
        written = sum(self.done.values())
        self.finished += finished
        if self.bar:
            self.bar.update(self.task, completed=written, description=unit.name)
        elif finished:
            elapsed = time.monotonic() - self.begin
            rate = written / elapsed if elapsed else 0
            left = (self.total - written) / rate if rate else 0
            _tell(
                f"[{self.finished}/{self.units}] {unit.name}: {size(written)} of {size(self.total)}, "
                f"{size(int(rate))}/s, {left:.0f} s left"
            )


class _Lines:
    """stderr: a line for each step of work that comes in parts, with the time left of its kind."""

    def __init__(self) -> None:
        self.begin = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        elapsed = time.monotonic() - self.begin
        _tell(f"[{done}/{total}] {name}, {elapsed / done * (total - done):.0f} s left")
        if done == total:
            self.begin = time.monotonic()


def _tell(line: str) -> None:
    """A line on stderr; a reader who has left is no reason to stop."""
    with contextlib.suppress(OSError):
        typer.echo(line, err=True)


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:  # before the verb had begun, or a second time while the first was being told
        sys.exit(EXIT_INTERRUPTED)
