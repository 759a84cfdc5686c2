"""The verb `eval-draft`: options, what is refused before the walk, what is printed."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Annotated

import typer

from mimoquant.cli.options import (
    HeldOutOption,
    HeldOutSequencesOption,
    HeldOutTokensOption,
    JsonOption,
    PlaceOption,
    QuietOption,
)
from mimoquant.cli.terminal import Lines


def eval_draft(
    reference: Annotated[Path, typer.Argument(help="The published checkpoint.", metavar="REFERENCE")],
    candidate: Annotated[Path, typer.Argument(help="The quantized one, by any tool.", metavar="CANDIDATE")],
    draft: Annotated[
        str,
        typer.Option(
            help="What drafts: each checkpoint's MTP layers, or a DFlash drafter's folder.", metavar="mtp|DIR"
        ),
    ] = "mtp",
    data: HeldOutOption = None,
    sequences: HeldOutSequencesOption = None,
    tokens: HeldOutTokensOption = 512,
    depth: Annotated[
        int | None, typer.Option(min=1, max=3, help="MTP layers in the chain; by default all, at most 3.")
    ] = None,
    device: PlaceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure how many drafted tokens a backbone accepts. Quantized beside bf16, on held-out tokens."""
    from mimoquant.cli.eval_kl import load_held_out
    from mimoquant.evaluation.drafts import choose_draft
    from mimoquant.evaluation.eval_draft import eval_draft as run
    from mimoquant.evaluation.eval_kl import open_layout
    from mimoquant.machine.devices import resolve_device
    from mimoquant.machine.team import Team
    from mimoquant.report.draft_text import draft_text

    begin, lines = time.monotonic(), Lines()
    with Team.from_environment(resolve_device(device)) as team:
        layouts = open_layout(reference), open_layout(candidate)
        choose_draft(layouts, draft, depth, tokens)  # before the data, which can take minutes
        vocab = layouts[0].geometry.vocab
        loaded = load_held_out(reference, data or ["heldout-v1"], sequences, tokens, vocab, team.leads)
        shown = (lambda layer, layers: lines(f"layer {layer}", layer + 1, layers)) if team.leads else None
        facts = run(
            reference, candidate, loaded, draft=draft, depth=depth, device=team.device, progress=shown, team=team
        )
    if not team.leads:
        return
    facts["elapsed_s"] = round(time.monotonic() - begin, 3)
    facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    typer.echo(json.dumps(facts, indent=2) if as_json else draft_text(facts))
