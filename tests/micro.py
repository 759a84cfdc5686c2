"""What many tests ask of the micro checkpoint: where it is, held-out tokens for it, J of what was made of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import mimoquant
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.planning.recipe import Recipe, load_recipe

MICRO = mimoquant.micro_checkpoint()
VOCAB = 1024


def held_out(sequences: int, tokens: int, source: Path = MICRO) -> TokenSet:
    return load_tokens(["heldout-v1"], source, sequences=sequences, tokens=tokens, vocab=VOCAB)


def plain_gptq(fmt: str) -> Recipe:
    """A shipped recipe without its walk back, whose seconds are spared where it proves nothing."""
    return load_recipe(f"gptq-{fmt}").rounded_for("output")


def j_of(out: Path, tokens: TokenSet, source: Path = MICRO) -> float:
    """Mean J of an output against its source, by `eval-kl`."""
    from mimoquant.evaluation.eval_kl import eval_kl

    return float(eval_kl(source, out, tokens, noise_floor=False)["j"]["mean"])


class StopError(Exception):
    """What a run is stopped by."""


@contextlib.contextmanager
def stopped_after(lines: int) -> Iterator[None]:
    """The run inside of the block has to end when its journal has so many lines."""
    record = RunFolder.record

    def stop(self: RunFolder, line: JournalLine) -> None:
        record(self, line)
        if len(self.finished) == lines:
            raise StopError

    with mock.patch.object(RunFolder, "record", stop), pytest.raises(StopError):
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a file that holds a JSON object."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
