"""How long a run will take: its own steps, done on one chunk of experts and timed.

Key idea: no table of machines. Chunks are read (past the page cache), one is encoded, hashed and, where a folder is
given, written; a calibrated recipe takes some of its number of tokens, at random, through the first quantized layer.
Reading, computing and writing overlap, so the slowest of the three is the run's time, after what starting takes. What
is timed apart is what grows with something: tokens in attention, rows in experts, experts, layers.

Left out: the page cache (a source that is in it reads faster), other programs, how ranks wait for each other, and
compilers, which are done with most kernels when the rehearsal ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mimoquant.checkpoint.folders import open_inside
from mimoquant.checkpoint.journal import existing_parent
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import remote_of
from mimoquant.machine.devices import make_engine
from mimoquant.model.layout import PROJECTIONS
from mimoquant.planning.needs import Estimate
from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts
from mimoquant.planning.writing import writing_of
from mimoquant.quant.cast import cast
from mimoquant.quant.method import WALKED_MOST
from mimoquant.quant.stack import Engine, Stack
from mimoquant.run.steps import Parts
from mimoquant.weights.stored import read_experts

if TYPE_CHECKING:
    from mimoquant.calibration.tokens import TokenSet
    from mimoquant.fisher.matrices import Fisher
    from mimoquant.run.calibrated import Calibrator

T = TypeVar("T")

TOKENS = {"cpu": 2**11, "cuda": 2**16}  # of a rehearsal: enough for a GPU to be busy with, and not to wait for kernels
_READ_S, _MOST_CHUNKS = 0.3, 8  # how long the source is read, and how much of it at most
_MOST_TIMES = 64  # that tokens of a rehearsal stand for more of them
_SMALL = 256  # side of the matrices that compilers are warmed up with


def rehearse(plan: Plan, device: str, folder: Path | None = None) -> Estimate:
    """Time a plan's steps on "cpu" or "cuda". `folder`: where the output would go, which may not be there yet.

    Raises CheckpointError for a source that cannot be read.
    """
    begin = time.perf_counter()
    steps = [step for unit in plan.units for step in unit.steps if isinstance(step, Experts) and step.fmt]
    step = steps[0]
    with (
        CheckpointReader(plan.layout.index) as reader,
        contextlib.closing(make_engine(plan.engine_device(device))) as engine,
    ):
        stacks = _read(plan, reader, engine, step)  # buffers, threads and a GPU's context cost time once
        starting, size = time.perf_counter() - begin, reader.bytes_read
        read_rate = _read_rate(plan, reader, engine, steps[1:] or steps)
        starting = max(0.0, starting - size / read_rate)
        encoded, rate = _encode(plan, engine, step, stacks)
        write_rate = _write_rate(encoded, writing_of(plan, device).lanes, folder)
        computing, walking = _expert_bytes(plan) / rate, 0.0
        if plan.recipe.calibration is not None:
            computing, walking, entering = _calibrated_seconds(plan, reader, device, step, stacks)
            computing += _bytes_beside(plan) / write_rate  # is written while no layer is computed
            starting += entering
    reading, writing = plan.source_bytes / read_rate, plan.shard_bytes / write_rate
    if plan.recipe.objective == "kl":
        reading *= 3  # the walk back reads the source once each way
    return Estimate(reading, computing + walking, writing, read_rate, write_rate, walking, starting)


def _read(plan: Plan, reader: CheckpointReader, engine: Engine, step: Experts) -> dict[str, Stack]:
    layer, begin, end = step.layer, step.begin, step.end
    return read_experts(reader, plan.layout, layer, begin, end, engine.empty, as_codes=step.as_codes)


def _read_rate(plan: Plan, reader: CheckpointReader, engine: Engine, steps: Sequence[Experts]) -> float:
    """Bytes a second, of chunk after chunk until that is long enough to be told."""
    before, seconds = reader.bytes_read, 0.0
    for step in steps[:_MOST_CHUNKS]:
        _forget(plan, step)
        seconds += _timed(partial(_read, plan, reader, engine, step))[0]
        if seconds > _READ_S:
            break
    return (reader.bytes_read - before) / seconds


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.perf_counter()
    out = work()
    return time.perf_counter() - begin, out


def _forget(plan: Plan, step: Experts) -> None:
    """Ask the kernel to drop a chunk's pages, so that the disk is read and not the page cache."""
    if remote_of(plan.layout.index.folder):
        return
    for expert in range(step.begin, step.end):
        for projection in PROJECTIONS:
            info = plan.layout.expert(step.layer, expert, projection).info
            with (
                contextlib.suppress(OSError, AttributeError),
                open_inside(plan.layout.index.folder, info.file) as handle,
            ):
                os.posix_fadvise(handle.fileno(), info.offset, info.size_bytes, os.POSIX_FADV_DONTNEED)


