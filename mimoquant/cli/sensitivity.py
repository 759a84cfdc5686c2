"""The verb `sensitivity`: options, what is refused before a long run, what is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimoquant.cli.files import write_page
from mimoquant.cli.options import (
    ActivationsOption,
    AsServedOption,
    ContainerOption,
    DataColumnOption,
    DenseActivationsOption,
    HeldOutTokensOption,
    JsonOption,
    KvOption,
    ObjectiveOption,
    PlaceOption,
    QuietOption,
    ReferenceAsServedOption,
    ResumeOption,
    UnknownOption,
    option_value,
)
from mimoquant.cli.terminal import Lines, hint_to_resume, printed_last, watcher
from mimoquant.shipped import HELD_OUT_SET, HELD_OUT_TOKENS, SENSITIVITY_SEQUENCES, shipped_recipes, shipped_sets

if TYPE_CHECKING:
    from mimoquant.mixing.documents import SensitivityDocument


def sensitivity(
    source: Annotated[Path, typer.Argument(help="The checkpoint to quantize.", metavar="SOURCE")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="The recipe to begin with, of one format; its method is used for every format.",
            metavar="NAME|FILE",
            autocompletion=shipped_recipes,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The recipe file to write; it must not exist.", metavar="FILE")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure on this: a shipped set or a file; repeatable.",
            metavar="SET|FILE",
            autocompletion=shipped_sets,
        ),
    ] = None,
    data_column: DataColumnOption = None,
    sequences: Annotated[
        int, typer.Option(min=4, help="Measure on at most so many sequences.")
    ] = SENSITIVITY_SEQUENCES,
    tokens: HeldOutTokensOption = HELD_OUT_TOKENS,
    budget_gib: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="What the quantized checkpoint may weigh; by default what the recipe itself takes.",
            metavar="GIB",
        ),
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(
            min=0, help="Take the fewest bytes that keep symmetric KL below this, in nats per token.", metavar="NATS"
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Predict what layers cost by the Fisher matrix, from one walk back; no forks, no J is measured.",
        ),
    ] = False,
    device: PlaceOption = "auto",
    resume: ResumeOption = False,
    container: ContainerOption = None,
    objective: ObjectiveOption = None,
    fp8: Annotated[
        bool,
        typer.Option(
            help="Whether a layer may stay FP8. Engines give such a layer FP8 inputs, and not all load the mixture."
        ),
    ] = True,
    any_format: Annotated[
        bool,
        typer.Option(
            "--any-format",
            help="Choose among int4, MXFP4 and NVFP4, whatever the recipe has; not all engines load them together.",
        ),
    ] = False,
    activations: ActivationsOption = None,
    dense_activations: DenseActivationsOption = None,
    kv: KvOption = None,
    as_served: AsServedOption = None,
    reference_as_served: ReferenceAsServedOption = False,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file as a page.", metavar="FILE")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    allow_unknown: UnknownOption = False,
) -> None:
    """Measure what each layer's quantization costs. Writes a recipe that spends bytes where they buy most."""
    from mimoquant.assembly.choices import EvaluationChoice, LimitChoice, MixtureChoice, RoundingChoice, Watcher
    from mimoquant.assembly.files import check_writable
    from mimoquant.assembly.mixing import check_recipe_file, choose_mixture
    from mimoquant.errors import UsageError
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team
    from mimoquant.report import sensitivity_page

    if budget_gib is not None and target_kl is not None:
        raise UsageError(
            f"--budget-gib {budget_gib:g} and --target-kl {target_kl:g}: only one of them can be the limit"
        )
    check_recipe_file(out)
    kinds = option_value(activations), option_value(dense_activations), option_value(kv)
    rounding = RoundingChoice(*kinds, as_served, reference_as_served)
    with Team.from_environment(resolve_device(device)) as team, hint_to_resume(team.leads):
        if html is not None and team.leads:
            check_writable(html, (source, Path(f"{out}.partial")))
        document = choose_mixture(
            source,
            out,
            MixtureChoice(recipe, option_value(container), allow_unknown, fp8, any_format, option_value(objective)),
            EvaluationChoice(data or (HELD_OUT_SET,), sequences, tokens, column=data_column, rounding=rounding),
            LimitChoice(None if budget_gib is None else int(budget_gib * 2**30), target_kl, quick),
            team,
            resume=resume,
            watcher=replace(watcher(), progress=_shown()) if team.leads else Watcher(),
        )
    if not team.leads:
        return
    with printed_last(document, _text, as_json):
        if html is not None:
            write_page(html, sensitivity_page.sensitivity_page(document))


def _text(document: SensitivityDocument) -> str:
    from mimoquant.report.sensitivity_page import sensitivity_text
    from mimoquant.report.verb_text import planned_lines

    return "\n".join([sensitivity_text(document), *planned_lines(document["engines"])])


def _shown() -> Callable[[str, int, int], None]:
    """A line a layer; the clock begins anew with each walk."""
    clock = [Lines()]

    def advance(what: str, done: int, layers: int) -> None:
        if done:
            clock[0](f"{what}, layer {done - 1}", done, layers)
        else:
            clock[0] = Lines()

    return advance
