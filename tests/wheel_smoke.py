"""Every verb, in an environment that has the wheel and what it depends on, and no more: `python -I wheel_smoke.py DIR`.

Run by `tests/test_wheel.py` and `scripts/test_wheel`. DIR takes what the verbs write.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app

NOT_NEEDED = ("pytest", "llmcompressor", "hypothesis")


def runs(folder: Path) -> list[list[str]]:
    """Command lines in an order in which each finds what it reads."""
    source, out, few = str(mimoquant.micro_checkpoint()), str(folder / "out"), ["--sequences", "7", "--tokens", "32"]
    quantize = ["quantize", source, "--device", "cpu", "--out"]
    return [
        ["inspect", source],
        ["plan", source, "--recipe", "gptq-int4-g128"],
        [*quantize, out, "--recipe", "mxfp4-rtn"],
        ["verify", out, "--source", source],
        ["verify", out, "--engine", "transformers"],  # exit code 3: this form loads wrong there
        ["launch", out, "--engine", "vllm", "--gpu", "h100", "--gpus", "1"],  # 3: the micro checkpoint has no class
        ["eval-kl", source, out, *few, "--html", str(folder / "report.html")],
        ["eval-draft", source, out, *few],
        ["sensitivity", source, "-r", "mxfp4-rtn", *few, "--out", str(folder / "mixed.yaml")],
        ["relayout", source, "--qkv", "split", "--dtype", "bf16", "--out", str(folder / "split")],
        ["synth", str(folder / "synth"), "--layout", "pro"],
    ]


def main() -> None:
    folder, here = Path(sys.argv[1]), Path(mimoquant.__file__).resolve()
    assert here.is_relative_to(sys.prefix), f"{here} is not the installed package"
    assert not (there := [name for name in NOT_NEEDED if importlib.util.find_spec(name)]), there
    tried = set()
    for arguments in runs(folder):
        result = CliRunner().invoke(app, arguments)
        wanted = 3 if {"launch", "transformers"} & set(arguments) else 0
        assert result.exit_code == wanted, (arguments, result.output, result.exception)
        tried.add(arguments[0])
    assert tried == set(app_verbs()), (tried, app_verbs())
    print(f"{len(tried)} verbs run")


def app_verbs() -> list[str]:
    return [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]


if __name__ == "__main__":
    main()
