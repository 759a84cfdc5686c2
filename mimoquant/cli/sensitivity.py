"""The verb `sensitivity`: options, what is refused before a long run, what is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mimoquant.cli.files import check_writable, write_page
from mimoquant.cli.options import (
    ContainerOption,
    HeldOutTokensOption,
    JsonOption,
    PlaceOption,
    QuietOption,
    ResumeOption,
    UnknownOption,
)
from mimoquant.cli.terminal import Lines, hint_to_resume, tell
from mimoquant.shipped import shipped_recipes, shipped_sets

if TYPE_CHECKING:
    from mimoquant.calibration.tokens import TokenSet


def sensitivity(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="Of one format; its method is used for all.",
            metavar="NAME|FILE",
            autocompletion=shipped_recipes,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write; must not exist.", metavar="FILE")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="What J is measured on: a shipped set or a file; repeatable.",
            metavar="SET|FILE",
            autocompletion=shipped_sets,
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=4, help="At most so many.")] = 56,
    tokens: HeldOutTokensOption = 512,
    budget_gib: Annotated[
        float | None, typer.Option(min=0, help="The output's size at most; by default the recipe's own.", metavar="GIB")
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(min=0, help="The least bytes that keep symmetric KL below this.", metavar="NATS")
    ] = None,
    device: PlaceOption = "auto",
    resume: ResumeOption = False,
    container: ContainerOption = None,
    fp8: Annotated[
        bool,
        typer.Option(help="Whether a layer may stay FP8, which engines give FP8 inputs; not all load the mixture."),
    ] = True,
    any_format: Annotated[
        bool,
        typer.Option(
            "--any-format",
            help="Offer int4 beside MXFP4 and NVFP4, whatever the recipe has; not all engines load both.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report page here.", metavar="FILE")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Measure what each layer's quantization costs. Writes a recipe that spends bytes where they buy most."""
    from mimoquant import api
    from mimoquant.calibration.tokens import load_tokens
    from mimoquant.errors import UsageError
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.memory import machine
    from mimoquant.machine.team import Team
    from mimoquant.mixing.needs import foreseen, fork_refusal
    from mimoquant.mixing.run import forks_of
    from mimoquant.mixing.run import sensitivity as run
    from mimoquant.report import sensitivity_page
    from mimoquant.report.verb_text import planned_lines

    begin = time.monotonic()
    if budget_gib is not None and target_kl is not None:
        raise UsageError(
            f"--budget-gib {budget_gib:g} and --target-kl {target_kl:g}: only one of them can be the limit"
        )
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {out}: a recipe file ends in .yaml")
    with Team.from_environment(resolve_device(device)) as team, hint_to_resume(team.leads):
        if team.leads:
            _check_files(source, out, html)
        mixtures = api.mixtures(
            source,
            recipe,
            container.value if container else None,
            team.device,
            allow_unknown=allow_unknown,
            fp8=fp8,
            any_format=any_format,
        )
        held = load_tokens(
            data or ["heldout-v1"],
            source,
            sequences=sequences,
            tokens=tokens,
            vocab=mixtures.plan.layout.geometry.vocab,
        )
        forks = forks_of(mixtures, held, team)
        refused = fork_refusal(forks, len(held.ids), team.device, machine(team.device))
        if refused:
            raise refused
        if team.leads:
            _tell([*mixtures.dropped, foreseen(forks, team.device)], held)
        budget = None if budget_gib is None else int(budget_gib * 2**30)
        facts = run(
            mixtures,
            held,
            out,
            budget_bytes=budget,
            target_j=target_kl,
            resume=resume,
            team=team,
            progress=_shown() if team.leads else None,
        )
    if not team.leads:
        return
    facts |= {
        "out": str(out),
        "elapsed_s": round(time.monotonic() - begin, 3),
        "engines": _engines(source, out, allow_unknown),
    }
    if html is not None:
        write_page(html, sensitivity_page.sensitivity_page(facts))
    lines = [sensitivity_page.sensitivity_text(facts), *planned_lines(facts["engines"])]
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines))


def _check_files(source: Path, out: Path, html: Path | None) -> None:
    from mimoquant.errors import UsageError

    if out.exists():
        raise UsageError(f"--out {out}: exists already", hint="choose another name or remove it")
    check_writable(out, (source,), "--out")
    if html is not None:
        check_writable(html, (source, Path(f"{out}.partial")))


def _tell(notes: list[str], tokens: TokenSet) -> None:
    if tokens.left_out:
        notes.append(f"too few tokens for one sequence of {tokens.ids.shape[1]}: {', '.join(tokens.left_out)}")
    for note in notes:
        tell(f"note: {note}")


def _engines(source: Path, out: Path, allow_unknown: bool) -> list[dict[str, Any]]:
    """What engines would make of the recipe's output, for not all load layers of several formats."""
    from mimoquant.planning.plan import make_plan
    from mimoquant.planning.recipe import load_recipe
    from mimoquant.serving.check import planned_facts
    from mimoquant.serving.served import planned

    return planned_facts(planned(make_plan(source, load_recipe(str(out)), allow_unknown=allow_unknown)))


def _shown() -> Callable[[str, int, int], None]:
    """A line a layer; the clock begins anew with each walk."""
    clock = [Lines()]

    def advance(what: str, done: int, layers: int) -> None:
        if done:
            clock[0](f"{what}, layer {done - 1}", done, layers)
        else:
            clock[0] = Lines()

    return advance
