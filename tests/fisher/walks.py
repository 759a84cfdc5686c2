"""Walks back over small checkpoints, with what they keep in passing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mimoquant
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.fisher import labels
from mimoquant.fisher.kept import Kept
from mimoquant.fisher.matrices import Fisher
from mimoquant.fisher.walk import FisherSettings, walk_back
from mimoquant.model import layer_stream
from mimoquant.weights.decoded import CheckpointWeights

MICRO = mimoquant.micro_checkpoint()
SEQUENCES, TOKENS = 10, 64


def shrink(put: Callable[[Any, str, int], None]) -> None:
    """Make portions so small that SEQUENCES are three of them, the last one with a batch and a half."""
    put(layer_stream, "BATCH_TOKENS", 128)
    put(layer_stream, "PORTION_TOKENS", 256)


def some_tokens(source: Path, sequences: int, tokens: int) -> TokenSet:
    vocab = open_layout(source).geometry.vocab
    return load_tokens(["mixed-v1"], source, sequences=sequences, tokens=tokens, vocab=vocab)


@contextmanager
def opened_weights(source: Path, device: str = "cpu") -> Iterator[CheckpointWeights]:
    layout = open_layout(source)
    with CheckpointReader(layout.index) as reader:
        yield CheckpointWeights(reader, layout, torch.device(device))


def walked(source: Path, tokens: TokenSet, settings: FisherSettings, folder: Path, **more: Any) -> Fisher:
    with opened_weights(source) as weights:
        return walk_back(weights, tokens, settings, folder, **more)


@dataclass
class Seen:
    """Labels [N, D] and, by layer, gradients [D, N, H] of a walk."""

    labels: list[Tensor] = field(default_factory=list)
    gradients: dict[int, list[Tensor]] = field(default_factory=dict)

    def all_labels(self) -> Tensor:
        return torch.cat(self.labels)

    def at(self, layer: int) -> Tensor:
        return torch.cat([held.flatten(1, 2) for held in self.gradients[layer]], 1)


def watch(patch: pytest.MonkeyPatch) -> Seen:
    """Look at the next walks, which are of one process."""
    seen, put, drawn = Seen(), Kept.put, labels.drawn

    def putting(self: Kept, unit: str, values: Tensor, facts: Any = None) -> None:
        kind, *numbers = unit.split()
        if kind == "gradients":
            seen.gradients.setdefault(int(numbers[0]), []).append(values.clone())
        put(self, unit, values, facts)

    def drawing(shares: Tensor, uniform: Tensor) -> Tensor:
        seen.labels.append(drawn(shares, uniform))
        return seen.labels[-1]

    patch.setattr(Kept, "put", putting)
    patch.setattr(labels, "drawn", drawing)
    return seen


def same_labels(patch: pytest.MonkeyPatch, held: Seen) -> None:
    """Let the next walk take the labels of one before it."""
    left = list(held.labels)
    patch.setattr(labels, "drawn", lambda shares, uniform: left.pop(0))
