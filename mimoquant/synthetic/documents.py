"""What `synth` says, field by field: what `--json` prints and the Python function returns."""

from __future__ import annotations

from typing import TypedDict


class SynthDocument(TypedDict):
    """A small checkpoint that was written."""

    schema_version: int
    """Of this document; a number changes its meaning only together with this one."""
    out: str
    """The folder."""
    layout: str
    """The published on-disk format: flash, v2.5 or pro."""
    tensors: int
    """Tensors, scales among them."""
    files: int
    """Shards."""
    size_bytes: int
    """Of all shards."""
    trap: list[str]
    """Weights that lie in another file than their scale, as some published ones do."""
