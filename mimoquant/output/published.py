"""What of an output may be another where it was published: what readers look at, and the chat template.

Key idea: weights and config are the proof. Who publishes a checkpoint writes its model card, adds pictures and a
licence, and mends its chat template; such files are told of, and are not held against it. A template is a program all
the same, so it must still be built (`output.libraries`). All else that differs is a problem.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from mimoquant.checkpoint.folders import is_there
from mimoquant.checkpoint.index import read_json_inside
from mimoquant.errors import CheckpointError

_FOR_READERS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "CITATION")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_MORE_TEMPLATES = "additional_chat_templates"
_HOLD_A_TEMPLATE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def may_be_edited(name: str) -> bool:
    """Whether a file is for readers, whom no program is, or a chat template."""
    path = PurePosixPath(name)
    if path.suffix.lower() in _FOR_READERS or (
        path.name.upper().startswith(_LEGAL) and path.suffix in ("", ".txt", ".cff")
    ):
        return True
    return name in _TEMPLATES or (str(path.parent) == _MORE_TEMPLATES and path.suffix == ".jinja")


def is_dangling_index(name: str, out: Path) -> bool:
    """Whether a file is an index of weights of which none is there, as the Hub's conversions leave them."""
    if "/" in name or not name.endswith(".index.json"):
        return False
    try:
        files = read_json_inside(out, name).get("weight_map")
    except CheckpointError:
        return False
    return isinstance(files, dict) and not any(isinstance(file, str) and is_there(out, file) for file in files.values())


def only_template_differs(name: str, out: Path, source: Path) -> bool:
    """Whether a tokenizer's or processor's config is the source's but for its `chat_template`."""
    if name not in _HOLD_A_TEMPLATE:
        return False
    try:
        ours, theirs = (read_json_inside(folder, name, unique=True) for folder in (source, out))
    except CheckpointError:
        return False
    ours.pop("chat_template", None)
    theirs.pop("chat_template", None)
    return json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
