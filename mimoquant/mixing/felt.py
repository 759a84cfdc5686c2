"""What an option of a layer costs, told without forks: one walk back, and one walk forward.

Key idea: an error δ of a layer's output costs in two ways.

Where each token stays with its experts, ½ δᵀ F δ nats to second order, F = E[g gᵀ] the Fisher matrix there and g the
gradient of log p(y|x), y drawn from the model's own distribution (`fisher.walk`). The same tokens are walked back and
then forward, where each layer's experts answer clean inputs in every format, so each token's δ meets its own g:
½ (g·δ)², averaged over draws. That is nearer than ½ tr(F E), which takes the loss to feel every token alike.

Where a later router sends a token elsewhere, the gradient knows nothing of it, and it is half or more of an early
layer's J. So each router tells how far a token is from having its last expert replaced by the next (the gap of the two
scores over the norm of its gradient: a distance in the residual stream), and the experts tell what that would cost,
½ (g·Δ)² of the jump Δ of the layer's output. An error that points anywhere, of norm |δ| in H dimensions, goes beyond a
border at a distance with the probability Φ(-distance √H / |δ|). A jump is an error too: it may move the token in later
layers. Layers in between make an error larger; by how much is told by each layer's error in the first format, which
goes through the next layer and no further.

Costs of layers are added up. Left out: how layers in between turn an error and pass it on to other tokens, other
replacements, errors that meet, higher orders. No constant is fitted. So costs say which layer and option is
dearer; J of a mixture is only measured by walking it.

Shapes: N tokens of a lane, D draws, H hidden, F formats, S sequences, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mimoquant.fisher.matrices import Fisher
from mimoquant.mixing.attribution import Floats, drawn
from mimoquant.mixing.mixtures import LayerOption
from mimoquant.model.backward import norm_gradient
from mimoquant.model.decoder_layer import Router
from mimoquant.model.dispatch import Routing

_SMALL = 1e-30


class Gradients:
    """Of log p at layers' outputs, of some of the sequences that were walked back; a layer's are read once.

    Args:
        rows: which sequences.
    """

    def __init__(self, fisher: Fisher, rows: Sequence[int], device: str) -> None:
        self.fisher, self.rows, self.device = fisher, torch.tensor(rows), device
        self._layer, self._held = -1, torch.empty(0)

    def of(self, layer: int) -> Tensor:
        """[D, N, H] in bfloat16."""
        if layer != self._layer:
            self._layer = layer
            self._held = self.fisher.gradients(layer)[:, self.rows].flatten(1, 2).to(self.device)
        return self._held


def felt(gradients_DNH: Tensor, changes_NH: Tensor) -> Tensor:
    """[N] nats: ½ (g·δ)² of each token's change, averaged over the draws; float32."""
    total = torch.zeros(len(changes_NH), device=changes_NH.device)
    for of_draw in gradients_DNH:
        total += (of_draw.to(torch.float32) * changes_NH).sum(-1).square()
    return total / (2 * len(gradients_DNH))


def border(
    tokens_NH: Tensor, hidden_NH: Tensor, norm: Tensor, router: Router, top_k: int, eps: float
) -> tuple[Tensor, Routing]:
    """How far each token is from having its last expert replaced by the next, in the norm of `hidden` [N]; and where it
    would be routed then. inf where there is no other expert.

    Args:
        tokens_NH: what the router sees, the normed `hidden_NH`.
    """
    scores = torch.nn.functional.linear(tokens_NH.to(torch.float32), router.weight).sigmoid()
    ranked = torch.topk(scores + router.bias, min(top_k + 1, len(router.weight)), dim=-1)
    if ranked.indices.shape[1] == top_k:
        there = Routing(ranked.indices, torch.full_like(ranked.values, 1 / top_k))
        return torch.full((len(tokens_NH),), math.inf, device=scores.device), there
    last, following = ranked.indices[:, -2], ranked.indices[:, -1]
    slopes = scores * (1 - scores)
    gradient = (
        slopes.gather(1, last[:, None]) * router.weight[last]
        - slopes.gather(1, following[:, None]) * router.weight[following]
    )
    gradient = norm_gradient(gradient, hidden_NH.to(torch.float32), norm, eps)
    gap = ranked.values[:, -2] - ranked.values[:, -1]
    experts = torch.cat([ranked.indices[:, : top_k - 1], following[:, None]], dim=1)
    chosen = scores.gather(1, experts)
    routing = Routing(experts, chosen / (chosen.sum(-1, keepdim=True) + 1e-20))
    return gap / gradient.norm(dim=-1).clamp(min=_SMALL), routing


@dataclass(frozen=True)
class LayerFelt:
    """What was told of the tokens of a lane in one layer, float32.

    `cost` [F, N]: what a format's change is felt as; `change` [F, N]: its norm. `distance` [N]: to the router's border;
    `jump` [N]: the norm of what the output does there, and `jump_cost` [N]: what that is felt as. `arrived`, `left`
    [N]: the norm of the last layer's change in the first format when this one's router sees it, and when it leaves; 0
    in the first layer.
    """

    cost: Tensor
    change: Tensor
    distance: Tensor
    jump: Tensor
    jump_cost: Tensor
    arrived: Tensor
    left: Tensor

    def packed(self) -> Tensor:
        """[2 F + 5, N], on the host."""
        beside = torch.stack([self.distance, self.jump, self.jump_cost, self.arrived, self.left])
        return torch.cat([self.cost, self.change, beside]).cpu()

    @staticmethod
    def of(packed: Tensor) -> LayerFelt:
        formats = (len(packed) - 5) // 2
        return LayerFelt(packed[:formats], packed[formats : 2 * formats], *packed[2 * formats :])


