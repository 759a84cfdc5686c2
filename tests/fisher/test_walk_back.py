"""A walk back: what its files and bytes promise. That its numbers are right is `test_against_transformers`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import walks
from ranks import forked
from walks import MICRO, same_labels, shrink, some_tokens, walked, watch

from mimoquant.calibration.tokens import CalibrationRecord
from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.fisher.matrices import Fisher
from mimoquant.fisher.walk import FisherSettings
from mimoquant.model.layer_stream import portions

TOKENS = some_tokens(MICRO, walks.SEQUENCES, walks.TOKENS)
HOST, FILES = FisherSettings(), FisherSettings(states="files")
LAYERS = (1, 2, 3, 4)  # of the micro checkpoint: those with experts


class Killed(Exception):
    pass


@pytest.fixture(autouse=True, scope="module")
def small_portions() -> Iterator[None]:
    """And one thread: sums must have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_portions: None) -> Path:
    """An undisturbed walk's folder."""
    folder = tmp_path_factory.mktemp("whole") / "fisher"
    walked(MICRO, TOKENS, HOST, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_walk_holds_matrices_gradients_and_facts_alone(whole: Path) -> None:
    assert len(portions(torch.from_numpy(TOKENS.ids))) == 3
    names = {*(f"fisher-{layer:04d}.safetensors" for layer in LAYERS), "fisher.json", "journal.jsonl"}
    names |= {f"gradients-{layer:04d}-{portion:04d}.safetensors" for layer in LAYERS for portion in range(3)}
    assert {path.name for path in whole.iterdir()} == names
    fisher = Fisher.open(whole)
    assert tuple(fisher.layers) == LAYERS
    assert fisher.record.tokens == replace(CalibrationRecord.of(TOKENS), fingerprints=None) and fisher.record.draws == 2
    assert sum(facts.share for facts in fisher.layers.values()) == pytest.approx(1)
    for layer, facts in fisher.layers.items():
        matrix = fisher.load(layer)
        assert matrix.shape == (256, 256) and torch.equal(matrix, matrix.T)
        assert facts.trace == pytest.approx(float(matrix.trace()), rel=1e-5)
        assert 1 < facts.effective_rank < 256 and facts.output is not None and facts.output > 0
        assert float(torch.linalg.eigvalsh(matrix.double())[0]) > -1e-6 * facts.trace


def test_gradients_are_those_that_the_matrices_are_the_second_moments_of(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher, seen = Fisher.open(whole), watch(monkeypatch)
    walked(MICRO, TOKENS, HOST, tmp_path / "fisher")
    for layer in LAYERS:
        gradients = fisher.gradients(layer)
        assert gradients.shape == (2, *TOKENS.ids.shape, 256)
        assert torch.equal(gradients.flatten(1, 2), seen.at(layer))
        rows = gradients.flatten(0, 2).double()
        assert torch.allclose(rows.T @ rows / len(rows), fisher.load(layer).double(), rtol=1e-3, atol=1e-9)


def test_labels_follow_from_the_seed(whole: Path, tmp_path: Path) -> None:
    other = walked(MICRO, TOKENS, replace(HOST, seed=1), tmp_path / "fisher")
    assert other.record.labels_sha256 != Fisher.open(whole).record.labels_sha256


def test_states_in_files_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    walked(MICRO, TOKENS, FILES, tmp_path / "fisher")
    assert contents(tmp_path / "fisher") == contents(whole)


@pytest.mark.slow
def test_bfloat16_moves_less_than_other_labels_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rests between layers, and what goes through experts, is bfloat16; beside float32 with the same labels."""
    with monkeypatch.context() as patch:
        seen = watch(patch)
        exact = walked(MICRO, TOKENS, replace(HOST, exact=True), tmp_path / "exact")
    other = walked(MICRO, TOKENS, replace(HOST, exact=True, seed=1), tmp_path / "other")
    with monkeypatch.context() as patch:
        same_labels(patch, seen)
        rough = walked(MICRO, TOKENS, HOST, tmp_path / "rough")
    for layer in LAYERS:
        true, moved, redrawn = (one.load(layer) for one in (exact, rough, other))
        assert 0 < float((moved - true).norm()) < 0.15 * float((redrawn - true).norm())


# --- kills ------------------------------------------------------------------------------------------------------------


def dies_at(patch: pytest.MonkeyPatch, count: int, *, torn: bool) -> None:
    """From the `count`-th journal line on nothing is recorded; `torn`: nor is that line itself, though its file is."""
    record, done = RunFolder.record, []

    def stop(self: RunFolder, line: JournalLine) -> None:
        done.append(line.unit)
        if len(done) < count or (len(done) == count and not torn):
            record(self, line)
        if len(done) >= count:
            raise Killed

    patch.setattr(RunFolder, "record", stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "torn"),
    [
        (HOST, False),
        (FILES, True),
        pytest.param(HOST, True, marks=pytest.mark.slow),
        pytest.param(FILES, False, marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again_it_gives_the_same_bytes(
    settings: FisherSettings, torn: bool, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt dies a few lines after where the one before could be taken up: a layer has four, in any order."""
    folder, passed = tmp_path / "fisher", []
    for _ in range(20):
        try:
            with monkeypatch.context() as patch:
                dies_at(patch, 6, torn=torn)
                walked(MICRO, TOKENS, settings, folder, resume=True, progress=lambda *told: passed.append(told))
            break
        except Killed:
            continue
    assert contents(folder) == contents(whole)
    assert passed.count(("forward", 0)) >= (2 if settings == HOST else 1), "it was killed on the way back"
    assert passed.count(("forward", 4)) < 4 and passed.count(("back", 4)) < 4, "and what was done stayed so"


def test_killed_on_the_way_forward(whole: Path, tmp_path: Path) -> None:
    def die(way: str, layer: int) -> None:
        if layer == 3:
            raise Killed

    for settings in (HOST, FILES):
        folder = tmp_path / settings.states
        with pytest.raises(Killed):
            walked(MICRO, TOKENS, settings, folder, progress=die)
        passed: list[Any] = []
        walked(MICRO, TOKENS, settings, folder, resume=True, progress=lambda *told, to=passed: to.append(told))
        assert contents(folder) == contents(whole)
        assert (passed[0] == ("forward", 4)) == (settings == FILES)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_that_were_not_recorded_in_time_are_made_again(
    layer: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers are written at a time, so the lines of a later one may be there and this one's not."""
    folder = tmp_path / "fisher"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "publish", lambda *_: (_ for _ in ()).throw(Killed))
        walked(MICRO, TOKENS, FILES, folder)
    journal = tmp_path / "fisher.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"gradients {layer} 0"' not in line]
    assert len(kept) == len(lines) - 1
    journal.write_text("".join(kept))
    walked(MICRO, TOKENS, FILES, folder, resume=True)
    assert contents(folder) == contents(whole)


def test_killed_between_its_last_steps(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "fisher", Path.unlink
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "publish", lambda *_: (_ for _ in ()).throw(Killed))
        walked(MICRO, TOKENS, HOST, folder)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == "run.json":
            raise Killed
        real(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", unlink)
        walked(MICRO, TOKENS, HOST, folder, resume=True)
    assert folder.is_dir()
    walked(MICRO, TOKENS, HOST, folder, resume=True)
    assert contents(folder) == contents(whole)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_two_ranks_give_the_bytes_of_one(whole: Path, tmp_path: Path) -> None:
    done = forked(2, "walk_driver", tmp_path / "fisher")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "fisher") == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("states", "count", "killed", "ranks"), [
    ("host", 1, "0", 4), ("files", 3, "1", 1), ("files", 12, "0", 2), ("host", 4, "2", 2),
])  # fmt: skip
def test_another_number_of_ranks_goes_on(
    states: str, count: int, killed: str, ranks: int, whole: Path, tmp_path: Path
) -> None:
    """Three ranks have a portion each, of four one has none."""
    folder = tmp_path / "fisher"
    done = forked(3, "walk_driver", folder, "--states", states, "--kill-at", str(count), "--kill-rank", killed)
    assert done.returncode != 0 and not folder.exists() and folder.with_name("fisher.partial").is_dir()
    done = forked(ranks, "walk_driver", folder, "--states", states, "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(whole)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_finished_walk_is_opened_or_refused(whole: Path) -> None:
    passed: list[Any] = []
    walked(MICRO, TOKENS, HOST, whole, resume=True, progress=lambda *told: passed.append(told))
    assert not passed
    with pytest.raises(UsageError, match="exists already"):
        walked(MICRO, TOKENS, HOST, whole)
    with pytest.raises(UsageError, match="seed differs"):
        walked(MICRO, TOKENS, replace(HOST, seed=1), whole, resume=True)


def test_another_walk_is_not_taken_up(tmp_path: Path) -> None:
    def die(way: str, layer: int) -> None:
        raise Killed

    folder = tmp_path / "fisher"
    with pytest.raises(Killed):
        walked(MICRO, TOKENS, HOST, folder, progress=die)
    with pytest.raises(UsageError, match="draws was 2, is now 3"):
        walked(MICRO, TOKENS, replace(HOST, draws=3), folder, resume=True)


def test_damage_is_found(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fisher"
    folder.mkdir()
    for name, held in contents(whole).items():
        (folder / name).write_bytes(held)
    path = folder / "fisher-0002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    fisher = Fisher.open(folder)
    fisher.load(1)
    with pytest.raises(CheckpointError, match=r"fisher-0002\.safetensors: has the sha256"):
        fisher.load(2)
    (folder / "gradients-0003-0001.safetensors").unlink()
    fisher.gradients(2)
    with pytest.raises(CheckpointError, match=r"gradients-0003-0001\.safetensors: cannot be read"):
        fisher.gradients(3)
    facts = json.loads((folder / "fisher.json").read_text())
    del facts["record"]["draws"]
    (folder / "fisher.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="is damaged"):
        Fisher.open(folder)
