"""Ids → what enters the first layer: rows of the embedding, and in place of media what the towers make of them.

Key idea: a walk's ids (`media.walked_ids`) say of each place which row belongs there, so whoever cuts them into batches
knows nothing of media. Towers run once for a walk, over those media alone that its ids name; then their weights are
gone. Of text, rows come as stored; beside media everything is float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mimoquant.errors import CheckpointError
from mimoquant.model.media import Placed
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.towers import TowerWeights


class Embedding:
    """The embedding of one checkpoint, and the rows of the media of some batches."""

    def __init__(
        self, weights: CheckpointWeights, batches: Iterable[Tensor] = (), media: Sequence[Sequence[Placed]] = ()
    ) -> None:
        """`media`: of a set's sequences, all of them. `batches`: of its ids, those that will be asked for.

        Raises CheckpointError for media that the checkpoint's towers cannot take.
        """
        self.device = weights.device
        self._media = _MediaRows(weights, batches, media) if any(media) else None
        self._table = weights.tensor("model.embed_tokens.weight")

    def __call__(self, ids: Tensor) -> Tensor:
        """Ids [B, T] → [B, T, H]."""
        ids = ids.to(self.device)
        if self._media is None:
            return self._table[ids]
        return self._media.put(self._table[ids.clamp(min=0)].to(torch.float32), ids)


class _MediaRows:
    """What the towers make of the media that some ids name, on the host."""

    def __init__(
        self, weights: CheckpointWeights, batches: Iterable[Tensor], media: Sequence[Sequence[Placed]]
    ) -> None:
        every = [placed for of_sequence in media for placed in of_sequence]
        ends = np.cumsum([placed.tokens for placed in every])
        named = [-1 - batch[batch < 0].cpu().numpy() for batch in batches]
        wanted = np.unique(np.searchsorted(ends, np.concatenate([*named, np.empty(0, np.int64)]), side="right"))
        self._place = torch.full((int(ends[-1]) if len(ends) else 0,), -1)  # row of the set → row here
        towers, done = TowerWeights(weights), 0
        made = towers.rows([every[number].medium for number in wanted])
        for number, rows in zip(wanted, made, strict=True):
            count = every[number].tokens
            if len(rows) != count:
                raise CheckpointError(f"medium {number} takes {len(rows)} tokens, {count} are kept for it")
            end = int(ends[number])
            self._place[end - count : end] = torch.arange(done, done + count)
            done += count
        self._rows = torch.cat(made) if made else torch.empty(0, weights.layout.geometry.hidden)

    def put(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Replace the rows of `hidden` [B, T, H] at ids below 0."""
        inside = ids < 0
        hidden[inside] = self._rows[self._place[-1 - ids[inside].cpu()]].to(hidden.device)
        return hidden
