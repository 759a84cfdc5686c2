"""The calibrated run, layer by layer: tokens → statistics → codes, and the tokens go on through what was written.

Key idea: one stream of hidden states walks through the model while it is quantized. A layer's attention routes the
tokens; its experts come in the same chunks in which they are written, and of each chunk the statistics are taken, the
codes chosen and the output computed before the next one is touched: never all Gram matrices at once, no weight read
twice. Hidden states rest on the host; one layer's tokens are on the device.

A sixteenth of the sequences is held out. They choose how far thin statistics are shrunk, and tell whether the loss that
was minimised predicts the loss on tokens that nobody minimised.

Several ranks walk together, layer by layer, each with its portions of the tokens (`portions`). Chunks come in rounds of
as many as there are ranks: each rank chooses the codes of its own, then all have all codes, and pass their tokens on
through the round's chunks in order. So sums are those of one process.

Left out: the layers' order is the model's; no second pass. Shapes: E experts of a chunk, H hidden, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mimoquant.calibration import statistics
from mimoquant.calibration.layer_facts import LayerFacts, LayerRecord, starved
from mimoquant.calibration.tokens import TokenSet, check_media
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.remote import remote_of
from mimoquant.errors import QualityError
from mimoquant.fisher.matrices import Fisher
from mimoquant.machine.team import Team
from mimoquant.model.decoder_layer import DenseWeights, ExpertChunk, LayerWeights, Router
from mimoquant.model.layer_stream import LayersAhead
from mimoquant.model.layout import PROJECTIONS, norm_name, router_name
from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts, Unit
from mimoquant.quant.awq import best_fold, divided_by, inverse, moved, scaled, settled
from mimoquant.quant.engine_torch import Sent, TorchEngine, amax, stored_parts, to_numpy
from mimoquant.quant.expert_methods import loss
from mimoquant.quant.formats import Format
from mimoquant.quant.method import WALKED_MOST, Method
from mimoquant.quant.reconstruct import reconstruct
from mimoquant.quant.stack import Stack
from mimoquant.run.chunk_facts import Rounded, chunk_losses, clamped_facts, fallbacks, relative_losses
from mimoquant.run.clamped import Counts
from mimoquant.run.codes import COARSE, best_shrinkage, encode
from mimoquant.run.crossing import Chosen, Parts, after_all, by_projection, leaving, named
from mimoquant.run.objective import OutputMetrics, before_answers, felt_of_gate_up, for_answers, gate_and_up
from mimoquant.run.portions import Portions, Seen, walked
from mimoquant.weights.decoded import TORCH_DTYPES, CheckpointWeights, decoded_chunk
from mimoquant.weights.stored import not_finite, read_experts, read_parts

Array = npt.NDArray[Any]
Stacks = Mapping[str, Stack | Sent]

HELD_OUT = 16  # one sequence in so many
SAMPLE_EXPERTS = 16  # at most, of a layer's first chunk, that choose the shrinkage
SAMPLE_TOKENS = 4096  # at most, that are forced through each expert: what down_proj's statistics are shrunk toward
SAMPLE_PER_COLUMN = 8  # of them, for each column of down_proj


class Calibrator:
    """Walks the calibration tokens through a plan's layers. Layers go in order, all of them: `begin`, then `encode`
    for every round of chunks or `keep` for every chunk, then `end`; or `replay`, for a layer that is written already.
    Ranks of a team call the same, in the same order."""

    def __init__(
        self,
        plan: Plan,
        reader: CheckpointReader,
        tokens: TokenSet,
        device: str,
        team: Team | None = None,
        weights: CheckpointWeights | None = None,
        fisher: Fisher | None = None,
        *,
        near: bool = False,
    ) -> None:
        assert plan.recipe.calibration is not None
        self.plan, self.settings, self.device = plan, plan.recipe.calibration, torch.device(device)
        self.weights, self.engine = weights or walked(reader, plan.layout, self.device), TorchEngine(device)
        near_source = remote_of(plan.layout.index.folder) is None
        self.layers, self.method = LayersAhead(self.weights, near=near_source), plan.recipe.expert_method()
        self.trains = torch.arange(len(tokens.ids)) % HELD_OUT != HELD_OUT - 1
        ids, sets = torch.from_numpy(tokens.walked), (self.trains, ~self.trains)
        self.team = team or Team(device)
        check_media(tokens, plan.layout)
        some = [ids[part] for part in sets if bool(part.any())]
        self.tokens = Portions(self.weights, some, self.team, tokens.media, near=near)
        kinds = tokens.kinds
        self.kinds = None if kinds is None else torch.from_numpy(kinds)[self.trains].flatten().to(self.device)
        self.facts, self.fisher = LayerFacts(-1), fisher
        self.metrics: OutputMetrics | None = None  # of the layer, where its codes are chosen for the loss
        self.norm_fold: Tensor | None = None
        self._round: tuple[ExpertChunk | None, Tensor | None] | None = None  # what `encode` chose from

    @torch.no_grad()
    def begin(self, layer: int, written: CheckpointReader | None = None, weights: LayerWeights | None = None) -> None:
        """Attention and routing of a layer; a dense layer is passed whole. `written`: its shard, if it exists.
        `weights`: of the layer, where they are read already."""
        weights = weights or self.layers.take(layer)
        self.facts, self.norm_fold, self.metrics = LayerFacts(layer), None, None
        if isinstance(weights.mlp, DenseWeights):
            self.tokens.dense(weights)
            return
        self.tokens.attend(weights)
        self._pool()
        if self.fisher and written is None and layer in self.plan.formats:
            self.metrics = OutputMetrics(self.fisher, layer, self.device, self.trains)
            self.facts.fisher = self.metrics.told
        if layer in self.plan.formats and self.plan.recipe.folds_norm(layer):
            self._apply_norm_fold(weights, self._agreed_fold(layer, written))
        if self.plan.calibrates_inputs(layer):
            self.facts.input_amax = statistics.finite(statistics.input_peaks(self._all_seen()), layer).tolist()
        self._refuse_starved(layer)

    def _all_seen(self) -> Seen:
        """Of the tokens that are held out, too: nothing is fitted here."""
        return [block for seen in self.tokens.seen for block in seen]

    def _pool(self) -> None:
        """What the whole layer's tokens say: the Gram matrix experts are shrunk toward, and a sample of the tokens."""
        train = self.tokens.seen[0]
        count = sum(len(tokens) for tokens, _ in train)
        self.pooled = torch.stack([statistics.gram(tokens) for tokens, _ in train]).sum(0) / count
        wanted = min(SAMPLE_TOKENS, SAMPLE_PER_COLUMN * self.plan.layout.geometry.expert_intermediate)
        step = -(-count // wanted)
        self.sample = torch.cat([tokens[::step] for tokens, _ in train])
        self.shrinkage = self.settings.shrinkage
        experts, dispatches = self.plan.layout.geometry.experts, [dispatch for _, dispatch in train]
        self.facts.tokens = statistics.counts(dispatches, 0, experts)
        self.facts.starved = starved(self.facts.tokens, len(self.pooled))
        self.facts.effective = statistics.effective_counts(dispatches, 0, experts)
        if self.kinds is not None:
            _, self.facts.image_tokens, self.facts.sound_tokens = statistics.counts_of_kinds(train, self.kinds, 3)

    @torch.no_grad()
    def encode(
        self, steps: Sequence[Experts], stacks: Stacks | None, *, wanted: bool = True
    ) -> Callable[[], list[Parts]]:
        """Choose the codes of a round of chunks, each rank those of one, and let the tokens through all of them: as far
        as nobody waits for the device. The call that comes back waits, tells the layer's facts and gives the parts;
        where the next round is begun before, a GPU always has work.

        Args:
            stacks: of the chunk that has this rank's place in the round; None where it has none.
            wanted: whether this rank writes the layer; the list is empty otherwise.
        Raises CheckpointError for weights or statistics that are NaN or Inf.
        """
        fmt, out = steps[0].fmt, []
        assert fmt is not None
        self._round = None  # the one before goes first
        original, inputs = self._round = self._own_chunk(steps, stacks)
        if self.shrinkage is None:
            self._agree_on_shrinkage(original, inputs, fmt)
        own = None if original is None or inputs is None else self._choose(original, inputs, fmt)
        for place, step in enumerate(steps):
            mine = own if place == self.team.rank else None
            parts = self.team.share(mine.parts if mine else None, place, str(self.device))
            arrived = leaving(parts) if wanted else None
            if self.settings.propagate == "quantized":
                self.tokens.through(mine.chunk if mine else decoded_chunk(step.begin, by_projection(parts), fmt))
            else:
                self.tokens.through(original if mine and original else self._source_chunk(step))
            if arrived:
                out.append(arrived)
        beside = after_all(self.device)

        def finished() -> list[Parts]:
            with beside():
                mine = own and own.told()
            for facts in self.team.gather(mine)[: len(steps)]:
                self._tell(facts)
            return [parts() for parts in out]

        return finished

    @torch.no_grad()
    def encode_as(self, fmt: Format, chunks: int) -> tuple[list[Parts], Counts]:
        """Codes of the chunks that `encode` has just passed, in another format, by the same statistics and shrinkage;
        and their groups that have no scale in it."""
        assert self._round is not None
        original, inputs = self._round
        own = None if original is None or inputs is None else self._choose(original, inputs, fmt)
        lost: Counts = {}
        for counted in self.team.gather(own and own.told()["clamped"]):
            lost |= counted or {}
        parts = own.parts if own else None
        return [
            leaving(self.team.share(parts if place == self.team.rank else None, place, str(self.device)))()
            for place in range(chunks)
        ], lost

    def _own_chunk(self, steps: Sequence[Experts], stacks: Stacks | None) -> tuple[ExpertChunk | None, Tensor | None]:
        """This rank's chunk of a round as the source has it, and the Gram sums of what its experts see."""
        if stacks is None:
            return None, None
        step = steps[self.team.rank]
        return self.chunk(step, stacks), self._input_grams(step.begin, step.end)

    def _choose(self, original: ExpertChunk, inputs: Tensor, fmt: Format) -> Chosen:
        """Codes of one chunk. `inputs`: Gram sums of what its experts see."""
        begin, end = original.begin, original.begin + len(original.gate)
        assert self.shrinkage is not None
        n0, count = self.shrinkage * len(self.pooled), self.facts.tokens[begin:end]
        chunk, folded = self._folded_down(original, fmt, count) if self.plan.recipe.folds_down else (original, 0)
        gram = statistics.finite_grams(statistics.shrink(inputs, count, self.pooled, n0), self.facts.layer)
        felt = self.metrics.experts(chunk, self._seen()) if self.metrics else None
        rows, metric = gate_and_up(chunk), self._felt_of_gate_and_up(felt, chunk, count)
        both = encode(rows, gram, fmt, before_answers(self.method) if felt is not None else self.method, metric)
        if felt is not None and metric is not None and self.method.refine:
            both = for_answers(both, chunk, (gram, metric, felt), fmt, self._seen())
        gate, up = both.values.chunk(2, dim=1)
        half = ExpertChunk(begin, gate.contiguous(), up.contiguous(), chunk.down)
        inner = self._inner_grams(half, count)
        down = encode(chunk.down, inner, fmt, self.method, felt)
        chosen = Chosen(named(both.parts, down.parts), replace(half, down=down.values), dict)
        if self.settings.reconstructs(self.facts.layer):
            chosen = self._reconstructed(chunk, chosen, {"gate": gram, "up": gram, "down": inner}, fmt, felt)
            both, down = replace(both, values=gate_and_up(chosen.chunk)), replace(down, values=chosen.chunk.down)
        made = [Rounded(rows, gram, metric, both), Rounded(chunk.down, inner, felt, down)]
        losses, fell_back = chunk_losses(made, fmt), fallbacks(made)
        peaks = self._inner_peaks(chosen.chunk)

        def told() -> dict[str, Any]:
            facts = (
                relative_losses(losses)
                | fell_back
                | {"shrunk": statistics.shares(count, n0), "folded_channels": folded}
            )
            if peaks is not None:
                facts["down_input_amax"] = statistics.finite(peaks, self.facts.layer).tolist()
            own = by_projection(chosen.parts)
            facts["clamped"] = clamped_facts(chunk, own, fmt, self.plan.layout, self.facts.layer)
            return chosen.told() | facts

        return replace(chosen, told=told)

    def _inner_peaks(self, chunk: ExpertChunk) -> Tensor | None:
        return (
            statistics.inner_peaks(self._all_seen(), chunk) if self.plan.calibrates_inputs(self.facts.layer) else None
        )

    def _reconstructed(
        self, chunk: ExpertChunk, chosen: Chosen, grams: dict[str, Tensor], fmt: Format, felt: Tensor | None
    ) -> Chosen:
        """The chunk's codes chosen once more, for what its experts answer."""
        begin, end = chunk.begin, chunk.begin + len(chunk.gate)
        weights = {projection: getattr(chunk, projection) for projection in PROJECTIONS}
        seen, *judges = (statistics.tokens_of(of_set, begin, end, WALKED_MOST) for of_set in self.tokens.seen)
        held = judges[0] if judges else [own[:0] for own in seen]
        made = reconstruct(
            weights, by_projection(chosen.parts), grams, fmt, seen, held, self.settings.reconstruct, felt
        )
        parts = {f"{name} {part}": values for name, of in made.parts.items() for part, values in of.items()}
        answer = torch.stack((made.before, made.after), dim=1)
        return Chosen(parts, decoded_chunk(begin, made.parts, fmt), lambda: {"answer": answer.tolist()})

    @torch.no_grad()
    def keep(self, step: Experts, stacks: Stacks) -> None:
        """Let the tokens through a chunk as the source has it."""
        self.tokens.through(self.chunk(step, stacks))

    @torch.no_grad()
    def replay(self, layer: int, unit: Unit, written: CheckpointReader) -> None:
        """Walk a layer whose shard `unit` an earlier run has written."""
        self.begin(layer, written)
        fmt = self.plan.formats.get(layer)
        for step in unit.steps:  # in the chunks of the first run: they set the order in which experts are summed
            if not isinstance(step, Experts):
                continue
            if fmt is not None and self.settings.propagate == "quantized":
                self.tokens.through(self._written_chunk(step, fmt, written))
            else:
                self.tokens.through(self._source_chunk(step))
        self.end()

    @torch.no_grad()
    def end(self) -> LayerRecord | None:
        """Add what the experts made; returns the layer's facts, if it was quantized."""
        self.tokens.add()
        self._round = None
        return self.facts.as_plain() if self.facts.relmse else None

    # --- the steps of `encode` ----------------------------------------------------------------------------------------

    def chunk(self, step: Experts, stacks: Stacks) -> ExpertChunk:
        """The source's weights, gate and up as they must be where the norm is folded. Raises CheckpointError."""
        weights = {projection: self.engine.bf16(stack) for projection, stack in stacks.items()}
        bad = torch.nonzero(~torch.isfinite(torch.stack([amax(weight) for weight in weights.values()])))
        if len(bad):
            which, expert = bad[0].tolist()
            raise not_finite(self.plan.layout.expert(step.layer, step.begin + expert, list(weights)[which]).name)
        if self.norm_fold is not None:
            weights |= {p: scaled(weights[p], self.norm_fold) for p in ("gate", "up")}
        return ExpertChunk(step.begin, *(weights[p] for p in PROJECTIONS))

    def _source_chunk(self, step: Experts) -> ExpertChunk:
        return self.chunk(step, read_experts(self.weights.reader, self.plan.layout, step.layer, step.begin, step.end))

    def _seen(self, held: bool = False) -> Seen:
        return self.tokens.seen[int(held)]

    def _input_grams(self, begin: int, end: int, *, held: bool = False) -> Tensor:
        return statistics.expert_grams(self._seen(held), begin, end, len(self.pooled))

    def _inner_grams(self, chunk: ExpertChunk, count: list[int]) -> Tensor:
        experts, width = chunk.gate.shape[:2]
        rows_of, end = statistics.intermediate_of(chunk), chunk.begin + experts
        sums = statistics.expert_grams(self._seen(), chunk.begin, end, width, rows_of)
        forced = statistics.forced_grams(self.sample, chunk.gate, chunk.up)
        assert self.shrinkage is not None
        return statistics.finite_grams(statistics.shrink(sums, count, forced, self.shrinkage * width), self.facts.layer)

    def _felt_of_gate_and_up(self, felt: Tensor | None, chunk: ExpertChunk, count: list[int]) -> Tensor | None:
        if felt is None:
            assert self.plan.recipe.objective == "output"
            return None
        assert self.shrinkage is not None
        n0 = self.shrinkage * chunk.gate.shape[1]
        return statistics.finite_grams(
            felt_of_gate_up(felt, chunk, self._seen(), count, self.sample, n0), self.facts.layer
        )

    def _agree_on_shrinkage(self, chunk: ExpertChunk | None, inputs: Tensor | None, fmt: Format) -> None:
        """The rank that has the layer's first chunk chooses for all."""
        first = self.team.rank == 0 and chunk is not None and inputs is not None
        chosen = self._choose_shrinkage(chunk, inputs, fmt) if first and chunk and inputs is not None else None
        self.shrinkage, self.facts.held_out = self.team.gather((chosen, self.facts.held_out))[0]

    def _choose_shrinkage(self, chunk: ExpertChunk, inputs: Tensor, fmt: Format) -> float:
        """The shrinkage with the least loss on held-out tokens, over the first experts of the layer."""
        if len(self.tokens.seen) < 2:
            return 1.0
        rows = gate_and_up(chunk)[:SAMPLE_EXPERTS]
        begin, end = chunk.begin, chunk.begin + len(rows)
        held, count = self._input_grams(begin, end, held=True), self.facts.tokens[begin:end]
        chosen, told = best_shrinkage(rows, inputs[: len(rows)], held, count, self.pooled, fmt, self.method)
        self.facts.held_out |= told
        return chosen

    def _refuse_starved(self, layer: int) -> None:
        limit, width, hungry = self.settings.max_starved_experts, len(self.pooled), self.facts.starved
        if limit is not None and layer in self.plan.formats and hungry > limit:
            raise QualityError(
                f"layer {layer}: {hungry} experts saw fewer than {width // 2} tokens, max_starved_experts is {limit}",
                hint="calibrate with more tokens, or raise the limit and go on with --resume",
            )

    def _agreed_fold(self, layer: int, written: CheckpointReader | None) -> Tensor:
        fold = None
        if self.team.leads:  # for all
            fold = {"fold": self._fold_of(layer) if written is None else self._written_fold(layer, written)}
        return self.team.share(fold, 0, str(self.device))["fold"]

    def _fold_of(self, layer: int) -> Tensor:
        """The factors between the norm and its router and experts, chosen on a sample of the layer's experts."""
        fmt, layout = self.plan.formats[layer], self.plan.layout
        step = max(1, layout.geometry.experts // SAMPLE_EXPERTS)
        sample = range(0, layout.geometry.experts, step)
        weights = [torch.cat([self.weights.expert(layer, e, p) for p in ("gate", "up")]) for e in sample]
        grams = torch.cat([self._input_grams(e, e + 1) for e in sample])
        count = [self.facts.tokens[e] for e in sample]
        gram = statistics.finite_grams(statistics.shrink(grams, count, self.pooled, float(len(self.pooled))), layer)
        recipe = self.plan.recipe
        fold = best_fold(
            torch.stack(weights),
            gram,
            self._loss_of(fmt),
            n_grid=recipe.awq.n_grid,
            duo=recipe.awq.duo,
            shared=True,
            real=recipe.real_fold,
        )
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
        dtype = TORCH_DTYPES[self.plan.layout.index.tensors[name].dtype]
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
        written = replace(
            weights,
            post_norm=scaled(weights.post_norm, inverse(fold)),
            mlp=replace(weights.mlp, weight=router.to(torch.float32)),
        )
        before = self.tokens.routing
        self.tokens.route_again(written)
        self.facts.topk_changed = statistics.changed(before, self.tokens.routing)
        self._pool()

    def _folded_down(self, chunk: ExpertChunk, fmt: Format, count: list[int]) -> tuple[ExpertChunk, int]:
        """up and down with each intermediate channel scaled, up down and down up; and how many are."""
        recipe = self.plan.recipe
        fold = best_fold(
            chunk.down,
            self._inner_grams(chunk, count),
            self._loss_of(fmt),
            n_grid=recipe.awq.n_grid,
            duo=recipe.awq.duo,
            shared=False,
            real=recipe.real_fold,
        )
        up, down = scaled(chunk.up, inverse(fold)[:, :, None]), scaled(chunk.down, fold[:, None, :])
        return replace(chunk, up=up, down=down), int(moved(fold).sum())

    def _loss_of(self, fmt: Format) -> Callable[[Tensor, Tensor], Tensor]:
        plain = Method(self.method.search, signed=self.method.signed, every=COARSE)
        return lambda weight, gram: loss(weight, encode(weight, gram, fmt, plain).values, gram)

    def _tell(self, facts: dict[str, Any]) -> None:
        """Add what a rank says of its chunk to the layer's facts: lists grow, numbers add up."""
        self.facts.clamped |= facts.pop("clamped")
        for name, value in facts.items():
            setattr(self.facts, name, getattr(self.facts, name) + value)
        self.facts.shrinkage = self.shrinkage or 0.0

    def _written_chunk(self, step: Experts, fmt: Format, written: CheckpointReader) -> ExpertChunk:
        names = (entry.name for entry in step.entries)
        geometry, container = self.plan.layout.geometry, self.plan.container
        held = read_parts(written, names, step.end - step.begin, fmt, container, geometry)
        return decoded_chunk(step.begin, {p: stored_parts(held[p], fmt, self.device) for p in PROJECTIONS}, fmt)
