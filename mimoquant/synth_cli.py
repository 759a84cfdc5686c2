"""The verb `synth`: options, what contradicts itself, what is printed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mimoquant.choices import Layout
from mimoquant.errors import UsageError
from mimoquant.options import JsonOption


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
    facts = {"schema_version": 1, "out": str(out), **asdict(report)}
    typer.echo(json.dumps(facts, indent=2) if as_json else describe.synth_text(facts))
