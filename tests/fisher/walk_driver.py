"""A walk back as one of several ranks, with small portions, for `test_walk_back`.

usage: python walk_driver.py FOLDER [--resume] [--states host|files] [--kill-at COUNT] [--kill-rank RANK]

`--kill-at`: rank `--kill-rank` kills itself, as kill -9 would, in its COUNT-th journal line.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import rank_driver
from walks import MICRO, SEQUENCES, TOKENS, opened_weights, shrink, some_tokens

from mimoquant.fisher.walk import FisherSettings, walk_back
from mimoquant.machine.team import Team


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--states", default="host")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-rank", default="1")
    options = parser.parse_args()
    shrink(setattr)
    if options.kill_at and os.environ.get("RANK", "0") == options.kill_rank:
        rank_driver.kill_at(options.kill_at)
    tokens = some_tokens(MICRO, SEQUENCES, TOKENS)
    with Team.from_environment("cpu") as team, opened_weights(MICRO) as weights:
        walk_back(
            weights, tokens, FisherSettings(states=options.states), options.folder, team=team, resume=options.resume
        )


if __name__ == "__main__":
    main()
