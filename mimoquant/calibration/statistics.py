"""What calibration tokens say about a chunk of experts: Gram matrices, coverage, and what to do where it is thin.

Key idea: each token counts for the experts it is routed to, and for no other. An expert that saw few tokens has a Gram
matrix that would mislead GPTQ worse than none at all (worst near as many tokens as columns), so it is shrunk toward the
layer's pooled one,

    H = (1 - lambda) H_e + lambda H_pool tr(H_e) / tr(H_pool),    lambda = n0 / (n_e + n0),

where an expert without tokens gets the pooled one. What is pooled for down_proj cannot be another expert's input: it is
the expert's own intermediate on tokens of the whole layer, routed there or not.

Rows are rounded to bfloat16, so their products are exact and only sums are float32, on every device.
Shapes: E experts of a chunk, K width of the Gram matrix, n tokens. References: Frantar et al., GPTQ, arXiv 2210.17323;
shrinkage toward a target as in Ledoit and Wolf, 2004.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.machine.cores import on_cores
from mimoquant.model.decoder_layer import ExpertChunk, float32_parts, gated, of_group, product
from mimoquant.model.dispatch import Dispatch, Group, Routing, most_bytes, on_device
from mimoquant.quant.order import cuda_passes

Rows = Callable[[Tensor, Group], Tensor]  # tokens [m, c, H] of a group of experts → what a projection sees [m, c, K]


def gram(rows: Tensor) -> Tensor:
    """Sum of outer products, [..., K, K] float32, of rows [..., n, K]."""
    rough = rows.to(torch.bfloat16)
    if rough.is_cuda:
        stacked = rough.reshape(-1, *rough.shape[-2:])
        out = torch.bmm(stacked.transpose(1, 2), stacked, out_dtype=torch.float32)
        return out.view(*rough.shape[:-2], *out.shape[1:])
    wide = rough.to(torch.float32)
    return wide.transpose(-1, -2) @ wide


def expert_grams(
    blocks: Sequence[tuple[Tensor, Dispatch]], begin: int, end: int, width: int, rows_of: Rows | None = None
) -> Tensor:
    """[E, K, K] sums over the tokens [n, H] that each block dispatches to experts begin..end."""
    out = torch.zeros(end - begin, width, width, device=blocks[0][0].device)
    for tokens, dispatch in blocks:
        groups = dispatch.groups(begin, end)

        def add(group: Group, tokens: Tensor = tokens) -> None:
            rows = group.of(tokens)
            if rows_of is not None:
                rows = rows_of(rows, group)
            add_grams(out, rows, group, begin)

        for _ in on_cores(add, groups, out.device, most_bytes(groups, tokens.shape[-1])):
            pass
    return out


def add_grams(out_EKK: Tensor, rows: Tensor, group: Group, begin: int) -> None:
    """Add the `gram` of each expert's own rows [m, c, K] of a group to its place among the experts from `begin` on. On
    CUDA each is a product of its own right into it: nothing is masked, and no sum copied."""
    if not out_EKK.is_cuda:
        own = torch.where(group.used[..., None], rows, 0) if group.padded else rows
        out_EKK[group.places(begin)] += gram(own)
        return
    rough = rows.to(torch.bfloat16)
    for slot, (expert, count) in enumerate(zip(group.experts, group.counts, strict=True)):
        into, own = out_EKK[expert - begin, None], rough[slot : slot + 1, :count]
        torch.baddbmm(into, own.mT, own, out_dtype=torch.float32, out=into)


def gradient_grams(
    gradients_DNH: Tensor, blocks: Sequence[tuple[Tensor, Dispatch]], begin: int, end: int
) -> tuple[Tensor, Tensor]:
    """What the loss feels of each of experts begin..end at its own tokens, in two halves of them.

    An expert's answer goes times its routing weight into the layer's output, so the gradient at the answer is that at
    the output times the weight.

    Args:
        gradients_DNH: at the layer's output, of draws and the first N of the blocks' tokens.
    Returns sums of outer products [2, E, H, H], and of how many they are [2, E], float32 both.
    """
    draws, count, width = gradients_DNH.shape
    sums = torch.zeros(2, end - begin, width, width, device=gradients_DNH.device)
    counts, first = sums.new_zeros(2, end - begin), 0
    for tokens, dispatch in blocks:
        for group in dispatch.groups(begin, end) if first < count else ():
            rows = group.rows + first
            gains = torch.where(rows < count, group.gains, 0)
            rows, places = rows.clamp(max=count - 1), group.places(begin)
            middle = rows.shape[1] // 2  # rows go up, so what is drawn of a sequence falls into one half
            for half, slots in enumerate((slice(middle), slice(middle, None))):
                counts[half, places] += draws * (gains[:, slots] > 0).sum(1)
                for gradients in gradients_DNH:
                    sums[half, places] += gram(gradients[rows[:, slots]] * gains[:, slots, None])
        first += len(tokens)
    return sums, counts


def input_peaks(blocks: Sequence[tuple[Tensor, Dispatch]]) -> Tensor:
    """[E] float32: the largest magnitude in the tokens [n, H] that each of all experts sees; 0 for one without."""
    peaks = torch.zeros(len(blocks[0][1].begins) - 1, device=blocks[0][0].device)
    for tokens, dispatch in blocks:
        counts = dispatch.starts.diff()
        experts = torch.repeat_interleave(torch.arange(len(peaks), device=peaks.device), counts)
        largest = tokens.abs().amax(-1).to(torch.float32)
        peaks.scatter_reduce_(0, experts, largest[dispatch.rows], "amax")
    return peaks


def inner_peaks(blocks: Sequence[tuple[Tensor, Dispatch]], chunk: ExpertChunk) -> Tensor:
    """The same [E] of what down_proj sees, which is bfloat16 where it is served, of a chunk's experts."""
    peaks, rows_of = torch.zeros(len(chunk.gate), device=chunk.gate.device), intermediate_of(chunk)
    for tokens, dispatch in blocks:
        for group in dispatch.groups(chunk.begin, chunk.begin + len(peaks)):
            largest = rows_of(group.of(tokens), group).abs().amax(-1).to(torch.bfloat16)
            places = group.places(chunk.begin)
            own = torch.where(group.used, largest, 0).amax(1).to(torch.float32)
            peaks[places] = torch.maximum(peaks[places], own)
    return peaks


