"""What a shell offers while a command line is typed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mimoquant.cli.options import Container, Gpu
from mimoquant.shipped import shipped_recipes


def run(line: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What bash would call to complete the last word of `line`."""
    words = line.split(" ")
    asked = {"_MIMOQUANT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    command = [sys.executable, *options, "-c", "from mimoquant.cli.app import app; app(prog_name='mimoquant')"]
    return subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("mimoquant qua", ["quantize"]),
        ("mimoquant eval", ["eval-kl", "eval-draft"]),
        ("mimoquant quantize --cont", ["--container"]),
        ("mimoquant quantize --container ", list(Container)),
        ("mimoquant launch OUT --gpu ", list(Gpu)),
        ("mimoquant quantize --device c", ["cpu", "cuda"]),
        ("mimoquant quantize SOURCE --recipe ", shipped_recipes()),
        ("mimoquant plan SOURCE -r mxfp4-", ["mxfp4-cast", "mxfp4-mse", "mxfp4-rtn"]),
        ("mimoquant sensitivity SOURCE --recipe nvfp4-", ["nvfp4-cast", "nvfp4-mse", "nvfp4-w4a4"]),
        ("mimoquant eval-kl REFERENCE CANDIDATE --data held", ["heldout-v1"]),
        ("mimoquant quantize SOURCE --data mi", ["mixed-v1"]),
        ("mimoquant quantize SOURCE --recipe ./mine", []),  # the shell's own file names take over
        ("mimoquant quantize SOURCE --out ", []),
    ],
)
def test_a_shell_is_offered(line: str, wanted: list[str]) -> None:
    assert run(line).stdout.split() == wanted


def test_completing_loads_nothing_heavy() -> None:
    """A key was pressed, somebody waits: the line with the most to look up loads neither torch nor numpy nor YAML."""
    shown = run("mimoquant quantize SOURCE --recipe ", "-X", "importtime").stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown}
    assert "typer" in loaded and loaded.isdisjoint({"torch", "numpy", "yaml", "numba", "tokenizers", "safetensors"})


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_asks_this_program(shell: str) -> None:
    command = [
        sys.executable,
        "-c",
        "from mimoquant.cli.app import app; app(prog_name='mimoquant')",
        "--show-completion",
    ]
    asked = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(
        [*command, shell], env=os.environ | asked, capture_output=True, text=True, check=True
    ).stdout
    assert f"_MIMOQUANT_COMPLETE=complete_{shell}" in script
