#!/usr/bin/env python
"""Fuzz the readers of untrusted files, guided by what lines of ours an input reaches.

Key idea: an input that reaches a new pair of consecutive lines in `mimoquant/` joins the corpus and is mutated in turn.
A finding is anything but an answer or one of our refusals in one line, and anything that takes longer than LIMIT_S or
more than LIMIT_BYTES of memory; it is written to a file and told.

usage: python scripts/stress/fuzz.py [READER ...] [--minutes N] [--seed S]      (CPU minutes of each reader)
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]

from readers import READERS, Reader, check, mutated  # noqa: E402

LIMIT_S = 5
LIMIT_BYTES = 4 * 2**30  # of address space, beside what is mapped at the start
OURS = str(ROOT / "mimoquant")


class Coverage:
    """Pairs of lines of ours that ran one after the other."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()
        self.new = 0

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        last = frame.f_lineno

        def line(inner: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                key = (inner.f_code.co_filename, last, inner.f_lineno)
                last = inner.f_lineno
                if key not in self.seen:
                    self.seen.add(key)
                    self.new += 1
            return line

        return line

    def of(self, reader: Reader, data: bytes, folder: Path) -> int:
        """Run the reader; returns how many pairs were new."""
        self.new = 0
        sys.settrace(self._call)
        try:
            check(reader, data, folder)
        finally:
            sys.settrace(None)
        return self.new


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"takes longer than {LIMIT_S} s")


def fuzz(name: str, minutes: float, dice: random.Random) -> list[str]:
    """Returns the findings, one line each."""
    reader, coverage, corpus, findings, runs = READERS[name], Coverage(), list(READERS[name].seeds), [], 0
    kinds: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        for seed in corpus:
            coverage.of(reader, seed, Path(scratch))
        begin = time.process_time()
        while time.process_time() - begin < minutes * 60:
            data, runs = mutated(dice.choice(corpus), reader.words, dice), runs + 1
            signal.alarm(LIMIT_S)
            try:
                if coverage.of(reader, data, Path(scratch)) and len(data) < 50_000:
                    corpus.append(data)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                if kind not in kinds:
                    kinds.add(kind)
                    path = Path(tempfile.gettempdir()) / f"finding-{name.replace(' ', '-')}-{len(kinds)}"
                    path.write_bytes(data)
                    findings.append(f"{name}: {kind}: {str(error)[:150]!r} ({path})")
            finally:
                signal.alarm(0)
        spent = time.process_time() - begin
    print(
        f"{name}: {runs} inputs in {spent / 60:.1f} CPU minutes, corpus {len(corpus)}, "
        f"{len(coverage.seen)} pairs of lines, {len(findings)} findings",
        flush=True,
    )
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; by default all")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _late)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LIMIT_BYTES, resource.RLIM_INFINITY))
    findings = []
    for name in options.readers or READERS:
        findings += fuzz(name, options.minutes, random.Random(options.seed))
    print("\n".join(findings))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
