#!/usr/bin/env python
"""Kill runs at random moments, resume them, and compare what they write with that of a run that was left alone.

Key idea: this process loads everything once and forks a child for each run, so a kill costs no start-up. The moments
are spread over the time that a whole run takes. A run is killed by SIGKILL again and again until, after `MOST_KILLS`
of them, it may end. With two ranks one of them is killed; the other has to notice and end by itself.

"Kept" are files of which the journal has a line, so layers that are not done again. "Begun anew" are all others that
are there; "whole" those of them that have all of their bytes, and wait for their line.

usage: python scripts/stress/kill_and_resume.py [--data-free N] [--calibrated N] [--ranks N] [--evaluation N]
       [--sensitivity N] [--seed S]                                                                 (numbers of kills)
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[2] / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # sums must have one order, and a fork must find no threads
os.environ |= {"MIMOQUANT_RANK_TIMEOUT_S": "60", "TORCH_CPP_LOG_LEVEL": "FATAL"}  # a lost rank is no news here

import mimoquant  # noqa: E402
from mimoquant import pipeline  # noqa: E402
from mimoquant.calibration.tokens import TokenSet, load_tokens  # noqa: E402
from mimoquant.checkpoint.index import open_shard  # noqa: E402
from mimoquant.checkpoint.journal import RUN_NAME, read_journal  # noqa: E402
from mimoquant.errors import CheckpointError  # noqa: E402
from mimoquant.machine.team import Team  # noqa: E402
from mimoquant.planning.plan import make_plan  # noqa: E402
from mimoquant.planning.recipe import load_recipe  # noqa: E402

MICRO = mimoquant.micro_checkpoint()
MOST_KILLS = 3  # of one run
RECIPES = {"data-free": "nvfp4-mse", "calibrated": "gptq-int4-g128"}
FEW_TOKENS = {"sequences": 48, "tokens": 64}


@dataclass
class Record:
    """What a kind of run went through."""

    kills: int = 0
    runs: int = 0
    kept: list[int] = field(default_factory=list)  # shards in the journal when the process was killed
    repeated: list[int] = field(default_factory=list)  # shards that were begun and not in the journal
    whole: list[int] = field(default_factory=list)  # of these the complete ones

    def __str__(self) -> str:
        shards = (
            f"{min(self.kept)} to {max(self.kept)} shards kept, at most {max(self.repeated)} begun anew, "
            f"{max(self.whole)} of them whole, in {sum(map(bool, self.whole))} cases"
        )
        return f"{self.kills} kills of {self.runs} runs, {shards}; all outputs equal to the last byte"


def run(kind: str, out: Path, resume: bool, rank: int, ranks: int, port: int) -> None:
    """One rank's whole run, in a process of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    recipe = load_recipe(RECIPES.get(kind, "int4-g128-rtn"))
    if kind == "calibrated":
        recipe = recipe.calibrated_on(FEW_TOKENS)
    plan = make_plan(MICRO, recipe, chunk_bytes=2**18)
    with Team.from_environment("cpu") as team:
        if kind == "evaluation":
            from mimoquant.evaluation.eval_kl import EvaluationFile, eval_kl

            eval_kl(MICRO, out.parent / "candidate", held_out(), file=EvaluationFile(out, resume=resume), team=team)
        elif kind == "sensitivity":
            from mimoquant.mixing.mixtures import Mixtures
            from mimoquant.mixing.run import sensitivity

            sensitivity(Mixtures(plan, 2**18), held_out(), out, resume=resume, team=team)
        else:
            pipeline.quantize(plan, out, resume=resume, team=team)


def held_out() -> TokenSet:
    return load_tokens(["heldout-v1"], MICRO, sequences=48, tokens=64, vocab=1024)


def forked(call: Callable[[], None]) -> int:
    """A child that runs `call`, tells of its failure on stderr, and ends; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        call()
        code = 0
    except BaseException as error:
        print(f"  {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def start(kind: str, out: Path, resume: bool, ranks: int) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [forked(partial(run, kind, out, resume, rank, ranks, port)) for rank in range(ranks)]


def ended_well(children: list[int]) -> bool:
    codes = [os.waitpid(child, 0)[1] for child in children]
    return not any(codes)


def journaled(out: Path, record: Record) -> None:
    """Tell the record what a resume will keep, and what is there besides."""
    partial = out.with_name(f"{out.name}.partial")
    lines = {line.file for path in partial.glob("journal*.jsonl") for line in read_journal(path)}
    begun = [path for path in partial.glob("*.safetensors") if path.name not in lines]
    record.kept.append(len(lines))
    record.repeated.append(len(begun))
    record.whole.append(sum(map(is_whole, begun)))


def is_whole(path: Path) -> bool:
    try:
        open_shard(path)  # refuses a file that is shorter than its header says
    except CheckpointError:
        return False
    return True


def contents(out: Path) -> dict[str, bytes]:
    """Files of a folder, or a file, by their names."""
    return {path.name: path.read_bytes() for path in out.iterdir()} if out.is_dir() else {"": out.read_bytes()}


def torment(kind: str, ranks: int, kills: int, folder: Path, dice: random.Random) -> Record:
    """`kills` kills, spread over as many runs as they need."""
    record, whole = Record(), folder / f"{kind}-{ranks}"
    if kind == "data-free":  # here, where children then have what was compiled; it leaves no threads behind
        run(kind, folder / f"{whole.name}-first", False, 0, 1, 0)
    else:
        assert ended_well(start(kind, folder / f"{whole.name}-first", False, 1))
    begin = time.monotonic()
    assert ended_well(start(kind, whole, False, ranks)), "an undisturbed run failed"
    whole_s, expected = time.monotonic() - begin, contents(whole)
    assert expected == contents(folder / f"{whole.name}-first"), "two ranks write what one writes"
    while record.kills < kills:
        out, resume, killed = folder / f"{kind}-{ranks}-{record.runs}", False, 0
        while not out.exists() or (out / RUN_NAME).exists():
            children = start(kind, out, resume, ranks)
            if killed < MOST_KILLS and record.kills < kills:
                time.sleep(dice.uniform(0, whole_s))
                victim = dice.choice(children)
                if os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    os.kill(victim, signal.SIGKILL)
                    killed, record.kills = killed + 1, record.kills + 1
                ended_well(children)
                journaled(out, record)
            else:
                assert ended_well(children), "a resumed run failed"
            resume = True
        found = contents(out)
        wrong = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        assert not wrong, f"{out}: {', '.join(wrong)} are not what an undisturbed run writes"
        record.runs += 1
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--data-free", "--calibrated", "--ranks", "--evaluation", "--sensitivity"):
        parser.add_argument(name, type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.calibrated or options.ranks or options.evaluation or options.sensitivity:  # loaded before any fork
        import rank_driver

        import mimoquant.mixing.run  # noqa: F401

        rank_driver.shrink_sizes()
    dice = random.Random(options.seed)
    jobs = (
        ("data-free", 1, options.data_free),
        ("calibrated", 1, options.calibrated),
        ("calibrated", 2, options.ranks),
        ("evaluation", 1, options.evaluation),
        ("sensitivity", 1, options.sensitivity),
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.evaluation:
            run("data-free", Path(folder) / "candidate", False, 0, 1, 0)
        for kind, ranks, kills in jobs:
            if kills:
                record = torment(kind, ranks, kills, Path(folder), dice)
                print(f"{kind}, {ranks} rank{'s' * (ranks > 1)}: {record}", flush=True)


if __name__ == "__main__":
    main()
