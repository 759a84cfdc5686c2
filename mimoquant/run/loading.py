"""The source bytes of a run's tasks, in the order in which they are done.

Key idea: one task after the other, or some in turn, a piece of each: then as many shards are filled at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from mimoquant.planning.units import Copy
from mimoquant.run.deal import Task
from mimoquant.run.steps import Loaded, kind_of
from mimoquant.run.workshop import Workshop


def load(shop: Workshop, tasks: Iterable[Task], at_once: int = 1) -> Iterator[Loaded]:
    """Every step's source bytes, in order; of so many tasks in turn, a piece of each. Runs in the read-ahead thread."""
    waiting, begun = iter(tasks), deque[Iterator[Loaded]]()
    while True:
        while len(begun) < at_once and (task := next(waiting, None)):
            begun.append(_load(shop, task))
        if not begun:
            return
        pieces = begun.popleft()
        loaded = next(pieces)
        if not loaded.last:
            begun.append(pieces)
        yield loaded


def _load(shop: Workshop, task: Task) -> Iterator[Loaded]:
    shop.reader.expect(step.info for steps in task.groups for step in steps if isinstance(step, Copy))
    for number, steps in enumerate(task.groups, start=1):
        last_group = number == len(task.groups)
        pieces = kind_of(steps[0]).read(shop, steps) if steps else iter([(None, True)])
        for data, last_piece in pieces:
            yield Loaded(task, steps, data, last_group and last_piece)
