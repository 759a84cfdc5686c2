"""The main job on the trained micro checkpoint that the package ships: plan, quantize, verify, and a table.

usage: scripts/demo [--keep DIR]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import mimoquant
from mimoquant.wording import size, table

RECIPES = ("int4-g128-rtn", "int4-g128-mse", "int4-g32-mse", "mxfp4-mse", "nvfp4-mse")
SHOWN = "mxfp4-mse"
console = Console(highlight=False)


def run(*arguments: str) -> None:
    """One mimoquant command, as a user would type it."""
    console.print(f"\n[bold]$ mimoquant {shlex.join(arguments)}[/bold]", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "mimoquant", *arguments], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}mimoquant {arguments[0]} failed with exit code {done.returncode}")
    console.print(done.stdout.rstrip(), markup=False, soft_wrap=True)


def shown(source: str, out: Path) -> None:
    """The verbs on the command line, with one recipe."""
    run("inspect", source)
    run("plan", source, "--recipe", out.name)
    console.print("(The engines miss model code, auto_map, which this toy has not and published checkpoints have.)")
    run("quantize", source, "--recipe", out.name, "--out", str(out))
    run("verify", str(out), "--source", source)


def row(source: str, out: Path) -> dict[str, Any]:
    """Quantize and verify from Python, where a run takes less than a program takes to start."""
    made = mimoquant.quantize(source, out.name, out)
    return {**made, **mimoquant.verify(out, source), "recipe": out.name, "seconds": made["elapsed_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, help="write the outputs here instead of a temporary folder")
    keep = parser.parse_args().keep
    source = str(mimoquant.micro_checkpoint())
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        shown(source, folder / SHOWN)
        again = Path(temporary) / "again"
        again.mkdir()
        rows = [row(source, (again if recipe == SHOWN else folder) / recipe) for recipe in RECIPES]
    head = ("recipe", "container", "output", "relMSE", "half steps", "proven", "seconds")
    cells = [
        (
            facts["recipe"],
            facts["container"],
            size(facts["output_bytes"]),
            f"{facts['mean_relative_error']:.2e}",
            f"{facts['worst_rounding']:.3f}",
            str(facts["checked"]["tensors"]) if facts["ok"] else "FAILED",
            f"{facts['seconds']:.1f}",
        )
        for facts in rows
    ]
    console.print(f"\n[bold]The micro checkpoint, {size(rows[0]['source_bytes'])} of FP8 weights[/bold]")
    print("\n".join(table(head, cells)))
    print(
        "\nrelMSE: squared error of the experts' weights over their squared size. half steps:\n"
        "the largest rounding error in half grid steps (1 is nearest rounding). proven: tensors held\n"
        "against the source; those that are not experts' have its very value. int4 and NVFP4 are no\n"
        "smaller here because experts are only 41 % of this checkpoint (97 % of the real ones), and\n"
        "FP8 weights beside them become bf16 in that container."
    )
    if keep:
        console.print(f"outputs: {keep}")


if __name__ == "__main__":
    main()
