"""What scales the activations of NVFP4 experts: 1, or by the largest that the calibration tokens make.

Key idea: an expert's scale is that of its own tokens; engines share the largest of a layer. What the walk saw stands in
the journal to the last bit, so `verify` makes the scales again from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.planning.units import InputScales
from mimoquant.weights.container import NVFP4_FULL, input_scales_of

Amax = tuple[list[float], list[float]]  # the largest input of each expert's gate and up, and of its down


def unit_amax(experts: int) -> Amax:
    """What makes each scale 1."""
    return [NVFP4_FULL] * experts, [NVFP4_FULL] * experts


def recorded_amax(record: Mapping[str, Any] | None, experts: int) -> Amax | None:
    """What a layer's line of the journal tells, which may be damaged: then None."""
    found: list[list[float]] = []
    for name in ("input_amax", "down_input_amax"):
        values = (record or {}).get(name)
        if not isinstance(values, list) or len(values) != experts:
            return None
        if not all(isinstance(value, float) and 0 <= value < math.inf for value in values):
            return None
        found.append(values)
    return found[0], found[1]


def scale_tensors(step: InputScales, container: str, amax: Amax) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """The tensors of a step, in its order."""
    both, down = (input_scales_of(container, of_part) for of_part in amax)
    for entry, scale in zip(step.entries, np.stack((both, both, down), axis=1).ravel(), strict=True):
        yield entry.name, scale.reshape(1)
