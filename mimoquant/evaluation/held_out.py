"""Held-out means held out: data that a candidate was calibrated on is refused.

Key idea: the recipe beside a candidate says what that was (`calibration.tokens.CalibrationRecord`). One by another tool
says nothing, and nothing is refused then.
"""

from __future__ import annotations

from pathlib import Path

from mimoquant.calibration.tokens import CalibrationRecord, TokenSet
from mimoquant.errors import UsageError
from mimoquant.shipped import HELD_OUT_SET


def refuse_shared_data(candidate: Path, tokens: TokenSet) -> None:
    """Raise UsageError where the candidate was calibrated on a sequence, or from a file, that `tokens` has too."""
    path = candidate / "recipe.yaml"
    record = CalibrationRecord.read(path) if path.is_file() else None
    if record is not None:
        refuse_shared(record, tokens, str(candidate))


def refuse_shared(record: CalibrationRecord, tokens: TokenSet, who: str) -> None:
    """The same of what is known to have been calibrated on, by `who`."""
    sequences, files = record.shared_with(tokens)
    if sequences or files:
        what = f"{sequences} of {len(tokens.ids)} sequences" if sequences else f"the file {files[0]}"
        raise UsageError(
            f"--data {tokens.name}: shares {what} with what {who} was calibrated on ({record.name})",
            hint=f"a model looks better on what it was calibrated on; give held-out data, such as {HELD_OUT_SET}",
        )