def tokens_of(blocks: Sequence[tuple[Tensor, Dispatch]], begin: int, end: int, most: int) -> list[Tensor]:
    """The tokens [n, H] that each of experts begin..end sees, evenly thinned to `most`."""
    out = []
    for expert in range(begin, end):
        rows = torch.cat([tokens[d.rows[d.begins[expert] : d.begins[expert + 1]]] for tokens, d in blocks])
        out.append(rows[:: max(1, -(-len(rows) // most))])
    return out


def counts(dispatches: Sequence[Dispatch], begin: int, end: int) -> list[int]:
    """Tokens of each expert."""
    return [sum(d.begins[expert + 1] - d.begins[expert] for d in dispatches) for expert in range(begin, end)]


def counts_of_kinds(blocks: Sequence[tuple[Tensor, Dispatch]], kinds: Tensor, many: int) -> list[list[int]]:
    """Tokens of each kind 0..many of each expert, [many][experts]. `kinds`: of the blocks' tokens, one after the
    other."""
    experts, first = len(blocks[0][1].begins) - 1, 0
    table = torch.zeros(many * experts, dtype=torch.int64, device=kinds.device)
    for tokens, dispatch in blocks:
        pairs = dispatch.starts.diff()
        owner = torch.repeat_interleave(torch.arange(experts, device=kinds.device), pairs)
        kind = kinds[first : first + len(tokens)][dispatch.rows]
        table += torch.bincount(kind * experts + owner, minlength=len(table))
        first += len(tokens)
    out: list[list[int]] = table.view(many, experts).tolist()
    return out


def effective_counts(dispatches: Sequence[Dispatch], begin: int, end: int) -> list[float]:
    """(sum g)² / sum g² of each expert's routing weights g: how many equally weighted tokens it saw."""
    if dispatches[0].gains.is_cuda:
        return _effective_at_once(dispatches, begin, end)
    totals = []
    for expert in range(begin, end):
        gains = torch.cat([d.gains[d.begins[expert] : d.begins[expert + 1]] for d in dispatches])
        totals.append(torch.stack((gains.sum() ** 2, gains.square().sum())))
    first, second = torch.stack(totals).T
    return [float(value) for value in first / second.clamp(min=1e-30)]


def _effective_at_once(dispatches: Sequence[Dispatch], begin: int, end: int) -> list[float]:
    """The same by differences of running sums, in a handful of operations."""
    sums = torch.zeros(2, end - begin, dtype=torch.float64, device=dispatches[0].gains.device)
    for dispatch in dispatches:
        gains = dispatch.gains.double()
        running = F.pad(torch.stack((gains, gains.square())).cumsum(1), (1, 0))
        sums += running[:, dispatch.starts[begin : end + 1]].diff(dim=1)
    out: list[float] = (sums[0].square() / sums[1].clamp(min=1e-30)).tolist()
    return out


def changed(before: Sequence[Routing], after: Sequence[Routing]) -> float:
    """The share of tokens whose set of experts differs; the order in it means nothing."""
    differ = [
        (old.experts.sort(-1).values != new.experts.sort(-1).values).any(-1)
        for old, new in zip(before, after, strict=True)
    ]
    return sum(int(tokens.sum()) for tokens in differ) / sum(len(tokens) for tokens in differ)


def shares(count_E: Sequence[int], n0: float) -> list[float]:
    """The lambdas."""
    return [1.0 if count == 0 else n0 / (count + n0) for count in count_E]


def shrink(gram_EKK: Tensor, count_E: Sequence[int], pooled: Tensor, n0: float) -> Tensor:
    """Mean Gram matrices, each shrunk toward `pooled` ([K, K] or one an expert), at its own trace."""
    count, share = (on_device(of, gram_EKK.device, torch.float32) for of in (count_E, shares(count_E, n0)))
    some, target, kernels = count.clamp(min=1), pooled.expand_as(gram_EKK), cuda_passes(gram_EKK)
    if kernels is None:
        own = gram_EKK / some[:, None, None]
        shared = share * _to_trace(_trace(own), target, count)
        return own.mul_((1 - share)[:, None, None]).add_(shared[:, None, None] * target)
    diagonal = torch.diagonal(gram_EKK, dim1=-2, dim2=-1) / some[:, None]
    shared = share * _to_trace(diagonal.sum(-1), target, count)
    mixed: Tensor = kernels.mixed(gram_EKK, some, pooled, 1 - share, shared)
    return mixed


def _to_trace(own_E: Tensor, target: Tensor, count: Tensor) -> Tensor:
    """[E], what gives `target` the trace of experts' own matrices; 1 for one without tokens."""
    return torch.where(count > 0, own_E / _trace(target).clamp(min=1e-30), 1.0)


def _trace(matrices: Tensor) -> Tensor:
    return torch.diagonal(matrices, dim1=-2, dim2=-1).sum(-1)


def intermediate(rows: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """What down_proj sees, bfloat16 [..., n, I], of rows [..., n, H]."""
    parts = float32_parts(rows, gate)
    return gated(product(parts, gate), product(parts, up), torch.bfloat16)


def intermediate_of(chunk: ExpertChunk) -> Rows:
    """`intermediate` of a chunk's experts, for `expert_grams`."""

    def rows_of(rows: Tensor, group: Group) -> Tensor:
        return intermediate(rows, *(of_group(weight, group, chunk.begin) for weight in (chunk.gate, chunk.up)))

    return rows_of


def slopes(gate: Tensor, up: Tensor) -> Tensor:
    """How fast the intermediate moves with gate's output and with up's: [..., I] each → [..., 2I]."""
    opened = torch.sigmoid(gate)
    return torch.cat([up * opened * (1 + gate * (1 - opened)), gate * opened], dim=-1)


def slopes_of(chunk: ExpertChunk) -> Rows:
    """`slopes` of a chunk's experts, for `expert_grams`: [m, c, 2I]."""

    def rows_of(rows: Tensor, group: Group) -> Tensor:
        return _slopes(rows, *(of_group(weight, group, chunk.begin) for weight in (chunk.gate, chunk.up)))

    return rows_of


def forced_slopes(sample: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As `forced_grams`, [E, 2I, 2I] of what gate and up move the intermediate by."""
    return _forced(lambda expert: _slopes(sample, gate[expert], up[expert]), sample, len(gate))


def _slopes(rows: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    parts = float32_parts(rows, gate)
    return slopes(product(parts, gate), product(parts, up))


def forced_grams(sample: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Mean Gram matrices [E, I, I] of each expert's intermediate on the same tokens `sample` [n, H]."""
    return _forced(lambda expert: intermediate(sample, gate[expert], up[expert]), sample, len(gate))


def _forced(rows_of: Callable[[int], Tensor], sample: Tensor, experts: int) -> Tensor:
    """Mean Gram matrices of what each expert makes of the sample."""
    grams = on_cores(lambda e: gram(rows_of(e)), range(experts), sample.device, 4 * sample.numel())
    return torch.stack(list(grams)) / len(sample)


def finite_grams(sums_EKK: Tensor, layer: int) -> Tensor:
    """`finite` of Gram matrices, whose diagonals bound all else."""
    finite(torch.diagonal(sums_EKK, dim1=-2, dim2=-1), layer)
    return sums_EKK


def finite(sums: Tensor, layer: int) -> Tensor:
    """The sums themselves. Raises CheckpointError where they are not finite."""
    if not bool(torch.isfinite(sums).all()):
        raise CheckpointError(
            f"layer {layer}: the calibration tokens' statistics are not finite",
            hint="the hidden states overflow: is this data for this model?",
        )
    return sums
