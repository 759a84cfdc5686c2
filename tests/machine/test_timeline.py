"""What a run spends its time on: spans of threads, the sum by name, and the file for a trace viewer."""

from __future__ import annotations

import json
import time
from pathlib import Path

from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.machine.timeline import WAIT_READ, WAIT_WRITE, Timeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe


def test_the_longest_wait_is_the_bound() -> None:
    timeline = Timeline()
    with timeline.span(WAIT_WRITE):
        time.sleep(0.2)
    assert list(timeline.waited(WAIT_READ, iter([1, 2]))) == [1, 2]
    what, share = timeline.bound
    assert what == "writing" and 0.5 < share <= 1
    assert timeline.seconds[WAIT_WRITE] >= 0.2 > timeline.seconds[WAIT_READ]


def test_a_run_fills_it(tmp_path: Path) -> None:
    timeline = Timeline()
    plan = make_plan(mimoquant.micro_checkpoint(), load_recipe("int4-g128-mse"))
    pipeline.quantize(plan, tmp_path / "out", device="cpu", timeline=timeline)
    assert {"read", WAIT_READ, WAIT_WRITE, "quantize experts", "write and hash"} <= timeline.seconds.keys()
    events = json.loads(timeline.chrome_trace())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert {"MainThread", "read-ahead", "write-behind-0"} <= rows.keys()
    for event in (event for event in events if event["ph"] == "X"):
        assert event["dur"] >= 0 and event["ts"] >= 0 and event["tid"] in rows.values()
    work = [event for event in events if event["name"] == "write and hash"]
    assert {event["tid"] for event in work} == {rows["write-behind-0"]}


def test_the_profile_is_refused_before_the_run_or_written_after_it(tmp_path: Path) -> None:
    call = ["quantize", str(mimoquant.micro_checkpoint()), "-r", "int4-g128-rtn", "--out", str(tmp_path / "out")]
    for place in (tmp_path / "none" / "trace.json", tmp_path / "out" / "trace.json"):
        refused = CliRunner().invoke(app, [*call, "--profile", str(place)])
        assert refused.exit_code == 2 and refused.stderr.startswith("error: --profile "), refused.stderr
        assert not (tmp_path / "out").exists()
    trace = tmp_path / "trace.json"
    done = CliRunner().invoke(app, [*call, "--profile", str(trace), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(trace.read_text())["traceEvents"]
    bound = json.loads(done.stdout)["bound_by"]
    assert bound["what"] in ("reading", "writing", "computing") and 0 < bound["share"] <= 1
