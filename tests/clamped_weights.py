"""The micro checkpoint with weights that are not zero and have no scale in a format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from micro import MICRO

from mimoquant.checkpoint.index import open_index

EXPERT = "model.layers.2.mlp.experts.3"
FEW = {f"{EXPERT}.up_proj.weight": {"zeroed": 1, "clamped": 0, "groups": 2048}}
GRAM = (
    "default_stage: {default_modifiers: {QuantizationModifier: {scheme: NVFP4A16, targets: ['re:.*experts.*']}}}\n"
    "mimoquant: {scale_search: gram}\n"
)


def edit(folder: Path, name: str, change: Any) -> None:
    """Change a tensor's values in place."""
    info = open_index(folder).tensors[name]
    dtype = {"F32": np.float32, "F8_E4M3": np.uint8, "BF16": np.uint16}[info.dtype]
    held = np.memmap(folder / info.file, dtype, "r+", info.offset, info.shape)
    change(held)
    held.flush()


def with_one_small_group(folder: Path, projection: str = "up", size: float = 1e-20) -> Path:
    """Of one weight a block of zeros but for 16 values, far too small beside the other block."""

    def codes(held: np.ndarray) -> None:
        held[:128, :128] = 0
        held[5, 16:32] = 0x38

    def scale(held: np.ndarray) -> None:
        held[0, 0] = size

    shutil.copytree(MICRO, folder)
    edit(folder, f"{EXPERT}.{projection}_proj.weight", codes)
    edit(folder, f"{EXPERT}.{projection}_proj.weight_scale_inv", scale)
    return folder


def scaled(folder: Path, factor: float, projection: str = "gate") -> Path:
    """One weight far too small, or large, as a whole."""

    def change(held: np.ndarray) -> None:
        held *= np.float32(factor)

    shutil.copytree(MICRO, folder)
    edit(folder, f"{EXPERT}.{projection}_proj.weight_scale_inv", change)
    return folder
