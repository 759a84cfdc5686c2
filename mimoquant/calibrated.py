"""The calibrated run, layer by layer: tokens → statistics → codes, and the tokens go on through what was written.

Key idea: one stream of hidden states walks through the model while it is quantized. A layer's attention routes the
tokens; its experts come in the same chunks in which they are written, and of each chunk the statistics are taken, the
codes chosen and the output computed before the next one is touched: never all Gram matrices at once, no weight read
twice. Hidden states rest on the host; one layer's tokens are on the device.

A sixteenth of the sequences is held out. They choose how far thin statistics are shrunk, and tell whether the loss that
was minimised predicts the loss on tokens that nobody minimised.

Left out: the layers' order is the model's; no second pass. Shapes: E experts of a chunk, H hidden, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.calibration import statistics
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, QualityError
from mimoquant.layer_weights import read_experts, read_parts
from mimoquant.model.decoder_layer import DenseWeights, ExpertChunk, LayerWeights, Router, add_experts
from mimoquant.model.layer_stream import (
    Block,
    Stream,
    add_blocks,
    attend_and_route,
    batch_sequences,
    dense_layer,
    route_again,
)
from mimoquant.model.layout import PROJECTIONS, norm_name, router_name
from mimoquant.model_weights import CheckpointWeights
from mimoquant.plan import Experts, Plan, Unit
from mimoquant.quant.awq import best_fold, divided_by, inverse, moved, scaled, settled
from mimoquant.quant.engine_torch import TorchEngine, amax, decode, nvfp4_global_scale, stored_parts, to_numpy
from mimoquant.quant.expert_methods import Encoded, encode_with, energy, loss
from mimoquant.quant.formats import Format
from mimoquant.quant.method import Method
from mimoquant.quant.stack import NonFiniteError, Stack

Array = npt.NDArray[Any]
Parts = dict[str, dict[str, Array]]  # projection → part → [E, ...]

HELD_OUT = 16  # one sequence in so many
SAMPLE_EXPERTS = 16  # at most, of a layer's first chunk, that choose the shrinkage
SAMPLE_TOKENS = 4096  # at most, that are forced through each expert: what down_proj's statistics are shrunk toward
SAMPLE_PER_COLUMN = 8  # of them, for each column of down_proj
SHRINKAGES = (0.0, 1.0, 4.0)  # times the width, that are tried
TOLD_ROWS = 1024  # at least, of a matrix, that tell its relMSE
COARSE = 5  # one in so many scale multipliers is tried while a fold or a shrinkage is chosen


@dataclass
class LayerFacts:
    """What is told of a layer: one value an expert in the lists. relMSE = tr(D H Dᵀ) / tr(W H Wᵀ), all projections."""

    layer: int
    tokens: list[int] = field(default_factory=list)
    starved: int = 0  # experts: see `starved` below
    effective: list[float] = field(default_factory=list)
    shrunk: list[float] = field(default_factory=list)  # lambda
    relmse_plain: list[float] = field(default_factory=list)  # of absmax rounding
    relmse: list[float] = field(default_factory=list)
    shrinkage: float = 0.0  # n0 over the width
    held_out: dict[str, float] = field(default_factory=dict)
    damped: int = 0
    rounded: int = 0
    folded_channels: int = 0
    topk_changed: float | None = (
        None  # share of the tokens that a folded router sends elsewhere; None: no norm is folded
    )

    def as_plain(self) -> dict[str, Any]:
        lists = {name: [_short(v) for v in getattr(self, name)]
                 for name in ("tokens", "effective", "shrunk", "relmse_plain", "relmse")}  # fmt: skip
        routed = {} if self.topk_changed is None else {"topk_changed": _short(self.topk_changed)}
        return (
            lists
            | routed
            | {
                "starved": self.starved,
                "shrinkage": self.shrinkage,
                "held_out": {name: _short(value) for name, value in self.held_out.items()},
                "damped": self.damped,
                "rounded": self.rounded,
                "folded_channels": self.folded_channels,
            }
        )


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


class Calibrator:
    """Walks the calibration tokens through a plan's layers. Layers go in order, all of them: `begin`, then `encode`
    or `keep` for every chunk of experts, then `end`; or `replay`, for a layer that is written already."""

    def __init__(self, plan: Plan, reader: CheckpointReader, tokens: TokenSet, device: str) -> None:
        assert plan.recipe.calibration is not None
        self.plan, self.settings, self.device = plan, plan.recipe.calibration, torch.device(device)
        self.weights, self.engine = CheckpointWeights(reader, plan.layout, self.device), TorchEngine(device)
        self.method = plan.recipe.expert_method()
        held = torch.arange(len(tokens.ids)) % HELD_OUT == HELD_OUT - 1
        ids = torch.from_numpy(tokens.ids)
        embedding = self.weights.tensor("model.embed_tokens.weight")
        self.streams = [self._stream(ids[part], embedding) for part in (~held, held) if bool(part.any())]
        self.blocks: list[list[Block]] = []
        self.facts = LayerFacts(-1)
        self.norm_fold: Tensor | None = None

    def _stream(self, ids: Tensor, embedding: Tensor) -> Stream:
        parts = torch.split(ids, batch_sequences(ids.shape[1]))
        batches = [embedding[part.to(self.device)].float().cpu() for part in parts]
        if self.device.type == "cuda":
            batches = [hidden.pin_memory() for hidden in batches]
        return Stream(self.weights, batches)

    @torch.no_grad()
    def begin(self, layer: int, written: CheckpointReader | None = None) -> None:
        """Attention and routing of a layer; a dense layer is passed whole. `written`: its shard, if it exists."""
        weights = self.weights.layer(layer)
        self.facts, self.blocks, self.norm_fold = LayerFacts(layer), [], None
        if isinstance(weights.mlp, DenseWeights):
            for stream in self.streams:
                dense_layer(stream, weights)
            return
        self.blocks = [attend_and_route(stream, weights, torch.bfloat16) for stream in self.streams]
        self._pool()
        if layer in self.plan.formats and self.plan.recipe.folds_norm(layer):
            fold = self._fold_of(layer) if written is None else self._written_fold(layer, written)
            self._apply_norm_fold(weights, fold)
        self._refuse_starved(layer)

    def _pool(self) -> None:
        """What the whole layer's tokens say: the Gram matrix experts are shrunk toward, and a sample of the tokens."""
        train = self.blocks[0]
        count = sum(len(block.tokens) for block in train)
        self.pooled = torch.stack([statistics.gram(block.tokens) for block in train]).sum(0) / count
        wanted = min(SAMPLE_TOKENS, SAMPLE_PER_COLUMN * self.plan.layout.geometry.expert_intermediate)
        step = -(-count // wanted)
        self.sample = torch.cat([block.tokens[::step] for block in train])
        self.shrinkage = self.settings.shrinkage
        experts, dispatches = self.plan.layout.geometry.experts, [block.dispatch for block in train]
        self.facts.tokens = statistics.counts(dispatches, 0, experts)
        self.facts.starved = starved(self.facts.tokens, len(self.pooled))
        self.facts.effective = statistics.effective_counts(dispatches, 0, experts)

    @torch.no_grad()
    def encode(self, step: Experts, stacks: dict[str, Stack]) -> Parts:
        """Choose the codes of a chunk, and let its tokens through.

        Raises NonFiniteError for weights that are NaN or Inf, CheckpointError where statistics are.
        """
        fmt, begin = step.fmt, step.begin
        assert fmt is not None
        original = self._chunk(begin, stacks)
        inputs = self._input_grams(begin, step.end)
        if self.shrinkage is None:
            self.shrinkage = self._choose_shrinkage(original, inputs, fmt)
        n0, count = self.shrinkage * len(self.pooled), self.facts.tokens[begin : step.end]
        chunk = self._folded_down(original, fmt, count) if self.plan.recipe.folds_down else original
        gram = _finite(statistics.shrink(inputs, count, self.pooled, n0), step.layer)
        rows = _gate_and_up(chunk)
        both = _encode(rows, gram, fmt, self.method)
        gate, up = both.values.chunk(2, dim=1)
        half = ExpertChunk(begin, gate.contiguous(), up.contiguous(), chunk.down)
        inner = self._inner_grams(half, count)
        down = _encode(chunk.down, inner, fmt, self.method)
        self._tell([(rows, gram, both), (chunk.down, inner, down)], fmt, count, n0)
        self._pass(replace(half, down=down.values) if self.settings.propagate == "quantized" else original)
        return _by_projection(both.parts, down.parts)

    @torch.no_grad()
    def keep(self, step: Experts, stacks: dict[str, Stack]) -> None:
        """Let the tokens through a chunk as the source has it."""
        self._pass(self._chunk(step.begin, stacks))

    @torch.no_grad()
    def replay(self, layer: int, unit: Unit, written: CheckpointReader) -> None:
        """Walk a layer whose shard `unit` an earlier run has written."""
        self.begin(layer, written)
        fmt = self.plan.formats.get(layer)
        for step in unit.steps:  # in the chunks of the first run: they set the order in which experts are summed
            if not isinstance(step, Experts):
                continue
            if fmt is not None and self.settings.propagate == "quantized":
                self._pass(self._written_chunk(step, fmt, written))
            else:
                self.keep(step, read_experts(self.weights.reader, self.plan.layout, layer, step.begin, step.end))
        self.end()

    @torch.no_grad()
    def end(self) -> dict[str, Any] | None:
        """Add what the experts made; returns the layer's facts, if it was quantized."""
        for stream, blocks in zip(self.streams, self.blocks, strict=False):
            add_blocks(stream, blocks)
        self.blocks = []
        return self.facts.as_plain() if self.facts.relmse else None

    # --- the steps of `encode` ----------------------------------------------------------------------------------------

    def _chunk(self, begin: int, stacks: dict[str, Stack]) -> ExpertChunk:
        """The source's weights, gate and up as they must be where the norm is folded. Raises NonFiniteError."""
        weights = {projection: self.engine.bf16(stack) for projection, stack in stacks.items()}
        for projection, weight in weights.items():
            bad = torch.nonzero(~torch.isfinite(amax(weight)))
            if len(bad):
                raise NonFiniteError(projection, int(bad[0, 0]))
        if self.norm_fold is not None:
            weights |= {p: scaled(weights[p], self.norm_fold) for p in ("gate", "up")}
        return ExpertChunk(begin, *(weights[p] for p in PROJECTIONS))

    def _pairs(self, held: bool = False) -> list[tuple[Tensor, Any]]:
        return [(block.tokens, block.dispatch) for block in self.blocks[int(held)]]

    def _input_grams(self, begin: int, end: int, *, held: bool = False) -> Tensor:
        return statistics.expert_grams(self._pairs(held), begin, end, len(self.pooled))

    def _inner_grams(self, chunk: ExpertChunk, count: list[int]) -> Tensor:
        experts, width = chunk.gate.shape[:2]
        rows_of, end = statistics.intermediate_of(chunk), chunk.begin + experts
        sums = statistics.expert_grams(self._pairs(), chunk.begin, end, width, rows_of)
        forced = statistics.forced_grams(self.sample, chunk.gate, chunk.up)
        assert self.shrinkage is not None
        return _finite(statistics.shrink(sums, count, forced, self.shrinkage * width), self.facts.layer)

    def _choose_shrinkage(self, chunk: ExpertChunk, inputs: Tensor, fmt: Format) -> float:
        """The shrinkage with the least loss on held-out tokens, over the first experts of the layer."""
        if len(self.blocks) < 2:
            return 1.0
        rows = _gate_and_up(chunk)[:SAMPLE_EXPERTS]
        begin, end = chunk.begin, chunk.begin + len(rows)
        held, count = self._input_grams(begin, end, held=True), self.facts.tokens[begin:end]
        whole = energy(rows, held)
        if not bool(whole.any()):  # no held-out token came by
            return 1.0
        quick = replace(self.method, refine=0, every=COARSE)
        measured: dict[float, float] = {}
        for factor in SHRINKAGES:
            gram = statistics.shrink(inputs[: len(rows)], count, self.pooled, factor * len(self.pooled))
            values = _encode(rows, gram, fmt, quick).values
            measured[factor] = float(loss(rows, values, held).sum() / whole.sum().clamp(min=1e-30))
            predicted = float(loss(rows, values, gram).sum() / energy(rows, gram).sum().clamp(min=1e-30))
            self.facts.held_out |= {f"predicted_{factor:g}": predicted, f"measured_{factor:g}": measured[factor]}
        return min(measured, key=lambda factor: measured[factor])

    def _refuse_starved(self, layer: int) -> None:
        limit, width, hungry = self.settings.max_starved_experts, len(self.pooled), self.facts.starved
        if limit is not None and layer in self.plan.formats and hungry > limit:
            raise QualityError(
                f"layer {layer}: {hungry} experts saw fewer than {width // 2} tokens, max_starved_experts is {limit}",
                hint="calibrate with more tokens, or raise the limit and go on with --resume",
            )

    def _fold_of(self, layer: int) -> Tensor:
        """The factors between the norm and its router and experts, chosen on a sample of the layer's experts."""
        fmt, layout = self.plan.formats[layer], self.plan.layout
        step = max(1, layout.geometry.experts // SAMPLE_EXPERTS)
        sample = range(0, layout.geometry.experts, step)
        weights = [torch.cat([self.weights.expert(layer, e, p) for p in ("gate", "up")]) for e in sample]
        grams = torch.cat([self._input_grams(e, e + 1) for e in sample])
        count = [self.facts.tokens[e] for e in sample]
        gram = _finite(statistics.shrink(grams, count, self.pooled, float(len(self.pooled))), layer)
        recipe = self.plan.recipe
        fold = best_fold(torch.stack(weights), gram, self._loss_of(fmt), n_grid=recipe.awq.n_grid, duo=recipe.awq.duo,
                         shared=True, real=recipe.real_fold)  # fmt: skip
        return settled(fold, self.weights.tensor(norm_name(layer)))

    def _written_fold(self, layer: int, written: CheckpointReader) -> Tensor:
        """The factors that an earlier run chose: source norm over written norm."""
        name = norm_name(layer)
        source = self.weights.tensor(name)
        stored = torch.from_numpy(written.read(name)).view(source.dtype).to(self.device)
        return divided_by(source, stored, real=self.plan.recipe.real_fold)

    def folded(self, name: str, block: Array) -> Array:
        """A copied tensor as it goes out: the norm of a folded layer is divided, its router multiplied."""
        if self.norm_fold is None or name not in (norm_name(self.facts.layer), router_name(self.facts.layer)):
            return block
        fold = inverse(self.norm_fold) if name == norm_name(self.facts.layer) else self.norm_fold
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[self.plan.layout.index.tensors[name].dtype]
        values = torch.from_numpy(block).view(dtype).view(-1, len(fold))
        return to_numpy(scaled(values, fold.cpu())).reshape(-1).view(np.uint8)

    def _apply_norm_fold(self, weights: LayerWeights, fold: Tensor) -> None:
        """Take the tokens through the norm and the router that are written; of powers of two, no token notices."""
        assert isinstance(weights.mlp, Router)
        self.facts.topk_changed = 0.0
        if not bool(moved(fold).any()):
            return
        self.norm_fold, self.facts.folded_channels = fold, int(moved(fold).sum())
        router = scaled(self.weights.tensor(router_name(self.facts.layer)), fold)  # rounded to what it is stored in
        written = replace(weights, post_norm=scaled(weights.post_norm, inverse(fold)),
                          mlp=replace(weights.mlp, weight=router.to(torch.float32)))  # fmt: skip
        before = [routing for stream in self.streams for routing in stream.routing]
        self.blocks = []  # the device holds the tokens once
        self.blocks = [route_again(stream, written, torch.bfloat16) for stream in self.streams]
        after = [routing for stream in self.streams for routing in stream.routing]
        self.facts.topk_changed = statistics.changed(before, after)
        self._pool()

    def _folded_down(self, chunk: ExpertChunk, fmt: Format, count: list[int]) -> ExpertChunk:
        """up and down with each intermediate channel scaled, up down and down up."""
        recipe = self.plan.recipe
        fold = best_fold(chunk.down, self._inner_grams(chunk, count), self._loss_of(fmt), n_grid=recipe.awq.n_grid,
                         duo=recipe.awq.duo, shared=False, real=recipe.real_fold)  # fmt: skip
        self.facts.folded_channels += int(moved(fold).sum())
        up, down = scaled(chunk.up, inverse(fold)[:, :, None]), scaled(chunk.down, fold[:, None, :])
        return replace(chunk, up=up, down=down)

    def _loss_of(self, fmt: Format) -> Callable[[Tensor, Tensor], Tensor]:
        plain = Method(self.method.search, signed=self.method.signed, every=COARSE)
        return lambda weight, gram: loss(weight, _encode(weight, gram, fmt, plain).values, gram)

    def _pass(self, chunk: ExpertChunk) -> None:
        for blocks in self.blocks:
            for block in blocks:
                add_experts(block.out, block.tokens, block.dispatch, chunk)

    def _tell(self, made: list[tuple[Tensor, Tensor, Encoded]], fmt: Format, count: list[int], n0: float) -> None:
        """Facts of a chunk. `made`: weights, their Gram matrices, and what became of them."""
        told = [_losses(weight, encoded.values, gram, fmt) for weight, gram, encoded in made]
        total, mine, plain = torch.stack(told).sum(0)
        total = total.clamp(min=1e-30)
        self.facts.relmse += (mine / total).tolist()
        self.facts.relmse_plain += (plain / total).tolist()
        self.facts.shrunk += statistics.shares(count, n0)
        self.facts.shrinkage = self.shrinkage or 0.0
        self.facts.damped += sum(encoded.damped for _, _, encoded in made)
        self.facts.rounded += sum(encoded.rounded for _, _, encoded in made)

    def _written_chunk(self, step: Experts, fmt: Format, written: CheckpointReader) -> ExpertChunk:
        names = (entry.name for entry in step.entries)
        geometry, container = self.plan.layout.geometry, self.plan.container
        held = read_parts(written, names, step.end - step.begin, fmt, container, geometry)
        values = [decode(stored_parts(held[p], fmt, self.device), fmt).to(torch.bfloat16) for p in PROJECTIONS]
        return ExpertChunk(step.begin, *values)


def _gate_and_up(chunk: ExpertChunk) -> Tensor:
    """One stack of rows: they share the Gram matrix, and in NVFP4 the global scale."""
    return torch.cat([chunk.gate, chunk.up], dim=1)


def _encode(weight: Tensor, gram: Tensor, fmt: Format, method: Method) -> Encoded:
    return encode_with(weight, gram, fmt, method, nvfp4_global_scale(amax(weight), method.search))


def _losses(weight: Tensor, values: Tensor, gram: Tensor, fmt: Format) -> Tensor:
    """[3, E]: the output's energy, what quantizing lost of it, what plain rounding loses. Of a matrix with thousands of
    rows one in several stands for all."""
    step = max(1, weight.shape[1] // TOLD_ROWS)
    rows, scale = weight[:, ::step].contiguous(), nvfp4_global_scale(amax(weight), "absmax")
    plain = encode_with(rows, gram, fmt, Method("absmax"), scale).values
    return torch.stack([energy(rows, gram), loss(rows, values[:, ::step], gram), loss(rows, plain, gram)])


def _finite(gram: Tensor, layer: int) -> Tensor:
    if not bool(torch.isfinite(gram).all()):
        raise CheckpointError(
            f"layer {layer}: the calibration tokens' statistics are not finite",
            hint="the hidden states overflow: is this data for this model?",
        )
    return gram


def _by_projection(both: dict[str, Tensor], down: dict[str, Tensor]) -> Parts:
    """The parts of stacked gate and up, split by rows; a global scale is shared."""
    halves: dict[str, dict[str, Tensor]] = {"gate": {}, "up": {}}
    for name, values in both.items():
        pair = (values, values) if name == "global_scale" else values.chunk(2, dim=1)
        halves["gate"][name], halves["up"][name] = pair
    return {p: {name: to_numpy(values) for name, values in parts.items()}
            for p, parts in (*halves.items(), ("down", down))}  # fmt: skip


def starved(counts: list[int], width: int) -> int:
    """Experts with fewer tokens than half the width of what they see: their own statistics mislead more than help."""
    return sum(count < width / 2 for count in counts)
