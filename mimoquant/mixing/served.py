"""What is rounded of a mixture beside its weights: experts' inputs as each option's kernel does, all else alike.

Key idea: every trial is walked as it would be served, so an option that is kept in bf16 spares its activations too, and
what is measured is what `eval-kl` with the same options says of the written checkpoint. What no option changes (FP8
matrices beside the experts, the cache) costs J even of the source; that is one trial more, and no layer's share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.model.served_rounding import NONE, NOTHING, UNROUNDED, LayerRounding, Rounding, Roundings, dense_told
from mimoquant.weights.container import keeps_fp8

if TYPE_CHECKING:
    from mimoquant.mixing.mixtures import LayerOption, Mixtures
    from mimoquant.planning.plan import Plan


@dataclass(frozen=True)
class ServedOptions:
    """What was asked for. `inputs`: label of an option → what goes into such experts is rounded to. `beside`: of every
    mixture, its `experts` say nothing. `reference`: of the source that is compared with. `known`: how that is known.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    beside: Rounding = NOTHING
    reference: Rounding = NOTHING
    known: tuple[str, ...] = ()

    @property
    def anything(self) -> bool:
        return self.beside.anything or self.reference.anything or any(kind != NONE for kind in self.inputs.values())

    @property
    def told(self) -> str:
        """All of it, in words: equal words mean an equal rounding."""
        if not self.anything:
            return "nothing"
        options = ", ".join(f"{label} {kind}" for label, kind in self.inputs.items())
        beside = f"{dense_told(self.beside.dense)}; KV cache {self.beside.cache}"
        return f"inputs of {options}; {beside}; reference {self.reference.told}"

    def beside_in(self, plan: Plan) -> Rounding:
        """What is rounded beside the experts of a plan's outputs, whose container may keep nothing in FP8."""
        kept = keeps_fp8(plan.container, plan.recipe.output.dense)
        return self.beside if kept else replace(self.beside, dense=NONE)


WEIGHTS_ALONE = ServedOptions()


class MixtureRoundings:
    """The same for a source, layer by layer; scales of NVFP4 inputs that are calibrated come with the layer's codes."""

    def __init__(self, mixtures: Mixtures, reader: CheckpointReader) -> None:
        from mimoquant.weights.layer_rounding import layer_roundings  # and torch, which `plan` does without

        plan, served, self.inputs = mixtures.plan, mixtures.served, mixtures.served.inputs
        none = (UNROUNDED,) * plan.layout.geometry.layers if served.anything else ()
        self.reference: Roundings = layer_roundings(reader, plan.layout, served.reference) or none
        self._beside = layer_roundings(reader, plan.layout, served.beside_in(plan)) or none

    @property
    def apart(self) -> bool:
        """Whether the source, served with all layers kept, is anything but the reference."""
        return tuple(self.reference) != self._beside

    def of(self, options: Mapping[int, LayerOption]) -> tuple[LayerRounding, ...]:
        """Of a mixture, by layer."""
        return tuple(
            replace(beside, experts=self.inputs[options[layer].label]) if layer in options else beside
            for layer, beside in enumerate(self._beside)
        )
