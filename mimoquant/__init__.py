"""mimoquant: the fastest and most faithful way to a 4-bit MiMo-V2 checkpoint."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def micro_checkpoint() -> Path:
    """The trained micro checkpoint that the package ships, in the published V2.5 format (see its README)."""
    return Path(__file__).parent / "micro"


def micro_drafter() -> Path:
    """A DFlash drafter trained for the micro checkpoint, in the published form (see its README)."""
    return Path(__file__).parent / "micro_dflash"
