"""GPTQ on scales that are already chosen, for many experts at once.

Key idea: the Gram matrix H of the inputs says what an error costs, tr(D H Dᵀ). Columns are rounded one after the other,
those with the largest H_jj first, and each error is pushed onto the columns that are still to come. Scales are static:
they belong to the column's place in the file, so the order needs no index in the file. All experts of a stack walk
through the columns together.

With the columns in reverse order, H = L Lᵀ gives the loss as a sum of squares, one a column, and the square of column i
is least where its weight is moved by the sum of L_ji / L_ii times what was left of the columns j before it (Babai's
nearest plane). The choices are those of GPTQ's inverse factor, at the price of one Cholesky factor and nothing else.

Left out: dynamic groups (the scale search goes first), activations. Shapes: E experts, O rows, I columns, G groups.
References: Frantar et al., GPTQ, arXiv 2210.17323; Chen et al., arXiv 2507.18553 (that both are the same); facts of
dampening .05: llm-compressor issue 2922.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mimoquant.quant.columns import round_columns
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.kernels.columns import Columns
from mimoquant.quant.order import falling, inverse, laid, reordered
from mimoquant.quant.products import (
    Halves,
    add_product,
    exact_parts,
    exact_product,
    first_half,
    half_dtype,
    part,
    take_product,
    transposed,
)
from mimoquant.quant.streams import side_stream

BLOCK = 128  # columns that are rounded before what is left of them is pushed onto the rest of their panel
_PANEL, _CUDA_PANEL = 512, 256  # columns that are pushed onto by all before them in one product
_MORE_DAMP = (10.0, 100.0)  # times the dampening, for a matrix that has no Cholesky factor
_FACTOR_PANEL = 512  # columns of a Cholesky factor that are made at once, on CUDA
_LEAST_DAMP = 0.01  # what those multiply, if less was asked for
Factor = tuple[Tensor, list[int], list[int]]  # see `push_factor`


@dataclass(frozen=True)
class GptqResult:
    """Codes [E, O, I] uint8; how many experts needed more dampening, and how many were rounded plainly instead.

    `troubled`, bool [E], says which ones those are: nothing should trust their Gram matrix. `left`: weight - value, as
    `products.first_half` [E, I, O], where the method has it.
    """

    codes: Tensor
    damped: int
    rounded: int
    troubled: Tensor
    left: Halves | None = None


def push_factor(gram_EII: Tensor, order: Tensor, damp: float) -> Factor:
    """How far what is left of column i moves column j > i: strictly upper triangular, [E, I, I].

    Args:
        order: [E, I] in which rows and columns of the Gram matrices are rounded; so does the factor have them.
        damp: of the mean diagonal, added to the diagonal.

    Also returns which experts needed more dampening, and which are rounded plainly because none helped: there the
    factor is zero. To know that is the one time that the host waits for a GPU.
    """
    return begun_factor(gram_EII, order, damp)()


def begun_factor(gram_EII: Tensor, order: Tensor, damp: float) -> Callable[[], Factor]:
    """`push_factor`, begun: what comes back waits for it. On CUDA a stream of its own makes it beside what comes until
    then, and goes first: a factor is many small steps, each of which leaves most of a GPU idle."""
    ordered, device = laid(gram_EII, order, order), gram_EII.device
    mean = torch.diagonal(ordered, dim1=-2, dim2=-1).mean(-1)
    side = side_stream(device, "factors", -1)
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # does nothing for None
        step = (damp * mean).clamp(min=torch.finfo(torch.float32).tiny)
        factor, sound = _factored(ordered, step)
    if side is not None:
        for held in (ordered, mean):  # should nobody wait for it
            held.record_stream(side)
    once = [factor]  # and no longer than whoever waits wants it
    del ordered, factor

    def finished() -> Factor:
        with torch.cuda.stream(side):
            found = _with_more_damp(once[0], ~sound, gram_EII, order, (damp, mean))
        if side is not None:
            torch.cuda.current_stream(device).wait_stream(side)
        return once.pop(), *found

    return finished


def _with_more_damp(
    factor: Tensor, unsound: Tensor, gram_EII: Tensor, order: Tensor, damp: tuple[float, Tensor]
) -> tuple[list[int], list[int]]:
    """Make the factor of unsound experts anew: see `push_factor`. `damp`: and the mean diagonal [E]."""
    damped: list[int] = []
    rounded: list[int] = []
    for expert in torch.nonzero(unsound).flatten().tolist():
        own = slice(expert, expert + 1)
        for more in _MORE_DAMP:
            one = laid(gram_EII[own], order[own], order[own])
            again, sound = _factored(one, more * max(damp[0], _LEAST_DAMP) * damp[1][own])
            if bool(sound):
                factor[own] = again
                damped.append(expert)
                break
        else:
            factor[own] = 0.0
            rounded.append(expert)
    return damped, rounded


def _factored(ordered: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The push factor [E, I, I] with `step` [E] on the diagonal, and bool [E], whether there is one; overwrites."""
    torch.diagonal(ordered, dim1=-2, dim2=-1).add_(step[:, None])
    if ordered.is_cuda:
        return ordered, _by_panels(ordered)
    lower, info = torch.linalg.cholesky_ex(ordered.flip(-2, -1))
    lower /= torch.diagonal(lower, dim1=-2, dim2=-1)[:, None, :].clone()
    return lower.flip(-2, -1).triu_(1), (info == 0) & _finite(lower)


