"""Groups without a scale are counted once each, whoever wrote their shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from clamped_weights import FEW, GRAM, with_one_small_group
from micro import contents
from test_team import SMALL, start


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_one_small_group(tmp_path_factory.mktemp("few") / "source")


@pytest.mark.slow
def test_a_resume_and_two_ranks_count_each_group_once(few: Path, tmp_path: Path) -> None:
    """Layer 2 is finished by the run that dies; the ranks' documents and folders are those of one process."""
    arguments = ("quantize", str(few), "--recipe", "nvfp4-mse", "--json", "--device", "cpu", "--out")
    alone = start(1, *arguments, str(tmp_path / "one"))
    killed = start(2, "--kill-at", "2", "--kill-rank", "0", *arguments, str(tmp_path / "two"))
    assert killed.returncode and (tmp_path / "two.partial").is_dir()
    resumed = start(2, *arguments, str(tmp_path / "two"), "--resume")
    for done in (alone, resumed):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["clamped_groups"] == FEW
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_calibrated_ranks_know_each_others_counts(few: Path, tmp_path: Path) -> None:
    (tmp_path / "gram.yaml").write_text(GRAM)
    for ranks in (1, 2):
        out = str(tmp_path / str(ranks))
        done = start(
            ranks, "quantize", str(few), "--recipe", str(tmp_path / "gram.yaml"), "--json", *SMALL, "--out", out
        )
        assert done.returncode == 0 and json.loads(done.stdout)["clamped_groups"] == FEW, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
