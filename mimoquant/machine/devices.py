"""Which engine a device means.

Key idea: the CPU engine needs no torch, so torch (1.5 s and 250 MB to import) is loaded only where a CUDA driver
answers or the user asks for a device.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.errors import UsageError
from mimoquant.quant.stack import Engine


def make_engine(device: str, empty: Callable[..., npt.NDArray[Any]] = np.empty) -> Engine:
    """The engine for "auto", "cpu" or "cuda[:n]". Raises UsageError where the device is not there.

    Args:
        empty: where memory on a CPU is from.
    """
    device = resolve_device(device)
    if device == "cpu":
        from mimoquant.quant.engine_cpu import CpuEngine

        return CpuEngine(empty=empty)
    from mimoquant.quant.engine_torch import TorchEngine

    return TorchEngine(device)


def resolve_device(device: str) -> str:
    """ "auto" made definite. Raises UsageError for a device that is unknown or not there."""
    if device == "auto":
        return "cuda" if _cuda_driver_answers() and _torch_sees_cuda() else "cpu"
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: known are auto, cpu and cuda")
    if device != "cpu" and not _torch_sees_cuda():
        raise UsageError(
            f"--device {device}: torch sees no CUDA device here",
            hint="use --device cpu; without calibration it gives the same bytes",
        )
    return device


def _cuda_driver_answers() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def _torch_sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
