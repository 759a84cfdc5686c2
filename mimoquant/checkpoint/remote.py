"""Sources that are not on this machine: which folder stands for one, and what is read of it from afar.

Key idea: a source on the Hub is a private folder here that has its small files, so whatever reads JSON reads them as
ever; its shards stay where they are. Who opens a file of such a folder that is not there asks `remote_of`: tensors and
headers are read by ranges, other files are fetched whole when they are first opened. For every other folder the answer
is None, and nothing is different. `hub` makes these sources; this module does not know the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mimoquant.errors import called

Wanted = tuple[str, int, memoryview]  # a file, the first byte, where its bytes go, whose length is theirs


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What is known of a file before it is read. `etag`: tells its content from another; `sha256`: of the content,
    where the Hub keeps it (for what is stored by LFS)."""

    size_bytes: int
    etag: str
    sha256: str | None


class Store(Protocol):
    """A source that is open. `name`: as the user knows it, pinned to a commit. `folder`: what stands for it here.
    `files`: all that it has, by relative path."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str:
        """ORG/NAME@COMMIT."""
        ...

    @property
    def folder(self) -> Path: ...

    @property
    def keeps(self) -> bool:
        """Whether the folder shall have all of it in the end."""
        ...

    @property
    def files(self) -> Mapping[str, RemoteFile]: ...

    @property
    def bytes_to_keep(self) -> int:
        """What its folder's disk needs room for still: of shards that come to stay, 0 where none do."""
        ...

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Fill memory with bytes of files, several requests at once. Raises StoppedError, CheckpointError."""
        ...

    def fetch(self, file: str) -> None:
        """Bring a whole file into the folder. Raises StoppedError, CheckpointError."""
        ...


_OPEN: dict[Path, Store] = {}


@contextmanager
def standing_for(store: Store) -> Iterator[Path]:
    """The folder of a store, which stands for it inside of the block."""
    _OPEN[store.folder] = store
    try:
        with called(str(store.folder), store.name):
            yield store.folder
    finally:
        del _OPEN[store.folder]


@dataclass(frozen=True, slots=True)
class Remote:
    """A folder of an open source: the whole, or one below it. `prefix`: of its files' names there."""

    store: Store
    prefix: str

    @property
    def names(self) -> list[str]:
        """Of all files below this folder, relative to it, sorted."""
        return sorted(name.removeprefix(self.prefix) for name in self.store.files if name.startswith(self.prefix))

    def file(self, name: str) -> RemoteFile | None:
        return self.store.files.get(self.prefix + name)

    def size_of(self, name: str) -> int:
        return self.store.files[self.prefix + name].size_bytes

    def is_away(self, name: str) -> bool:
        """Whether a file is there and not here."""
        return self.prefix + name in self.store.files and not (self.store.folder / (self.prefix + name)).exists()

    def stays_away(self, name: str) -> bool:
        """Whether tensors of a file are read by ranges; if not, it is here now."""
        if self.is_away(name) and self.store.keeps:
            self.fetch(name)
        return self.is_away(name)

    def fetch(self, name: str) -> None:
        self.store.fetch(self.prefix + name)

    def read(self, wanted: Sequence[Wanted]) -> None:
        self.store.read([(self.prefix + name, offset, target) for name, offset, target in wanted])

    def stamp(self, name: str) -> str:
        """What tells, without reading it, that a file is another."""
        file = self.store.files[self.prefix + name]
        return f"{file.size_bytes} bytes of etag {file.etag}"


def remote_of(folder: Path) -> Remote | None:
    """What a folder stands for; None for one that is what it seems."""
    if not _OPEN:
        return None
    for place in (folder, *folder.parents):
        if store := _OPEN.get(place):
            below = folder.relative_to(place).as_posix()
            return Remote(store, "" if below == "." else f"{below}/")
    return None


def revision_of(folder: Path | str) -> str | None:
    """ORG/NAME@COMMIT of a source on the Hub."""
    remote = remote_of(Path(folder))
    return None if remote is None else remote.store.revision


def named(folder: Path | str) -> str:
    """A checkpoint's folder as its user knows it."""
    remote = remote_of(Path(folder))
    return str(folder) if remote is None else f"{remote.store.name}/{remote.prefix}".rstrip("/")
