"""A checkpoint as the Hub's cache holds it: links into blobs, which lie on another disk, named through a link."""

from __future__ import annotations

import shutil
from pathlib import Path


def hub_cache(folder: Path, root: Path, name: str = "ours") -> Path:
    """The snapshot's folder under `root`, with a link for each file of `folder`; `name`: of the model."""
    repo, blobs = root / f"models--me--{name}", root / f"disk-{name}"
    snapshot = repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    repo.mkdir()
    (repo / "blobs").symlink_to(blobs)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        target.symlink_to("../" * len(target.parent.relative_to(repo).parts) + f"blobs/{number}")
    return snapshot
