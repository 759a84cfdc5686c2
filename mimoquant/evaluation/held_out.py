"""Held-out means held out: data that a candidate was calibrated on is refused.

Key idea: beside a candidate lie its recipe and the fingerprints of the text it was calibrated on
(`calibration.tokens.CalibrationRecord`), so content decides, and neither names of files nor the length of sequences.
Outputs of earlier versions have no fingerprints: sequences and files are compared then. A recipe by another tool says
nothing, and nothing is refused.
"""

from __future__ import annotations

from pathlib import Path

from mimoquant.calibration.fingerprints import OVERLAP_LIMIT
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet
from mimoquant.checkpoint.folders import is_there
from mimoquant.errors import UsageError
from mimoquant.shipped import HELD_OUT_SET
from mimoquant.wording import percent

_HINT = f"a model looks better on what it was calibrated on; give held-out data, such as {HELD_OUT_SET}"


def refuse_shared_data(candidate: Path, tokens: TokenSet) -> float | None:
    """The share of `tokens` that the candidate was calibrated on; None where it does not say on what.

    Raises UsageError: that is OVERLAP_LIMIT or more. CheckpointError: what the candidate says of it is damaged.
    """
    record = CalibrationRecord.read(candidate) if is_there(candidate, "recipe.yaml") else None
    return None if record is None else refuse_shared(record, tokens, str(candidate))


def refuse_shared(record: CalibrationRecord, tokens: TokenSet, who: str) -> float:
    """The same of what is known to have been calibrated on, by `who`."""
    calibrated = f"what {who} was calibrated on ({record.name})"
    if record.fingerprints is not None:
        share = tokens.fingerprints.share_in(record.fingerprints)
        if share >= OVERLAP_LIMIT:
            what = "text, images or sounds" if any(tokens.media) else "text"
            told = f"{percent(share)} of its {what} with {calibrated}; less than {percent(OVERLAP_LIMIT)} may be"
            raise UsageError(f"--data {tokens.name}: shares {told}", hint=_HINT)
        return share
    sequences, files = record.shared_with(tokens)
    if sequences or files:
        what = f"{sequences} of {len(tokens.ids)} sequences" if sequences else f"the file {files[0]}"
        raise UsageError(f"--data {tokens.name}: shares {what} with {calibrated}", hint=_HINT)
    return 0.0
