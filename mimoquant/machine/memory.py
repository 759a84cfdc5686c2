"""What memory a machine has: the host's, a control group's, a GPU's."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path

_USABLE = 0.94  # of a GPU's memory: the rest is the driver's, or lies between allocations


_CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is at most (`host_bytes`, `gpu_bytes`), and how much of the host's memory is free at the moment."""

    host_bytes: int
    host_free_bytes: int
    gpu_bytes: int = 0


def machine(device: str, gpu_memory_gb: float | None = None) -> Machine:
    """This machine, as far as a process may use it: of the host's memory, its share among those that torchrun starts.

    Args:
        gpu_memory_gb: what the user grants of a GPU's memory.
    """
    host, free = _host_memory()
    if not device.startswith("cuda"):
        return Machine(host, free)
    import torch

    total = torch.cuda.get_device_properties(torch.device(device)).total_memory
    return Machine(host, free, min(int(_USABLE * total), int(gpu_memory_gb * 1e9) if gpu_memory_gb else total))


def peak_rss_bytes() -> int:
    """Host memory of this process at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _host_memory() -> tuple[int, int]:
    """Total and free bytes, of the machine or of the control group that this process is in, whichever is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    old = "memory/memory."
    for limit, used in (("memory.max", "memory.current"), (f"{old}limit_in_bytes", f"{old}usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit ("max")
            bound = int((_CONTROL_GROUP / limit).read_text())
            if bound < total:
                total = bound
                free = min(free, bound - int((_CONTROL_GROUP / used).read_text()))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return total // processes, max(free, 0) // processes