def _by_panels(gram: Tensor) -> Tensor:
    """`_factored` in place, panel by panel from the last, since the library's batched one leaves most of a GPU idle."""
    width, sound = gram.shape[-1], torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    for first, end in reversed(spans(0, width, _FACTOR_PANEL)):
        own, before = slice(first, end), slice(0, first)
        lower, info = torch.linalg.cholesky_ex(gram[:, own, own].flip(-2, -1))
        upper = lower.flip(-2, -1)
        diagonal = torch.diagonal(upper, dim1=-2, dim2=-1)[:, None, :].clone()
        if first:
            one = torch.eye(end - first, device=gram.device).expand_as(upper)
            above = exact_product(gram[:, before, own], torch.linalg.solve_triangular(upper, one, upper=True))
            one, other = exact_parts(above)
            for begin, stop in spans(0, first, _FACTOR_PANEL):  # the upper triangle is enough
                there = gram[:, :stop, begin:stop]
                take_product(there, one[:, :stop], other[:, begin:stop].mT)
            gram[:, before, own] = above.div_(diagonal)
            gram[:, own, before] = 0.0
            sound &= _finite(above)
        gram[:, own, own] = upper.div_(diagonal).triu_(1)
        sound &= (info == 0) & _finite(upper)
    return sound


def _finite(matrices: Tensor) -> Tensor:
    """bool [E]."""
    return torch.isfinite(torch.linalg.vector_norm(matrices, float("inf"), dim=(1, 2)))


def panel_of(matrix: Tensor) -> int:
    """Columns of a panel: on CUDA fewer, since what is pushed within one costs memory traffic and not arithmetic."""
    return _CUDA_PANEL if matrix.is_cuda else _PANEL


def spans(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """begin..end in pieces."""
    return [(first, min(first + size, end)) for first in range(begin, end, size)]


def gptq(
    weight_EOI: Tensor,
    gram_EII: Tensor,
    grid: Grid,
    fmt: Format,
    damp: float,
    begun: Callable[[], Factor] | None = None,
) -> GptqResult:
    """Codes of `weight_EOI` (float32) on `grid`, made for inputs with the Gram matrix `gram_EII` (float32).

    On CUDA weights may be bfloat16. Weights that lie in memory column by column need no copy; codes do. `begun`: the
    factor of these Gram matrices in `falling` order with this `damp`, where somebody has begun it.
    """
    width, order = weight_EOI.shape[2], falling(gram_EII)
    factor, damped, rounded = begun() if begun else push_factor(gram_EII, order, damp)
    push, every, group = first_half(factor), slice(None), (order // fmt.group_size).to(torch.int32)
    weight = reordered(weight_EOI.transpose(1, 2), order)
    turned = grid.turned()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    left = torch.empty(weight.shape, dtype=half_dtype(weight.device), device=weight.device)
    stack = Columns(weight, factor, turned.scale, turned.zero, codes, (left,), fmt)
    for first, end in spans(0, width, panel_of(weight)):
        target, before = weight[:, first:end].to(torch.float32, copy=True), slice(0, first)
        if first:
            add_product(target, transposed(part(push, before, slice(first, end))), part(stack.left, before, every))
        for now in (slice(*span) for span in spans(first, end, BLOCK)):
            round_columns(stack, now, target[:, now.start - first : now.stop - first], group)
            later = transposed(part(push, now, slice(now.stop, end)))
            add_product(target[:, now.stop - first :], later, part(stack.left, now, every))
    codes, left = (reordered(of, inverse(order)) for of in (codes, left))
    return GptqResult(codes.transpose(1, 2), len(damped), len(rounded), troubled(damped + rounded, codes), (left,))


def troubled(experts: list[int], like_Emn: Tensor) -> Tensor:
    """bool [E], which of a stack's experts are among these."""
    found = torch.zeros(len(like_Emn), dtype=torch.bool, device=like_Emn.device)
    if experts:
        found[experts] = True
    return found
