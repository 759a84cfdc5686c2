"""The window that a checkpoint's config means, for transformers of any version to compute with.

From 5.24 on transformers reads `sliding_window_size`, before `sliding_window` and as tokens before the query: one key
more than vLLM and we see. `test_transformers.py` holds that; all else compares with the window that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path


def meant_window(folder: Path) -> int:
    """Keys that a query sees, itself among them; to be given to `from_pretrained` as `sliding_window`."""
    return int(json.loads((folder / "config.json").read_text())["sliding_window_size"])
