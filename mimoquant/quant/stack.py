"""What goes into an engine: some experts' weights of one projection, as stored."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from mimoquant.quant.formats import Format


class Stack(NamedTuple):
    """`values`: uint8 (FP8 bits) or uint16 (bf16 bits) [E, O, I]; `scales`: float32 [E, R, C], or None for bf16.

    In MXFP4, for a cast: uint8 packed codes [E, O, I/2], uint8 biased exponents [E, O, I/32].
    """

    values: npt.NDArray[Any]
    scales: npt.NDArray[Any] | None


class Audit(NamedTuple):
    """Stored codes held against their source. `worst` is the largest distance in half grid steps (1 is the bound of
    nearest rounding; values clipped at the end of the grid do not count), `outside` how many values exceed it."""

    worst: float
    outside: int
    error2: float
    weight2: float
    scales_ok: bool = True  # finite and positive, all of them

    def merge(self, other: Audit) -> Audit:
        return Audit(
            max(self.worst, other.worst),
            self.outside + other.outside,
            self.error2 + other.error2,
            self.weight2 + other.weight2,
        )

    @property
    def relative_error(self) -> float:
        """Squared error relative to the squared weights (relMSE)."""
        return self.error2 / self.weight2 if self.weight2 else 0.0


class NonFiniteError(Exception):
    """A weight is NaN or Inf; the caller knows its name."""

    def __init__(self, projection: str, expert: int) -> None:
        super().__init__(projection, expert)
        self.projection, self.expert = projection, expert


class Engine(Protocol):
    """What `pipeline` needs of an engine; `engine_cpu.CpuEngine` and `engine_torch.TorchEngine` are the two."""

    name: str

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory that the engine likes to take weights from."""
        ...

    def encode(self, stacks: dict[str, Stack], fmt: Format, search: str) -> dict[str, dict[str, npt.NDArray[Any]]]: ...

    def dequantize(
        self, values: npt.NDArray[Any], block_scales: npt.NDArray[Any], scale_row: npt.NDArray[Any]
    ) -> npt.NDArray[Any]: ...

    def close(self) -> None: ...
