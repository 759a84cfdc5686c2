"""What the compiled column loops offer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mimoquant.quant.formats import Format
from mimoquant.quant.products import Halves


@dataclass(frozen=True)
class Columns:
    """A stack of weights on its way to codes, all of it contiguous.

    weight: float32 [E, I, O], or on CUDA bfloat16. matrix: float32 [E, I, I], what the loop pushes errors by. scale,
    zero: float32 [E, G, O]. codes: uint8 [E, I, O]. left: weight - value, as `products.first_half` [E, I, O].
    divisor: [E], nvfp4's global scale.
    """

    weight: Tensor
    matrix: Tensor
    scale: Tensor
    zero: Tensor | None
    codes: Tensor
    left: Halves
    fmt: Format
    divisor: Tensor | None = None
