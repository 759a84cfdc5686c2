"""What kernels round of a layer beside its weights: inputs of matrix products, keys and values.

Key idea: one plain object a layer says it all, and a forward that gets none does exactly what it did before. The
arithmetic is `quant.activations`; what a checkpoint's own scales are, `weights.layer_rounding` reads.
Left out: queries and attention's shares, which some attention kernels round as well; where nothing beside the experts
is rounded, the bf16 that engines store between operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NONE, FP8, MXFP8, MXFP4, NVFP4 = "none", "fp8", "mxfp8", "mxfp4", "nvfp4"
FP8_UE8M0 = "fp8-ue8m0"  # its scales are powers of two
_FIT_BF16 = {FP8_UE8M0, MXFP8, MXFP4}  # four digits at most, times a power of two


@dataclass(frozen=True, slots=True)
class LayerRounding:
    """`experts`: inputs of routed experts, gate and up's and down's; `qkv`, `o`, `mlp`: of a layer's other products.

    `gate_up_scale`, `down_scale`: NVFP4's input global scales, divisors. `cache`: the scales of keys and of values in
    an FP8 cache; None: it is not rounded. `in_bf16`: what each operation makes is stored in bf16, as engines do.
    """

    experts: str = NONE
    gate_up_scale: float = 1.0
    down_scale: float = 1.0
    qkv: str = NONE
    o: str = NONE
    mlp: str = NONE
    cache: tuple[float, float] | None = None
    in_bf16: bool = False

    @property
    def of_attention(self) -> tuple[object, ...]:
        """What makes two forwards differ before the experts."""
        return self.qkv, self.o, self.mlp, self.cache, self.in_bf16

    @property
    def silu_in_bf16(self) -> bool:
        """Whether an expert's SiLU, and that times up, are stored in bf16: a kernel that rounds has them in float32."""
        return self.in_bf16 and self.experts == NONE

    def stored(self, made: Tensor) -> Tensor:
        """What an operation made, as the next one finds it; the very same tensor where that is not rounded."""
        return made.bfloat16().to(made.dtype) if self.in_bf16 else made

    def parts(self, kind: str, usual: int = 3) -> int:
        """As how many bfloat16 numbers inputs that were rounded to `kind` are taken: one holds some exactly, of float32
        those are the `usual` ones."""
        return 1 if kind in _FIT_BF16 or (kind == NONE and self.in_bf16) else usual

    def expert_inputs(self, rows: Tensor) -> Tensor:
        """What gate and up of routed experts see; with "none" the very same tensor."""
        return rounded(rows, self.experts, self.gate_up_scale)

    def cached(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, as the cache gives them back."""
        if self.cache is None:
            return key, value
        from mimoquant.quant.activations import round_kv_fp8  # torch: `launch` knows kinds only

        return round_kv_fp8(key, self.cache[0]), round_kv_fp8(value, self.cache[1])


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is to be rounded of a model, before its files are looked at.

    `experts`: a kind for the inputs of routed experts, `by_layer` another one for some layers. `dense`: "fp8" (or
    "fp8-ue8m0") rounds what goes into matrices that are stored in FP8, to MXFP8 where those are; "none" nothing.
    `cache`: "fp8" or "none". With `dense`, a model that has such matrices is stored in bf16 between operations.
    """

    experts: str = NONE
    dense: str = NONE
    cache: str = NONE
    by_layer: tuple[tuple[int, str], ...] = ()

    @property
    def anything(self) -> bool:
        return self != NOTHING

    def of_experts(self, layer: int) -> str:
        return dict(self.by_layer).get(layer, self.experts)

    @property
    def kinds(self) -> str:
        """What experts' inputs are rounded to, in words."""
        return " and ".join(dict.fromkeys((self.experts, *(kind for _, kind in self.by_layer))))

    @property
    def told(self) -> str:
        """All of it, in words: equal words mean an equal rounding."""
        layers = "".join(f", layer {layer} {kind}" for layer, kind in self.by_layer)
        return f"experts {self.experts}{layers}; {dense_told(self.dense)}; KV cache {self.cache}"


def dense_told(kind: str) -> str:
    """A rounding of dense inputs, with what comes with it: an FP8 kernel is given what was stored in bf16."""
    return f"dense {kind}" if kind == NONE else f"dense {kind}, stored in bf16"


NOTHING, UNROUNDED = Rounding(), LayerRounding()
Roundings = Sequence[LayerRounding]  # of a model, by layer; empty: nothing is rounded


def rounded(rows: Tensor, kind: str, scale: float = 1.0) -> Tensor:
    """Inputs [..., I] as a kernel rounds them, float32; with "none" the very same tensor."""
    if kind == NONE:
        return rows
    from mimoquant.quant import activations

    if kind == NVFP4:
        return activations.quantize_nvfp4(rows, scale).values
    if kind in (FP8, FP8_UE8M0):
        return activations.quantize_fp8(rows, power_of_two=kind == FP8_UE8M0).values
    return {MXFP8: activations.quantize_mxfp8, MXFP4: activations.quantize_mxfp4}[kind](rows).values
