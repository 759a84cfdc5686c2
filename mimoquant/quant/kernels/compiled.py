"""How a kernel for CPUs is compiled."""

from __future__ import annotations

from typing import Any

from numba import njit


def compiled(**options: Any) -> Any:
    """njit without Python's checks on division, and with a cache on disk where there is a place for one."""

    def decorate(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither the package's folder nor the home can be written: compile in every process
            return njit(nogil=True, error_model="numpy", **options)(function)

    return decorate
