"""A process of the program from outside: what it says and when, its memory and the GPU's over time, its end.

Key idea: nothing of it runs in here, so what is measured is what a user's command takes. One thread listens to its
stderr; between two looks at its memory the caller may ask for its death (`kill_when`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOK_S, SAMPLE_S = 0.02, 0.5


@dataclass
class Seen:
    """`lines`: of stderr, each with the second it came. `samples`: second, bytes on the host (anonymous memory alone,
    then all that is resident), on the device. `exit_code`: 128 + 9 for a kill."""

    command: list[str]
    exit_code: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    stdout: str = ""
    lines: list[tuple[float, str]] = field(default_factory=list)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)


class Device:
    """What is in use of the first GPU, all of the time, as nvidia-smi tells; 0 without one."""

    def __init__(self) -> None:
        self.bytes, self._process = 0, None
        if shutil.which("nvidia-smi") is None:
            return
        command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "400"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self.bytes = int(line) * 2**20

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def watch(arguments: list[str], log: Path, *, limit_s: float, kill_when: Callable[[], bool] | None = None) -> Seen:
    """Run `mimoquant` with `arguments`; it is killed where `kill_when` says so, and after `limit_s`."""
    seen = Seen(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout, log.open("w") as kept, _device() as device:
        process = subprocess.Popen(
            [sys.executable, "-m", "mimoquant", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        listener = threading.Thread(target=_listen, args=(process.stderr, seen, kept, begin))
        listener.start()
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            now = time.monotonic() - begin
            if now > limit_s or (kill_when is not None and kill_when()):
                process.send_signal(signal.SIGKILL)
                ended = os.wait4(process.pid, 0)
                break
            if not seen.samples or now - seen.samples[-1][0] >= SAMPLE_S:
                seen.samples.append((now, *_resident(process.pid), device.bytes))
            time.sleep(LOOK_S)
        seen.seconds = time.monotonic() - begin
        listener.join()
        code = os.waitstatus_to_exitcode(ended[1])
        seen.exit_code = process.returncode = code if code >= 0 else 128 - code
        seen.peak_bytes = ended[2].ru_maxrss * 1024
        stdout.seek(0)
        seen.stdout = stdout.read()
    return seen


@contextlib.contextmanager
def _device() -> Iterator[Device]:
    device = Device()
    try:
        yield device
    finally:
        device.close()


def _listen(stderr: Any, seen: Seen, kept: Any, begin: float) -> None:
    for line in stderr:
        seen.lines.append((time.monotonic() - begin, line.rstrip("\n")))
        print(f"{seen.lines[-1][0]:7.2f} {line}", end="", file=kept, flush=True)


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory, and of all that is resident; 0 once the process has ended."""
    found = {"RssAnon": 0, "VmRSS": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["RssAnon"], found["VmRSS"]
