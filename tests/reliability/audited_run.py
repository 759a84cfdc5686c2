"""The command line under an audit hook, for `test_no_code`: tells of everything that it may not do.

usage: python audited_run.py SOURCE WORK VERB ... [-- VERB ...]

Told as lines on stdout: code of a checkpoint that is compiled or run, anything unpickled, sockets, processes, and files
that are written or removed outside of WORK.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

source, work = (os.path.realpath(path) for path in sys.argv[1:3])
FORBIDDEN = (
    "pickle.find_class",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.sendto",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "ctypes.dlopen.checkpoint",
    "webbrowser.open",
    "urllib.Request",
    "ftplib.connect",
    "http.client.connect",
)
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.rmtree",
    "shutil.copyfile",
)
told: list[str] = []
watching = False


def outside(path: Any) -> bool:
    if isinstance(path, int) or path is None:
        return False
    real = os.path.realpath(os.fsdecode(path))
    return not (real.startswith(work + os.sep) or real.startswith("/dev/"))


def by_numba() -> bool:
    """Whether the kernels' compiler does it, which keeps what it compiled of ours in `__pycache__`, pickled."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and "numba/core/caching.py" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    global watching
    if not watching:
        return
    watching = False  # what the hook does itself
    try:
        if (event in FORBIDDEN or event in CHANGES or event == "open") and by_numba():
            return
        if event == "subprocess.Popen" and arguments[1] == ["/sbin/ldconfig", "-p"]:
            return  # torch for GPUs asks where the driver's library is
        if event in FORBIDDEN:
            told.append(f"{event} {arguments!r:.120}")
        elif event in ("exec", "compile"):
            name = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
            if isinstance(name, str) and not name.startswith("<") and os.path.realpath(name).startswith((source, work)):
                told.append(f"{event} {name}")
            if event == "compile" and b"mark_of_foreign_code" in bytes(str(arguments[0]), "utf-8", "replace"):
                told.append(f"compile of {name}")
        elif (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            if outside(arguments[0]):
                told.append(f"open for writing {arguments[0]}")
        elif event in CHANGES and outside(arguments[0]):
            told.append(f"{event} {arguments[0]}")
    finally:
        watching = True


def main() -> None:
    global watching
    from mimoquant.cli.app import app

    verbs: list[list[str]] = [[]]
    for argument in sys.argv[3:]:
        verbs.append([]) if argument == "--" else verbs[-1].append(argument)
    sys.addaudithook(hook)
    os.umask(0)
    for verb in verbs:
        watching = True
        try:
            app(verb, standalone_mode=False)
        finally:
            watching = False
    print("\n".join(["", "TOLD", *told]))


if __name__ == "__main__":
    main()
