"""What a calibrated run tells of a layer: a journal line's facts, and the report's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
    answer: list[list[float]] = field(default_factory=list)  # [before, after] the joint rounds: see `reconstruct`
    topk_changed: float | None = None  # share of tokens a folded router sends elsewhere; None: no norm is folded

    def as_plain(self) -> dict[str, Any]:
        lists = {
            name: [_short(v) for v in getattr(self, name)]
            for name in ("tokens", "effective", "shrunk", "relmse_plain", "relmse")
        }
        routed = {} if self.topk_changed is None else {"topk_changed": _short(self.topk_changed)}
        walked = {"answer": [[_short(v) for v in pair] for pair in self.answer]} if self.answer else {}
        return (
            lists
            | walked
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


def starved(counts: list[int], width: int) -> int:
    """Experts with fewer tokens than half the width of what they see: their own statistics mislead more than help."""
    return sum(count < width / 2 for count in counts)
