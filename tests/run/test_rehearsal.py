"""The rehearsal: it does a run's own steps, and what it tells grows with what is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from micro import MICRO, plain_gptq

from mimoquant import pipeline
from mimoquant.machine.timeline import Timeline
from mimoquant.planning.needs import Estimate
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.run.calibrated import Calibrator
from mimoquant.run.rehearsal import rehearse


def test_a_data_free_rehearsal_times_reading_encoding_and_writing(tmp_path: Path) -> None:
    plan = make_plan(MICRO, load_recipe("int4-g32-mse"))
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in MICRO.iterdir() if path.is_file()}
    told = rehearse(plan, "cpu", tmp_path / "not" / "there")
    assert list(tmp_path.iterdir()) == []
    assert before == {
        path.name: hashlib.sha256(path.read_bytes()).digest() for path in MICRO.iterdir() if path.is_file()
    }
    assert told.reading_s == pytest.approx(plan.source_bytes / told.read_bytes_per_s)
    assert told.writing_s == pytest.approx(plan.shard_bytes / told.write_bytes_per_s)
    assert told.computing_s > 0 <= told.starting_s and told.bound[1] == max(
        told.reading_s, told.computing_s, told.writing_s
    )


def test_what_takes_longest_bounds_a_run() -> None:
    assert Estimate(1, 3, 2, 1, 1).bound == ("computing", 3)
    assert Estimate(4, 3, 2, 1, 1).bound == ("reading", 4)


@pytest.mark.slow
def test_a_calibrated_rehearsal_is_of_the_order_of_the_run(tmp_path: Path) -> None:
    """Times on a busy machine vary several times over; what was measured on an idle one is in RESULTS.md."""
    recipe = plain_gptq("int4-g32").calibrated_on({"sequences": 16, "tokens": 64})
    plan = make_plan(MICRO, recipe)
    told = rehearse(plan, "cpu")
    timeline = Timeline()
    pipeline.quantize(plan, tmp_path / "out", device="cpu", timeline=timeline)
    spent = sum(timeline.seconds[name] for name in ("quantize experts", "attention and routing"))
    assert told.bound[0] == "computing" and spent / 10 < told.computing_s < spent * 10


def test_a_rehearsal_takes_few_tokens_and_minds_no_starved_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[int] = []
    begin = Calibrator.begin
    monkeypatch.setattr(
        Calibrator, "begin", lambda self, layer, **more: walked.append(layer) or begin(self, layer, **more)
    )
    changes = {"sequences": 100_000, "tokens": 2048, "max_starved_experts": 0}
    many = rehearse(make_plan(MICRO, plain_gptq("int4-g32").calibrated_on(changes)), "cpu")
    few = rehearse(make_plan(MICRO, load_recipe("gptq-int4-g32").calibrated_on({"sequences": 32})), "cpu")
    assert many.walking_back_s == 0 < few.walking_back_s < few.computing_s
    assert walked == [0, 1, 1, 0, 1, 1] and few.computing_s < many.computing_s / 100
