"""A walk that survives a kill: after each layer its hidden states are on disk, and those of the layer before go.

Key idea: a journaled shard, as in a quantize run, so a resume knows what is whole. At most one layer is walked twice.
Each rank keeps its own states; a file goes only when all ranks have the next one, so there is always a layer that all
of them can begin from.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimoquant.checkpoint.index import open_shard
from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import Entry, ShardWriter, stopping, write_file_durably
from mimoquant.errors import MimoquantError, StoppedError
from mimoquant.team import Team
from mimoquant.team_folder import opened

_FACTS = "facts"


class Snapshots:
    """Of the walks of one run, each of which has a name."""

    def __init__(self, run: RunFolder, team: Team) -> None:
        self.run, self.team = run, team

    @staticmethod
    @contextlib.contextmanager
    def beside(out: Path, identity: dict[str, Any], *, resume: bool, team: Team) -> Iterator[Snapshots]:
        """Those of a run that ends in one file, `out`: they are in `out`.partial until `finish`.

        Raises UsageError where `out` exists, or what lies there is of a run with another `identity`.
        """
        with opened(RunFolder(out, identity, resume=resume, rank=team.rank), team) as run:
            try:
                yield Snapshots(run, team)
            except MimoquantError:
                if not run.finished and team.size == 1:  # nothing that a resume could use, and nobody who still writes
                    run.discard()
                raise

    def finish(self, text: str) -> None:
        """Write the run's file, then let the snapshots go. Raises StoppedError where either fails."""
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
        """Keep what a walk needs to go on after `layer`: float32 states, and anything that JSON can hold."""
        told = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        entries = [Entry(name, "F32", tuple(values.shape)) for name, values in states.items()]
        file = self._file(walk, layer)
        writer = ShardWriter(self.run.path(file), [*entries, Entry(_FACTS, "U8", told.shape)])
        try:
            for name, values in states.items():
                writer.write(name, values.cpu().contiguous().numpy())
            writer.write(_FACTS, told)
            self.run.record(JournalLine(self._unit(walk, layer), file, writer.size_bytes, writer.close()))
        finally:
            writer.abandon()
        self.team.gather(None)
        if layer:
            before = self.run.path(self._file(walk, layer - 1))
            with stopping(before):
                before.unlink(missing_ok=True)

    def load(self, walk: str, layers: int) -> tuple[int, dict[str, Tensor], Any] | None:
        """The next layer, states and facts of a walk that was begun; None for one that was not."""
        mine = [layer for layer in range(layers) if self._unit(walk, layer) in self.run.finished]
        held = self.team.gather(mine)
        both = set.intersection(*map(set, held))
        if not both:
            return None
        layer = max(both)
        index = open_shard(self.run.path(self._file(walk, layer)))
        with CheckpointReader(index) as reader:
            states = {name: torch.from_numpy(reader.read(name).view(np.float32)).view(info.shape)
                      for name, info in index.tensors.items() if name != _FACTS}  # fmt: skip
            facts = json.loads(reader.read(_FACTS).tobytes())
        return layer + 1, states, facts

    def _unit(self, walk: str, layer: int) -> str:
        return f"{walk}, layer {layer}, rank {self.team.rank}"

    def _file(self, walk: str, layer: int) -> str:
        return f"{walk}-layer-{layer:03d}-rank-{self.team.rank}.safetensors"
