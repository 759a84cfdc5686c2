"""What a `sensitivity` run found, in a file beside its recipe: a job that is queued again sees that no work is left.

Key idea: a recipe has the evidence for its choice only, and its name says nothing of what it was made from. So all
findings are kept, with what they follow from and a digest of the recipe. They are written before the recipe: where that
is, they are. How many processes shared the work is not among it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.writer import write_file_durably
from mimoquant.errors import UsageError
from mimoquant.evaluation.kept_result import kept_document
from mimoquant.machine.team import Team
from mimoquant.mixing.documents import KeptFindings, SensitivityFindings
from mimoquant.wording import json_text

_WRITTEN = "written recipe"


def findings_path(out: Path) -> Path:
    """Beside the recipe `out`."""
    return out.with_suffix(".findings.json")


def made_of(identity: Mapping[str, Any], budget: int | None, target_j: float | None) -> dict[str, str]:
    """What findings that are there already must share with those that are asked for."""
    limit = {"budget in bytes": budget, "target of J": target_j}
    return _flat({key: value for key, value in identity.items() if key != "processes"} | limit)


def keep_findings(out: Path, findings: SensitivityFindings, made: Mapping[str, str], recipe: str) -> None:
    """Write the file; `recipe` is the text that `out` will have."""
    kept: KeptFindings = {**findings, "made_of": {**made, _WRITTEN: hashlib.sha256(recipe.encode()).hexdigest()}}
    write_file_durably(findings_path(out), (json_text(kept) + "\n").encode())


def kept_findings(out: Path, made: Mapping[str, str], team: Team) -> SensitivityFindings | None:
    """What was found when the recipe `out` was written, on every rank; None where there is no recipe.

    Raises UsageError: it was made of something else, was edited since, or nothing tells what it was made of.
    """
    findings: SensitivityFindings | None = team.gather(_read(out, made) if team.leads else None)[0]
    return findings


def _read(out: Path, made: Mapping[str, str]) -> Any:
    if not out.is_file():
        return None
    path, now = findings_path(out), {**made, _WRITTEN: hashlib.sha256(out.read_bytes()).hexdigest()}
    if (kept := kept_document(path, now, out, "not what sensitivity wrote beside a recipe")) is None:
        raise UsageError(
            f"--out {out}: exists already, and {path.name}, which would tell what it was made of, is not beside it",
            hint="choose another name or remove it",
        )
    return kept


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested keys with dots between them."""
    if not isinstance(value, dict):
        return {name: str(value)}
    return {key: held for part in value for key, held in _flat(value[part], f"{name}.{part}".lstrip(".")).items()}
