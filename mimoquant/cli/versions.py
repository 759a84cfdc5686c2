"""What `--version` says: this program, Python, the libraries that numbers may depend on. Nothing of it is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import mimoquant

LIBRARIES = ("torch", "triton", "numba", "numpy", "safetensors", "tokenizers")
OPTIONAL = ("transformers", "datasets", "compressed-tensors", "llmcompressor")


def version_text() -> str:
    """One `name version` a line, as a bug report needs it; libraries that are not needed only where they are there."""
    found = {"mimoquant": mimoquant.__version__, "python": platform.python_version()}
    for name in (*LIBRARIES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return "\n".join(f"{name} {number}" for name, number in found.items())
