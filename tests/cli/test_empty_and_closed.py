"""Empty arguments, and a stdout whose reader has left: told by name, and by the code that a shell has for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO
from typer.testing import CliRunner

from mimoquant import api
from mimoquant.cli.app import app, main
from mimoquant.errors import UsageError


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


VERBS = ["inspect", "plan", "quantize", "relayout", "verify", "launch", "eval-kl", "eval-draft", "sensitivity", "synth"]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["no-verb"], ["inspect", "--none"], [str(MICRO)]])
@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_has_left_is_no_bug(
    words: list[str], both: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`mimoquant --help | true`: before typer's own help or an error of the command line has been printed."""
    usage = words[0] not in ("--help", "--version")
    if usage and not both:
        pytest.skip("the command line's errors go to stderr")
    monkeypatch.setattr(sys, "argv", ["mimoquant", *words])
    read, write = os.pipe()
    os.close(read)
    ends = {"stdout": os.fdopen(os.dup(write), "w")} | ({"stderr": os.fdopen(write, "w")} if both else {})
    for name, end in ends.items():
        monkeypatch.setattr(sys, name, end)
    with pytest.raises(SystemExit) as ended:
        main()
    for end in ends.values():
        end.close()  # what was left in its buffer goes nowhere
    assert ended.value.code == 141 and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=[pytest.mark.slow] * (v not in ("inspect", "eval-kl"))) for v in VERBS]
)
def test_help_of_a_verb_whose_reader_has_left(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mimoquant", verb, "--help"])
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as end, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "stdout", end)
        main()
    assert ended.value.code == 141


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["inspect", ""], "CKPT"),
        (["inspect", "--", ""], "CKPT"),
        (["plan", "{}", "-r", ""], "--recipe"),
        (["plan", "{}", "-r", "mxfp4-rtn", "--out="], "--out"),
        (["quantize", "{}", "-r", "mxfp4-rtn", "-o", ""], "--out"),
        (["quantize", "{}", "-r", "gptq-int4-g128", "-o", "new", "--data", "mixed-v1", "--data", ""], "--data"),
        (["quantize", "{}", "-r", "gptq-int4-g128", "-o", "new", "--html", ""], "--html"),
        (["quantize", "{}", "-r", "mxfp4-rtn", "-o", "new", "--keep-source", ""], "--keep-source"),
        (["relayout", "{}", "--out", ""], "--out"),
        (["verify", ""], "OUT"),
        (["verify", "{}", "--source", ""], "--source"),
        (["launch", "", "--engine", "vllm"], "OUT"),
        (["eval-kl", "{}", ""], "CANDIDATE"),
        (["eval-kl", "{}", "{}", "--baseline", ""], "--baseline"),
        (["eval-draft", "", "{}"], "REFERENCE"),
        (["sensitivity", "{}", "-r", "int4-g128-rtn", "--out", ""], "--out"),
        (["synth", ""], "DIR"),
    ],
)
def test_an_empty_argument_is_refused_by_name(
    words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(MICRO)  # what `""` would mean
    done = call(*(word.format(MICRO) for word in words))
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {name} is empty\n"), done.output


def test_functions_refuse_an_empty_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MICRO)
    calls: dict[str, Callable[[], object]] = {
        "checkpoint": lambda: api.inspect(""),
        "source": lambda: api.plan("", "mxfp4-rtn"),
        "recipe": lambda: api.plan(MICRO, ""),
        "out": lambda: api.quantize(MICRO, "mxfp4-rtn", ""),
        "data": lambda: api.plan(MICRO, "gptq-int4-g128", data=["mixed-v1", ""]),
        "reference": lambda: api.eval_kl("", MICRO),
    }
    for name, call_it in calls.items():
        with pytest.raises(UsageError, match=f"^{name} is empty$"):
            call_it()


@pytest.mark.parametrize("value", ["inf", "-inf", "1e400", "nan"])
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["eval-kl", "{}", "{}", "--max-kl"], "max-kl"),
        (["plan", "{}", "-r", "gptq-int4-g128", "--gpu-memory"], "gpu-memory"),
        (["sensitivity", "{}", "-r", "int4-g128-rtn", "--out", "m.yaml", "--budget-gib"], "budget-gib"),
        (["sensitivity", "{}", "-r", "int4-g128-rtn", "--out", "m.yaml", "--target-kl"], "target-kl"),
    ],
)
def test_a_number_that_is_none_is_refused(
    words: list[str], name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*(word.format(MICRO) for word in words), value)
    assert done.exit_code == 2 and name in done.stderr and "Traceback" not in done.output and not done.stdout
    assert f"{name} is {float(value)}, expected a finite number" in done.stderr or "Invalid value" in done.stderr


@pytest.mark.parametrize(
    ("word", "hint"), [("-o=out", "-o out"), ("-o=/x/y", "-o /x/y"), ("-r=mxfp4-rtn", "-r mxfp4-rtn")]
)
def test_a_short_option_with_an_equals_sign_makes_no_folder(
    word: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("quantize", str(MICRO), "-r", "mxfp4-rtn", word, "--device", "cpu")
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert done.stderr == f"error: {word}: a short option has no = before its value\nhint: write {hint}\n"
