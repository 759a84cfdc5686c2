"""Tensors by name, by offset, read-only.

Key idea: `pread` into memory that the caller owns: no memory map (mapped pages count as resident and fault one by
one), no shared file position (any number of threads may read), and every byte is counted. Of a source that is not on
this machine (`remote`) the same memory is filled by ranges, what lies side by side in one request.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

from mimoquant.checkpoint.folders import open_inside
from mimoquant.checkpoint.index import CheckpointIndex, TensorInfo
from mimoquant.checkpoint.remote import remote_of
from mimoquant.errors import CheckpointError

_EXPECTED_BYTES, _EXPECTED_TOGETHER = 2**20, 2**26  # of a tensor that is read ahead, of all of them
Bytes = npt.NDArray[np.uint8]


class CheckpointReader:
    """Reads tensors of one checkpoint. Thread-safe. `bytes_read` counts payload bytes."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.bytes_read = 0
        self._remote = remote_of(index.folder)
        self._expected: dict[str, Bytes] = {}  # tensors from afar that were read before they were asked for
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))), thread_name_prefix="read")

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown()
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def read(self, name: str) -> Bytes:
        """The raw bytes of one tensor, as a flat uint8 array."""
        info = self.index.tensors[name]
        out = np.empty(info.size_bytes, np.uint8)
        self.read_into(info, out)
        return out

    def read_into(self, info: TensorInfo, out: Bytes) -> None:
        """Fill `out` (flat uint8, `info.size_bytes` long) with the tensor's bytes."""
        self.read_range(info, 0, out)

    def read_many(self, wanted: Iterable[tuple[TensorInfo, Bytes]]) -> None:
        """Fill many arrays, several at once: one thread copies from the page cache slower than memory could take it."""
        if self._remote:
            pairs = list(wanted)
            far = [self._is_far(info) for info, _ in pairs]
            self._read_far([(info, 0, out) for (info, out), is_far in zip(pairs, far, strict=True) if is_far])
            wanted = [pair for pair, is_far in zip(pairs, far, strict=True) if not is_far]
        list(self._pool.map(lambda pair: self.read_into(*pair), wanted))

    def expect(self, infos: Iterable[TensorInfo]) -> None:
        """These are read next, each whole, one after the other. Of what is far away the small ones are asked for now,
        together: a request each would be waited for each. What was expected before and not read is forgotten."""
        if not self._remote:
            return
        small = [info for info in infos if 0 < info.size_bytes <= _EXPECTED_BYTES and self._is_far(info)]
        ends = itertools.accumulate(info.size_bytes for info in small)
        small = [info for info, end in zip(small, ends, strict=True) if end <= _EXPECTED_TOGETHER]
        arrays = {info.name: np.empty(info.size_bytes, np.uint8) for info in small}
        self._read_far([(info, 0, arrays[info.name]) for info in small])
        self._expected = arrays

    def read_range(self, info: TensorInfo, start: int, out: Bytes) -> None:
        """Fill `out` with the tensor's bytes from `start` on."""
        view, done = out.data, 0
        if start + len(view) > info.size_bytes:
            raise CheckpointError(
                f"{self.index.folder / info.file}: {info.name} has {info.size_bytes} bytes, "
                f"{start + len(view)} were asked for"
            )
        if self._remote and self._is_far(info):
            held = self._expected.pop(info.name, None) if len(view) == info.size_bytes else None
            if held is None:
                self._read_far([(info, start, out)])
            else:
                out[:] = held
            return
        descriptor = self._descriptor(info.file)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], info.offset + start + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.index.folder / info.file}: ends inside {info.name}, "
                        f"{len(view) - done} of {info.size_bytes} bytes short",
                        hint="the file changed while it was read",
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{self.index.folder / info.file}: reading {info.name} failed ({error.strerror})"
            ) from error
        with self._lock:
            self.bytes_read += done

    def _is_far(self, info: TensorInfo) -> bool:
        """Whether a tensor is read by ranges; where its source is kept, its shard is brought here instead."""
        return self._remote is not None and self._remote.stays_away(info.file)

    def _read_far(self, wanted: list[tuple[TensorInfo, int, Bytes]]) -> None:
        """Ranges of tensors that are not on this machine, (tensor, start, where to)."""
        assert self._remote is not None
        self._remote.read([(info.file, info.offset + start, out.data) for info, start, out in wanted])
        with self._lock:
            self.bytes_read += sum(len(out.data) for _, _, out in wanted)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    with open_inside(self.index.folder, file) as opened:
                        self._descriptors[file] = os.dup(opened.fileno())
                except OSError as error:
                    raise CheckpointError(f"{self.index.folder / file}: cannot be opened ({error.strerror})") from error
            return self._descriptors[file]