def _expert_bytes(plan: Plan) -> int:
    """Bytes of the experts that are quantized, as they are read."""
    quantized = (weight for (layer, _, _), weight in plan.layout.experts.items() if layer in plan.formats)
    return sum(weight.loaded_bytes(as_codes=plan.recipe.casts) for weight in quantized)


def _bytes_beside(plan: Plan) -> int:
    """Bytes that are written of units without experts."""
    return sum(unit.size_bytes for unit in plan.units if not any(isinstance(step, Experts) for step in unit.steps))


def _encode(plan: Plan, engine: Engine, step: Experts, stacks: dict[str, Stack]) -> tuple[Parts, float]:
    """A chunk's parts, without calibration, and the source bytes a second of the second time: the first compiles."""
    assert step.fmt is not None
    fmt, search = step.fmt, plan.recipe.scale_search

    def work() -> Parts:
        return (
            cast(stacks, fmt)
            if plan.recipe.casts
            else engine.encode(stacks, fmt, "mse" if search == "gram" else search)
        )

    work()
    seconds, parts = _timed(work)
    return parts, sum(stack.values.nbytes for stack in stacks.values()) / seconds


def _write_rate(parts: Parts, lanes: int, folder: Path | None) -> float:
    """Bytes a second that are hashed, on so many threads, and written at the same time."""
    arrays = [array.tobytes() for of in parts.values() for array in of.values()]
    size = sum(map(len, arrays))
    digest = hashlib.sha256()
    rate = lanes * size / _timed(lambda: deque(map(digest.update, arrays), maxlen=0))[0]
    if folder is None:
        return rate
    with tempfile.TemporaryFile(dir=existing_parent(folder), buffering=0) as handle:
        begin = time.perf_counter()
        handle.writelines(arrays)
        os.fsync(handle.fileno())
        return min(rate, size / (time.perf_counter() - begin))


def _calibrated_seconds(
    plan: Plan, reader: CheckpointReader, device: str, step: Experts, stacks: dict[str, Stack]
) -> tuple[float, float, float]:
    """Of one process: attention of all tokens, experts of all routed tokens, and the method on all experts; of the walk
    back before that; and of the tokens' way to the first quantized layer."""
    begin = time.perf_counter()
    from mimoquant.run.calibrated import SAMPLE_EXPERTS

    held, geometry = plan.recipe.calibration, plan.layout.geometry
    assert held is not None
    walk, rehearsed = _walk_to(plan, reader, device, step.layer)
    entering = time.perf_counter() - begin
    attention, folding = _attention_seconds(walk, step.layer)
    few = step if device.startswith("cuda") else _ordinary_expert(step, walk.facts.tokens)
    count, place = few.end - few.begin, slice(few.begin - step.begin, few.end - step.begin)
    own = {name: _some(stack, place) for name, stack in stacks.items()}
    walk.settings = replace(held, reconstruct=0)
    choice, method, rows, passing = _expert_seconds(walk, few, own)
    routed = max(1, sum(walk.facts.tokens[few.begin : few.end])) / sum(walk.facts.tokens)
    scale = held.sequences * held.tokens / rehearsed
    refined = [layer for layer in plan.formats if held.reconstructs(layer)]
    refining = _refining_seconds(walk, few, own, held.reconstruct, scale) / count if refined else 0.0
    of_tokens = scale * (geometry.layers * attention + len(geometry.moe_layers) * rows / routed)
    sample = min(SAMPLE_EXPERTS, step.end - step.begin)
    of_layer = folding + (choice * sample + method * geometry.experts) / count
    walking = _walking_back_seconds(plan, attention / rehearsed, passing / routed / rehearsed)
    return of_tokens + len(plan.formats) * of_layer + len(refined) * refining * geometry.experts, walking, entering