def layer_costs(layers: Sequence[LayerFelt], width: int, sequences: int) -> tuple[Floats, Floats]:
    """[L, F, S] nats a token that each format of each layer costs alone, and the part of it where tokens stay with
    their experts; of a lane's sequences.

    Args:
        layers: from the first to the last that has experts. width: H.
    """
    count = len(layers)
    jumps = [one.jump_cost.clone() for one in layers]  # with all that follows, from the last layer down
    out, stay, growth = [], [], growths(layers)
    for number in range(count - 1, -1, -1):
        own, grown = layers[number], 1.0
        cost, jump = own.cost.clone(), jumps[number]
        for later in range(number + 1, count):
            there, distance = grown * growth[later][0], layers[later].distance
            cost += crossing(distance, own.change * there, width) * jumps[later]
            jump += crossing(distance, own.jump * there, width) * jumps[later]
            grown *= growth[later][1]
        out.append(_by_sequence(cost, sequences))
        stay.append(_by_sequence(own.cost, sequences))
    return np.stack(out[::-1]), np.stack(stay[::-1])


def growths(layers: Sequence[LayerFelt]) -> list[tuple[float, float]]:
    """By how much an error grows on its way to each layer's router, and through the layer: of most tokens (the median),
    for those that are sent elsewhere are told by their jumps. Of the first layer nothing is known, or needed."""
    out = [(1.0, 1.0)]
    for before, one in itertools.pairwise(layers):
        moved = before.change[0] > 0
        began, arrived, left = (values[moved] for values in (before.change[0], one.arrived, one.left))
        to_router, through = (float((norms / began).median()) if len(began) else 1.0 for norms in (arrived, left))
        out.append((to_router, through))
    return out


def crossing(distance: Tensor, size: Tensor, width: int) -> Tensor:
    """The probability that an error of a norm `size`, pointing anywhere in `width` dimensions, goes beyond a border."""
    beyond = torch.special.ndtr(-distance * math.sqrt(width) / size.clamp(min=_SMALL))
    return torch.where(size > 0, beyond, torch.zeros_like(beyond))


def _by_sequence(values_FN: Tensor, sequences: int) -> Floats:
    means = values_FN.view(len(values_FN), sequences, -1).mean(-1, dtype=torch.float64)
    return np.asarray(means.numpy())


@dataclass(frozen=True)
class FeltCosts:
    """Nats a token that an option of a layer costs alone, [L, options, S] of S sequences; the first option is the one
    that all are compared with. `stay`: the part of it where tokens stay with their experts."""

    of_sequences: Floats
    stay: Floats

    @staticmethod
    def of(costs: Floats, stay: Floats, options: Sequence[LayerOption]) -> FeltCosts:
        """Of costs [L, F, S]; what is kept costs nothing."""
        quantizing = [k for k, option in enumerate(options) if option.fmt]
        out = np.zeros((2, len(costs), len(options), costs.shape[2]))
        out[:, :, quantizing] = costs, stay
        return FeltCosts(*out)

    @property
    def sequences(self) -> int:
        return int(self.of_sequences.shape[2])

    @cached_property
    def _means(self) -> Floats:
        """[1 + resamples, L, options]."""
        counts = np.concatenate([np.ones((1, self.sequences)), drawn(np.random.default_rng(0), self.sequences)])
        out: Floats = np.einsum("rs,los->rlo", counts, self.of_sequences, optimize=True) / self.sequences
        return out

    @property
    def contributions(self) -> Floats:
        """[1 + resamples, L] of the first option."""
        return self._means[:, :, 0]

    @property
    def rerouted(self) -> Floats:
        """[L]: the share of `contributions` that is of tokens sent to other experts."""
        moved = (self.of_sequences - self.stay)[:, 0].mean(1)
        out: Floats = moved / np.maximum(self.contributions[0], _SMALL)
        return out

    @property
    def total(self) -> Floats:
        """[1 + resamples], all layers in the first option."""
        out: Floats = self.contributions.sum(1)
        return out

    @property
    def ratio(self) -> Floats:
        """[L, options]: an option's cost over the first's; 1 where that costs nothing and the other does."""
        costs, base = self.costs(), self.costs()[:, :1]
        out: Floats = np.where(base > 0, costs / np.maximum(base, _SMALL), (costs > 0).astype(np.float64))
        return out

    def costs(self) -> Floats:
        """[L, options]."""
        out: Floats = self._means[0]
        return out

    def predicted(self, choice: Sequence[int]) -> Floats:
        """[1 + resamples]: the sum of what a choice costs, layer by layer."""
        out: Floats = self._means[:, np.arange(len(self.of_sequences)), list(choice)].sum(1)
        return out
