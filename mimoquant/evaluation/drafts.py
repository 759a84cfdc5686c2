"""What drafts tokens beside a backbone: its own MTP layers, or a DFlash drafter in blocks.

Key idea: `acceptance` needs one thing of either, the hidden states whose product with the backbone's head are guesses
at the tokens after position t+1: h_1(t) .. h_D(t) for all starts t. MTP layers make them of the backbone's last hidden
states, in a chain or each by itself; a DFlash drafter also of earlier ones, taken as the walk passes them. The drafter
is one for both backbones, so it is read once and shared.

Left out: sampled starts; all are drafted, which costs b times the drafter's size a token, below a backbone's pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mimoquant.checkpoint.index import CheckpointIndex
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.decoder_layer import ForwardConfig
from mimoquant.model.dflash import DrafterWeights, draft_blocks, fuse
from mimoquant.model.drafter import Drafter, open_drafter
from mimoquant.model.layer_stream import Stream
from mimoquant.model.layout import ModelLayout
from mimoquant.model.mtp import MtpWeights, mtp_forward
from mimoquant.weights.decoded import CheckpointWeights, read_drafter_weights

MAX_DEPTH = 3  # of MTP layers
CHAIN, BACKBONE = "mtp", "mtp-backbone"  # whose hidden states an MTP layer gets: the layer's before it, the backbone's
MTP = (CHAIN, BACKBONE)


class Drafts(Protocol):
    """A draft model beside one backbone, whose streams are walked."""

    def after_layer(self, number: int) -> None:
        """Told after each layer of the walk."""

    def drafted(self, stream: int, batch: int, ids: Tensor, final: Tensor, embedding: Tensor) -> list[Tensor]:
        """h_1 .. h_D of the starts 0 .. T-D-1 of one batch, each [B, T - D, H].

        Args:
            ids: the text's tokens [B, T]. final: the backbone's normed hidden states. embedding: [vocab, H].
        """
        ...


class Draft(Protocol):
    """A draft model, not yet beside a backbone. `depth`: how many tokens it drafts at once."""

    @property
    def name(self) -> str: ...
    @property
    def depth(self) -> int: ...
    def beside(self, sources: Sequence[CheckpointWeights], streams: Sequence[list[Stream]]) -> Sequence[Drafts]:
        """Itself beside each backbone, all on one device, with that backbone's streams."""
        ...


def choose_draft(layouts: Sequence[ModelLayout], draft: str, depth: int | None, tokens: int) -> Draft:
    """The draft model called `draft`, for all of `layouts`, on sequences of `tokens` tokens.

    Args:
        draft: one of MTP, or a DFlash drafter's folder. depth: MTP layers; a block is as deep as its drafter has it.
    Raises UsageError: too deep, or no drafter. CheckpointError: it does not fit, or there are no MTP layers.
    """
    chosen = Mtp(_mtp_depth(layouts, depth), draft) if draft in MTP else _open_blocks(layouts, Path(draft), depth)
    if tokens <= chosen.depth:
        what = f"a chain of {chosen.depth} MTP layers" if draft in MTP else f"a block of {chosen.depth + 1}"
        raise UsageError(f"sequences of {tokens} tokens: {what} needs at least {chosen.depth + 1}")
    return chosen


def _mtp_depth(layouts: Sequence[ModelLayout], asked: int | None) -> int:
    fewest = min(layouts, key=lambda layout: layout.mtp_layers)
    if not fewest.mtp_layers:
        raise CheckpointError(f"{fewest.index.folder}: has no MTP layers (model.mtp.layers.*) to draft with")
    depth = asked or min(fewest.mtp_layers, MAX_DEPTH)
    if depth > fewest.mtp_layers:
        raise UsageError(f"--depth {depth}: {fewest.index.folder} has {fewest.mtp_layers} MTP layers")
    return depth


def _open_blocks(layouts: Sequence[ModelLayout], folder: Path, asked: int | None) -> Blocks:
    if not folder.is_dir():
        raise UsageError(f"--draft {folder}: is neither {' nor '.join(MTP)} nor the folder of a drafter")
    drafter, index = open_drafter(folder)
    for layout in layouts:
        drafter.check_fits(layout.geometry, layout.index.folder)
    if asked not in (None, drafter.depth):
        raise UsageError(
            f"--depth {asked}: {folder} drafts blocks of {drafter.block}, so {drafter.depth} tokens at once",
            hint="leave --depth out",
        )
    return Blocks(drafter, index)


