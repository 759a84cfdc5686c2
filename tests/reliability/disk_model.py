"""What a disk may hold after the power went, given the calls that a program made until then.

Key idea: a file has bytes that fsync made durable and writes after that; a folder has names that its fsync made
durable and changes of names after that. When the power goes, of what is not durable any part may be there: writes up to
some point, cut short or as zeros in their place; of a folder's changes any subset, so a later one without an earlier
one. fsync of a file says nothing of its name. That is weaker than what common file systems promise (it is what POSIX
does), with one exception that all of them keep: a rename within a folder is one change.

After: Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), whose checker is called ALICE.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_layer import Call


@dataclass(eq=False)
class File:
    durable: bytes = b""
    pending: list[bytes | None] = field(default_factory=list)  # writes at the end; None: cut to nothing

    def sync(self) -> None:
        self.durable, self.pending = self.left(len(self.pending)), []

    def left(self, count: int) -> bytes:
        """The bytes when `count` of what is pending got through."""
        out = self.durable
        for data in self.pending[:count]:
            out = b"" if data is None else out + data
        return out


@dataclass(eq=False)
class Folder:
    durable: dict[str, Node] = field(default_factory=dict)
    pending: list[dict[str, Node | None]] = field(default_factory=list)  # changes of names; None: gone

    def sync(self) -> None:
        self.durable, self.pending = self.left([True] * len(self.pending)), []

    def left(self, through: list[bool]) -> dict[str, Node]:
        out: dict[str, Node | None] = dict(self.durable)
        for change, kept in zip(self.pending, through, strict=True):
            if kept:
                out |= change
        return {name: node for name, node in out.items() if node is not None}

    @property
    def now(self) -> dict[str, Node]:
        """The names as programs see them while there is power."""
        return self.left([True] * len(self.pending))


Node = File | Folder
Tree = dict[str, bytes | None]  # path → bytes; None: a folder


@dataclass
class Disk:
    """The folder `root`, which is there and durable, and all below it."""

    root: Path
    top: Folder = field(default_factory=Folder)

    def _node(self, path: Path) -> Node | None:
        node: Node | None = self.top
        for part in path.relative_to(self.root).parts:
            node = node.now.get(part) if isinstance(node, Folder) else None
        return node

    def _change(self, path: Path, **change: Node | None) -> None:
        folder = self._node(path.parent)
        assert isinstance(folder, Folder), f"{path}: its folder is not there"
        folder.pending.append(change)

    def do(self, call: Call) -> None:
        node = self._node(call.path)
        if call.kind == "create" and isinstance(node, File):
            node.pending.append(None)
        elif call.kind in ("create", "mkdir"):
            self._change(call.path, **{call.path.name: File() if call.kind == "create" else Folder()})
        elif call.kind == "write":
            assert isinstance(node, File)
            node.pending.append(call.data)
        elif call.kind == "fsync":
            assert node is not None
            node.sync()
        elif call.kind == "unlink":
            self._change(call.path, **{call.path.name: None})
        else:
            assert call.kind == "rename" and call.target is not None and call.target.parent == call.path.parent
            self._change(call.path, **{call.path.name: None, call.target.name: node})

    def after_power_loss(
        self, bytes_left: Callable[[File], bytes], changes_left: Callable[[Folder], list[bool]]
    ) -> Tree:
        tree: Tree = {}

        def visit(folder: Folder, prefix: str) -> None:
            for name, node in folder.left(changes_left(folder)).items():
                if isinstance(node, File):
                    tree[prefix + name] = bytes_left(node)
                else:
                    tree[prefix + name] = None
                    visit(node, f"{prefix}{name}/")

        visit(self.top, "")
        return tree


def _torn(file: File, dice: random.Random) -> bytes:
    count = dice.randint(0, len(file.pending))
    whole, more = file.left(count), file.pending[count] if count < len(file.pending) else None
    length = dice.randint(0, len(more)) if more else 0
    return whole + (bytes(length) if dice.random() < 0.5 else (more or b"")[:length])


def power_losses(disk: Disk, dice: random.Random, samples: int) -> Iterator[Tree]:
    """What may be left if the power goes now: nothing, all, only names or only bytes of what is pending; and
    `samples` mixtures."""

    def every(kept: bool) -> Callable[[Folder], list[bool]]:
        return lambda folder: [kept] * len(folder.pending)

    def none(file: File) -> bytes:
        return file.durable

    def zeros(file: File) -> bytes:
        return file.durable + bytes(max(0, len(file.left(len(file.pending))) - len(file.durable)))

    def all_(file: File) -> bytes:
        return file.left(len(file.pending))

    for bytes_left in (none, zeros, all_):
        for kept in (False, True):
            yield disk.after_power_loss(bytes_left, every(kept))
    for _ in range(samples):
        yield disk.after_power_loss(
            lambda file: _torn(file, dice), lambda folder: [dice.random() < 0.5 for _ in folder.pending]
        )


def write_tree(tree: Tree, root: Path) -> None:
    root.mkdir(parents=True)
    for name, data in tree.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
