"""Streams of CUDA beside the one of the products.

Key idea: a stream is kept for what it is used for. Memory goes back to the stream that it was taken on, so new ones, of
which CUDA hands out 32 in turn, would each hold what one needs.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def side_stream(device: torch.device, use: str, priority: int = 0) -> torch.cuda.Stream | None:
    """The stream for a `use` beside the products, on CUDA. Of a `priority` below 0 it comes before them."""
    return torch.cuda.Stream(device, priority) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
