"""Which files of a folder may be opened: those that lie in it, and those of the Hub cache that it is a snapshot of.

Key idea: a name is resolved once, the resolved path is held against the allowed roots, and that path, without links, is
what is opened. A snapshot of the Hub's cache is links into its own `blobs`, which may itself be a link (to a larger
disk); any other link that leads out is refused.
Reference: the cache layout of huggingface_hub (`models--ORG--NAME/{blobs,refs,snapshots}`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from mimoquant.checkpoint.remote import remote_of
from mimoquant.errors import CheckpointError

_CACHED_REPO = "models--"
LFS_POINTER = b"version https://git-lfs"  # how what a clone without LFS has instead of a file begins
LFS_HINT = "run git lfs pull there, or download it with hf download"
_OUTSIDE = "copy the files into one folder (cp -rL), or name the folder that they lie in"


def resolve_inside(folder: Path, name: str) -> Path:
    """Where `name` of `folder` really lies: an absolute path without links, of a regular file.

    Raises CheckpointError for a name or link that leads out of the folder (and of its Hub cache), for what is not there
    and for what is no regular file.
    """
    check_name(folder, name)
    path = folder / name
    if not path.exists() and (remote := remote_of(folder)) and remote.is_away(name):
        remote.fetch(name)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(
                f"{path}: is a link to {os.readlink(path)}, where there is no file",
                hint="the download is incomplete: fetch the missing file and try again",
            )
        if remote_of(folder):
            raise CheckpointError(
                f"{folder}: {name} is not in the repository", hint="name a revision that has it: hf://ORG/NAME@REVISION"
            )
        raise CheckpointError(
            f"{folder}: {name} is missing", hint="the download is incomplete: fetch the missing file and try again"
        )
    resolved = path.resolve()
    if not lies_inside(resolved, folder):
        raise CheckpointError(
            f"{path}: is a link that leads out of the checkpoint folder, to {resolved}", hint=_OUTSIDE
        )
    if not resolved.is_file():
        raise CheckpointError(f"{path}: is not a regular file")
    return resolved


def check_name(folder: Path | str, name: str) -> None:
    """Raises CheckpointError for a name of a file that leads out of its folder, or that no file can have."""
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in Path(name).parts:
        raise CheckpointError(f"{folder}: the path {name!r} leads out of the checkpoint folder")
    if len(os.fsencode(name)) > 1000 or any(len(os.fsencode(part)) > 255 for part in Path(name).parts):
        raise CheckpointError(f"{folder}: the file name {name} is too long to exist")


def open_inside(folder: Path, name: str) -> BufferedReader:
    """`name` of `folder`, open for reading: the very file that was resolved and checked, whatever is swapped meanwhile.

    Raises CheckpointError as `resolve_inside`, and where the file is another by the time it is open. OSError: it cannot
    be opened.
    """
    return open_resolved(resolve_inside(folder, name), folder, name)


def open_resolved(resolved: Path, folder: Path, name: str) -> BufferedReader:
    """The file that `name` of `folder` was resolved to, and checked as. Raises as `open_inside` does after that."""
    descriptor = os.open(resolved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    opened = Path(f"/proc/self/fd/{descriptor}")
    if opened.exists() and opened.resolve() != resolved:  # a folder on the way became a link in between
        os.close(descriptor)
        raise CheckpointError(f"{folder / name}: was exchanged while it was being opened")
    return os.fdopen(descriptor, "rb")


def read_inside(folder: Path, name: str, max_bytes: int) -> bytes:
    """The bytes of `name` of `folder`. Raises CheckpointError as `open_inside`, for what cannot be read and for what is
    larger."""
    path, remote = folder / name, remote_of(folder)
    if remote and remote.is_away(name) and (size := remote.size_of(name)) > max_bytes:  # before it is fetched
        raise CheckpointError(f"{path}: {size} bytes, more than the {max_bytes} that it may have")
    try:
        with open_inside(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise CheckpointError(f"{path}: {size} bytes, more than the {max_bytes} that it may have")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def sha256_inside(folder: Path, name: str) -> str:
    """sha256 of `name` of `folder`, in hex. Raises CheckpointError as `open_inside`, and for what cannot be read."""
    try:
        with open_inside(folder, name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error


def is_there(folder: Path, name: str) -> bool:
    """Whether there is such a name, be it a link that leads nowhere."""
    remote = remote_of(folder)
    return os.path.lexists(folder / name) or (remote is not None and remote.file(name) is not None)


def top_level_names(folder: Path) -> list[str]:
    """Of what lies in a folder itself."""
    remote = remote_of(folder)
    return [path.name for path in folder.iterdir()] if remote is None else [n for n in remote.names if "/" not in n]


def lies_inside(resolved: Path, folder: Path) -> bool:
    """Whether a path without links is the folder's, or of the Hub cache that the folder is a snapshot of."""
    return any(resolved.is_relative_to(root) for root in _roots(folder.resolve()))


def _roots(folder: Path) -> Iterator[Path]:
    """The folder that the user named and, where it is (part of) a snapshot of the Hub's cache, that cache's blobs."""
    yield folder
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith(_CACHED_REPO):
            yield (place.parent.parent / "blobs").resolve()
            return
