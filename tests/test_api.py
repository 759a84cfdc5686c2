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
from mimoquant.report.eval_page import eval_page
from mimoquant.report.eval_text import eval_text
from mimoquant.report.sensitivity_page import sensitivity_page

VERBS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
# what only a command line has: how to print, and what to write beside it
OF_THE_COMMAND_LINE = {"as_json", "help", "html", "profile", "quiet", "junit", "card"}
RENAMED = {"dtype": "bf16", "budget_gib": "budget_bytes"}
# what the clock and the machine decide: there on both sides, with other values
CHANGING = ("elapsed_s", "peak_rss_bytes", "machine", "bound_by", "disk_free_bytes")


def test_every_verb_is_a_public_function_and_nothing_else_is() -> None:
    functions = {name for name in mimoquant.__all__ if not name.startswith("micro_")}
    assert functions == {verb.replace("-", "_") for verb in VERBS}


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_function_takes_what_its_verb_takes(verb: str) -> None:
    options = {RENAMED.get(one.name, one.name) for one in VERBS[verb].params} - OF_THE_COMMAND_LINE
    taken = set(inspect.signature(getattr(mimoquant, verb.replace("-", "_"))).parameters) - {"progress"}
    assert taken == options


@pytest.mark.parametrize("name", mimoquant.__all__)
def test_a_public_function_is_typed_and_described(name: str) -> None:
    function = getattr(mimoquant, name)
    hints = typing.get_type_hints(function, vars(api) | {"Callable": typing.Callable})
    assert set(hints) == {*inspect.signature(function).parameters, "return"}
    assert function.__doc__ and (name.startswith("micro_") or "Raises" in function.__doc__)


def test_names_stay_functions_once_the_modules_of_their_names_are_loaded() -> None:
    code = "import mimoquant.planning.plan, mimoquant.output.verify, mimoquant.serving.launch; import mimoquant as m;"
    code += "print(*(callable(getattr(m, name)) for name in m.__all__))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(mimoquant.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        getattr(mimoquant, "quantise")  # noqa: B009


