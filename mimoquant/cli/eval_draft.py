"""The verb `eval-draft`: options, what is refused before the walk, what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mimoquant.cli.options import (
    ActivationsOption,
    AsServedOption,
    DataColumnOption,
    DenseActivationsOption,
    HeldOutOption,
    HeldOutSequencesOption,
    HeldOutTokensOption,
    JsonOption,
    KvOption,
    PlaceOption,
    QuietOption,
    ReferenceAsServedOption,
    option_value,
)
from mimoquant.cli.terminal import print_document, watcher
from mimoquant.shipped import HELD_OUT_SET, HELD_OUT_TOKENS


def eval_draft(
    reference: Annotated[Path, typer.Argument(help="The published checkpoint, in bf16 or FP8.", metavar="REFERENCE")],
    candidate: Annotated[Path, typer.Argument(help="The quantized checkpoint, by any tool.", metavar="CANDIDATE")],
    draft: Annotated[
        str,
        typer.Option(
            help="What drafts tokens: each checkpoint's own MTP layers, in a chain (mtp) or each on the backbone's "
            "hidden states as SGLang runs them (mtp-backbone), or the DFlash drafter in a folder.",
            metavar="mtp|mtp-backbone|DIR",
        ),
    ] = "mtp",
    data: HeldOutOption = None,
    data_column: DataColumnOption = None,
    sequences: HeldOutSequencesOption = None,
    tokens: HeldOutTokensOption = HELD_OUT_TOKENS,
    depth: Annotated[
        int | None, typer.Option(min=1, max=3, help="MTP layers that draft in a chain; by default all, at most 3.")
    ] = None,
    activations: ActivationsOption = None,
    dense_activations: DenseActivationsOption = None,
    kv: KvOption = None,
    as_served: AsServedOption = None,
    reference_as_served: ReferenceAsServedOption = False,
    device: PlaceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how many drafted tokens a backbone accepts. The quantized one beside the published one, on
    held-out tokens."""
    from mimoquant.assembly.choices import EvaluationChoice, RoundingChoice
    from mimoquant.assembly.evaluations import evaluate_draft
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team
    from mimoquant.report.draft_text import draft_text

    kinds = option_value(activations), option_value(dense_activations), option_value(kv)
    rounding = RoundingChoice(*kinds, as_served, reference_as_served)
    choice = EvaluationChoice(data or (HELD_OUT_SET,), sequences, tokens, column=data_column, rounding=rounding)
    with Team.from_environment(resolve_device(device)) as team:
        document = evaluate_draft(
            reference, candidate, choice, team, draft=draft, depth=depth, watcher=watcher(team.leads)
        )
    if team.leads:
        print_document(document, draft_text, as_json)
