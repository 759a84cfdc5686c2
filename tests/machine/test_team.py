"""Runs that several processes share, with gloo: the bytes of one process, and a clean end.

Ranks are forked (see `ranks`), but for a slow test: torchrun starts a run that is killed, and the one that goes on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import rank_driver
import torch
from micro import MICRO, contents
from ranks import TESTS, forked, under_torchrun
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, StoppedError, UsageError
from mimoquant.machine.team import Team
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.run.deal import deal

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--sequences", "48", "--tokens", "64", "--device", "cpu")
PLAIN = (*SMALL, "--objective", "output")  # of gptq-int4-g128, where the walk back proves nothing
AWQ = r"""
default_stage:
  default_modifiers:
    AWQModifier:
      mappings:
        - smooth_layer: 're:.*layers\.[1-9]\.post_attention_layernorm$'
          balance_layers: ['re:.*mlp\.gate$', 're:.*mlp\.experts\.\d+\.gate_proj$', 're:.*mlp\.experts\.\d+\.up_proj$']
        - smooth_layer: 're:.*experts\.\d+\.up_proj$'
          balance_layers: ['re:.*experts\.\d+\.down_proj$']
      duo_scaling: false
      n_grid: 3
    QuantizationModifier: {scheme: W4A16, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {carve_outs: {3: bf16}, fold: exact-real, calibration: {propagate: original}}
"""


def start(ranks: int, *arguments: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """The command line in so many processes, each with one thread: sums must have one order. One is this process."""
    if torchrun:
        return under_torchrun(ranks, TESTS / "rank_driver.py", *arguments)
    return alone(*arguments) if ranks == 1 else forked(ranks, "rank_driver", *arguments)


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module, name, size in rank_driver.SIZES:
                patch.setattr(module, name, size)
            done = CliRunner().invoke(app, list(arguments))
    finally:
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def quantize(
    ranks: int, recipe: str, out: Path, *options: str, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    verb = ("quantize", str(MICRO), "--recipe", recipe, "--out", str(out), "--json")
    return start(ranks, *verb, *options, torchrun=torchrun)


def same(one: Path, other: Path) -> bool:
    left, right = contents(one), contents(other)
    return left.keys() == right.keys() and all(left[name] == right[name] for name in left)


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "awq.yaml"
    path.write_text(AWQ)
    return path


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("gptq") / "out"
    done = quantize(1, "gptq-int4-g128", out, *PLAIN)
    assert done.returncode == 0, done.stderr
    return out


def test_data_free_runs_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    pipeline.quantize(make_plan(MICRO, load_recipe("int4-g128-rtn")), tmp_path / "one", device="cpu")
    done = quantize(2, "int4-g128-rtn", tmp_path / "two", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "two")  # one rank prints
    assert same(tmp_path / "one", tmp_path / "two")


def test_a_finished_run_that_is_started_again_is_told_once_and_left_as_it_is(gptq: Path) -> None:
    before = contents(gptq)
    done = quantize(2, "gptq-int4-g128", gptq, *PLAIN, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is finished already") == 1 and json.loads(done.stdout)["out"] == str(gptq)
    refused = quantize(2, "gptq-int4-g128", gptq, *PLAIN, "--refine", "1", "--resume")
    assert refused.returncode == 2 and refused.stderr.count("calibration.reconstruct was None, is now 1") == 1
    assert contents(gptq) == before


def test_calibrated_runs_write_the_bytes_of_one_process(gptq: Path, tmp_path: Path) -> None:
    done = quantize(2, "gptq-int4-g128", tmp_path / "out", *PLAIN)
    assert done.returncode == 0, done.stderr
    assert same(gptq, tmp_path / "out")


@pytest.mark.slow
def test_codes_for_the_loss_are_those_of_one_process(tmp_path: Path) -> None:
    for ranks, out in ((1, "one"), (2, "two")):
        done = quantize(ranks, "gptq-int4-g128", tmp_path / out, *SMALL)
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_input_scales_are_those_of_one_process(tmp_path: Path) -> None:
    for ranks, out in ((1, "one"), (2, "two")):
        done = quantize(ranks, "gptq-nvfp4-w4a4", tmp_path / out, *SMALL, "--objective", "output")
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "one", tmp_path / "two")
    assert b"input_global_scale" in (tmp_path / "one" / "model.safetensors.index.json").read_bytes()


@pytest.mark.slow
def test_a_rank_killed_on_the_walk_back_is_gone_on_from(tmp_path: Path) -> None:
    wanted = ("gptq-int4-g128", tmp_path / "out", *SMALL)
    killed = quantize(2, *wanted, "--kill-at", "4")
    assert killed.returncode and (tmp_path / "out.partial" / "fisher.partial").is_dir(), killed.stderr
    done = quantize(1, *wanted, "--resume")
    assert done.returncode == 0, done.stderr
    assert quantize(1, wanted[0], tmp_path / "one", *wanted[2:]).returncode == 0
    assert same(tmp_path / "one", tmp_path / "out")


@pytest.mark.slow
def test_folds_kept_layers_and_original_tokens_too(awq: Path, tmp_path: Path) -> None:
    for ranks in (1, 3):
        done = quantize(ranks, str(awq), tmp_path / str(ranks), *SMALL)
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "1", tmp_path / "3")
    told = json.loads((tmp_path / "1" / "report.json").read_text())["calibration"]
    assert all(facts["folded_channels"] for facts in told.values()) and "layer 3" not in told


def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_goes_on(gptq: Path, tmp_path: Path) -> None:
    done = quantize(2, "gptq-int4-g128", tmp_path / "out", *PLAIN, "--kill-at", "2")
    assert done.returncode != 0
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "journal-1.jsonl").is_file()
    assert done.stderr.count("error: ") == 1 and "hint: a quantize run goes on with --resume" in done.stderr
    done = quantize(1, "gptq-int4-g128", tmp_path / "out", *PLAIN, "--resume")
    assert done.returncode == 0, done.stderr
    assert same(gptq, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "count", "ranks", "torchrun"), [("0", 3, 3, False), ("1", 1, 2, True), ("2", 1, 2, False)]
)
def test_resuming_with_more_and_with_fewer_ranks(
    killed: str, count: int, ranks: int, torchrun: bool, gptq: Path, tmp_path: Path
) -> None:
    kill = ("--kill-at", str(count), "--kill-rank", killed)
    done = quantize(3, "gptq-int4-g128", tmp_path / "out", *PLAIN, *kill, torchrun=torchrun)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    done = quantize(ranks, "gptq-int4-g128", tmp_path / "out", *PLAIN, "--resume", torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    assert same(gptq, tmp_path / "out")


@pytest.mark.slow
def test_a_refusal_is_one_sentence(gptq: Path) -> None:
    done = quantize(2, "gptq-int4-g128", gptq, *PLAIN)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and f"error: {gptq}: exists already" in done.stderr
    assert "mimoquant/pipeline.py" not in done.stderr  # no traceback of ours


def test_damage_that_one_rank_finds_is_one_sentence(tmp_path: Path) -> None:
    source = shutil.copytree(MICRO, tmp_path / "source")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    info = open_index(source).tensors[name]
    raw = bytearray((source / info.file).read_bytes())
    raw[info.offset] = 0x7F  # NaN
    (source / info.file).write_bytes(raw)
    done = start(2, "quantize", str(source), "--recipe", "gptq-int4-g128", "--out", str(tmp_path / "out"), *SMALL)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and f"{name} holds NaN or Inf" in done.stderr  # by the walk back already


def test_an_evaluation_gives_the_numbers_of_one_process(gptq: Path) -> None:
    told = []
    for ranks in (1, 2):
        done = start(
            ranks,
            "eval-kl",
            str(MICRO),
            str(gptq),
            "--sequences",
            "16",
            "--tokens",
            "64",
            "--device",
            "cpu",
            "--baseline",
            str(gptq),
            "--json",
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    for facts in told:
        for key in ("elapsed_s", "peak_rss_bytes"):
            facts.pop(key)
    assert told[0] == told[1] and told[0]["j"]["mean"] > 0 and told[0]["noise_floor"]["relative_noise"] > 0


@pytest.mark.slow
def test_a_killed_evaluation_of_several_ranks_goes_on(gptq: Path, tmp_path: Path) -> None:
    """Three ranks, of which the last has no portion."""

    def evaluate(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        return start(
            3,
            "eval-kl",
            str(MICRO),
            str(gptq),
            "--sequences",
            "14",
            "--tokens",
            "64",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / out),
            *more,
        )

    assert evaluate("whole.json").returncode == 0
    killed = evaluate("killed.json", "--kill-at", "2")
    assert killed.returncode != 0 and killed.stderr.count("error: ") == 1, killed.stderr
    kept = sorted(path.name for path in (tmp_path / "killed.json.partial").glob("*-rank-*.safetensors"))
    assert {"evaluation-layer-001-rank-1.safetensors"} <= set(kept)
    done = evaluate("killed.json", "--resume")
    assert done.returncode == 0 and "layer 0," not in done.stderr, done.stderr
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_acceptance_gives_the_numbers_of_one_process(gptq: Path) -> None:
    told = []
    for ranks in (1, 2):
        done = start(
            ranks,
            "eval-draft",
            str(MICRO),
            str(gptq),
            "--sequences",
            "16",
            "--tokens",
            "64",
            "--depth",
            "2",
            "--kv",
            "fp8",
            "--device",
            "cpu",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    for facts in told:
        for key in ("elapsed_s", "peak_rss_bytes"):
            facts.pop(key)
    assert told[0] == told[1] and told[0]["accepted_length"]["sampling"]["difference"]["mean"] != 0


# --- without torchrun -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_each_unit_is_written_once(size: int) -> None:
    for recipe in ("int4-g128-rtn", "gptq-int4-g128"):
        plan = make_plan(MICRO, load_recipe(recipe), chunk_bytes=2**18)
        hands = [deal(plan, {plan.units[0].name}, rank, size) for rank in range(size)]
        written = sorted(task.unit.name for hand in hands for task in hand if task.writes)
        assert written == sorted(unit.name for unit in plan.units[1:])
        for task in (task for hand in hands for task in hand if task.writes):
            assert tuple(step for group in task.groups for step in group) == task.unit.steps


def test_a_team_of_one_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with Team.from_environment("cpu") as team:
        assert (team.rank, team.size, team.leads) == (0, 1, True)
        assert team.gather({"a": 1}) == [{"a": 1}] and team.share({}, 0, "cpu") == {}


class _Board:
    """torchrun's store, as far as the end of a run needs it."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.said.setdefault(key, value).encode()

    def wait(self, keys: list[str], timeout: object) -> None:
        if not self.said.keys() >= set(keys):
            raise RuntimeError("timeout")

    def get(self, key: str) -> bytes:
        return self.said[key].encode()


def test_the_others_end_as_the_rank_that_failed_and_are_silent() -> None:
    board, teams = _Board(), [Team(), Team()]
    for rank, team in enumerate(teams):
        team.rank, team.size, team._board = rank, 2, board
    assert isinstance(teams[1]._lost(RuntimeError("closed")), StoppedError)
    assert teams[0]._tell(CheckpointError("x: is bad", hint="mend it"))
    ended = teams[1]._lost(RuntimeError("closed"))
    assert isinstance(ended, CheckpointError) and str(ended) == "x: is bad" and ended.hint == "mend it" and ended.told
    assert not teams[1]._tell(ended)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "quick"), [("int4-g128-rtn", []), ("gptq-int4-g128", []), ("int4-g128-rtn", ["--quick"])]
)
def test_ranks_find_what_one_process_finds(recipe: str, quick: list[str], tmp_path: Path) -> None:
    """Facts, costs and the recipe; after a kill, too."""
    text = (
        (REPOSITORY / "recipes" / f"{recipe}.yaml").read_text().rstrip().replace("objective: kl", "objective: output")
    )
    few = "\n  calibration: {sequences: 24, tokens: 64}\n" if "gptq" in recipe else "\n"
    (tmp_path / "given.yaml").write_text(text + few)

    def find(ranks: int, out: str, *more: str) -> subprocess.CompletedProcess[str]:
        return start(
            ranks,
            "sensitivity",
            str(MICRO),
            "-r",
            str(tmp_path / "given.yaml"),
            "-o",
            str(tmp_path / out),
            "--sequences",
            "28",
            "--tokens",
            "128",
            "--device",
            "cpu",
            "--budget-gib",
            "0.0078",
            "--json",
            *quick,
            *more,
        )

    one, two = find(1, "one.yaml"), find(2, "two.yaml")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    facts, others = (json.loads(done.stdout) for done in (one, two))
    for name in ("layers", "chosen", "frontier", "j"):
        assert facts[name] == others[name]
    passes = [[walk["forward_passes"] for walk in told["cost"]["walks"]] for told in (facts, others)]
    assert passes[0] == pytest.approx(passes[1])
    assert (tmp_path / "one.yaml").read_bytes() == (tmp_path / "two.yaml").read_bytes()
    killed = find(2, "killed.yaml", "--kill-at", "3")
    assert killed.returncode != 0 and killed.stderr.count("error: ") == 1, killed.stderr
    done = find(2, "killed.yaml", "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.yaml").read_bytes() == (tmp_path / "killed.yaml").read_bytes()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5 is none of the 2 that"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 is none of the 2 that"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "rank 1 cannot look for the other processes .*MASTER_ADDR"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "rank 1 cannot look .*MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "rank 1 cannot look for"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MIMOQUANT_RANK_TIMEOUT_S": "soon"}, "MIMOQUANT_RANK_TIMEOUT_S is 'soon'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MIMOQUANT_RANK_TIMEOUT_S": "-3"}, "MIMOQUANT_RANK_TIMEOUT_S is '-3'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MIMOQUANT_RANK_TIMEOUT_S": "inf"}, "MIMOQUANT_RANK_TIMEOUT_S is 'inf'"),
    ],
)
def test_an_environment_that_is_no_torchruns_is_refused(
    words: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MIMOQUANT_RANK_TIMEOUT_S"):
        monkeypatch.delenv(name, raising=False)
    for name, value in words.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=problem):
        Team.from_environment("cpu")
