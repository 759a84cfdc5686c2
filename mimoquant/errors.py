"""The error tree and its exit codes.

Key idea: every failure that a user can cause is one sentence (what, where, both numbers) and an optional hint;
`cli` turns it into an exit code in one place. Anything else that escapes is a bug and keeps its traceback (exit 1).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

MAX_CHARACTERS = 2000  # of a message
_USER_INFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?:[^\s/:@]*:\S*|[^\s/]*)@")
_SECRET_VALUE = re.compile(r"([?&#;][^\s=&]*(?:key|token|secret|passw|pwd|auth|sig)[^\s=&]*=)[^\s&#]+", re.IGNORECASE)
_CALLED: dict[str, str] = {}
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class MimoquantError(Exception):
    """A failure a user can cause. `exit_code`: see cli/README.md; `hint` says what to do about it."""

    exit_code = 1
    told = False  # another process of the run says it

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(_sentence(without_secrets(message)))
        self.hint = None if hint is None else without_secrets(hint)


@contextmanager
def called(path: str, name: str) -> Iterator[None]:
    """Inside of the block users are told `name` where a path begins with `path`, a folder that they have not named."""
    _CALLED[path] = name
    try:
        yield
    finally:
        del _CALLED[path]


def as_called(text: str) -> str:
    """The text with folders by the names that their user knows."""
    for path, name in _CALLED.items():
        text = text.replace(path, name)
    return text


def without_secrets(text: str) -> str:
    """The text, with folders as they are called, without what an address in it may hold of passwords: all before its
    `@`, and keys in its query. A path has one slash where the address had two."""
    text = as_called(text)
    if ":/" not in text:
        return text
    return _SECRET_VALUE.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def _sentence(message: str) -> str:
    """One line of bounded length, whatever a hostile file has for a name: line breaks, terminal codes, a megabyte."""
    if len(message) > MAX_CHARACTERS:
        message = f"{message[: MAX_CHARACTERS // 2]} ... {message[-MAX_CHARACTERS // 2 :]}"
    if message.isprintable():
        return message
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


class UsageError(MimoquantError):
    """The command line is wrong; nothing was done."""

    exit_code = 2


class RecipeError(MimoquantError):
    """The recipe is wrong, or does not fit this checkpoint; nothing was done."""

    exit_code = 2


class CheckpointError(MimoquantError):
    """The checkpoint (or other data) is wrong."""

    exit_code = 3


class StoppedError(MimoquantError):
    """The run stopped midway for a reason outside the data (disk full, I/O error); it can be resumed."""

    exit_code = 4


class QualityError(MimoquantError):
    """A quality gate failed: the output exists and is not what it claims."""

    exit_code = 5


def is_disk_trouble(error: OSError) -> bool:
    """Full, over quota, broken or read-only: nothing that another command line would mend."""
    return error.errno in _DISK_TROUBLE


def is_out_of_memory(error: Exception) -> bool:
    """numpy's and Python's, torch's for a GPU (by name: torch may not be loaded) and torch's for a CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or named
