"""How much work a run is, in a measure that neither a slow machine nor a busy one changes: the functions it calls.

A test of seconds tells how busy its machine is; what a call takes in seconds stands in scripts/RESULTS.md.
"""

from __future__ import annotations

import cProfile
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

CHILD = """
import cProfile, sys
profile = cProfile.Profile()
try:
    profile.runcall(exec, sys.argv[1], {})
except SystemExit as end:
    assert not end.code, end.code
print(sum(entry.callcount for entry in profile.getstats()), file=sys.stderr)
"""
# A process that is forked from the tests would count their memory as its own, so a small one starts it.
PARENT = """
import resource, subprocess, sys
command = [sys.executable, "-c", *sys.argv[1:]]
ran = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
print(ran.stderr.split()[-1].decode(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
PROGRAM = """
import runpy, sys
sys.argv = ["mimoquant", *{arguments!r}]
runpy.run_module("mimoquant", run_name="__main__", alter_sys=True)
"""


def calls_in(call: Callable[[], T]) -> tuple[T, int]:
    """What `call` returns, and the functions called in it by this thread."""
    profile = cProfile.Profile()
    result = profile.runcall(call)
    return result, sum(entry.callcount for entry in profile.getstats())


def cost_of_code(code: str) -> tuple[int, int]:
    """Functions called by `code` in a process of its own, imports with them, and its kB of memory at most."""
    told = subprocess.run(
        [sys.executable, "-c", PARENT, CHILD, code], check=True, capture_output=True, text=True
    ).stdout.split()
    return int(told[0]), int(told[1])


def cost_of_run(*arguments: object) -> tuple[int, int]:
    """The same of `mimoquant ARGUMENTS`, which must end with 0."""
    return cost_of_code(PROGRAM.format(arguments=[str(argument) for argument in arguments]))
