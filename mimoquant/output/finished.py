"""Whether an output is there already, whole, and of this very plan: then a run that is started again has no work left.

Key idea: `run.json` goes when a folder gets its name, so what the run began with is read from what it wrote
(recipe.yaml or relayout.json, config.json), and told as a resume tells it; then every small file and every shard's hash
are held against plan and journal. A model card may have been edited. Left out: the source's values, which `verify`
reads, and the kind of device, which no file names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from mimoquant.calibration.tokens import CalibrationRecord, TokenSet
from mimoquant.checkpoint.hf_files import CONFIG_NAME, FINGERPRINTS_NAME
from mimoquant.checkpoint.journal import (
    JOURNAL_NAME,
    RUN_NAME,
    JournalLine,
    first_change,
    read_journal,
    short_value,
)
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.output.small_files import written_texts
from mimoquant.planning.plan import Plan
from mimoquant.planning.relayout import RECORD_NAME, RelayoutPlan

_AGAIN = "remove the folder to write it again, or choose another --out; verify --source tells all that is wrong"


def finished_already(plan: Plan, out: Path, tokens: TokenSet | None) -> dict[str, JournalLine] | None:
    """The journal of `out`, which this plan made; None where nothing is there, or what a run has not finished.

    Raises UsageError: what is there is no output, or was made otherwise; the first difference is named.
    CheckpointError: it is damaged.
    """
    if (out / RUN_NAME).is_file() or not os.path.lexists(out):
        return None
    before, now = _made_by(plan, out), _identity(plan, tokens)
    if isinstance(before, str):
        raise UsageError(
            f"{out}: exists already, and is no finished output: {before}", hint="choose another --out or remove it"
        )
    if found := first_change({key: before.get(key) for key in now}, now):
        what, was, is_now = found
        raise UsageError(
            f"{out}: is finished, and its {what} was {short_value(was)}, is now {short_value(is_now)}",
            hint="choose another --out, or remove the folder to write it again",
        )
    finished = {line.unit: line for line in read_journal(out / JOURNAL_NAME)}
    _check(plan, out, finished, tokens)
    return finished


def _identity(plan: Plan, tokens: TokenSet | None) -> dict[str, Any]:
    identity = plan.identity() | {"config": plan.config}
    if tokens:
        identity["calibration tokens"] = tokens.sha256
    return _plain(identity)


def _made_by(plan: Plan, out: Path) -> dict[str, Any] | str:
    """What `_identity` was when `out` was made; where that cannot be told, why."""
    record = RECORD_NAME if isinstance(plan, RelayoutPlan) else "recipe.yaml"
    if not out.is_dir():
        return "it is no folder"
    for name in (JOURNAL_NAME, CONFIG_NAME, record):
        if not (out / name).is_file():
            return f"{name} is missing"
    try:
        config = json.loads((out / CONFIG_NAME).read_bytes())
        if isinstance(plan, RelayoutPlan):
            held = json.loads((out / record).read_bytes())
            return {key: str(value) for key, value in held.items()} | {"config": config}
        recipe = yaml.safe_load((out / record).read_bytes())
        block = recipe["mimoquant"]
        provenance, calibration = block.pop("provenance"), block.get("calibration") or {}
        calibration.pop("max_starved_experts", None)  # as in `Plan.identity`
        return _plain(
            {
                "version": provenance["mimoquant"],
                "source headers": provenance["source_headers_sha256"],
                "container": block["container"],
                "recipe": recipe,
                "config": config,
                "calibration tokens": (provenance.get("calibration") or {}).get("tokens_sha256"),
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return f"{CONFIG_NAME} or {record} is not what a run writes"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, where all keys are text."""
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


def _check(plan: Plan, out: Path, finished: dict[str, JournalLine], tokens: TokenSet | None) -> None:
    """Raises CheckpointError where a file is not what plan and journal say."""
    for unit in plan.units:
        line = finished.get(unit.name)
        if line is None or (line.file, line.size_bytes) != (unit.file, unit.size_bytes):
            raise CheckpointError(f"{out}: is finished, but its journal does not have {unit.file}", hint=_AGAIN)
    texts = written_texts(plan, finished, CalibrationRecord.of(tokens).as_plain() if tokens else None)
    texts |= {FINGERPRINTS_NAME: tokens.fingerprints.as_bytes()} if tokens else {}
    for name in (*plan.side_files, *texts):
        path = out / name
        if not path.is_file():
            raise CheckpointError(f"{out}: is finished, but {name} is missing", hint=_AGAIN)
        if name in texts and name != "README.md" and path.read_bytes() != texts[name]:
            raise CheckpointError(f"{path}: is not what the run wrote", hint=_AGAIN)
    for line in finished.values():
        path = out / line.file
        if not line.is_whole_in(out):
            raise CheckpointError(f"{path}: is missing, or its bytes are not those of the journal", hint=_AGAIN)
