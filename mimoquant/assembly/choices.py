"""Options that go together, as one object: what a caller chose, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimoquant.shipped import HELD_OUT_SET, HELD_OUT_TOKENS


def _nobody(*told: object) -> None:
    """Who does not listen."""


@dataclass(frozen=True)
class Watcher:
    """Who is told of a run while it works."""

    note: Callable[[str], None] = _nobody  # a sentence that a user should know
    progress: Callable[[str, int, int], None] = _nobody  # what is done, how many are done, how many there are


@dataclass(frozen=True)
class CalibrationChoice:
    """What to calibrate on and to refine, where the recipe says otherwise; None leaves it to the recipe."""

    data: Sequence[str] | None = None
    sequences: int | None = None
    tokens: int | None = None
    refine: int | None = None
    refine_layer: Sequence[int] | None = None
    column: str | None = None
    objective: str | None = None

    def changes(self) -> dict[str, Any]:
        """For `Recipe.calibrated_on`."""
        given = {
            "data": tuple(self.data) if self.data else None,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "reconstruct": self.refine,
            "reconstruct_layers": tuple(self.refine_layer) if self.refine_layer else None,
            "column": self.column,
            "objective": self.objective,
        }
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class OutputChoice:
    """How an output is stored beside its experts' formats, where the recipe says otherwise; None leaves it to that.

    `dense`: of ModelOpt's container. `input_scales`: of NVFP4 experts. `base_model`: the source's repository on the
    Hub, for the card. `mend_json`: whether JSON files that no parser takes are written mended.
    """

    dense: str | None = None
    input_scales: str | None = None
    base_model: str | None = None
    mend_json: bool = False

    def changes(self) -> dict[str, Any]:
        """For `Recipe.stored_as`."""
        return {key: value for key, value in vars(self).items() if value}


@dataclass(frozen=True)
class PlanChoice:
    """A recipe for a source. `recipe`: a shipped name, or a file. `container`: None lets recipe and source decide."""

    recipe: str
    container: str | None = None
    allow_unknown: bool = False
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    output: OutputChoice = field(default_factory=OutputChoice)


@dataclass(frozen=True)
class MixtureChoice:
    """What each layer may become, beginning from a recipe of one format.

    `fp8`: whether a layer may stay FP8. `any_format`: whether int4 may stand beside MXFP4 and NVFP4. `objective`: what
    codes are chosen for, None leaves it to the recipe.
    """

    recipe: str
    container: str | None = None
    allow_unknown: bool = False
    fp8: bool = True
    any_format: bool = False
    objective: str | None = None


@dataclass(frozen=True)
class LimitChoice:
    """What a mixture has to keep: bytes of its shards, or J in nats per token; neither: the recipe's own bytes.

    `quick`: by costs that are predicted, which can keep no J.
    """

    budget_bytes: int | None = None
    target_kl: float | None = None
    quick: bool = False


@dataclass(frozen=True)
class RoundingChoice:
    """What is rounded beside weights: by name (None: not said), or as an engine does on a kind of GPU, "vllm:b200".

    `reference`: whether the reference is rounded too, in place of as it is.
    """

    activations: str | None = None
    dense: str | None = None
    kv: str | None = None
    as_served: str | None = None
    reference: bool = False

    def given(self) -> dict[str, object]:
        """Option → what was given."""
        return {
            "--activations": self.activations,
            "--dense-activations": self.dense,
            "--kv": self.kv,
            "--as-served": self.as_served,
            "--reference-as-served": self.reference or None,
        }


@dataclass(frozen=True)
class EvaluationChoice:
    """What is measured on, and what J is held to.

    `data`: shipped sets, files or folders. `sequences`: at most so many. `tokens`: per sequence. `max_kl`: the limit.
    """

    data: Sequence[str] = (HELD_OUT_SET,)
    sequences: int | None = None
    tokens: int = HELD_OUT_TOKENS
    noise_floor: bool = True
    max_kl: float | None = None
    column: str | None = None  # of the data's records, only that is read
    rounding: RoundingChoice = field(default_factory=RoundingChoice)


@dataclass(frozen=True)
class ServerChoice:
    """A running server. `model`: its name for it, where it serves several. `top_k`: ids that are asked for."""

    url: str
    model: str | None = None
    top_k: int | None = None
