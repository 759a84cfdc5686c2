"""A result file of an evaluation, and what it was made of: a job that is queued again finds that it has no work left.

Key idea: a result names its checkpoints by paths, which may hold others since. So the file also has digests of their
headers, config and of their shards' sizes and times of change, and what else the numbers follow from. How many
processes shared the work is not among it, for they give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.journal import first_change, short_value
from mimoquant.errors import UsageError
from mimoquant.evaluation.documents import FolderEvaluation, KeptEvaluation
from mimoquant.wording import json_text

_ALSO = ("tokens a sequence", "tokens", "noise floor", "rounding", "kind of device")


def made_of(identity: Mapping[str, Any]) -> dict[str, str]:
    """What another result must differ in, of what an evaluation that is taken up must share (`eval_kl`)."""
    told = {"version": identity["version"]}
    for role in ("reference", "candidate", "baseline"):
        if held := identity[role]:
            told |= {f"{role} headers": held["headers"], f"{role} config": _digest(held["config"])}
            told[f"{role} files"] = _digest(identity[f"{role} files"])
    return told | {key: identity[key] for key in _ALSO}


def result_text(evaluation: FolderEvaluation, made: dict[str, str]) -> str:
    """The file."""
    kept: KeptEvaluation = {**evaluation, "made_of": made}
    return json_text(kept) + "\n"


def finished_result(path: Path, made: dict[str, str]) -> FolderEvaluation | None:
    """The evaluation that a file holds, made of this very thing; None where there is no file.

    Raises UsageError: it was made of something else, which is told, or it is no result.
    """
    evaluation: FolderEvaluation | None = kept_document(path, made, path, "no result of eval-kl")
    return evaluation


def kept_document(path: Path, made: Mapping[str, str], out: Path, otherwise: str) -> Any:
    """The document of a JSON file, less its `made_of`, which has to be `made`; None where there is no file.

    Raises UsageError about `out`, the file that the caller named: it was made of something else, or is `otherwise`.
    """
    try:
        kept = json.loads(path.read_bytes())
        before = kept.pop("made_of")
        found = first_change({key: before.get(key) for key in (*made, *before)}, made)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise UsageError(
            f"--out {out}: exists, and {'' if path == out else f'{path} '}is {otherwise} that --resume could hold "
            "against this one",
            hint="choose another name or remove it",
        ) from error
    if found:
        what, was, now = found
        raise UsageError(
            f"--out {out}: is finished, and its {what} was {short_value(was)}, is now {short_value(now)}",
            hint="choose another --out, or remove the file to measure again",
        )
    return kept


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