def printed(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The document of a verb."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def same(returned: Any, document: dict[str, Any], **apart: object) -> bool:
    """Whether a function returned what its verb printed, whole. `apart`: what differs by choice, as it was returned."""
    plain: dict[str, Any] = json.loads(json.dumps(returned))
    assert list(plain) == list(document)
    kept = [key for key in document if key not in CHANGING]
    assert all(type(plain[key]) is type(document[key]) for key in document)
    return {key: plain[key] for key in kept} == {key: (document | apart)[key] for key in kept}


def test_a_function_returns_what_its_verb_prints(tmp_path: Path) -> None:
    assert same(mimoquant.inspect(MICRO), printed("inspect", MICRO))
    assert same(
        mimoquant.plan(MICRO, "nvfp4-mse", out=tmp_path), printed("plan", MICRO, "-r", "nvfp4-mse", "-o", tmp_path)
    )
    one, other = tmp_path / "one", tmp_path / "other"
    seen: list[tuple[str, int, bool]] = []
    made = mimoquant.quantize(MICRO, "mxfp4-rtn", one, device="cpu", progress=lambda *told: seen.append(told))
    assert sum(finished for _, _, finished in seen) == len(made["shards"]) == 9
    told = printed("quantize", MICRO, "-r", "mxfp4-rtn", "-o", other, "--device", "cpu")
    assert same(made, told, out=str(one)) and made["bound_by"].keys() == told["bound_by"].keys()
    options = ("--source", MICRO, "--engine", "sglang", "--tp", 2, "-q")
    held = mimoquant.verify(one, MICRO, engine="sglang", tp=2)
    assert same(held, printed("verify", other, *options, code=3), out=str(one)) and not held["engine"]["ok"]
    assert same(
        mimoquant.verify(one, engine="transformers"), printed("verify", one, "--engine", "transformers", code=3)
    )


def test_relayout_synth_and_launch_return_what_they_print(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    made = mimoquant.relayout(MICRO, one, qkv="split", bf16=True)
    told = printed("relayout", MICRO, "-o", other, "--qkv", "split", "--dtype", "bf16", "-q")
    assert same(made, told, out=str(one))
    small = {"layers": 3, "experts": 4}
    made = mimoquant.synth(tmp_path / "new", "v2.5", **small)
    assert made["trap"], "weights parted from their scale are there to be told"
    told = printed("synth", tmp_path / "newer", "--layout", "v2.5", "--layers", 3, "--experts", 4)
    assert same(made, told, out=str(tmp_path / "new"))
    mimoquant.quantize(MICRO, "mxfp4-rtn", tmp_path / "out", device="cpu")
    options = ("--engine", "sglang", "--gpu", "h200", "--gpus", 2)
    assert same(mimoquant.launch(tmp_path / "out", "sglang", "h200", 2), printed("launch", tmp_path / "out", *options))


FEW: dict[str, Any] = {"sequences": 7, "tokens": 32, "device": "cpu"}
FEW_OPTIONS = ("--sequences", 7, "--tokens", 32, "--device", "cpu", "-q")


def test_evaluations_return_what_they_print(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mimoquant.quantize(MICRO, "mxfp4-rtn", out, device="cpu")
    assert same(mimoquant.eval_kl(MICRO, out, **FEW), printed("eval-kl", MICRO, out, *FEW_OPTIONS))
    limited = mimoquant.eval_kl(MICRO, out, max_kl=9.0, baseline=MICRO, **FEW)
    assert limited["passed"] is True and limited["baseline"] is not None
    assert same(limited, printed("eval-kl", MICRO, out, "--max-kl", 9, "--baseline", MICRO, *FEW_OPTIONS))
    assert mimoquant.eval_kl(MICRO, out, max_kl=1e-9, **FEW)["passed"] is False
    assert same(mimoquant.eval_draft(MICRO, out, **FEW), printed("eval-draft", MICRO, out, *FEW_OPTIONS))


def test_an_evaluation_is_written_and_becomes_a_page(tmp_path: Path) -> None:
    file = tmp_path / "kl.json"
    document = mimoquant.eval_kl(MICRO, MICRO, out=file, **FEW)
    assert eval_page(document) and "IDENTICAL" in eval_text(document)
    written = json.loads(file.read_text())
    assert written.pop("made_of")  # what --resume holds another request against
    assert written == {key: json.loads(json.dumps(document))[key] for key in written}
    assert document.keys() - written.keys() == {"max_kl", "passed", "elapsed_s", "peak_rss_bytes"}
    with pytest.raises(MimoquantError, match="exists already"):
        mimoquant.eval_kl(MICRO, MICRO, out=file, **FEW)


@pytest.mark.slow
def test_sensitivity_returns_what_it_prints(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    made = mimoquant.sensitivity(MICRO, "int4-g128-mse", one, **FEW)
    told = printed("sensitivity", MICRO, "-r", "int4-g128-mse", "-o", other, *FEW_OPTIONS)
    assert same(made, told, out=str(one)) and one.read_bytes() == other.read_bytes()
    assert sensitivity_page(made) and made["engines"]


def test_a_function_raises_where_its_verb_exits(tmp_path: Path) -> None:
    for call in (
        lambda: mimoquant.plan(MICRO, "int4"),
        lambda: mimoquant.verify(MICRO),
        lambda: mimoquant.eval_kl(MICRO),
        lambda: mimoquant.eval_kl(MICRO, MICRO, server="http://localhost:1"),
        lambda: mimoquant.eval_kl(MICRO, MICRO, top_k=3),
        lambda: mimoquant.eval_kl(MICRO, server="http://localhost:1", baseline=MICRO),
        lambda: mimoquant.eval_kl(MICRO, MICRO, resume=True),
        lambda: mimoquant.sensitivity(MICRO, "mxfp4-rtn", tmp_path / "r.json"),
        lambda: mimoquant.synth(tmp_path / "new", "pro", source=MICRO, layers=3),
        lambda: mimoquant.sensitivity(MICRO, "mxfp4-rtn", tmp_path / "r.yaml", budget_bytes=1, target_kl=0.1),
    ):
        with pytest.raises(MimoquantError) as raised:
            call()
        assert raised.value.exit_code == 2
    assert not list(tmp_path.iterdir())
