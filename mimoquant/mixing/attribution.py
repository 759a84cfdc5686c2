"""J of trials, sequence by sequence → what each layer contributes to J, and what a choice of options will cost.

Key idea: to second order in which layers are quantized, J is a sum over layers and pairs, J = sum_i a_i + sum_ij b_ij.
Quantizing layer i alone gives A_i = a_i; restoring it alone takes off G_i = a_i + sum_j b_ij. Their mean is the layer's
share: shares add up to J of all layers quantized, as neither A nor G does by itself (in practice roughly, so they are
scaled to). A format with another error counts in proportion to that error's energy, measured on the layer's output;
what is kept counts nothing. With s the part of all shares that a choice leaves, and pairs in proportion to both shares,

    J(choice) = J(all) (c s + (1 - c) s^2),    c = sum A / J(all) where pairs are all there is, or 2 - sum G / J(all);

c is the mean of both. J rises with s, so the least s is the least J, and that is a knapsack. All of it is a prediction.

Where trials are walked as they are served, the source itself may have a J, for what no option changes. That is taken
off A and J(all) first, and comes back in what is predicted.

A and G may come from different sequences, so each is taken relative to the whole J of its own ones. Intervals are of a
bootstrap over sequences: of everything at once, so a difference of two numbers has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mimoquant.mixing.documents import JEstimate
from mimoquant.wording import FEWEST_SEQUENCES

Floats = npt.NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def as_plain(self) -> JEstimate:
        return JEstimate(mean=self.mean, low=self.low, high=self.high)

    @staticmethod
    def of(values: Floats, sequences: int = FEWEST_SEQUENCES) -> Estimate:
        """`values`: from the data itself, then from each resample. From too few sequences there is no interval."""
        if sequences < FEWEST_SEQUENCES:
            return Estimate(float(values[0]), -math.inf, math.inf)
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return Estimate(float(values[0]), float(low), float(high))


@dataclass(frozen=True)
class Ablation:
    """Mean J (nats a token) of trials, one value a sequence. Layers are in the rows of arrays, L of them.

    `whole`: all layers quantized, on the first and on the second half of the sequences. `alone` [L, first]: only that
    layer quantized. `restored` [L, second]: all but that layer. `ratio` [L, options]: error of an option over that of
    option 0, which all of this is measured with. `none`: no layer quantized, by halves; None: that is 0.
    """

    whole: tuple[Floats, Floats]
    alone: Floats
    restored: Floats
    ratio: Floats
    none: tuple[Floats, Floats] | None = None

    @cached_property
    def _counts(self) -> tuple[Floats, Floats]:
        """How often each sequence is drawn, [1 + resamples, sequences] of each half: once, then as it comes."""
        rng = np.random.default_rng(0)
        first, second = (np.concatenate([np.ones((1, len(half))), drawn(rng, len(half))]) for half in self.whole)
        return first, second

    def mean(self, first: Floats, second: Floats) -> Floats:
        """[1 + resamples] means of values of all sequences, given by halves."""
        sums = self._counts[0] @ first + self._counts[1] @ second
        out: Floats = sums / (len(first) + len(second))
        return out

    @property
    def sequences(self) -> int:
        """In the smaller half, which bounds what all of this is known to."""
        return min(map(len, self.whole))

    @cached_property
    def total(self) -> Floats:
        return self.mean(*self.whole)

    @cached_property
    def floor(self) -> Floats:
        """[1 + resamples] J of no layer quantized: what no choice takes off."""
        return self.mean(*self.none) if self.none else np.zeros(1 + RESAMPLES)

    def half_means(self, half: int) -> Floats:
        """[1 + resamples] J that quantizing all layers adds, on one half."""
        out: Floats = _means(self._counts[half], self._added(self.whole[half], half)[None])[:, 0]
        return out

    @cached_property
    def alone_means(self) -> Floats:
        """[1 + resamples, L]: J that quantizing each layer alone adds."""
        return _means(self._counts[0], self._added(self.alone, 0))

    def _added(self, values: Floats, half: int) -> Floats:
        """Beyond no layer quantized, sequence by sequence."""
        out: Floats = values - self.none[half] if self.none else values
        return out

    @cached_property
    def gains(self) -> Floats:
        """[1 + resamples, L]: J that restoring each layer takes off."""
        return _means(self._counts[1], self.whole[1] - self.restored)

    @cached_property
    def contributions(self) -> Floats:
        """[1 + resamples, L], nats a token: they sum to what quantizing adds, `total` less `floor`."""
        first, second = (np.maximum(self.half_means(half), 1e-30)[:, None] for half in (0, 1))
        shares = (self.alone_means / first + self.gains / second).clip(min=0)
        out: Floats = (self.total - self.floor)[:, None] * shares / np.maximum(shares.sum(1, keepdims=True), 1e-30)
        return out

    @cached_property
    def _bend(self) -> Floats:
        """[1 + resamples], c: 1 where layers add up, more where together they do less than each alone."""
        first, second = (np.maximum(self.half_means(half), 1e-30) for half in (0, 1))
        out: Floats = (1 + (self.alone_means.sum(1) / first - self.gains.sum(1) / second) / 2).clip(0, 2)
        return out

    def costs(self) -> Floats:
        """[L, options]: the share of J that each option of each layer leaves, nats a token."""
        out: Floats = self.contributions[0][:, None] * self.ratio
        return out

    def predicted(self, choice: Sequence[int]) -> Floats:
        """[1 + resamples]: J of a choice."""
        added = self.total - self.floor
        left = self.contributions @ self.ratio[np.arange(len(self.ratio)), list(choice)] / np.maximum(added, 1e-30)
        out: Floats = self.floor + added * (self._bend * left + (1 - self._bend) * left**2)
        return out

    def cost_of(self, j: float) -> float:
        """The sum of `costs` at which a choice is predicted to have this J, at most that of all layers quantized."""
        c, total = float(self._bend[0]), float(self.total[0] - self.floor[0])
        j = max(j - float(self.floor[0]), 0.0)
        if j >= total:
            return j
        left = j / total / c if c == 1 else (-c + np.sqrt(c * c + 4 * (1 - c) * j / total)) / (2 * (1 - c))
        return float(left) * total


def drawn(rng: np.random.Generator, count: int) -> Floats:
    picks = rng.integers(0, count, (RESAMPLES, count))
    return np.stack([np.bincount(row, minlength=count) for row in picks]).astype(np.float64)


def _means(counts: Floats, values: Floats) -> Floats:
    """[1 + resamples, rows] of values [rows, sequences]."""
    out: Floats = counts @ values.T / counts.shape[1]
    return out
