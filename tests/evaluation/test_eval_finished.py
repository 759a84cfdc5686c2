"""`eval-kl --resume` where the result is there: told and left as it is, or refused with what differs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, contents, edit_json
from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app

FEW = ("--sequences", "6", "--tokens", "24", "--device", "cpu")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `out` and `other` of the same headers, and `result.json` of the first two."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(MICRO, folder / "source")
    mimoquant.quantize(folder / "source", "mxfp4-rtn", folder / "out", device="cpu")
    mimoquant.quantize(folder / "source", "mxfp4-mse", folder / "other", device="cpu")
    done = call("eval-kl", folder / "source", folder / "out", *FEW, "-o", folder / "result.json", "--json")
    assert done.exit_code == 0, done.output
    (folder / "first.json").write_text(done.stdout)
    return folder


def again(folder: Path, *more: object, candidate: str = "out") -> Any:
    return call("eval-kl", folder / "source", folder / candidate, *FEW, "-o", folder / "result.json", "--resume", *more)


def test_it_is_told_and_left_as_it_is(finished: Path, tmp_path: Path) -> None:
    before, page = (finished / "result.json").read_bytes(), tmp_path / "page.html"
    done = again(finished, "--json", "--html", page)
    assert done.exit_code == 0, done.output
    assert f"note: {finished / 'result.json'}: is finished already" in done.stderr and "layer" not in done.stderr
    told, first = json.loads(done.stdout), json.loads((finished / "first.json").read_text())
    for changing in ("elapsed_s", "peak_rss_bytes"):
        told.pop(changing), first.pop(changing)
    assert told == first and (finished / "result.json").read_bytes() == before
    assert page.stat().st_size > 1000 and not list(finished.glob("*.partial"))


def test_a_gate_is_held_against_it(finished: Path) -> None:
    assert again(finished, "--max-kl", "1000").exit_code == 0
    assert again(finished, "--max-kl", "0").exit_code == 5


def test_without_resume_it_is_in_the_way(finished: Path) -> None:
    done = call("eval-kl", finished / "source", finished / "out", *FEW, "-o", finished / "result.json")
    assert done.exit_code == 2 and "exists already" in done.stderr


def touch_a_shard(folder: Path) -> None:
    os.utime(next((folder / "out").glob("*.safetensors")), (1e9, 1e9))


def another_config(folder: Path) -> None:
    edit_json(folder / "out" / "config.json", lambda config: config.update(transformers_version="9"))


OTHERS: dict[str, tuple[tuple[object, ...], str, Callable[[Path], object], str]] = {
    "sequences": (("--sequences", "7"), "out", lambda folder: None, "its tokens was "),
    "tokens": (("--tokens", "23"), "out", lambda folder: None, "its tokens a sequence was 24, is now 23"),
    "noise floor": (("--no-noise-floor",), "out", lambda folder: None, "its noise floor was True, is now False"),
    "another candidate of the same headers": ((), "other", lambda folder: None, "its candidate files was "),
    "a baseline": (("--baseline", "other"), "out", lambda folder: None, "its baseline headers was None, is now "),
    "shards that were written since": ((), "out", touch_a_shard, "its candidate files was "),
    "a config that was edited": ((), "out", another_config, "its candidate config was "),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_another_request_is_refused_with_the_difference(name: str, finished: Path, tmp_path: Path) -> None:
    more, candidate, change, told = OTHERS[name]
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    change(folder)
    named = [folder / word if word == "other" else word for word in more]
    before = contents(folder)
    done = again(folder, *named, candidate=candidate)
    assert done.exit_code == 2 and "result.json: is finished, and " + told in done.stderr, done.output
    assert "hint: choose another --out" in done.stderr and contents(folder) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"made_of": 3}', '{"made_of": {}}'])
def test_what_is_no_result_is_refused(text: str, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    (folder / "result.json").write_text(text)
    done = again(folder)
    assert done.exit_code == 2 and "result.json: " in done.stderr and "Traceback" not in done.output, done.output
    assert (folder / "result.json").read_text() == text
