"""The processes ("ranks") that share a run, as torchrun starts them: who is who, and what they tell each other.

Key idea: all that ranks exchange goes through three calls, `broadcast` (a tensor that all have the memory for), `share`
(named tensors from their owner) and `gather` (small plain objects, as JSON). Ranks make the same calls in the same
order. A team of one, which is every run that torchrun did not start, does nothing and loads nothing.

The end of one rank is the end of all. One that fails leaves its sentence on torchrun's board (a key-value store) and
closes its connections; the others fail in their next call, find the sentence and end as it did, but one rank only
prints it. A rank that is killed leaves nothing; then that is the sentence.

Left out: ranks that join or leave a run. Tensors on CUDA go through NCCL, all else through gloo.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mimoquant import errors
from mimoquant.errors import MimoquantError, StoppedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_S = 1800  # that a rank waits for another: the longest that one may work while others have nothing to do
GRACE_S = 2.0  # that a rank whose connection broke waits for a sentence that says why
RESUME = "a quantize run goes on with --resume, under any number of processes"
_BOARD = "end of the run"
_START = "torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which go together"
_PATIENCE = "MIMOQUANT_RANK_TIMEOUT_S"


def refuse_ranks(what: str) -> None:
    """Raises UsageError where torchrun started several processes for what each of them would do whole."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks.isdecimal() and int(ranks) > 1:
        raise UsageError(f"{what}: is the work of one process, {ranks} were started", hint="run it without torchrun")


def _patience() -> timedelta:
    told = os.environ.get(_PATIENCE, str(TIMEOUT_S))
    with contextlib.suppress(ValueError, OverflowError):
        if (patience := timedelta(seconds=float(told))) > timedelta(0):
            return patience
    raise UsageError(f"{_PATIENCE} is {told!r}, expected a number of seconds")


class Team:
    """This process among those of the run. A context manager: leaving it with an error ends the others too."""

    def __init__(self, device: str = "cpu") -> None:
        """A team of one. See `from_environment`."""
        self.rank, self.size, self.device = 0, 1, device
        self._board: Any = None  # torch.distributed.Store

    @staticmethod
    def from_environment(device: str) -> Team:
        """The team that torchrun started, or a team of one. `device`: "cpu" or "cuda"; `team.device` has a number.

        Raises UsageError where a node has more ranks than GPUs or the environment's words do not go together,
        StoppedError where the others cannot be reached.
        """
        team = Team(device)
        with contextlib.suppress(KeyError, ValueError):
            team.rank, team.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if team.size > 1:
            if not 0 <= team.rank < team.size:
                raise UsageError(f"rank {team.rank} is none of the {team.size} that WORLD_SIZE speaks of", hint=_START)
            team._join()
        return team

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that prints, and finishes the output folder."""
        return self.rank == 0

    def _join(self) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        patience = _patience()
        backend = "gloo"
        if self.device.startswith("cuda"):
            local, gpus = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
            if local >= gpus:
                raise UsageError(
                    f"rank {local} of this node has no GPU: there are {gpus}",
                    hint="start as many processes a node as it has GPUs",
                )
            self.device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local)
        try:
            store, rank, size = next(rendezvous("env://", timeout=patience))
            self._board = PrefixStore("mimoquant", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        except ValueError as error:  # of MASTER_ADDR or MASTER_PORT
            raise UsageError(
                f"rank {self.rank} cannot look for the other processes ({_line(error)})", hint=_START
            ) from error
        except RuntimeError as error:
            raise StoppedError(f"rank {self.rank}: the other processes cannot be reached ({_line(error)})") from error

    # --- what ranks tell each other -----------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Fill `tensor` (contiguous, of the same shape everywhere) with the owner's values."""
        if self.size == 1 or not tensor.numel():
            return
        import torch
        import torch.distributed as dist

        with self._together():
            dist.broadcast(tensor.view(-1).view(torch.uint8), owner)

    def share(self, tensors: dict[str, Tensor] | None, owner: int, device: str) -> dict[str, Tensor]:
        """The owner's tensors, everywhere on `device`; the others give None."""
        if self.size == 1:
            assert tensors is not None
            return tensors
        import torch

        held = {name: values.to(device).contiguous() for name, values in (tensors or {}).items()}
        layout = {name: (str(values.dtype), list(values.shape)) for name, values in held.items()}
        for name, (dtype, shape) in self.gather(layout)[owner].items():
            if self.rank != owner:
                held[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
            self.broadcast(held[name], owner)
        return held

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain object, by rank. Returns when all ranks have called it."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._together():
            dist.all_gather(counts, torch.tensor([len(mine)]))
            longest = max(int(count) for count in counts)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(mine)] = mine
            rows = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(rows, padded)
        return [json.loads(row[: int(count)].numpy().tobytes()) for row, count in zip(rows, counts, strict=True)]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A call that all ranks take part in; it fails where one of them is gone."""
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL have no other
            raise self._lost(error) from error

    # --- the end ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.size == 1:
            return
        first = error is None or self._tell(error)
        import torch.distributed as dist

        if error is None or self.device == "cpu":  # NCCL would wait for a rank that is gone; the end here will do
            dist.destroy_process_group()
        if isinstance(error, KeyboardInterrupt):
            ended = StoppedError("the run was interrupted, or one of its processes died", hint=RESUME)
            ended.told = not first
            raise ended from None
        if isinstance(error, MimoquantError) and not first:
            error.told = True

    def _tell(self, error: BaseException) -> bool:
        """Leave the error for the other ranks; whether this rank was the first to."""
        failure = {
            "rank": self.rank,
            "kind": type(error).__name__,
            "message": str(error),
            "hint": getattr(error, "hint", None),
        }
        if not isinstance(error, MimoquantError):
            what = "was interrupted" if isinstance(error, KeyboardInterrupt) else "failed, see its traceback"
            failure |= {"kind": "StoppedError", "message": f"rank {self.rank} {what}", "hint": RESUME}
        mine = json.dumps(failure)
        try:
            return bool(self._board.compare_set(_BOARD, "", mine).decode() == mine)
        except RuntimeError:  # the board is gone, with the process that held it
            return True

    def _lost(self, error: Exception) -> MimoquantError:
        """What ended the rank that does not answer."""
        try:
            self._board.wait([_BOARD], timedelta(seconds=GRACE_S))
            failure = json.loads(self._board.get(_BOARD))
        except RuntimeError:
            return StoppedError(f"rank {self.rank}: another process of this run has died ({_line(error)})", hint=RESUME)
        ended: MimoquantError = getattr(errors, failure["kind"])(failure["message"], hint=failure["hint"])
        ended.told = True
        return ended


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
