"""What a walk back keeps, and where: states on the host or in files, gradients and Fisher matrices in files.

Key idea: a run folder, as a quantize run has one, so what is there after a kill is whole and belongs to this walk.
Threads write while the next layer is walked. A file belongs to a portion of the tokens, never to a rank, so any number
of processes can go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimoquant.checkpoint.index import open_shard
from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry, ShardWriter
from mimoquant.machine.team import Team

Place = Literal["host", "files"]
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_TENSOR = "values"
_WRITERS = 4  # files at once: one is hashed by one thread, which takes as long as a GPU for what is in it


class Kept:
    """Units by name: `states L P` (what enters layer L), `gradients L P` (at its output), of portion P; `fisher L`.

    Args:
        place: where states go. On the host they do not outlive the process.
    """

    def __init__(self, run: RunFolder, team: Team, place: Place) -> None:
        self.run, self.team, self.place = run, team, place
        self._writer = ThreadPoolExecutor(_WRITERS, thread_name_prefix="fisher")
        self._made: dict[str, Future[Tensor | None]] = {}  # by this process; what is on the host comes out of it
        self._writing: list[Future[Any]] = []  # of the layer that is being walked
        self._before: list[Future[Any]] = []

    def put(self, unit: str, values: Tensor, facts: dict[str, Any] | None = None) -> None:
        """Keep a tensor, which nobody may change any more. What goes wrong is raised by a later `layer_done`."""
        ready = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        self._made[unit] = self._writer.submit(self._keep, unit, values, ready, facts)
        self._writing.append(self._made[unit])

    def get(self, unit: str) -> Tensor:
        """A kept tensor, on the host. Raises CheckpointError for a file that is not what was written."""
        made = self._made[unit].result() if unit in self._made else None
        if made is not None:
            return made
        return read_values(self.path(unit))

    def drop(self, unit: str) -> None:
        """Let go of what is on the host."""
        self._made.pop(unit, None)

    def facts(self, unit: str) -> Mapping[str, Any] | None:
        """What was told of a unit that is finished, as far as this rank knows."""
        line = self.run.finished.get(unit)
        return line.facts if line else None

    def has(self, units: Iterable[str]) -> bool:
        """Whether all of them are in files."""
        return all(unit in self.run.finished for unit in units)

    def layer_done(self) -> None:
        """Wait for what was put before the last call, on all ranks."""
        for future in self._before:
            future.result()
        self.team.gather(None)
        self._before, self._writing = self._writing, []

    def finish(self) -> None:
        """Wait for everything, on all ranks."""
        self.layer_done()
        self.layer_done()

    def leave(self) -> None:
        """The walk ends early: what is being written is finished, for a resume. An error there is not the first."""
        self._writer.shutdown()
        if self.team.size == 1:
            with contextlib.suppress(BaseException):
                self.finish()

    def close(self) -> None:
        """No more will be put."""
        self._writer.shutdown()

    def path(self, unit: str) -> Path:
        kind, *numbers = unit.split()
        return self.run.path("-".join([kind, *(f"{int(number):04d}" for number in numbers)]) + ".safetensors")

    def _keep(self, unit: str, values: Tensor, ready: Any, facts: dict[str, Any] | None) -> Tensor | None:
        """The tensor itself where it stays on the host."""
        held, path = _to_host(values, ready).contiguous(), self.path(unit)
        if self.place == "host" and unit.startswith("states "):
            return held
        writer = ShardWriter(path, [Entry(_TENSOR, _NAMES[held.dtype], tuple(held.shape))])
        try:
            writer.write(_TENSOR, held.view(-1).view(torch.uint8).numpy())
            digest = writer.close()
            self.run.record(JournalLine(unit, path.name, writer.size_bytes, digest, facts))
        finally:
            writer.abandon()
        return None


def read_values(path: Path) -> Tensor:
    """The tensor of a unit's file."""
    with CheckpointReader(open_shard(path)) as reader:
        info = reader.index.tensors[_TENSOR]
        return torch.from_numpy(reader.read(_TENSOR)).view(_DTYPES[info.dtype]).view(info.shape)


def _to_host(values: Tensor, ready: Any) -> Tensor:
    """On a stream of its own, so that it waits for nothing that came after `ready`."""
    if not values.is_cuda:
        return values
    ready.synchronize()
    side: Callable[..., Any] = torch.cuda.Stream
    with torch.cuda.stream(side(values.device)):
        return values.cpu()
