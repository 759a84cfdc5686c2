"""Kernels for CUDA, on machines that can compile them. Imports no compiler before it is asked for one."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


@cache
def triton_kernels(name: str) -> Any:
    """The module of that name in this folder; None where there is no Triton."""
    try:
        return importlib.import_module(f"mimoquant.quant.kernels.{name}")
    except ImportError:
        return None
