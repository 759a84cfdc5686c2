"""Pages and profiles: whether a verb may write one, refused before a long run; and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mimoquant.assembly.files import check_writable
from mimoquant.errors import UsageError, as_called

if TYPE_CHECKING:
    from mimoquant.planning.plan import Plan


def check_page(path: Path, made: Plan, out: Path) -> None:
    """Refuse before a long run what would only fail after it."""
    if not made.recipe.calibrated:
        raise UsageError(
            f"--html {path}: recipe {made.recipe.name} does not calibrate, there is nothing to show",
            hint="leave --html out, or choose a recipe that calibrates, such as gptq-int4-g128",
        )
    check_writable(path, (made.layout.index.folder, out, Path(f"{out}.partial")))


def check_profile(path: Path, made: Plan, out: Path) -> None:
    """The same for --profile."""
    check_writable(path, (made.layout.index.folder, out, Path(f"{out}.partial")), "--profile")


def write_page(path: Path, page: str, option: str = "--html") -> None:
    try:
        path.write_text(as_called(page), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror})") from error
