"""What a benchmark ran with, for the line above its table."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version


def versions(names: tuple[str, ...]) -> str:
    """Python's and the packages' versions, and the commit."""
    told = []
    for name in names:
        try:
            told.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            told.append(f"{name} not installed")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return f"Python {platform.python_version()}, {', '.join(told)}; commit {commit}"
