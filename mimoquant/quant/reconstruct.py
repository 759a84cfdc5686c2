"""Codes and scales chosen once more for what an expert answers: gate, up and down together, on its own tokens.

Key idea: GPTQ lowers the error of each projection's output. What leaves an expert is down · (silu(gate x) ∘ (up x)), so
an error in row r of gate or up counts for a token by a, the slope of the inner activation there, and by column r of
down. Around the present codes the expert's squared error is, for one such row, a quadratic with a Gram matrix of its
own, |down_r|² Σ a² x xᵀ. So blocks of columns are walked with the refinement's loop (`columns.improve_columns`), every
row under its own matrix. Rows take turns, and after each turn the error is brought up to date, since what they do to
each other is in no matrix. Down has one Gram matrix, of the quantized inner activations, and aims at the original's
answer: it makes up for gate and up. A round is down, up, gate.

A row is moved by the few tokens that open it, so its quadratic is shrunk toward the projection's own error, as far as
its effective number of tokens, (Σ a²)² / Σ a⁴, asks for: without that the error on other tokens rises in deep layers.
A projection that did not lower an expert's error on the tokens that are walked is taken back. Whether the error falls
on others is asked of tokens that were held out: an expert for which it does not keeps the codes that it had.

With a metric F = RᵀR of the answers (`output_metric`) the error is that of R · answer, so R · down stands where down
does, and only up and gate are walked: down's codes, chosen under F already, would lose more on other tokens than they
gain (scripts/RESULTS.md). Without one all outputs count alike.

AutoRound minimises the same error by sign gradient descent on the roundings. From GPTQ's codes that raises it: each
code is the best one, all others given, and descent changes many at once (scripts/RESULTS.md).

Shapes: E experts, T tokens (the most of any of them, zeros behind the others), H hidden, I inner width; R rows and K
columns of a projection, B columns of a block, G groups. Reference: Cheng et al., SignRound, arXiv 2309.05516.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.quant.columns import improve_columns, units
from mimoquant.quant.engine_torch import pack_nibbles, unpack_nibbles
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import panel_of, spans
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.method import WALKED_COLUMNS, WALKED_FEWEST, WALKED_TOKENS, WALKED_TURNS
from mimoquant.quant.products import add_product, first_half, half_dtype, halves, part
from mimoquant.quant.refine import refine

Parts = dict[str, Tensor]
GATE, UP, DOWN = "gate", "up", "down"

_PRIOR = 4.0  # times the width: as many tokens' worth of each projection's own error, against overfitting
_DAMP = 1e-3  # of a Gram matrix's mean diagonal
_ENOUGH = 16  # held-out tokens that may judge an expert


@dataclass(frozen=True)
class Reconstructed:
    """Parts by projection, and of each expert [E] the error on held-out tokens, over its answer's energy: `before`,
    `after`. Both are zero for one that too few held-out tokens came by."""

    parts: dict[str, Parts]
    before: Tensor
    after: Tensor


def reconstruct(
    original: dict[str, Tensor],
    parts: dict[str, Parts],
    grams: dict[str, Tensor],
    fmt: Format,
    seen: Sequence[Tensor],
    held: Sequence[Tensor],
    rounds: int,
    felt_EHH: Tensor | None = None,
) -> Reconstructed:
    """Walk a chunk of experts `rounds` times.

    Args:
        original: projection → weights [E, R, K], of any float dtype. parts: projection → stored parts, as `encode_with`
            makes them. grams: projection → mean Gram matrices [E, K, K] that they were made for.
        seen, held: of each expert, the tokens [n, H] that are walked, and those that judge.
        felt_EHH: what the loss feels of each expert's answers, positive definite.
    """
    made = []
    for own in together([len(tokens) for tokens in seen], WALKED_TOKENS[seen[0].device.type]):
        weights = {name: weight[own].to(torch.float32) for name, weight in original.items()}
        prior = {name: gram[own] for name, gram in grams.items()}
        stored = {name: {part: values[own] for part, values in of.items()} for name, of in parts.items()}
        walk = _Walk(weights, stored, prior, fmt, padded(seen[own]), None if felt_EHH is None else felt_EHH[own])
        made.append(_reconstruct(walk, padded(held[own]), rounds))
    whole = {
        name: {part: torch.cat([one.parts[name][part] for one in made]) for part in of} for name, of in parts.items()
    }
    return Reconstructed(whole, torch.cat([one.before for one in made]), torch.cat([one.after for one in made]))


def together(counts: list[int], limit: int) -> list[slice]:
    """Consecutive experts whose tokens, padded, are few enough to be walked together."""
    out, begin = [], 0
    for end in range(1, len(counts) + 1):
        if end == len(counts) or max(WALKED_FEWEST, *counts[begin : end + 1]) * (end + 1 - begin) > limit:
            out.append(slice(begin, end))
            begin = end
    return out


def padded(tokens: Sequence[Tensor]) -> Tensor:
    """[E, T, H] float32, zeros behind an expert's last token: those answer zero and weigh nothing."""
    return torch.nn.utils.rnn.pad_sequence([one.to(torch.float32) for one in tokens], batch_first=True)


