"""An evaluation that is killed: taken up it gives the numbers of one that was left alone, to the bit, or is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO, held_out
from ranks import forked
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.index import open_shard
from mimoquant.cli.app import app
from mimoquant.errors import UsageError
from mimoquant.evaluation.eval_kl import EvaluationFile, eval_kl, kept_bytes, open_layout
from mimoquant.evaluation.side_by_side import StateName
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.machine.team import Team
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

TOKENS = held_out(6, 24)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    for recipe in ("mxfp4-rtn", "nvfp4-mse"):
        pipeline.quantize(make_plan(MICRO, load_recipe(recipe)), folder / recipe, device="cpu")
    shutil.copytree(MICRO, folder / "source")
    return {
        name: folder / of
        for name, of in (("reference", "source"), ("candidate", "mxfp4-rtn"), ("baseline", "nvfp4-mse"))
    }


def stop_after(layer: int, patch: pytest.MonkeyPatch, *, torn: bool = False) -> None:
    """Die when this layer is kept, or (`torn`) in the middle of keeping it: its file is there, its journal line not."""
    save = Snapshots.save

    def stop(self: Snapshots, walk: str, number: int, states: Any, facts: Any) -> None:
        if torn and number == layer:
            patch.setattr(self.run, "record", killed)
        save(self, walk, number, states, facts)
        if number == layer:
            raise Killed

    def killed(line: Any) -> None:
        raise Killed

    patch.setattr(Snapshots, "save", stop)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_killed_after_each_layer_it_gives_the_same_bytes(
    device: str, torn: bool, outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise floor and baseline."""
    run: dict[str, Any] = {**outputs, "tokens": TOKENS, "team": Team(device)}
    whole = eval_kl(**run, file=EvaluationFile(tmp_path / "whole.json"))
    assert whole == eval_kl(**run), "what is kept changes nothing"
    kept = json.loads((tmp_path / "whole.json").read_text())
    assert kept.pop("made_of")["tokens"] == TOKENS.sha256 and kept == json.loads(json.dumps(whole))
    out, layers, passed = tmp_path / "killed.json", len(whole["layers"]), []
    for layer in range(layers):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_after(layer, patch, torn=torn)
            eval_kl(**run, file=EvaluationFile(out, resume=True), progress=lambda *told: passed.append(told[0]))
    facts = eval_kl(**run, file=EvaluationFile(out, resume=True), progress=lambda *told: passed.append(told[0]))
    assert facts == whole and out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert passed == (list(range(layers)) if torn else []), "a kill costs one layer at most"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.json", "whole.json"]


@pytest.fixture
def killed(outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An evaluation that died after layer 1."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(1, patch)
        eval_kl(**outputs, tokens=TOKENS, file=EvaluationFile(tmp_path / "out.json"))
    return tmp_path / "out.json"


def test_what_is_kept_is_as_told(killed: Path, outputs: dict[str, Path]) -> None:
    """One layer's states: of three checkpoints, and the reference's twice more for the noise floor."""
    (kept,) = killed.with_name("out.json.partial").glob("*.safetensors")
    told = kept_bytes(open_layout(MICRO), TOKENS, 3, noise_floor=True)
    assert told <= kept.stat().st_size < 1.1 * told + 5000


def test_an_evaluation_begun_before_names_had_a_type_is_taken_up(killed: Path) -> None:
    """States have the names that 0.1.0 gave them: of the checkpoint, of its portion, of the batch."""
    (kept,) = killed.with_name("out.json.partial").glob("*.safetensors")
    names = open_shard(kept).tensors.keys()
    assert {"0 0 0", "1 0 0", "2 0 0", "facts"} < names
    assert all(str(StateName.parse(name)) == name for name in names if name != "facts")


def touched(folder: Path) -> None:
    """Another payload under the same header, as its time of change has it."""
    os.utime(folder / "model_mtp.safetensors", ns=(1, 1))


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "the reference's payload": ("reference files.model_mtp.safetensors was ", lambda run: touched(run["reference"])),
    "the candidate": ("candidate.headers was ", lambda run: run.update(candidate=run["baseline"])),
    "no baseline": ("baseline was {", lambda run: run.pop("baseline")),
    "data": ("tokens was ", lambda run: run.update(tokens=held_out(5, 24))),
    "length": ("tokens a sequence was 24, is now 12", lambda run: run.update(tokens=held_out(12, 12))),
    "noise floor": ("noise floor was True, is now False", lambda run: run.update(noise_floor=False)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_is_refused_by_name(what: str, killed: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    message, change = CHANGES[what]
    copy = shutil.copytree(outputs["reference"], tmp_path / "copy")  # with the times of the original
    run: dict[str, Any] = {**outputs, "reference": copy, "tokens": TOKENS}
    before = {path.name: path.read_bytes() for path in killed.with_name("out.json.partial").iterdir()}
    change(run)
    with pytest.raises(UsageError, match="cannot be resumed") as refused:
        eval_kl(**run, file=EvaluationFile(killed, resume=True))
    assert message in str(refused.value) and "is now" in str(refused.value)
    assert before == {path.name: path.read_bytes() for path in killed.with_name("out.json.partial").iterdir()}


def test_another_version_is_refused(killed: Path, outputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimoquant.evaluation.eval_kl.__version__", "9.9")
    with pytest.raises(UsageError, match=r"version was .*, is now 9\.9"):
        eval_kl(**outputs, tokens=TOKENS, file=EvaluationFile(killed, resume=True))


def test_mistakes_end_in_one_sentence(killed: Path, outputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    base = ("eval-kl", outputs["reference"], outputs["candidate"], "--sequences", 6, "--tokens", 24, "--device", "cpu")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((*base, "--resume"), "--resume: only an evaluation with --out"),
        ((*base, "--out", tmp_path / "there.json"), "exists already"),
        ((*base, "--out", outputs["candidate"] / "x.json"), "which holds a checkpoint and nothing else"),
        ((*base, "--out", tmp_path / "no" / "x.json"), "cannot be written"),
        ((*base, "--out", killed), "an unfinished run is there"),
        (("eval-kl", MICRO, "--server", "http://h", "--out", tmp_path / "x"), "--out cannot go with --server"),
    ]
    for arguments, message in cases:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output, done.output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupt_exits_130_and_tells_how_to_resume(
    number: signal.Signals, outputs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    command = ["eval-kl", str(MICRO), str(outputs["candidate"]), "--sequences", "28", "--tokens", "128"]
    command += ["--no-noise-floor", "--device", "cpu", "--out", str(out)]
    stopped = forked(1, "rank_driver", "--whole", "--kill-at=1", "--kill-rank=0", f"--signal={number:d}", *command)
    assert stopped.returncode == 130 and "Traceback" not in stopped.stderr, stopped.stderr
    assert [line.partition(" ")[0] for line in stopped.stderr.splitlines()[-2:]] == ["interrupted", "hint:"]
    assert not out.exists()
    done = CliRunner().invoke(app, [*command, "--resume", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(out.read_text())
    told.pop("made_of")
    assert told.items() <= json.loads(done.stdout).items() and told["j"]["mean"] > 0
