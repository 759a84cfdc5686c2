"""JSON files beside the shards that no parser takes: told before a run, which refuses them or writes them mended.

Key idea: side files are copied as bytes. One that is no JSON would be copied as well, and stop whoever loads the copy.
The one fault that can be mended without a guess is a comma after the last entry, as in the first revisions of
MiMo-V2.6-Flash's dflash/config.json. It is mended where that is asked for, and `verify` knows what was made of it.

Left out: what the JSON says, files that are too large to be settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mimoquant.checkpoint.folders import open_inside
from mimoquant.errors import CheckpointError
from mimoquant.model.layout import ModelLayout
from mimoquant.model.releases import release_of
from mimoquant.wording import many

MAX_BYTES = 64 * 2**20
_LAST_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+")|,(?=\s*[}\]])')  # a string, which is skipped; or such a comma
_MENDED_BY = {
    ("MiMo-V2.6-Flash", "dflash/config.json"): "XiaomiMiMo/MiMo-V2.6-Flash-RL mends it in revision b2674c72",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A JSON file that is none. `text`: why, in a sentence; `hint`: what helps; `mended`: its bytes without the commas
    that are too many, None where these are not all that is wrong."""

    name: str
    text: str
    hint: str
    mended: bytes | None


def json_faults(layout: ModelLayout, names: Iterable[str]) -> tuple[Fault, ...]:
    """Of the files of a checkpoint's folder, those that are called JSON and are none."""
    found = (_fault(layout, name) for name in names if name.endswith(".json"))
    return tuple(fault for fault in found if fault is not None)


def refusal(faults: Iterable[Fault], *, mend: bool) -> CheckpointError | None:
    """Why they cannot be carried over: the first that is not mended, or cannot be."""
    for fault in faults:
        if not (mend and fault.mended is not None):
            return CheckpointError(fault.text, hint=fault.hint)
    return None


def _fault(layout: ModelLayout, name: str) -> Fault | None:
    folder, release = layout.index.folder, release_of(layout)
    raw = _read(folder, name)
    problem = None if raw is None else _problem(raw)
    if raw is None or problem is None:
        return None
    text = raw.decode("utf-8-sig", "replace")
    mended = _LAST_COMMA.sub(lambda found: found[1] or "", text)
    if _problem(mended.encode()) is not None:
        hint = "fetch that file again, or take it out of the folder: it would stop whoever loads the copy"
        return Fault(name, f"{folder / name}: is not valid JSON ({problem})", hint, None)
    commas = many(len(text) - len(mended), "comma")
    hint = _MENDED_BY.get((release.name if release else "", name), "a later revision may have it mended")
    return Fault(
        name,
        f"{folder / name}: is not valid JSON, it has {commas} before a closing bracket, which no parser takes",
        f"{hint}; --mend-json writes the copy without",
        mended.encode(),
    )


def _read(folder: Path, name: str) -> bytes | None:
    """A file's bytes; None where it is larger than settings are."""
    try:
        with open_inside(folder, name) as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error
    return raw if len(raw) <= MAX_BYTES else None


def _problem(raw: bytes) -> str | None:
    try:
        json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return str(error)[:120]
    return None
