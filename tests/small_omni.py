"""A small omni checkpoint with random towers, and pictures and sounds for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mimoquant.model.media import Picture, Sound
from mimoquant.synthetic.checkpoint import SynthSizes, synth

SIZES = SynthSizes(
    layers=4,
    hidden=32,
    experts=8,
    top_k=2,
    expert_intermediate=32,
    dense_intermediate=64,
    vocab=256,
    heads=4,
    kv_heads=2,
)
WIDTH, CODEBOOKS, CODES = 96, 4, 16  # of a patch; of its sounds
GRIDS = ((1, 2, 2), (1, 4, 6), (1, 10, 6), (1, 4, 22), (2, 4, 8))
FRAMES = (1, 4, 9)


def omni_checkpoint(out: Path) -> Path:
    """A tiny model in V2.5's layout; equal at every call."""
    synth(out, "v2.5", sizes=SIZES)
    return out


def pictures() -> list[Picture]:
    """Of several sizes: a single token; less than a window of patches and more, along rows and columns; two frames."""
    stream = np.random.Generator(np.random.SFC64(1))
    return [Picture(_values(stream, int(np.prod(grid)), WIDTH), grid) for grid in GRIDS]


def sounds() -> list[Sound]:
    """A frame alone, a whole group, and one that is filled up."""
    stream = np.random.SFC64(2)
    return [Sound((stream.random_raw(n * CODEBOOKS) % CODES).astype(np.int64).reshape(n, CODEBOOKS)) for n in FRAMES]


def _values(stream: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Numbers in [-2, 2) with few digits, from bits: numpy promises those to stay as they are."""
    bits = stream.bit_generator.random_raw(rows * width) >> np.uint64(54)
    return (bits.astype(np.float32) / 256 - 2).reshape(rows, width)
