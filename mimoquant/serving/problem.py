"""One thing that an engine would do wrong with a checkpoint, or that nobody has verified."""

from __future__ import annotations

from dataclasses import dataclass

from mimoquant.planning.documents import EngineProblem
from mimoquant.wording import ranges

WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing. `verdict`: refused (stops with an error), corrupted (loads and is wrong) or warning.

    `other_tp`: another tensor parallelism avoids it.
    """

    verdict: str
    text: str
    source: str
    hint: str | None = None
    other_tp: bool = False

    @property
    def fails(self) -> bool:
        return self.verdict != WARNING

    def as_plain(self) -> EngineProblem:
        return EngineProblem(
            verdict=self.verdict, text=self.text, source=self.source, hint=self.hint, other_tp=self.other_tp
        )


def of_layers(layers: list[int]) -> str:
    """What a sentence about them begins with: "layer 7", "47 layers (1-47)"."""
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers ({ranges(layers)})"


def and_others(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} others" if len(names) > 1 else names[0]
