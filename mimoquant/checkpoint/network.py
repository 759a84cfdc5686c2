"""Whether Hugging Face's libraries may reach the network: only a source that is named `hf://` does.

Key idea: the libraries read their settings once, when they are first imported, and everything they are given is a local
folder. What the user had set before is kept, since that is what says whether a source on the Hub may be read.
"""

from __future__ import annotations

import os

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads them
_before: dict[str, str | None] = {}


def stay_offline() -> None:
    """Before a library of Hugging Face is imported that could look something up."""
    for name, value in _OFFLINE.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def user_is_offline() -> bool:
    """Whether the user has forbidden what `hf://` would do."""
    values = [_before.get(name, os.environ.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return any(str(value).upper() in _TRUE for value in values)
