"""A source's layers, whose experts come both as they are and in 4-bit formats; each byte is read once.

Key idea: a format's codes are those that `quantize` would write, chosen by the recipe's own method. Where the recipe
calibrates, the calibration tokens walk beside, through the recipe's own formats, and other formats of a layer are
chosen from the same statistics.

What is kept, as bf16 or as FP8, has the source's values, so it is one option here: None.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import RecipeError
from mimoquant.fisher.matrices import Fisher
from mimoquant.machine.team import Team
from mimoquant.model.decoder_layer import ExpertChunk, LayerWeights
from mimoquant.model.layout import PROJECTIONS
from mimoquant.planning.plan import Plan
from mimoquant.planning.units import Experts
from mimoquant.quant.clamped import clamped
from mimoquant.quant.engine_torch import TorchEngine, stored_parts
from mimoquant.quant.formats import Format
from mimoquant.quant.stack import Engine, NonFiniteError, Stack
from mimoquant.run.calibrated import Calibrator
from mimoquant.run.clamped import Counts, named
from mimoquant.weights.container import input_scale_tensor, input_scales_of
from mimoquant.weights.decoded import CheckpointWeights, decoded_chunk, is_finite
from mimoquant.weights.layer_rounding import shared_divisor
from mimoquant.weights.stored import not_finite, read_experts

Option = Format | None
Round = list[tuple[Experts, dict[str, Stack]]]  # chunks that are quantized together, with their bytes as stored


class Weights(CheckpointWeights):
    """A checkpoint whose weights beside the experts are asked for by two walks, and read once."""

    def __init__(self, reader: CheckpointReader, plan: Plan, device: torch.device) -> None:
        super().__init__(reader, plan.layout, device)
        self._kept = functools.lru_cache(maxsize=1)(super().tensor)  # the embedding

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._kept(name, dtype)


class LayerOptions:
    """The layers of a plan's source, for a recipe that needs no tokens."""

    ranks = 1  # chunks of a round

    def __init__(self, plan: Plan, reader: CheckpointReader, engine: Engine, device: str) -> None:
        self.plan, self.reader, self.engine = plan, reader, engine
        self.source = Weights(reader, plan, torch.device(device))
        self.plain = TorchEngine(device)
        self.clamped: dict[str, Counts] = {}  # format → its groups that have no scale (see `run.clamped`)

    def feed(self, first: int) -> Iterator[LayerWeights | Round]:
        """All weights from a layer on, in the order of their use: what is beside a layer's experts, then its rounds."""
        units = {unit.name: unit for unit in self.plan.units}
        for number in range(first, self.source.layers):
            yield self.source.layer(number)
            steps = [step for step in units[f"layer {number}"].steps if isinstance(step, Experts)]
            for begin in range(0, len(steps), self.ranks):
                yield [(step, self._read(step)) for step in steps[begin : begin + self.ranks]]

    def _read(self, step: Experts) -> dict[str, Stack]:
        return read_experts(self.reader, self.plan.layout, step.layer, step.begin, step.end, self.engine.empty)

    def begin(self, layer: int, weights: LayerWeights) -> None:
        """A layer is entered."""

    def chunks(self, work: Round, wanted: Sequence[Option]) -> Iterator[dict[Option, ExpertChunk]]:
        """Each chunk of a round in the options wanted. Raises CheckpointError where a weight is NaN or Inf."""
        for step, stacks in work:
            yield {option: self._chunk(step, stacks, option) for option in wanted}

    def _chunk(self, step: Experts, stacks: dict[str, Stack], option: Option) -> ExpertChunk:
        if option is None:
            plain = {p: self.plain.bf16(stacks[p]) for p in PROJECTIONS}
            for projection, values in plain.items():
                for expert, one in enumerate(values if not is_finite(values) else ()):
                    if not is_finite(one):
                        raise not_finite(self.plan.layout.expert(step.layer, step.begin + expert, projection).name)
            return ExpertChunk(step.begin, *plain.values())
        try:
            parts = self.engine.encode(stacks, option, self.plan.recipe.scale_search)
        except NonFiniteError as error:
            name = self.plan.layout.expert(step.layer, step.begin + error.expert, error.projection).name
            raise not_finite(name) from error
        found = {p: clamped(stacks[p], parts[p], option) for p in PROJECTIONS}
        self._count(option, named(self.plan.layout, step.layer, step.begin, found))
        return self._decoded(step, parts, option)

    def _count(self, fmt: Format, counts: Counts) -> None:
        if counts:
            self.clamped[fmt.label] = self.clamped.get(fmt.label, {}) | counts

    def _decoded(self, step: Experts, parts: dict[str, dict[str, Any]], fmt: Format) -> ExpertChunk:
        stored = {p: stored_parts(parts[p], fmt, self.source.device) for p in PROJECTIONS}
        return decoded_chunk(step.begin, stored, fmt)

    def input_scales(self, fmt: Option) -> tuple[float, float]:
        """NVFP4's input global scales of a layer's experts in a format: of gate and up, and of down."""
        return 1.0, 1.0

    def end(self) -> None:
        """A layer is left."""

    def state(self) -> dict[str, Tensor]:
        """What a walk that is taken up again needs, between two layers."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""


class CalibratedOptions(LayerOptions):
    """The same for a recipe that calibrates. The plan's own formats are what the calibration tokens go through."""

    def __init__(
        self,
        plan: Plan,
        reader: CheckpointReader,
        engine: Engine,
        tokens: TokenSet,
        team: Team,
        fisher: Fisher | None = None,
    ) -> None:
        super().__init__(plan, reader, engine, team.device)
        folded = next(filter(plan.recipe.folds_norm, plan.formats), None)
        if folded is not None:
            raise RecipeError(
                f"recipe {plan.recipe.name}: folds the norm of layer {folded}; sensitivity cannot tell what that layer "
                "costs alone, because its router changes too",
                hint="leave the mapping from the norm out; that from up_proj to down_proj can stay",
            )
        self.team, self.ranks = team, team.size
        self.calibrator = Calibrator(plan, reader, tokens, team.device, team, self.source, fisher)

    def begin(self, layer: int, weights: LayerWeights) -> None:
        self.calibrator.begin(layer, weights=weights)

    def chunks(self, work: Round, wanted: Sequence[Option]) -> Iterator[dict[Option, ExpertChunk]]:
        steps = [step for step, _ in work]
        mine = work[self.team.rank][1] if self.team.rank < len(work) else None
        own = self.plan.formats.get(steps[0].layer)
        coded = {}
        if own is None:
            for step, stacks in work:
                self.calibrator.keep(step, stacks)
        else:
            coded[own] = self.calibrator.encode(steps, mine)()
            self._count(own, self.calibrator.facts.clamped)
        for option in self._of_any_rank(wanted):
            if option not in coded:
                coded[option], lost = self.calibrator.encode_as(option, len(steps))
                self._count(option, lost)
        for place, (step, stacks) in enumerate(work):
            yield {
                option: self._chunk(step, stacks, None)
                if option is None
                else self._decoded(step, coded[option][place], option)
                for option in wanted
            }

    def _of_any_rank(self, wanted: Sequence[Option]) -> list[Format]:
        """What any rank wants of a round: ranks choose codes together, and only some of them have probes."""
        told = self.team.gather([astuple(option) for option in wanted if option is not None])
        return sorted({Format(*fields) for of_rank in told for fields in of_rank}, key=astuple)

    def input_scales(self, fmt: Option) -> tuple[float, float]:
        """Calibrated ones where the plan writes such. Of down the experts that have been passed say it: in a layer of
        several chunks the first ones have a scale that a later one may still raise."""
        facts = self.calibrator.facts
        if not self.plan.calibrates_inputs(facts.layer) or fmt not in (None, self.plan.formats.get(facts.layer)):
            return 1.0, 1.0
        container = self.plan.container
        name = f".{input_scale_tensor(container)[0]}"
        gate_up, down = (
            shared_divisor(torch.from_numpy(input_scales_of(container, amax)), name) if amax else 1.0
            for amax in (facts.input_amax, facts.down_input_amax)
        )
        return gate_up, down

    def end(self) -> None:
        self.calibrator.end()

    def state(self) -> dict[str, Tensor]:
        states = self.calibrator.tokens.state()
        if self.source.device.type == "cpu":
            return states
        return {name: values.clone() for name, values in states.items()}  # the next layer writes into them

    def restore(self, state: dict[str, Tensor]) -> None:
        self.calibrator.tokens.restore(state)
