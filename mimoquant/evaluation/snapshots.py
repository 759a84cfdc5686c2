"""A walk that survives a kill: after each layer its hidden states are on disk, and those of the layer before go.

Key idea: a journaled shard, as in a quantize run, so a resume knows what is whole. A thread writes it while the next
layer is walked, so at most one whole layer and a part of the next are walked twice. Each rank keeps its own states; a
file goes only when all ranks have the next one, so there is always a layer that all of them can begin from.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.checkpoint.index import open_shard
from mimoquant.checkpoint.journal import JournalLine, RunFolder, opened
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry, ShardWriter, stopping, write_file_durably
from mimoquant.errors import MimoquantError, StoppedError
from mimoquant.machine.team import Team

_FACTS = "facts"


class Snapshots:
    """Of the walks of one run, each of which has a name."""

    def __init__(self, run: RunFolder, team: Team) -> None:
        self.run, self.team = run, team
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._writing: Future[None] | None = None
        self._replaced: Path | None = None  # what goes when that is written

    @staticmethod
    @contextlib.contextmanager
    def beside(out: Path, identity: dict[str, Any], *, resume: bool, team: Team) -> Iterator[Snapshots]:
        """Those of a run that ends in one file, `out`: they are in `out`.partial until `finish`.

        Raises UsageError where `out` exists, or what lies there is of a run with another `identity`.
        """
        with opened(RunFolder(out, identity, resume=resume, rank=team.rank), team) as run:
            snapshots = Snapshots(run, team)
            try:
                yield snapshots
            except BaseException as error:
                snapshots._leave()
                if isinstance(error, MimoquantError) and not run.finished and team.size == 1:
                    run.discard()  # nothing that a resume could use, and nobody who still writes
                raise

    def finish(self, text: str) -> None:
        """Write the run's file, then let the snapshots go. Raises StoppedError where either fails."""
        self._settle()
        self._writer.shutdown()
        if self.team.leads:
            write_file_durably(self.run.out, text.encode())
            try:
                shutil.rmtree(self.run.partial)
            except OSError as error:
                raise StoppedError(
                    f"{self.run.partial}: cannot be removed ({error.strerror})",
                    hint=f"{self.run.out} is complete, remove that folder",
                ) from error
        self.team.gather(None)

    def save(self, walk: str, layer: int, states: dict[str, Tensor], facts: Any) -> None:
        """Keep what a walk needs to go on after `layer`: float32 states, and anything that JSON can hold.

        Returns while the states, which nobody may change any more, are being written. What goes wrong there is raised
        by the next call.
        """
        self._settle()
        told = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        self._writing = self._writer.submit(self._write, walk, layer, dict(states), told)
        self._replaced = self.run.path(self._file(walk, layer - 1)) if layer else None

    def _write(self, walk: str, layer: int, states: dict[str, Tensor], told: np.ndarray[Any, Any]) -> None:
        entries = [Entry(name, "F32", tuple(values.shape)) for name, values in states.items()]
        file = self._file(walk, layer)
        writer = ShardWriter(self.run.path(file), [*entries, Entry(_FACTS, "U8", told.shape)])
        try:
            for entry in entries:
                writer.write(entry.name, states.pop(entry.name).cpu().contiguous().numpy())
            writer.write(_FACTS, told)
            self.run.record(JournalLine(self._unit(walk, layer), file, writer.size_bytes, writer.close()))
        finally:
            writer.abandon()

    def _settle(self) -> None:
        """Wait for what is being written, on all ranks; then the layer before it goes."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        writing.result()
        self.team.gather(None)
        if self._replaced:
            with stopping(self._replaced):
                self._replaced.unlink(missing_ok=True)

    def _leave(self) -> None:
        """The run ends early: what is being written is finished, for a resume. An error there is not the first."""
        self._writer.shutdown()
        if self.team.size == 1:
            with contextlib.suppress(BaseException):
                self._settle()

    def load(self, walk: str, layers: int) -> tuple[int, dict[str, Tensor], Any] | None:
        """The next layer, states and facts of a walk that was begun; None for one that was not."""
        mine = [layer for layer in range(layers) if self._unit(walk, layer) in self.run.finished]
        of_ranks = self.team.gather(mine)
        both = set.intersection(*map(set, of_ranks))
        if not both:
            return None
        layer = max(both)
        for before in (number for number in mine if number < layer):
            with stopping(self.run.partial):
                self.run.path(self._file(walk, before)).unlink(missing_ok=True)
        index = open_shard(self.run.path(self._file(walk, layer)))
        with CheckpointReader(index) as reader:
            states = {
                name: torch.from_numpy(reader.read(name).view(np.float32)).view(info.shape)
                for name, info in index.tensors.items()
                if name != _FACTS
            }
            facts = json.loads(reader.read(_FACTS).tobytes())
        return layer + 1, states, facts

    def _unit(self, walk: str, layer: int) -> str:
        return f"{walk}, layer {layer}, rank {self.team.rank}"

    def _file(self, walk: str, layer: int) -> str:
        return f"{walk}-layer-{layer:03d}-rank-{self.team.rank}.safetensors"
