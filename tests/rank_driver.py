"""The command line with small portions and chunks, for `test_team`: the micro checkpoint is one portion otherwise.

usage: python rank_driver.py [--kill-at COUNT] [--kill-rank RANK] [--signal NUMBER] [--whole] VERB ...

`--kill-at`: rank `--kill-rank` kills itself in its COUNT-th journal line, as kill -9 would, or by another `--signal`.
`--whole`: sizes are left as they are.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from mimoquant.assembly import mixing
from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.model import layer_stream
from mimoquant.planning import needs
from mimoquant.run import portions

CHUNK_BYTES = 2**18  # two or three experts of the micro checkpoint
# Where a size is looked up, which need not be where it is defined: a module that has imported it keeps its own, so a
# patch of the definition holds or not, depending on what was imported before.
SIZES = [
    (layer_stream, "BATCH_TOKENS", 256),
    (layer_stream, "PORTION_TOKENS", 512),
    (portions, "BLOCK_TOKENS", 1024),
    (needs, "CHUNK_BYTES", CHUNK_BYTES),
    (mixing, "CHUNK_BYTES", CHUNK_BYTES),
]


def shrink_sizes() -> None:
    for module, name, size in SIZES:
        setattr(module, name, size)


def kill_at(count: int, number: int = signal.SIGKILL) -> None:
    record = RunFolder.record
    done: list[str] = []

    def stop(self: RunFolder, line: JournalLine) -> None:
        record(self, line)
        done.append(line.unit)
        if len(done) == count:
            os.kill(os.getpid(), number)

    RunFolder.record = stop  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-rank", default="1")
    parser.add_argument("--signal", type=int, default=signal.SIGKILL)
    parser.add_argument("--whole", action="store_true")
    options, rest = parser.parse_known_args()
    if not options.whole:
        shrink_sizes()
    if options.kill_at and os.environ.get("RANK", "0") == options.kill_rank:
        kill_at(options.kill_at, options.signal)
    sys.argv = ["mimoquant", *rest]
    from mimoquant.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
