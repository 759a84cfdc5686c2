"""What ships with the package: recipes and data sets, by name, and which sets are taken by default.

Key idea: only the file system is asked and nothing is imported, so that a shell can complete these names in no time.
"""

from __future__ import annotations

from pathlib import Path

CALIBRATION_SET = "mixed-v1"  # what recipes calibrate on, unless they say otherwise
HELD_OUT_SET = "heldout-v1"  # what J is measured on, unless told otherwise
HELD_OUT_TOKENS = 512  # per sequence of it
SENSITIVITY_SEQUENCES = 56  # of it, that choose a mixture


def recipes_folder() -> Path:
    return _shipped("recipes")


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def calib_folder() -> Path:
    return _shipped("calib")


def shipped_sets() -> list[str]:
    folder = calib_folder()
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _shipped(name: str) -> Path:
    """Beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
