"""Which tokens go to which experts: pairs by expert, as groups of stacked products and as tiles of one launch.

Key idea: everything that a layer's experts need to know of the routing is sorted once and sent to the device once, so
nothing waits for the device in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP_ROWS = 2**16  # of tokens that go through a group of experts at once
_CPU_GROUP_ROWS = 2**10  # the same on a CPU: what is made of them lies in its caches, and in memory used before
_ALONE = 512  # tokens of an expert that are a product of their own on CUDA: nothing padded, no weight copied


@dataclass(frozen=True, slots=True)
class Routing:
    """Chosen experts [B*T, k] (int64, by falling score) and their weights [B*T, k]."""

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Experts with a similar number of tokens: `rows` and `gains` [m, c] are padded, with gain 0, to a common c; `used`
    [m, c] is False there. `members` [m] are the experts' numbers on the device."""

    experts: list[int]
    counts: list[int]
    members: Tensor
    rows: Tensor
    gains: Tensor
    used: Tensor

    @property
    def padded(self) -> bool:
        return min(self.counts) < self.rows.shape[1]

    def of(self, tokens: Tensor) -> Tensor:
        """Its rows [m, c, H] of tokens [n, H]."""
        if tokens.is_cuda:
            return tokens[self.rows]
        return tokens.index_select(0, self.rows.flatten()).view(*self.rows.shape, -1)  # five times as fast on a CPU

    def places(self, begin: int) -> Tensor | slice:
        """Where its experts lie among those from `begin` on; of one a slice, by which no matrix is copied."""
        if len(self.experts) == 1:
            place = self.experts[0] - begin
            return slice(place, place + 1)
        return self.members - begin


def most_bytes(groups: Sequence[Group], width: int) -> int:
    """Of the tokens of the largest group, [m, c, width] in float32."""
    return 4 * width * max((group.rows.numel() for group in groups), default=0)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The (token, expert) pairs of some `tokens` by expert: pairs begins[e] to begins[e+1] are those of expert e.

    rows [pairs] (int64, which token), gains [pairs] and `starts` (`begins` again) are on the device, `begins` is not:
    nothing waits for the device after this has been made.
    """

    rows: Tensor
    gains: Tensor
    begins: list[int]
    starts: Tensor
    tokens: int
    _kept: dict[tuple[int, int], list[Group]] = field(default_factory=dict, repr=False, compare=False)
    _pairs: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @staticmethod
    def of(routing: Routing, experts: int) -> Dispatch:
        flat = routing.experts.flatten()
        order = torch.argsort(flat, stable=True)
        starts = F.pad(torch.cumsum(torch.bincount(flat, minlength=experts), 0), (1, 0))
        rows, gains = order // routing.experts.shape[1], routing.weights.flatten()[order]
        return Dispatch(rows, gains, starts.tolist(), starts, len(routing.experts))

    @property
    def pairs(self) -> Tensor:
        """[B*T, k], which pairs a token has, rising."""
        if not self._pairs:
            self._pairs.append(torch.argsort(self.rows, stable=True).view(self.tokens, -1))
        return self._pairs[0]

    def tiles(self, begin: int, end: int, rows: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Pairs of experts begin..end in tiles of at most `rows` of one expert: int32 [tiles, 3] of (expert, counted
        from `begin`; first pair; end), on the device, and the pairs from and to of all of them, a few at a time."""
        held: list[tuple[int, int, int]] = []
        for expert in range(begin, end):
            last = self.begins[expert + 1]
            for first in range(self.begins[expert], last, rows):
                if held and first + rows - held[0][1] > _GROUP_ROWS:
                    yield self._sent(held)
                    held = []
                held.append((expert - begin, first, min(first + rows, last)))
        if held:
            yield self._sent(held)

    def _sent(self, tiles: list[tuple[int, int, int]]) -> tuple[Tensor, tuple[int, int]]:
        numbers = on_device([n for tile in tiles for n in tile], self.rows.device, torch.int32)
        return numbers.view(-1, 3), (tiles[0][1], tiles[-1][2])

    def groups(self, begin: int, end: int) -> list[Group]:
        """Experts begin..end that have tokens, as groups whose padding is at most an eighth. The last ones that were
        asked for are kept: statistics and outputs ask for the same."""
        if (begin, end) not in self._kept:
            self._kept.clear()
            self._kept[begin, end] = self._grouped(begin, end)
        return self._kept[begin, end]

    def _grouped(self, begin: int, end: int) -> list[Group]:
        alike: dict[int, list[int]] = {}
        for expert in range(begin, end):
            count = self.begins[expert + 1] - self.begins[expert]
            if count:
                alone = self.rows.is_cuda and count >= _ALONE
                alike.setdefault(count if alone else _capacity(count), []).append(expert)
        device, out = self.rows.device, []
        placed, true = on_device([e for members in alike.values() for e in members], device), _true(device)
        rows = _GROUP_ROWS if self.rows.is_cuda else _CPU_GROUP_ROWS
        for capacity, experts in alike.items():
            step = max(1, rows // capacity)
            own, placed = placed[: len(experts)], placed[len(experts) :]
            if capacity >= _ALONE and self.rows.is_cuda:
                out += [self._alone(expert, own[i : i + 1], true) for i, expert in enumerate(experts)]
                continue
            for first in range(0, len(experts), step):
                out.append(self._group(experts[first : first + step], own[first : first + step], capacity))
        return out

    def _alone(self, expert: int, member: Tensor, true: Tensor) -> Group:
        """Its pairs as they lie."""
        begin, end = self.begins[expert : expert + 2]
        own, used = slice(begin, end), true.expand(1, end - begin)
        return Group([expert], [end - begin], member, self.rows[None, own], self.gains[None, own], used)

    def _group(self, experts: list[int], members: Tensor, capacity: int) -> Group:
        starts, ends = self.starts[members][:, None], self.starts[members + 1][:, None]
        place = starts + torch.arange(capacity, device=members.device)[None, :]
        used = place < ends
        place = place.clamp(max=len(self.rows) - 1)
        counts = [self.begins[expert + 1] - self.begins[expert] for expert in experts]
        return Group(experts, counts, members, self.rows[place], self.gains[place] * used, used)


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """[n], without waiting for what the device has been given to do."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@cache
def _true(device: torch.device) -> Tensor:
    return torch.ones(1, 1, dtype=torch.bool, device=device)


def _capacity(count: int) -> int:
    """`count` rounded up to four significant bits, at least 8."""
    step = max(8, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
