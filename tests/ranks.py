"""The command line in other processes: under torchrun, or forked from one that has loaded everything once.

torchrun and each process take seconds to import torch, many times what a run of the micro checkpoint takes.
Forked ranks find the same environment, and what torchrun does for them is done here: the board (a key-value store)
outlives them, and when one ends badly the others get SIGTERM.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent
LIMIT_S = 300
# One thread, since sums must have one order. Ranks wait for each other for longer than a run may take: one that notes
# the death of another only then has failed.
SETTINGS = {"OMP_NUM_THREADS": "1", "MIMOQUANT_RANK_TIMEOUT_S": str(2 * LIMIT_S)}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch.distributed",
        "transformers.tokenization_utils_tokenizers",
        "numba.np.arrayobj",
        "pydantic",
        *(f"mimoquant.cli.{verb}" for verb in ("verbs", "eval_kl", "eval_draft", "sensitivity")),
        *(f"mimoquant.{name}" for name in ("assembly.plans", "evaluation.eval_kl", "evaluation.eval_draft")),
        *(f"mimoquant.{name}" for name in ("run.calibrated", "fisher.walk", "mixing.run", "quant.engine_cpu")),
        "mimoquant.quant.kernels.columns_cpu",
    ]
)


def under_torchrun(count: int, driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """So many ranks of `driver`, a program of this folder."""
    env = os.environ | SETTINGS | {"PYTHONPATH": str(TESTS.parent)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*torchrun, str(driver), *arguments], capture_output=True, text=True, env=env, timeout=LIMIT_S
    )


def forked(count: int, driver: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """So many ranks of `driver.main`, by its dotted name; the exit code is that of the first that ended badly."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        # for the server, which starts with the first process
        for name, value in SETTINGS.items() | {("PYTHONPATH", str(TESTS.parent)), ("HF_HUB_OFFLINE", "1")}:
            patch.setenv(name, value)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env = SETTINGS | place | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        told = [Path(folder) / name for name in ("stdout", "stderr")]
        numbers = [{"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
        ranks = [FORKS.Process(target=_rank, args=(driver, arguments, env | mine, told)) for mine in numbers]
        for rank in ranks:
            rank.start()
        code = _ended(ranks)
        out, errors = (path.read_text() if path.exists() else "" for path in told)
    return subprocess.CompletedProcess(arguments, code, out, errors)


def _rank(driver: str, arguments: tuple[str | Path, ...], env: dict[str, str], told: list[Path]) -> None:
    for number, path in zip((1, 2), told, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(env)
    sys.argv = [driver, *map(str, arguments)]
    importlib.import_module(driver).main()


def _ended(ranks: list[ForkServerProcess]) -> int:
    """When all have ended: the exit code of the first that ended badly, which has ended the others."""
    until, left, code = time.monotonic() + LIMIT_S, list(ranks), 0
    while left:
        if not wait([rank.sentinel for rank in left], until - time.monotonic()):
            for rank in left:
                rank.kill()
            raise TimeoutError(f"{len(left)} ranks have not ended after {LIMIT_S} s")
        for rank in [rank for rank in left if not rank.is_alive()]:
            rank.join()
            left.remove(rank)
            if rank.exitcode and not code:
                code = rank.exitcode
                for other in left:
                    other.terminate()
    return code
