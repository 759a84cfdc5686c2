"""The run folder of several ranks: rank 0 opens it, then the others join and learn what is finished."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.machine.team import Team


@contextlib.contextmanager
def opened(run: RunFolder, team: Team, check: Callable[[RunFolder], None] | None = None) -> Iterator[RunFolder]:
    """`run` of this rank, open on all ranks. `check` is called by rank 0 before the others join, and may refuse."""
    with contextlib.ExitStack() as stack:
        if team.leads:
            stack.enter_context(run)
            if check:
                check(run)
        kept = team.gather([line.as_plain() for line in run.finished.values()])[0]
        if not team.leads:
            stack.enter_context(run)
            run.finished = {line["unit"]: JournalLine(**line) for line in kept}
        yield run
