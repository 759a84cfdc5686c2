"""A repository on the Hub as a checkpoint's source: pinned to a commit, its small files here, its shards there.

Key idea: one question at the start pins the revision and lists names, sizes and hashes; from then on everything is read
of that commit. Small files come whole into a private folder, each held against the hash that the Hub keeps of it (git's
or LFS's), and `remote` reads the rest of that folder by ranges. This module is loaded only where a source is `hf://`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import constants, get_session

from mimoquant.checkpoint.folders import check_name
from mimoquant.checkpoint.hf_files import is_small, list_files, side_files
from mimoquant.checkpoint.index import shard_names
from mimoquant.checkpoint.journal import free_bytes
from mimoquant.checkpoint.kept import Downloads, keeping
from mimoquant.checkpoint.network import user_is_offline
from mimoquant.checkpoint.ranges import CONNECTIONS, Ranges, check_status, retried
from mimoquant.checkpoint.remote import RemoteFile, Wanted, standing_for
from mimoquant.checkpoint.repository import NETWORK_ERRORS, Repository, check_settings, offline, parse, refused
from mimoquant.checkpoint.scratch import scratch_folder
from mimoquant.checkpoint.writer import stopping, write_file_durably
from mimoquant.errors import CheckpointError, UsageError

WHOLE_BYTES = 2**24  # of a file that is asked for in one piece
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
BLOCK_BYTES = CONNECTIONS * 2**22


class HubSource:
    """A repository at one commit, open. See `remote.Store`."""

    def __init__(
        self, repository: Repository, files: dict[str, RemoteFile], folder: Path, *, keeps: bool = False
    ) -> None:
        self.name, self.revision = str(repository), f"{repository.name}@{repository.revision}"
        self.files, self.folder, self.keeps = files, folder, keeps
        self._ranges = Ranges(repository, files)
        self._fetching = threading.Lock()
        self._downloads: Downloads | None = None  # of a source that is kept, from the first tensor on

    @property
    def bytes_to_keep(self) -> int:
        if not self.keeps:
            return 0
        left = sum(self.files[name].size_bytes for name in self.shards if not (self.folder / name).exists())
        return left - sum(path.stat().st_size for path in self.folder.rglob(".*.incomplete"))

    def read(self, wanted: Sequence[Wanted]) -> None:
        self._ranges.read(wanted)

    def close(self) -> None:
        self._ranges.abort()
        if self._downloads:
            self._downloads.close()
        self._ranges.close()

    def fetch(self, file: str) -> None:
        """A whole file into the folder. Raises CheckpointError where it is not what the Hub has a hash of."""
        if self.keeps and file in self.shards:
            with self._fetching:
                self._downloads = self._downloads or Downloads(self._fetch, self.shards)
            self._downloads.wait_for(file)
            return
        with self._fetching:
            self._fetch(file)

    def fetch_rest(self) -> None:
        """What an ordinary checkpoint has beside what was read."""
        for name in self.shards:
            self.fetch(name)
        left_out = side_files(self.folder, self.shards).left_out
        for name in list_files(self.folder)[0]:
            if name not in left_out:
                self.fetch(name)

    @functools.cached_property
    def shards(self) -> list[str]:
        """As the index names them."""
        return [name for name in shard_names(self.folder) if name in self.files]

    def _fetch(self, file: str) -> None:
        if not (self.folder / file).exists():
            self._fetch_large(file) if self.files[file].size_bytes > WHOLE_BYTES else self._fetch_small(file)

    def fetch_small_files(self) -> None:
        """All that settings, tokenizers and cards are made of."""
        small = [name for name, held in self.files.items() if is_small(name, held.size_bytes)]
        missing = [name for name in small if not (self.folder / name).exists()]
        large = [name for name in missing if self.files[name].size_bytes > WHOLE_BYTES]
        self._ranges.map(self._fetch_small, [name for name in missing if name not in large])
        for name in large:  # each by several requests at once
            self._fetch_large(name)

    def _fetch_small(self, file: str) -> None:
        data = self._ranges.content(file)
        known = self.files[file]
        digest = hashlib.sha256() if known.sha256 else hashlib.sha1(f"blob {len(data)}\0".encode())
        digest.update(data)
        self._check(file, digest.hexdigest())
        path = self._place(file)
        if self.keeps:
            write_file_durably(path, data)
            return
        unfinished = path.with_name(f".{path.name}.incomplete")  # another thread opens what has its name
        with stopping(path):
            unfinished.write_bytes(data)
            unfinished.rename(path)

    def _fetch_large(self, file: str) -> None:
        """Under another name until it is whole; what is there of it is gone on with."""
        path, size = self._place(file), self.files[file].size_bytes
        unfinished = path.with_name(f".{path.name}.incomplete")
        digest = hashlib.sha256() if self.files[file].sha256 else hashlib.sha1(f"blob {size}\0".encode())
        block = memoryview(bytearray(min(size, BLOCK_BYTES)))
        with stopping(path), unfinished.open("a+b") as written:
            written.seek(0)
            while have := written.readinto(block):
                digest.update(block[:have])
            for begin in range(min(written.tell(), size), size, len(block)):
                part = block[: min(len(block), size - begin)]
                self.read([(file, begin, part)])
                digest.update(part)
                written.write(part)
            written.flush()
            if self.keeps:
                os.fsync(written.fileno())
        try:
            self._check(file, digest.hexdigest())
        except CheckpointError:
            unfinished.unlink()
            raise
        with stopping(path):
            unfinished.rename(path)

    def _place(self, file: str) -> Path:
        path = self.folder / file
        with stopping(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _check(self, file: str, found: str) -> None:
        known = self.files[file].sha256 or self.files[file].etag
        if known and found != known:
            raise CheckpointError(
                f"{self.name}/{file}: has the hash {found[:16]}, the Hub's record has {known[:16]}",
                hint="it was damaged on the way: try again",
            )


@contextlib.contextmanager
def opened(text: str, keep: Path | None = None) -> Iterator[Path]:
    """The folder that stands for `hf://ORG/NAME[@REVISION]` inside of the block. `keep`: where the source is to be
    as an ordinary checkpoint when the block is done.

    Raises UsageError: there is none, or it may not be read. CheckpointError: its names or files are not right.
    StoppedError: the Hub cannot be asked.
    """
    repository = parse(text)
    if user_is_offline():
        raise offline(repository)
    check_settings(repository)
    with _online(), contextlib.ExitStack() as stack:
        pinned, files = _pinned(repository)
        if keep is None:
            folder = stack.enter_context(scratch_folder("mimoquant-hub-"))
        else:
            folder = stack.enter_context(keeping(keep, f"{pinned.name}@{pinned.revision}"))
        source = HubSource(pinned, files, folder, keeps=keep is not None)
        with contextlib.closing(source), standing_for(source):
            source.fetch_small_files()
            if keep is not None:
                _check_room(source, keep)
            yield folder
            if keep is not None:
                source.fetch_rest()


def _check_room(source: HubSource, keep: Path) -> None:
    """Raises UsageError where the disk has no room for what is still to come."""
    needed, free = source.bytes_to_keep, free_bytes(source.folder)
    if needed > free:
        raise UsageError(
            f"--keep-source {keep}: needs {needed / 1e9:.2f} GB more but {free / 1e9:.2f} GB are free",
            hint="make room, choose another disk, or leave it out: then nothing is kept",
        )


@contextlib.contextmanager
def _online() -> Iterator[None]:
    """huggingface_hub may have been loaded by somebody who needed no network."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _pinned(repository: Repository) -> tuple[Repository, dict[str, RemoteFile]]:
    """The repository at a commit, and its files."""

    def ask() -> bytes:
        response = get_session().get(
            repository.listing,
            headers=repository.headers_for(repository.listing),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        check_status(response)
        return response.content

    try:
        raw = retried(ask, f"{repository} at {repository.endpoint}")
    except NETWORK_ERRORS as error:
        raise refused(repository, error) from error
    try:
        told = json.loads(raw)
        if not _COMMIT.fullmatch(told["sha"]):
            raise ValueError
        pinned = replace(repository, revision=told["sha"])
        listed = [_listed(held) for held in told["siblings"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{repository}: {repository.endpoint} does not list its files with their sizes",
            hint="is HF_ENDPOINT a Hub?",
        ) from error
    return pinned, _checked(str(pinned), listed)


def _checked(where: str, listed: list[tuple[str, RemoteFile]]) -> dict[str, RemoteFile]:
    """Raises CheckpointError where names lead out, are of no file that a clone would have, or of two at once: one
    could come to lie over another."""
    files = dict(listed)
    for name in files:
        check_name(where, name)
        if PurePosixPath(name).as_posix() != name or name == ".":
            raise CheckpointError(f"{where}: lists {name!r}, which is no name of a file")
        above = next((str(place) for place in PurePosixPath(name).parents if str(place) in files), None)
        if above:
            raise CheckpointError(f"{where}: lists {above!r} as a file and as the folder of {name!r}")
    if len(files) < len(listed):
        raise CheckpointError(f"{where}: lists {len(listed)} files by {len(files)} names")
    return files


def _listed(held: dict[str, Any]) -> tuple[str, RemoteFile]:
    """A file of the listing. Raises TypeError, KeyError where it is not told as the Hub does."""
    large = held.get("lfs") or {}
    size, sha256, blob = large.get("size", held["size"]), large.get("sha256"), held.get("blobId")
    if type(size) is not int or size < 0 or not all(isinstance(one, str | None) for one in (sha256, blob)):
        raise TypeError
    return str(held["rfilename"]), RemoteFile(size, sha256 or blob or "", sha256)
