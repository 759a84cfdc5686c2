"""How a run's shards come to disk: how many are written at once, and what may wait for them.

Key idea: hashing one file takes three times as long as a disk may take to write it, so several are written side by side
wherever they can be filled faster; `machine.hashing` takes two at a time where cores are few. A cast computes next to
nothing: its shards are filled in turn, a piece of each, so that all are written all the time and little waits. What
takes its time to compute goes shard by shard, and costs a kill less.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mimoquant.planning.plan import CAST_CHUNK_BYTES, Plan

QUEUE_BYTES = 192 * 2**20  # results of one shard that may wait for the disk
CUDA_LANES = 3  # shards that are written and hashed at once where a GPU fills them faster than one thread hashes
CAST_LANES = 4  # the same of a cast, on as many cores
PIECE_BYTES = 2**25  # of a tensor that is copied, at a time
SMALL_PIECE_BYTES = 2**23  # the same on a CPU, without calibration: little memory, that is used again


@dataclass(frozen=True, slots=True)
class Writing:
    """`lanes`: shards that are written at once; `at_once`: that are filled at once, else one after the other;
    `piece_bytes`: of a tensor that is read at a time."""

    lanes: int
    at_once: int
    queue_bytes: int
    piece_bytes: int = PIECE_BYTES


def writing_of(plan: Plan, device: str, *, far: bool = False) -> Writing:
    """For a plan on a kind of device ("cpu" or "cuda"). `far`: the source is not on this machine: what was read of it
    costs more than anything else, so a shard is finished before the next is begun."""
    if plan.recipe.casts and not far:
        lanes = min(CAST_LANES, len(os.sched_getaffinity(0)))
        return Writing(lanes, lanes, 2 * lanes * CAST_CHUNK_BYTES, SMALL_PIECE_BYTES)
    if device.startswith("cuda"):
        return Writing(CUDA_LANES, 1, 2 * max(unit.size_bytes for unit in plan.units))
    small = plan.recipe.calibration is None and not far
    return Writing(1, 1, QUEUE_BYTES, SMALL_PIECE_BYTES if small else PIECE_BYTES)
