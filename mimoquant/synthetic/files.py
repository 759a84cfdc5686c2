"""Which file a synthetic checkpoint's tensors lie in, and files that take tensors in any order.

Key idea: the published placements, cuts in awkward places included, are functions of the tensor's name; every file is
laid out (sparse) before the first tensor is made, so tensors may come in any order.
Source: the published indexes of V2-Flash, V2.5 and V2.5-Pro.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import DTYPE_BYTES
from mimoquant.checkpoint.writer import Entry, shard_header
from mimoquant.model.geometry import Geometry

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.(\w+)$")


Placement = Callable[[str], str]


def _experts_per_rank(geometry: Geometry) -> int:
    ranks = 2 if geometry.experts < 64 else 8 if geometry.experts < 384 else 32
    return math.ceil(geometry.experts / ranks)


def _place_flash(geometry: Geometry, name: str) -> str:
    if match := _EXPERT.match(name):
        return f"model_{match[1]}_linear_fc{2 if match[3] == 'down' else 1}.safetensors"
    if match := re.match(r"model\.layers\.(\d+)\.", name):
        return f"model_{match[1]}.safetensors"
    part = "mtp" if name.startswith("model.mtp.") else "embedding" if "embed_tokens" in name else "final"
    return f"model_{part}.safetensors"


def _place_v25(geometry: Geometry, name: str) -> str:
    """The trap: the writer's cut falls into the last layer but one, inside the last expert's `up_proj` of each rank."""
    per_rank, cut = _experts_per_rank(geometry), geometry.layers - 2
    match = _EXPERT.match(name)
    if not match:
        return f"model_{'mtp' if name.startswith('model.mtp.') else 'pp0_ep0_shard1'}.safetensors"
    layer, expert, projection = int(match[1]), int(match[2]), match[3]
    late = layer > cut or (layer == cut and projection == "down")
    if layer == cut and projection == "up" and match[4] == "weight_scale_inv":
        late = expert % per_rank == per_rank - 1 or expert == geometry.experts - 1
    return f"model_pp0_ep{expert // per_rank}_shard{int(late)}.safetensors"


def _place_pro(geometry: Geometry, name: str) -> str:
    if match := _EXPERT.match(name):
        return f"model_pp0_ep{int(match[2]) // _experts_per_rank(geometry)}_shard0.safetensors"
    if name.startswith("model.mtp."):
        return "model_mtp.safetensors"
    early = re.match(r"model\.(embed_tokens\.|layers\.([01]\.|2\.(input_layernorm|self_attn)\.))", name)
    return f"model_pp0_ep0_shard{0 if early else 1}.safetensors"


PLACEMENTS = {"flash": _place_flash, "v2.5": _place_v25, "pro": _place_pro}


class ShardFiles:
    """All shards of a checkpoint, laid out at once and then filled in any order.

    `metadata`: whether headers carry `format: pt`; the published V2.5 and Pro files have no metadata.
    """

    def __init__(self, folder: Path, entries: list[Entry], place: Placement, metadata: bool) -> None:
        self.weight_map = {entry.name: place(entry.name) for entry in entries}
        self.sizes: dict[str, int] = {}
        self._total_bytes = sum(entry.size_bytes for entry in entries)
        self._ranges: dict[str, tuple[Path, int, int]] = {}
        shards: dict[str, list[Entry]] = {}
        for entry in entries:
            shards.setdefault(self.weight_map[entry.name], []).append(entry)
        for file, members in shards.items():
            members.sort(key=lambda entry: (-DTYPE_BYTES[entry.dtype], entry.name))  # as the safetensors library does
            header = shard_header(members, metadata=metadata)
            offset = len(header)
            for entry in members:
                self._ranges[entry.name] = folder / file, offset, entry.size_bytes
                offset += entry.size_bytes
            self.sizes[file] = offset
            with (folder / file).open("wb") as handle:
                handle.write(header)
                handle.truncate(offset)

    def put(self, name: str, data: npt.NDArray[Any]) -> None:
        path, offset, size = self._ranges.pop(name)
        if data.nbytes != size:
            raise ValueError(f"{name}: {data.nbytes} bytes where {size} belong")
        with path.open("r+b") as handle:
            handle.seek(offset)
            handle.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)

    def index(self, layout: str, tp_size: int) -> dict[str, Any]:
        """The index file's content. Every tensor must have been put."""
        if self._ranges:
            raise ValueError(f"{len(self._ranges)} tensors were never written, first {min(self._ranges)}")
        metadata: dict[str, Any] = {"total_size": self._total_bytes}
        if layout != "flash":
            metadata = {"save_format": "fp8", **metadata, "tp_size": tp_size}
        return {"metadata": metadata, "weight_map": dict(sorted(self.weight_map.items()))}
