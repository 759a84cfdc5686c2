"""An evaluation whose process dies, or whose disk fails, at a call that changes the disk: it is taken up to the bit."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fault_layer import Call, FaultLayer, Killed
from small_runs import quantize

from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.errors import StoppedError
from mimoquant.evaluation.eval_kl import EvaluationFile, eval_kl
from mimoquant.synthetic.checkpoint import SynthSizes, synth


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, TokenSet]:
    folder = tmp_path_factory.mktemp("evaluation")
    source = folder / "source"
    synth(source, "flash", sizes=SynthSizes(layers=3, experts=2, top_k=1))
    quantize(source, folder / "out")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 64, (4, 8)))
    return source, folder / "out", load_tokens([str(folder / "ids.npy")], source, sequences=4, tokens=8, vocab=64)


@pytest.fixture(scope="module")
def whole(run: tuple[Path, Path, TokenSet], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Call]]:
    """What an evaluation writes that is left alone, and the calls that it makes."""
    out = tmp_path_factory.mktemp("whole") / "out.json"
    with FaultLayer(out.parent).active() as layer:
        eval_kl(*run, file=EvaluationFile(out))
    return out.read_bytes(), layer.calls


def taken_up(run: tuple[Path, Path, TokenSet], out: Path) -> bytes:
    """The file, which is there already where only the folder beside it was to go."""
    if not out.exists():
        eval_kl(*run, file=EvaluationFile(out, resume=True))
        assert [path.name for path in out.parent.iterdir()] == [out.name]
    return out.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trouble", ["killed", "disk"])
def test_at_any_call(
    trouble: str, step: int, run: tuple[Path, Path, TokenSet], whole: tuple[bytes, list[Call]], tmp_path: Path
) -> None:
    text, calls = whole
    assert {call.kind for call in calls} == {"mkdir", "create", "write", "fsync", "rename", "unlink"}
    for number, call in list(enumerate(calls))[::-step]:
        out = tmp_path / str(number) / "out.json"
        out.parent.mkdir()

        def fault(now: int, call: Call, number: int = number) -> None:
            if now >= number:
                raise Killed if trouble == "killed" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with FaultLayer(out.parent, fault).active(), pytest.raises((Killed, StoppedError)) as ended:
            eval_kl(*run, file=EvaluationFile(out))
        if trouble == "disk":
            assert ended.type is StoppedError and "No space left" in str(ended.value) and ended.value.hint, call
        assert taken_up(run, out) == text, call
        shutil.rmtree(out.parent)