# --- MTP layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mtp:
    """Each backbone's own MTP layers, `depth` of them: in a chain, or each on the backbone's hidden states."""

    depth: int
    name: str = CHAIN

    def beside(self, sources: Sequence[CheckpointWeights], streams: Sequence[list[Stream]]) -> list[Drafts]:
        return [_MtpDrafts(source, self) for source in sources]


class _MtpDrafts:
    def __init__(self, source: CheckpointWeights, draft: Mtp) -> None:
        self._source, self._draft = source, draft

    @cached_property
    def _layers(self) -> list[MtpWeights]:
        """Read when the walk is over and its weights are gone."""
        return [self._source.mtp_layer(number) for number in range(self._draft.depth)]

    def after_layer(self, number: int) -> None:
        pass

    def drafted(self, stream: int, batch: int, ids: Tensor, final: Tensor, embedding: Tensor) -> list[Tensor]:
        embedded, chained = embedding[ids].to(torch.float32), self._draft.name == CHAIN
        return draft_tokens(final, embedded, self._layers, self._source.config, chained=chained)


@torch.no_grad()
def draft_tokens(
    final_BTH: Tensor, embedded_BTH: Tensor, layers: Sequence[MtpWeights], config: ForwardConfig, *, chained: bool
) -> list[Tensor]:
    """h_1 .. h_D of the starts 0 .. T-D-1, each [B, T - D, H].

    Args:
        final_BTH: the backbone's normed hidden states, h_0. embedded_BTH: the text's tokens. layers: D of them.
        chained: a layer gets the hidden states of the one before it, as DeepSeek-V3 trains them; else all get h_0, as
            SGLang's multi-layer EAGLE runs this family (0.5.23, multi_layer_eagle_worker_v2.py).
    """
    starts = final_BTH.shape[1] - len(layers)
    hidden, out = final_BTH[:, :starts], []
    for depth, weights in enumerate(layers, start=1):
        out.append(mtp_forward(hidden, embedded_BTH[:, depth : depth + starts], weights, config))
        hidden = out[-1] if chained else hidden
    return out


# --- DFlash drafters --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """A DFlash drafter in a folder of its own."""

    drafter: Drafter
    index: CheckpointIndex

    @property
    def name(self) -> str:
        return str(self.drafter.folder)

    @property
    def depth(self) -> int:
        return self.drafter.depth

    def beside(self, sources: Sequence[CheckpointWeights], streams: Sequence[list[Stream]]) -> list[Drafts]:
        weights = read_drafter_weights(self.drafter, self.index, sources[0].device)
        return [_BlockDrafts(self.drafter, weights, of_source) for of_source in streams]


class _BlockDrafts:
    """`_fused[stream][batch]`: fc's product with what was captured so far, [B, T, H]."""

    def __init__(self, drafter: Drafter, weights: DrafterWeights, streams: list[Stream]) -> None:
        self._drafter, self._weights, self._streams = drafter, weights, streams
        self._fused: list[list[Tensor]] = [[] for _ in streams]

    @torch.no_grad()
    def after_layer(self, number: int) -> None:
        if number not in self._drafter.captured:
            return
        place = self._drafter.captured.index(number)
        for at, stream in enumerate(self._streams):
            device = stream.source.device
            parts = [fuse(hidden.to(device), place, self._weights) for hidden in stream.batches]
            self._fused[at] = parts if place == 0 else [a + b for a, b in zip(self._fused[at], parts, strict=True)]

    @torch.no_grad()
    def drafted(self, stream: int, batch: int, ids: Tensor, final: Tensor, embedding: Tensor) -> list[Tensor]:
        drafter, own = self._drafter, self._weights.mask
        mask = (embedding[drafter.mask_token] if own is None else own).to(torch.float32)
        embedded = embedding[ids].to(torch.float32)
        embedded = torch.where((ids == drafter.mask_token)[..., None], mask, embedded)
        starts = torch.arange(ids.shape[1] - drafter.depth, device=ids.device)
        out = draft_blocks(self._fused[stream][batch], embedded, mask, self._weights, drafter, starts)
        return list(out.unbind(2))