def _reconstruct(walk: _Walk, held: Tensor, rounds: int) -> Reconstructed:
    parts = dict(walk.parts)
    for _ in range(rounds):
        if walk.felt is None:
            walk.down()
        walk.inner(UP)
        walk.inner(GATE)
    enough = (held != 0).any(-1).sum(-1) >= _ENOUGH
    wanted = _answer(held, walk.weights)
    energy = walk.size(wanted).clamp(min=1e-30)

    def off(of: dict[str, Parts]) -> Tensor:
        answer = _answer(held, {name: _values(stored, walk.fmt) for name, stored in of.items()})
        return torch.where(enough, walk.size(answer - wanted), 0) / energy

    before, after = off(parts), off(walk.parts)
    worse = after > before
    kept = {
        name: {part: _where(worse, parts[name][part], values) for part, values in of.items()}
        for name, of in walk.parts.items()
    }
    return Reconstructed(kept, before, torch.where(worse, before, after))


def _values(parts: Parts, fmt: Format) -> Tensor:
    """[E, R, K] float32, as the codes mean them."""
    return Grid.of(parts, fmt).wide(fmt).decode(unpack_nibbles(parts["codes"]), fmt)


def _answer(tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    inner = F.silu(tokens @ weights[GATE].mT) * (tokens @ weights[UP].mT)
    return inner @ weights[DOWN].mT


def _where(these: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Of the experts `these` [E] the first, of others the second; bytes have no arithmetic, so all go by views."""
    return torch.where(these.view(-1, *[1] * (one.dim() - 1)), one.view(_bytes(one)), other.view(_bytes(one))).view(
        one.dtype
    )


def _bytes(values: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()]


class _Walk:
    """Some experts on their way: parts, and for the tokens what gate and up give and how far the answer is off.

    Tokens come last, [E, I, T] and [E, H, T], so that some rows of a projection are a block of memory. While gate or up
    is walked, `toward` [E, I, T] stands for `off`: downᵀ · off, which downᵀ · down brings up to date in less work.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        parts: dict[str, Parts],
        prior: dict[str, Tensor],
        fmt: Format,
        seen: Tensor,
        felt: Tensor | None,
    ) -> None:
        self.weights, self.prior, self.fmt, self.seen, self.felt = weights, prior, fmt, seen, felt
        self.root = None if felt is None else _root(felt)
        self.wanted = _answer(seen, weights).mT.contiguous()
        self.parts: dict[str, Parts] = {}
        self.values: Parts = {}
        self.given: Parts = {}
        self._take(parts)

    def _take(self, new: dict[str, Parts]) -> None:
        """New parts of some projections, and all that follows from them."""
        for name, parts in new.items():
            self.parts[name], self.values[name] = parts, _values(parts, self.fmt)
            if name != DOWN:
                self.given[name] = self.values[name] @ self.seen.mT
        self.off = self.wanted - self.values[DOWN] @ self._inner()
        self.loss = torch.linalg.vector_norm(self.seen_by_loss(self.off), dim=(1, 2))

    def seen_by_loss(self, answers_EHT: Tensor) -> Tensor:
        """R · answers, whose squares are what the loss feels of them."""
        return answers_EHT if self.root is None else self.root @ answers_EHT

    def size(self, answers_ETH: Tensor) -> Tensor:
        """[E], their squares as the loss feels them."""
        felt = answers_ETH if self.root is None else answers_ETH @ self.root.mT
        return felt.square().sum((1, 2))

    def _inner(self, rows: slice = slice(None)) -> Tensor:
        return F.silu(self.given[GATE][:, rows]) * self.given[UP][:, rows]

    def _keep_better(self, name: str, new: Parts) -> None:
        """Take the projection's new parts for the experts whose error they lower."""
        before, old = self.loss, self.parts[name]
        self._take({name: new})
        worse = ~(self.loss < before)
        if bool(worse.any()):
            self._take({name: {part: _where(worse, old[part], stored) for part, stored in new.items()}})

    def down(self) -> None:
        """The refinement of down_proj toward the weights that answer best from the quantized inner activations."""
        inner = self._inner()
        prior = _PRIOR * inner.shape[1] * self.prior[DOWN]
        gram = _damped(inner @ inner.mT + prior)
        pull = self.off @ inner.mT + (self.weights[DOWN] - self.values[DOWN]) @ prior
        wanted = self.values[DOWN] + torch.linalg.solve(gram, pull.mT).mT
        old = self.parts[DOWN]
        new, codes = refine(wanted, gram, old, unpack_nibbles(old["codes"]), self.fmt, 1)
        self._keep_better(DOWN, new | {"codes": pack_nibbles(codes.contiguous())})

    def inner(self, name: str) -> None:
        """Gate or up: panels of columns, blocks of a panel, and in each block the rows in turns."""
        parts, down = self.parts[name], self.seen_by_loss(self.values[DOWN])
        self.toward, self.cross = down.mT @ self.seen_by_loss(self.off), halves(down.mT @ down)
        self.answering = down
        grid, codes = Grid.of(parts, self.fmt), unpack_nibbles(parts["codes"])
        grid = Grid(grid.scale.clone(), grid.zero)
        count, width = codes.shape[1:]
        turns = [slice(*span) for span in spans(0, count, -(-count // WALKED_TURNS))]
        for panel in (slice(*span) for span in spans(0, width, panel_of(codes))):
            rest = (self.weights[name] - self.values[name]) @ self.prior[name][:, :, panel]
            for now in (
                slice(*span) for span in spans(panel.start, panel.stop, max(self.fmt.group_size, WALKED_COLUMNS))
            ):
                groups = slice(now.start // self.fmt.group_size, now.stop // self.fmt.group_size)
                here, later = (
                    slice(at.start - panel.start, at.stop - panel.start) for at in (now, slice(now.stop, panel.stop))
                )
                pairs = _pairs(self.seen[:, :, now])
                for rows in turns:
                    own = grid.part(rows, groups)
                    codes[:, rows, now], grid.scale[:, rows, groups], change = self._block(
                        name, now, rows, codes[:, rows, now], own, rest[:, rows, here], pairs
                    )
                    rest[:, rows, later] -= change @ self.prior[name][:, now, now.stop : panel.stop]
        new = parts | {"codes": pack_nibbles(codes)}
        if self.fmt.scales_move:
            new |= {"scale": grid.stored_scale(parts)}
        self._keep_better(name, new)

    def _block(
        self, name: str, now: slice, rows: slice, codes: Tensor, grid: Grid, rest: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [E, R, B] and scales [E, R, G] of some rows and columns, and how the values change [E, R, B]. Brings up
        to date what follows from them.

        Args:
            rest: [E, R, B], what the values are off times the projection's own Gram matrix. pairs: of the columns.
        """
        gate, up, tokens = self.given[GATE][:, rows], self.given[UP][:, rows], self.seen[:, :, now]
        before = self._inner(rows)
        slope = F.silu(gate) if name == UP else up * silu_slope(gate)  # of the inner activation, [E, R, T]
        pull = (self.toward[:, rows] * slope) @ tokens
        reach = self.answering[:, :, rows].square().sum(1)
        weight = slope.square_()
        doubt = weight.square().sum(-1) / weight.sum(-1).clamp(min=1e-30) * (_PRIOR * self.seen.shape[2] * reach)
        gram = _row_grams(pairs, weight) * reach[..., None, None]
        gram += doubt[..., None, None] * self.prior[name][:, None, now, now]
        pull += doubt[..., None] * rest
        new, scale = _improved(codes, grid, pull, _damped(gram), self.fmt, self.parts[name].get("global_scale"))
        values = Grid(scale, grid.zero).wide(self.fmt).decode(new, self.fmt)
        change = values - self.values[name][:, rows, now]
        self.given[name][:, rows] += change @ tokens.mT
        self.values[name][:, rows, now] = values
        add_product(self.toward, part(self.cross, slice(None), rows), halves(before - self._inner(rows)))
        return new, scale, change


def _root(felt: Tensor) -> Tensor:
    """R of positive definite matrices RᵀR, scaled to a mean diagonal of one."""
    mean = torch.diagonal(felt, dim1=-2, dim2=-1).mean(-1)[:, None, None]
    lower: Tensor = torch.linalg.cholesky(felt / mean)
    return lower.mT.contiguous()


def silu_slope(x: Tensor) -> Tensor:
    open_ = torch.sigmoid(x)
    return open_ * (1 + x * (1 - open_))


def _pairs(tokens_ETB: Tensor) -> Tensor:
    """Products of all pairs of columns, each pair once, [E, P, T]; on CUDA in bfloat16."""
    columns = tokens_ETB.mT.contiguous()
    first, second, _ = _triangle(columns.shape[1], columns.device)
    return (columns[:, first] * columns[:, second]).to(half_dtype(columns.device))


def _row_grams(pairs_EPT: Tensor, weight_ERT: Tensor) -> Tensor:
    """Σ a² x xᵀ for each row and its weights a² of tokens, [E, R, B, B], as one product. They only say how steep the
    error is, so on CUDA bfloat16 will do."""
    if pairs_EPT.is_cuda:
        sums = torch.bmm(weight_ERT.to(torch.bfloat16), pairs_EPT.mT, out_dtype=torch.float32)
    else:
        sums = weight_ERT @ pairs_EPT.mT
    width = math.isqrt(2 * pairs_EPT.shape[1])
    return sums[..., _triangle(width, pairs_EPT.device)[2]]


@cache
def _triangle(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of a triangle with its diagonal, and where in it each place [width, width] of a matrix is."""
    first, second = torch.triu_indices(width, width, device=device)
    place = torch.empty(width, width, dtype=torch.int64, device=device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=device)
    return first, second, place


def _damped(gram: Tensor) -> Tensor:
    """With a little more on the diagonals of [..., B, B], so that no column without tokens moves."""
    diagonal = torch.diagonal(gram, dim1=-2, dim2=-1)
    diagonal += _DAMP * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return gram


def _improved(
    codes_ERB: Tensor, grid: Grid, pull_ERB: Tensor, gram: Tensor, fmt: Format, divisor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes [E, R, B] and scales [E, R, G] after one walk over a block, each row under its own Gram matrix [B, B]."""
    experts, rows, width = codes_ERB.shape
    each = experts * rows  # to the loop a row is an expert with one row

    def alone(values: Tensor) -> Tensor:
        return values.reshape(each, -1, 1).clone()

    blank = torch.zeros(each, width, 1, device=codes_ERB.device)
    matrix, codes = gram.reshape(each, width, width), alone(codes_ERB)
    stack = Columns(
        blank,
        matrix,
        alone(grid.scale),
        None if grid.zero is None else alone(grid.zero),
        codes,
        first_half(blank.clone()),
        fmt,
        None if divisor is None else divisor.flatten().repeat_interleave(rows),
    )
    reach = None
    if fmt.scales_move:
        level = units(codes, fmt)
        owns = (slice(*span) for span in spans(0, width, fmt.group_size))
        reach = torch.stack([matrix[:, :, own] @ level[:, own] for own in owns], dim=1)
    improve_columns(stack, slice(0, width), alone(pull_ERB), reach)
    return codes.view(codes_ERB.shape), stack.scale.view(grid.scale.shape)
