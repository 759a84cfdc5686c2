"""A checkpoint of V2.5's sizes with fewer experts, made in a minute: what is large is drawn once and written often.

Key idea: `synth` lays the files out and says what is in them; here it draws, encodes and writes on all cores at once.
Experts are eight different ones, attention has four layers' worth of values, MTP layers are one: drawing takes far
longer than writing. Norms, routers, biases and towers are each layer's own.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from mimoquant.synthetic.files import ShardFiles
from mimoquant.synthetic.towers import TowerSizes

synth = importlib.import_module("mimoquant.synthetic.checkpoint")  # the module: `mimoquant.synth` is the verb
EXPERTS, LAYERS = 8, 4  # different ones
_BLOCK_KINDS = (-1, 0, 0, 0, 0, 1, 1, 1, 1)
TOWERS = {
    "v2.5": TowerSizes(
        kinds=(*_BLOCK_KINDS * 3, -1),
        hidden=1280,
        inner=4608,
        heads=32,
        kv_heads=8,
        head_dim=64,
        patch=16,
        window=64,
        sound_hidden=1024,
        sound_inner=4096,
        sound_heads=16,
        layers=6,
        codebooks=20,
        codes=1280,
    ),
    "small": TowerSizes(),
}
SIZES = {
    "v2.5": synth.SynthSizes(
        layers=48,
        hidden=4096,
        top_k=8,
        expert_intermediate=2048,
        dense_intermediate=16384,
        vocab=152576,
        heads=64,
        kv_heads=4,
        head_dim=192,
        v_head_dim=128,
        window=128,
    ),
    "small": synth.SynthSizes(layers=12, hidden=128, experts=8, expert_intermediate=128, dense_intermediate=256),
}


def is_shared(name: str) -> bool:
    """Whether other tensors have the same values."""
    return name.startswith("model.") and name.endswith("_proj.weight")


def like(name: str) -> str:
    """The tensor whose values one has."""
    if not is_shared(name):
        return name
    name = re.sub(r"experts\.(\d+)", lambda found: f"experts.{int(found[1]) % EXPERTS}", name)
    layers = 1 if ".experts." in name or ".mtp." in name else LAYERS
    return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) % layers}", name)


class _Made(list[tuple[str, Any]]):
    """Takes what is put into files: name and values."""

    def put(self, name: str, data: Any) -> None:
        self.append((name, data))


class _AtOnce:
    """Draws and writes tensors on many threads; one that has another's values waits for them and writes them."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.tasks: list[Future[None]] = []
        self.plain, self.lock = synth._put, threading.Lock()
        self.made: dict[Any, Future[_Made]] = {}

    def put(self, files: ShardFiles, stored: Any, origin: Any) -> None:
        """In the place of `synth._put`."""
        self.tasks.append(self.pool.submit(self._put, files, stored, origin))

    def _put(self, files: ShardFiles, stored: Any, origin: Any) -> None:
        name = like(stored.name)
        first = replace(stored, name=name, parts=tuple((like(part), shape) for part, shape in stored.parts))
        for of_first, data in self._values(first, origin):
            files.put(stored.name + of_first.removeprefix(name), data)

    def _values(self, stored: Any, origin: Any) -> _Made:
        if not is_shared(stored.name):
            return self._drawn(stored, origin)
        with self.lock:
            mine = stored not in self.made
            made = self.made.setdefault(stored, Future())
        if mine:
            try:
                made.set_result(self._drawn(stored, origin))
            except BaseException as error:
                made.set_exception(error)
        return made.result()

    def _drawn(self, stored: Any, origin: Any) -> _Made:
        made = _Made()
        self.plain(made, stored, origin)
        return made

    def finish(self) -> None:
        for task in self.tasks:
            task.result()
        self.pool.shutdown()


def make_source(folder: Path, sizes: Any, towers: TowerSizes, threads: int | None = None) -> Any:
    """Write it; returns `synth`'s report."""
    at_once = _AtOnce(threads or len(os.sched_getaffinity(0)))

    class Files(ShardFiles):
        def index(self, layout: str, tp_size: int) -> dict[str, Any]:
            at_once.finish()
            return super().index(layout, tp_size)

    with mock.patch.multiple(synth, ShardFiles=Files, _put=at_once.put):
        return synth.synth(folder, "v2.5", sizes=sizes, towers=towers)
