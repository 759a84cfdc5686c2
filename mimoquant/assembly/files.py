"""Where a file beside the checkpoints may be written: refused before a long run rather than after it."""

from __future__ import annotations

from pathlib import Path

from mimoquant.errors import UsageError


def check_new(path: Path, checkpoints: tuple[Path, ...]) -> None:
    """The same of --out, which must not be there yet."""
    if path.exists():
        raise UsageError(f"--out {path}: exists already", hint="choose another name or remove it")
    check_writable(path, checkpoints, "--out")


def check_writable(path: Path, checkpoints: tuple[Path, ...], option: str = "--html") -> None:
    """Try to write a file, and leave no trace of it."""
    try:
        target = path.resolve()
        for folder in checkpoints:
            if target.is_relative_to(folder.resolve()):
                raise UsageError(f"{option} {path}: lies in {folder}, which holds a checkpoint and nothing else")
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise UsageError(f"{option} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
