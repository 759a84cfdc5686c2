"""Write one safetensors shard as a stream, hashed on the way.

Key idea: the plan fixes every entry before the first byte is computed, so the header is written first and tensors
follow in header order. Memory stays at one tensor, the size is known to the byte, and the sha256 is of the bytes that
were meant, not of what a disk gave back. Hashing takes longer than writing to a fast disk, so both happen at once, and
what is written next does not wait for it.

The header carries one metadata key (`format: pt`): anything else would make equal outputs differ.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.index import DTYPE_BYTES
from mimoquant.errors import CheckpointError, StoppedError
from mimoquant.machine.hashing import Hashing

TEMPORARY = ".tmp"  # behind the name of a small file that is being written
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW  # a link would lead out of the folder
_COPY_BLOCK = 2**22


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return _size_bytes(self.dtype, self.shape)


@functools.lru_cache(maxsize=4096)  # 100,000 tensors have some dozen shapes, and each is asked for several times
def _size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPE_BYTES[dtype] * math.prod(shape)


def file_order(entry: Entry) -> tuple[int, str]:
    """Sorts tensors by falling item size, so that each starts where its dtype can be read."""
    return -DTYPE_BYTES[entry.dtype], entry.name


def shard_header(entries: list[Entry], *, metadata: bool = True) -> bytes:
    """Length prefix and JSON header of a shard with these entries in this order, padded to 8 bytes.

    `metadata`: with the key `format: pt`, which some readers ask for.

    Raises ValueError where a tensor would start at an address its dtype cannot be read from.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    position = 0
    for entry in entries:
        if position % DTYPE_BYTES[entry.dtype]:
            raise ValueError(f"{entry.name}: {entry.dtype} would start at the odd byte {position}")
        end = position + entry.size_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (position, end)}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class ShardWriter:
    """Writes the tensors of one shard in the order of `entries`; `close` makes it durable and returns its sha256.

    What is written is still read after `write` has returned, so nobody may change it before `close`. `hashing`: who
    hashes it, and others beside; None: threads of its own.
    """

    def __init__(self, path: Path, entries: list[Entry], hashing: Hashing | None = None) -> None:
        self.path = path
        self._entries = [entry for entry in entries if entry.size_bytes]
        self._next = 0  # the entry that is being written, and how much of it is still to come
        self._left = self._entries[0].size_bytes if self._entries else 0
        self._opened = contextlib.ExitStack()
        hashing = hashing or self._opened.enter_context(Hashing())
        self._sha256 = self._opened.enter_context(contextlib.closing(hashing.stream()))
        self.size_bytes = 0
        with stopping(path):
            self._file = os.open(path, _CREATE, 0o644)
        try:
            self._put(shard_header(entries))
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Append bytes of the next tensor: all of it, or its next part."""
        if data.nbytes == 0:
            return  # an empty tensor is an entry of the header without bytes
        expected = self._entries[self._next].name if self._next < len(self._entries) else "the end"
        if name != expected or data.nbytes > self._left:
            raise ValueError(f"{self.path}: got {data.nbytes} bytes of {name} where {self._left} of {expected} follow")
        self._put(data.reshape(-1).view(np.uint8).data)
        self._left -= data.nbytes
        if self._left == 0:
            self._next += 1
            self._left = self._entries[self._next].size_bytes if self._next < len(self._entries) else 0

    def close(self) -> str:
        """fsync and close; returns the sha256 of the whole file in hex."""
        if self._next < len(self._entries):
            raise ValueError(f"{self.path}: {self._entries[self._next].name} was never written in full")
        with stopping(self.path):
            os.fsync(self._file)
        sha256 = self._sha256.hexdigest()
        self.abandon()
        return sha256

    def abandon(self) -> None:
        """Close without the promise that the file is whole."""
        self._opened.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._sha256.put(view)
        with stopping(self.path):
            self.size_bytes += write_all(self._file, view)
        self._sha256.wait()


class stopping:
    """Turns an OSError of a write into a StoppedError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        if isinstance(error, OSError):
            raise stopped(self.path, error) from error


def stopped(path: Path, error: OSError) -> StoppedError:
    """The end of a run that could not write `path`."""
    return StoppedError(
        f"{path}: cannot be written ({error.strerror})",
        hint="make room or mend the permissions, then run the same command again with --resume",
    )


def write_file_durably(path: Path, data: bytes) -> None:
    """Create or replace a small file so that a crash leaves either the old or the new one."""
    temporary = path.with_name(path.name + TEMPORARY)
    with stopping(path):
        _write_synced(temporary, [data])
        os.replace(temporary, path)
        fsync_folder(path.parent)


def copy_file_durably(origin: Path, path: Path) -> None:
    """Copy a file's bytes, not its permissions. Its name is durable when the folder is."""
    with stopping(path):
        _write_synced(path, _blocks(origin))


def _blocks(origin: Path) -> Iterator[bytes]:
    try:
        with origin.open("rb") as source:
            while block := source.read(_COPY_BLOCK):
                yield block
    except OSError as error:
        raise CheckpointError(f"{origin}: cannot be read ({error.strerror})") from error


def _write_synced(path: Path, blocks: Iterable[bytes]) -> None:
    descriptor = os.open(path, _CREATE, 0o644)
    try:
        for block in blocks:
            write_all(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> int:
    """Write all of it, in as many calls as the disk makes of it; returns the number of bytes."""
    view = memoryview(data)
    while view:
        count = os.write(descriptor, view)
        if not count:
            raise OSError(errno.EIO, "the disk takes no more")
        view = view[count:]
    return len(data)


def make_folder_durably(folder: Path) -> None:
    """Make a folder, with its parents, so that a power loss leaves it where it is."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for path in missing or [folder]:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
