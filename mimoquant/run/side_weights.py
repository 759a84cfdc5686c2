"""Weights that are copied as files, a drafter's or an audio tokenizer's: read once before the run, for NaN and Inf.

Key idea: what is damaged is told before the first shard is written, by file and tensor, as it is for the shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mimoquant.checkpoint.folders import resolve_inside
from mimoquant.checkpoint.index import CheckpointIndex, read_shard_header
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError
from mimoquant.weights.stored import refuse_non_finite

_BLOCK = 32 * 2**20


def refuse_side_weights(folder: Path, files: Iterable[str]) -> None:
    """Raises CheckpointError where a safetensors file among `files` (relative to `folder`) is damaged, or holds NaN or
    Inf."""
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        resolve_inside(folder, file)  # what is far away comes whole: it is copied afterwards
        infos, size, sha256 = read_shard_header(folder, file)
        index = CheckpointIndex(folder, {info.name: info for info in infos}, {file: size}, {file: sha256}, {})
        with CheckpointReader(index) as reader:
            for info in infos:
                for begin in range(0, info.size_bytes, _BLOCK):
                    block = np.empty(min(_BLOCK, info.size_bytes - begin), np.uint8)
                    reader.read_range(info, begin, block)
                    try:
                        refuse_non_finite(info, block)
                    except CheckpointError as error:
                        raise CheckpointError(f"{file}: {error}", hint=error.hint) from error