def _walking_back_seconds(plan: Plan, attention: float, experts: float) -> float:
    """Reckoned from a token's seconds in a layer's attention and in its experts: a layer's forward is made twice, but
    for the experts' last product the second time, and a draw's gradients take another two products of attention's each
    and three of the experts' three."""
    held = plan.recipe.calibration
    if held is None or held.fisher is None:
        return 0.0
    layers, draws = plan.layout.geometry.layers, held.fisher_draws
    of_token = (2 + 2 * draws) * attention + (5 / 3 + draws) * experts
    return held.fisher_sequences * held.tokens * layers * of_token


def _walk_to(plan: Plan, reader: CheckpointReader, device: str, layer: int) -> tuple[Calibrator, int]:
    """Random tokens before a layer, and how many. What they are does not matter, so they pass no experts on the way."""
    from mimoquant.calibration.tokens import TokenSet
    from mimoquant.run.calibrated import HELD_OUT, Calibrator

    held = plan.recipe.calibration
    assert held is not None
    most = TOKENS[device.partition(":")[0]]
    length = min(held.tokens, most // HELD_OUT)
    count = max(HELD_OUT, min(held.sequences, most // length) // HELD_OUT * HELD_OUT)
    ids = np.random.default_rng(0).integers(0, plan.layout.geometry.vocab, (count, length))
    lenient = replace(plan, recipe=replace(plan.recipe, calibration=replace(held, max_starved_experts=None)))
    tokens = TokenSet("random", ids, (), "", (), ())
    fisher = _any_fisher(plan, tokens) if held.fisher else None
    walk = Calibrator(lenient, reader, tokens, device, fisher=fisher)
    for earlier in range(layer):
        walk.begin(earlier)
        walk.end()
    walk.layers.close()  # what comes is read by itself
    return walk, ids.size


def _any_fisher(plan: Plan, tokens: TokenSet) -> Fisher:
    """Matrices of no model: what they hold does not change how long rounding by them takes."""
    import torch

    from mimoquant.calibration.tokens import CalibrationRecord
    from mimoquant.fisher.matrices import Fisher, FisherRecord, LayerFisher

    held, width, (count, length) = plan.recipe.calibration, plan.layout.geometry.hidden, tokens.ids.shape
    assert held is not None and held.fisher is not None
    draws, share = held.fisher_draws, max(1, count * held.fisher_sequences // held.sequences)

    class Unit(Fisher):
        @property
        def samples(self) -> int:
            return int(draws * share * length)

        def load(self, layer: int, device: str = "cpu") -> torch.Tensor:
            return torch.eye(width, device=device)

        def gradients(self, layer: int, device: str = "cpu") -> torch.Tensor:
            return torch.ones(draws, share, length, width, dtype=torch.bfloat16, device=device)

    layers = {layer: LayerFisher(layer, "", "", 1.0, 1.0, None, 0.0, ()) for layer in plan.formats}
    record = FisherRecord(CalibrationRecord.of(tokens), 1, 0, "")
    return Unit(Path(), record, layers, {"tokens a sequence": str(length)})


def _attention_seconds(walk: Calibrator, layer: int) -> tuple[float, float]:
    """Of the tokens' attention and router, and of what else comes before a layer's experts (the choice of a fold)."""
    weights = walk.weights.layer(layer)
    walk.begin(layer, weights=weights)  # the first time loads kernels
    attention = _seconds(walk, lambda: walk.tokens.attend(weights))
    return attention, max(0.0, _seconds(walk, lambda: walk.begin(layer, weights=weights)) - attention)


def _expert_seconds(walk: Calibrator, few: Experts, stacks: dict[str, Stack]) -> tuple[float, float, float, float]:
    """Of choosing a layer's shrinkage, of the method, of the tokens' way through these experts and statistics, and of
    that way alone."""
    from mimoquant.calibration.statistics import expert_grams, gradient_grams, intermediate_of

    geometry = walk.plan.layout.geometry
    _warm_up(walk, few)
    if walk.device.type == "cuda" or walk.metrics:  # where the first of a size, or of a kind, compiles
        _encode_seconds(walk, few, stacks)
        walk.shrinkage = walk.settings.shrinkage
    first = _encode_seconds(walk, few, stacks)
    again = _encode_seconds(walk, few, stacks)  # the shrinkage is chosen once a layer
    chunk, seen = walk.chunk(few, stacks), walk.tokens.seen[0]

    def pass_on() -> None:
        walk.tokens.through(chunk)
        expert_grams(seen, few.begin, few.end, geometry.hidden)
        expert_grams(seen, few.begin, few.end, geometry.expert_intermediate, intermediate_of(chunk))
        if walk.metrics:
            gradient_grams(walk.metrics.gradients, seen, few.begin, few.end)

    rows, passing = _seconds(walk, pass_on), _seconds(walk, lambda: walk.tokens.through(chunk))
    return max(0.0, first - again), max(0.0, again - rows), rows, passing


def _refining_seconds(walk: Calibrator, few: Experts, stacks: dict[str, Stack], rounds: int, scale: float) -> float:
    """Of the joint refinement of these experts, each with as many tokens as one will have on average: those of the
    rehearsal, again and again."""
    own = max(1, sum(walk.facts.tokens[few.begin : few.end])) / (few.end - few.begin)
    wanted = min(WALKED_MOST, scale * sum(walk.facts.tokens) / len(walk.facts.tokens))
    times = min(_MOST_TIMES, max(1, round(wanted / own)))
    walk.tokens.seen = [blocks * times for blocks in walk.tokens.seen]
    without = _encode_seconds(walk, few, stacks)
    walk.settings = replace(walk.settings, reconstruct=rounds, reconstruct_layers=())
    return max(0.0, _encode_seconds(walk, few, stacks) - without)


def _encode_seconds(walk: Calibrator, few: Experts, stacks: dict[str, Stack]) -> float:
    return _seconds(walk, lambda: walk.encode([few], stacks)())


def _seconds(walk: Calibrator, work: Callable[[], object]) -> float:
    """Until a GPU, too, has done it."""
    begin = time.perf_counter()
    work()
    if walk.device.type == "cuda":
        import torch

        torch.cuda.synchronize(walk.device)
    return time.perf_counter() - begin


def _some(stack: Stack, place: slice) -> Stack:
    return Stack(stack.values[place], None if stack.scales is None else stack.scales[place])


def _ordinary_expert(step: Experts, tokens: Sequence[int]) -> Experts:
    """That one of a chunk whose number of tokens is nearest to what experts have on average."""
    average = sum(tokens) / len(tokens)
    expert = min(range(step.begin, step.end), key=lambda expert: abs(tokens[expert] - average))
    return replace(step, begin=expert, end=expert + 1)


def _warm_up(walk: Calibrator, step: Experts) -> None:
    """Let compilers do their work on something small."""
    import torch

    from mimoquant.quant.engine_torch import amax, nvfp4_global_scale
    from mimoquant.quant.expert_methods import encode_with

    assert step.fmt is not None
    weight = torch.linspace(-1, 1, _SMALL**2, device=walk.device).reshape(1, _SMALL, _SMALL).to(torch.bfloat16)
    gram = torch.eye(_SMALL, device=walk.device)[None]
    encode_with(weight, gram, step.fmt, walk.method, nvfp4_global_scale(amax(weight), walk.method.search, step.fmt))
