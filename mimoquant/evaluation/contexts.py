"""What a predicted token follows in its sequence: text alone, an image, a sound.

Key idea: what an image costs shows where its tokens are the context, and most right behind it; a mean over all
positions would hide both. A position belongs to the token that it predicts. Tokens that stand for media are predicted
by nobody and are not scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mimoquant.evaluation.divergence import bootstrap
from mimoquant.evaluation.documents import ContextPart, Part
from mimoquant.model.media import Picture, Placed

RIGHT_AFTER = 16  # tokens
CONTEXTS = ("text alone", "right after an image", "after an image", "right after a sound", "after a sound")
_Ints = npt.NDArray[np.int64]


def contexts_of(media: Sequence[Sequence[Placed]], tokens: int) -> _Ints:
    """[sequences, tokens - 1]: of each position's next token, its place in CONTEXTS. The last medium before it
    counts."""
    out = np.zeros((len(media), tokens), np.int64)
    for row, placed in zip(out, media, strict=True):
        for start, count, medium in placed:
            end, near = start + count, 1 if isinstance(medium, Picture) else 3
            row[end : end + RIGHT_AFTER] = near
            row[end + RIGHT_AFTER :] = near + 1
    return out[:, 1:]


def by_context(
    context: _Ints, j: npt.NDArray[np.float64], agree: npt.NDArray[np.bool_], sequence: _Ints
) -> list[ContextPart]:
    """The scored positions of each context that has any, in the order of CONTEXTS; one value a position in each."""
    insides = [(name, context == place) for place, name in enumerate(CONTEXTS)]
    return [ContextPart(context=name, **part_of(j, agree, sequence, at)) for name, at in insides if at.any()]


def part_of(
    j: npt.NDArray[np.float64], agree: npt.NDArray[np.bool_], sequence: _Ints, inside: npt.NDArray[np.bool_]
) -> Part:
    """What is told of some of the scored positions, of which there is at least one."""
    low, high = bootstrap(j[inside], sequence[inside])
    return Part(
        tokens=int(inside.sum()),
        sequences=len(np.unique(sequence[inside])),
        j=float(j[inside].mean()),
        low=low,
        high=high,
        top1=float(agree[inside].mean()),
    )
