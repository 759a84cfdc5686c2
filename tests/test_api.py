"""The public functions: one a verb, with its options, its document and its errors."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO
from typer.main import get_command
from typer.testing import CliRunner

import mimoquant
from mimoquant import api
from mimoquant.cli.app import app
from mimoquant.errors import MimoquantError

VERBS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
# what only a command line has: how to print, what to write beside it, a gate's exit code, a server as the candidate
OF_THE_COMMAND_LINE = {
    "as_json",
    "help",
    "html",
    "profile",
    "quiet",
    "max_kl",
    "junit",
    "card",
    "server",
    "model",
    "top_k",
}
RENAMED = {"dtype": "bf16", "budget_gib": "budget_bytes"}
CHANGING = ("elapsed_s", "peak_rss_bytes", "machine", "bound_by", "max_kl", "passed")


def test_every_verb_is_a_public_function_and_nothing_else_is() -> None:
    functions = {name for name in mimoquant.__all__ if not name.startswith("micro_")}
    assert functions == {verb.replace("-", "_") for verb in VERBS}


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_function_takes_what_its_verb_takes(verb: str) -> None:
    options = {RENAMED.get(one.name, one.name) for one in VERBS[verb].params} - OF_THE_COMMAND_LINE
    taken = set(inspect.signature(getattr(mimoquant, verb.replace("-", "_"))).parameters) - {"progress"}
    assert taken == options - ({"resume", "out"} if verb.startswith("eval") else set())


@pytest.mark.parametrize("name", mimoquant.__all__)
def test_a_public_function_is_typed_and_described(name: str) -> None:
    function = getattr(mimoquant, name)
    hints = typing.get_type_hints(function, vars(api) | {"Callable": typing.Callable})
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
    assert function.__doc__ and (name.startswith("micro_") or "Raises" in function.__doc__)


def test_names_stay_functions_once_the_modules_of_their_names_are_loaded() -> None:
    code = "import mimoquant.plan, mimoquant.verify, mimoquant.synth, mimoquant.relayout as one; import mimoquant as m;"
    code += "print(*(callable(getattr(m, name)) for name in m.__all__))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(mimoquant.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        getattr(mimoquant, "quantise")  # noqa: B009


def printed(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return stable(json.loads(result.stdout))


def stable(facts: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return {key: value for key, value in plain.items() if key not in CHANGING}


def test_a_function_returns_what_its_verb_prints(tmp_path: Path) -> None:
    assert stable(mimoquant.inspect(MICRO)) == printed("inspect", MICRO)
    assert stable(mimoquant.plan(MICRO, "nvfp4-mse")) == printed("plan", MICRO, "-r", "nvfp4-mse")
    one, other = tmp_path / "one", tmp_path / "other"
    seen: list[tuple[str, int, bool]] = []
    made = mimoquant.quantize(MICRO, "mxfp4-rtn", one, device="cpu", progress=lambda *told: seen.append(told))
    assert sum(finished for _, _, finished in seen) == len(made["shards"]) == 9
    told = printed("quantize", MICRO, "-r", "mxfp4-rtn", "-o", other, "--device", "cpu")
    assert stable(made) == {key: value for key, value in told.items() if key != "out"}
    assert stable(mimoquant.verify(one, MICRO)) == printed("verify", other, "--source", MICRO) | {"out": str(one)}
    few = {"sequences": 7, "tokens": 32, "device": "cpu"}
    options = ("--sequences", 7, "--tokens", 32, "--device", "cpu")
    assert stable(mimoquant.eval_kl(MICRO, one, **few)) == printed("eval-kl", MICRO, one, *options)
    assert stable(mimoquant.eval_draft(MICRO, one, **few)) == printed("eval-draft", MICRO, one, *options)


def test_a_function_raises_where_its_verb_exits(tmp_path: Path) -> None:
    for call in (
        lambda: mimoquant.plan(MICRO, "int4"),
        lambda: mimoquant.verify(MICRO),
        lambda: mimoquant.synth(tmp_path / "new", "pro", source=MICRO, layers=3),
        lambda: mimoquant.sensitivity(MICRO, "mxfp4-rtn", tmp_path / "r.yaml", budget_bytes=1, target_kl=0.1),
    ):
        with pytest.raises(MimoquantError) as raised:
            call()
        assert raised.value.exit_code == 2
    assert not list(tmp_path.iterdir())
