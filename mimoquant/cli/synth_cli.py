"""The verb `synth`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mimoquant.cli.choices import Layout
from mimoquant.cli.options import JsonOption


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
    """Write a small checkpoint in a real on-disk format. Random or converted: for tests, demos and bug reports."""
    from mimoquant import api
    from mimoquant.planning import facts as describe

    facts = api.synth(out, layout.value, source=source, seed=seed, layers=layers, experts=experts, hidden=hidden,
                      expert_intermediate=expert_intermediate, vocab=vocab)  # fmt: skip
    typer.echo(json.dumps(facts, indent=2) if as_json else describe.synth_text(facts))
