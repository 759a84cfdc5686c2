"""A result file of an evaluation, and what it was made of: a job that is queued again finds that it has no work left.

Key idea: a result names its checkpoints by paths, which may hold others since. So the file also has digests of their
headers, config and of their shards' sizes and times of change, and what else the numbers follow from. How many
processes shared the work is not among it, for they give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mimoquant.__version__ import __version__
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.journal import first_change, short_value
from mimoquant.errors import UsageError
from mimoquant.evaluation.documents import FolderEvaluation, KeptEvaluation
from mimoquant.model.layout import ModelLayout
from mimoquant.wording import json_text


def made_of(layouts: dict[str, ModelLayout], tokens: TokenSet, noise_floor: bool, device: str) -> dict[str, str]:
    """What another result must differ in. `layouts`: by role. `device`: of any index, its kind counts."""
    told = {"version": __version__}
    for role, layout in layouts.items():
        told[f"{role} headers"] = layout.index.headers_fingerprint()
        told[f"{role} config"] = _digest(layout.config)
        told[f"{role} files"] = _digest(layout.index.stamps())
    return told | {
        "tokens a sequence": str(tokens.ids.shape[1]),
        "tokens": tokens.sha256,
        "noise floor": str(noise_floor),
        "kind of device": device.partition(":")[0],
    }


def result_text(evaluation: FolderEvaluation, made: dict[str, str]) -> str:
    """The file."""
    kept: KeptEvaluation = {**evaluation, "made_of": made}
    return json_text(kept) + "\n"


def finished_result(path: Path, made: dict[str, str]) -> FolderEvaluation | None:
    """The evaluation that a file holds, made of this very thing; None where there is no file.

    Raises UsageError: it was made of something else, which is told, or it is no result.
    """
    try:
        kept = json.loads(path.read_bytes())
        before = kept.pop("made_of")
        found = first_change({key: before.get(key) for key in (*made, *before)}, made)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(
            f"--out {path}: exists, and is no result of eval-kl that --resume could hold against this one",
            hint="choose another name or remove it",
        ) from error
    if found:
        what, was, now = found
        raise UsageError(
            f"--out {path}: is finished, and its {what} was {short_value(was)}, is now {short_value(now)}",
            hint="choose another --out, or remove the file to measure again",
        )
    evaluation: FolderEvaluation = kept
    return evaluation


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
