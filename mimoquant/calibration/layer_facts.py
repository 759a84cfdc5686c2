"""What a calibrated run tells of a layer: a journal line's facts, and the report's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict, cast


class LayerFisherFacts(TypedDict):
    """What the walk back says of a layer: F is the second moment of the gradient of log p at its output."""

    trace: float
    """tr(F)."""
    effective_rank: float
    """tr(F)² / tr(F²): how many directions the loss feels, of as many as the model is wide."""
    share: float
    """Of what it would cost if the experts of every layer erred by the same relative amount, 0 to 1."""


class LayerRecord(TypedDict):
    """What a calibrated run tells of a layer, in report.json and the documents. Lists have one value an expert.

    relMSE = tr(D H Dᵀ) / tr(W H Wᵀ) over all three projections: D is the change of the weights W, H their statistics.
    """

    tokens: list[int]
    """Tokens that the router sent to the expert."""
    image_tokens: NotRequired[list[int]]
    """Those of them that stand for images; absent where the data has neither images nor sounds."""
    sound_tokens: NotRequired[list[int]]
    """Those that stand for sounds; absent with the former."""
    effective: list[float]
    """The same weighed, (sum g)² / sum g² of the routing weights g."""
    shrunk: list[float]
    """Lambda, how much of the expert's statistics is its layer's: n0 / (tokens + n0), 0 to 1."""
    relmse_plain: list[float]
    """relMSE of absmax rounding."""
    relmse: list[float]
    """relMSE of what was written."""
    answer: NotRequired[list[list[float]]]
    """Squared error of the expert's output before and after the joint rounds; absent without such rounds."""
    felt_plain: NotRequired[list[float]]
    """The same as relmse_plain by what the loss feels, tr(F D H Dᵀ) / tr(F W H Wᵀ), F the metric of a projection's
    outputs; absent where codes were not chosen for the loss."""
    felt: NotRequired[list[float]]
    """The same of what was written."""
    fisher: NotRequired[LayerFisherFacts]
    """What the walk back says of the layer; absent without one."""
    topk_changed: NotRequired[float]
    """Share of tokens that a folded router sends to other experts; absent where no norm is folded."""
    input_amax: NotRequired[list[float]]
    """The largest magnitude in what the expert's gate and up see; 0 for one that saw no token. Absent where no input
    scales are calibrated."""
    down_input_amax: NotRequired[list[float]]
    """The same of what its down sees."""
    starved: int
    """Experts with fewer tokens than half the model's width."""
    shrinkage: float
    """n0 over the width."""
    held_out: dict[str, float]
    """"predicted_" or "measured_" and a shrinkage → relMSE of gate and up of a few experts on tokens that chose
    nothing else; empty where no shrinkage was chosen."""
    damped: int
    """Matrices whose statistics needed more damping than the recipe's."""
    rounded: int
    """Matrices that no damping could help, so that they were rounded plainly."""
    folded_channels: int
    """Channels that AWQ scaled by another factor than 1."""


@dataclass
class LayerFacts:
    """What is told of a layer: one value an expert in the lists. relMSE = tr(D H Dᵀ) / tr(W H Wᵀ), all projections."""

    layer: int
    tokens: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)  # of `tokens`; empty where the data has no media
    sound_tokens: list[int] = field(default_factory=list)
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
    answer: list[list[float]] = field(default_factory=list)  # [before, after] the joint rounds: see `reconstruct`
    topk_changed: float | None = None  # share of tokens a folded router sends elsewhere; None: no norm is folded
    felt_plain: list[float] = field(default_factory=list)
    felt: list[float] = field(default_factory=list)
    fisher: LayerFisherFacts | None = None
    input_amax: list[float] = field(default_factory=list)  # where input scales are calibrated
    down_input_amax: list[float] = field(default_factory=list)
    clamped: dict[str, list[int]] = field(default_factory=dict)  # see `run.clamped`; not in the record

    def as_plain(self) -> LayerRecord:
        """In the order of the journal, whose bytes must stay."""
        lists = {
            name: [_short(v) for v in getattr(self, name)]
            for name in ("tokens", "effective", "shrunk", "relmse_plain", "relmse")
        }
        routed = {} if self.topk_changed is None else {"topk_changed": _short(self.topk_changed)}
        walked = {"answer": [[_short(v) for v in pair] for pair in self.answer]} if self.answer else {}
        felt: dict[str, Any] = {}
        if self.fisher is not None:
            felt = {name: [_short(v) for v in getattr(self, name)] for name in ("felt_plain", "felt")}
            felt["fisher"] = {name: _short(cast(float, value)) for name, value in self.fisher.items()}
        counted = {
            "starved": self.starved,
            "shrinkage": self.shrinkage,
            "held_out": {name: _short(value) for name, value in self.held_out.items()},
            "damped": self.damped,
            "rounded": self.rounded,
            "folded_channels": self.folded_channels,
        }
        peaks = {name: getattr(self, name) for name in ("input_amax", "down_input_amax")} if self.input_amax else {}
        media = {n: getattr(self, n) for n in ("image_tokens", "sound_tokens")} if self.image_tokens else {}
        return cast(LayerRecord, lists | media | walked | routed | felt | peaks | counted)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def starved(counts: list[int], width: int) -> int:
    """Experts with fewer tokens than half the width of what they see: their own statistics mislead more than help."""
    return sum(count < width / 2 for count in counts)
