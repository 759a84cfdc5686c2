"""sha256 of several files at once, beside their writing.

Key idea: hashing takes longer than writing, so threads of their own do it. Where cores are fewer than that takes, and
have instructions for it, a thread hashes two files at a time, which takes hardly longer than one
(`quant.kernels.sha256_cpu`): what waits of one file waits for company, until it is too much. Else `hashlib` hashes
file by file.
"""

from __future__ import annotations

import collections
import hashlib
import os
import threading
from typing import Any, Protocol

import numpy as np

UNHASHED_BYTES = 2**24  # of a file that may wait, at most
_AT_ONCE = 2**18  # bytes from which it is worth the handing over
_PIECE_BYTES = 2**21  # that are hashed before a thread looks what waits


class Digest(Protocol):
    """A running hash; `hashlib`'s is one."""

    def update(self, view: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class BlockDigest:
    """A running sha256 that can be taken on together with another."""

    def __init__(self) -> None:
        self._state = _kernels().new_state()
        self._tail = b""  # less than a block
        self._size_bytes = 0

    def update(self, view: memoryview, /) -> None:
        begin = self._fill(view)
        blocks = (len(view) - begin) // _kernels().BLOCK_BYTES
        self._one(view[begin:], blocks)
        self._keep(view, begin, blocks)

    def update_with(self, view: memoryview, other: BlockDigest, more: memoryview) -> tuple[int, int]:
        """Hash as much of `view` here and of `more` there as goes together; returns how many bytes were of each."""
        begin, second = self._fill(view), other._fill(more)
        blocks = min(len(view) - begin, len(more) - second) // _kernels().BLOCK_BYTES
        states = self._state.ctypes.data, other._state.ctypes.data
        _kernels().hash_two(*states, _address(view) + begin, _address(more) + second, blocks)
        return self._keep(view, begin, blocks), other._keep(more, second, blocks)

    def hexdigest(self) -> str:
        last = BlockDigest()
        last._state, last._tail, last._size_bytes = self._state.copy(), self._tail, self._size_bytes
        end = b"\x80" + bytes((55 - self._size_bytes) % 64) + (8 * self._size_bytes).to_bytes(8, "big")
        last.update(memoryview(end))
        digest: bytes = _kernels().digest_of(last._state)
        return digest.hex()

    def _fill(self, view: memoryview) -> int:
        """Bytes that make the block that was begun whole."""
        if not self._tail:
            return 0
        taken: int = min(_kernels().BLOCK_BYTES - len(self._tail), len(view))
        self._tail += bytes(view[:taken])
        if len(self._tail) == _kernels().BLOCK_BYTES:
            self._one(memoryview(self._tail), 1)
            self._tail = b""
        return taken

    def _one(self, view: memoryview, blocks: int) -> None:
        if blocks:
            _kernels().hash_one(self._state.ctypes.data, _address(view), blocks)

    def _keep(self, view: memoryview, begin: int, blocks: int) -> int:
        """Note what was hashed, and what is left if it is less than a block; returns how much of `view` is done."""
        size: int = _kernels().BLOCK_BYTES
        done = begin + blocks * size
        if not self._tail and len(view) - done < size:
            self._tail, done = bytes(view[done:]), len(view)
        self._size_bytes += done
        return done


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) if len(view) else 0


def _kernels() -> Any:
    """Compiled loops. No compiler is loaded before two files may be hashed at once."""
    from mimoquant.quant.kernels import sha256_cpu

    return sha256_cpu


class Hashing:
    """Threads that hash `streams` files at the same time, as many as cores are good for."""

    def __init__(self, streams: int = 1, cores: int | None = None) -> None:
        threads = max(1, (cores or len(os.sched_getaffinity(0))) // 2)  # the other half has what is hashed to make
        self._pairs = streams > threads and bool(_kernels().IS_THERE)
        self._count = threads if self._pairs else streams
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._more, self._less = threading.Condition(self._lock), threading.Condition(self._lock)
        self._open: list[HashedStream] = []
        self._closed = False

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._more.notify_all()
        for thread in self._threads:
            thread.join()

    def stream(self) -> HashedStream:
        """Of a file that is begun."""
        one = HashedStream(self, BlockDigest() if self._pairs else hashlib.sha256())
        with self._lock:
            self._open.append(one)
        return one

    def put(self, stream: HashedStream, view: memoryview) -> None:
        """See `HashedStream.put`."""
        with self._lock:
            if queued := len(view) >= _AT_ONCE or not stream.is_idle:
                stream.add(view)
                self._start()
                if self._next():
                    self._more.notify()
        if not queued:  # so no thread has to do with this stream
            stream.digest.update(view)

    def settle(self, stream: HashedStream, left: int) -> None:
        """Wait until so many bytes of it at most are left to be hashed."""
        with self._lock:
            while stream.waiting_bytes > left or (stream.is_busy and not left):
                if stream.error is not None:
                    raise stream.error
                stream.is_awaited = True
                self._more.notify()
                self._less.wait()
            stream.is_awaited = False

    def forget(self, stream: HashedStream) -> None:
        with self._lock:
            if stream in self._open:
                self._open.remove(stream)
                self._more.notify()  # the one that is left need not wait for it

    def _start(self) -> None:
        while len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=f"hash-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _next(self) -> list[HashedStream]:
        """What can be hashed now: two files, or one that somebody waits for."""
        ready = [one for one in self._open if one.waiting_bytes and not one.is_busy and one.error is None]
        if not self._pairs:
            return ready[:1]
        alone = len(self._open) == 1
        return ready[:2] if len(ready) > 1 else [stream for stream in ready if alone or stream.is_awaited]

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (taken := self._next()) and not self._closed:
                    self._more.wait()
                for stream in taken:
                    stream.is_busy = True
            if not taken:
                return
            error, done = None, (0,) * len(taken)
            try:
                done = _hash(taken)
            except BaseException as raised:
                error = raised
            with self._lock:
                for stream, count in zip(taken, done, strict=True):
                    stream.drop(count)
                    stream.is_busy, stream.error = False, stream.error or error
                if any(stream.is_awaited for stream in taken):
                    self._less.notify_all()


class HashedStream:
    """The bytes of one file, hashed behind whoever puts them in, who must leave them as they are until then."""

    def __init__(self, hashing: Hashing, digest: Digest) -> None:
        self._hashing, self.digest = hashing, digest
        self._views: collections.deque[memoryview] = collections.deque()
        self.waiting_bytes = 0
        self.is_busy = self.is_awaited = False
        self.error: BaseException | None = None

    def put(self, view: memoryview) -> None:
        """The next bytes."""
        self._hashing.put(self, view)

    def wait(self) -> None:
        """Until not too many bytes are left to be hashed."""
        self._hashing.settle(self, UNHASHED_BYTES)

    def hexdigest(self) -> str:
        """The sha256 of all that was put, when it is known."""
        self._hashing.settle(self, 0)
        return self.digest.hexdigest()

    def close(self) -> None:
        self._hashing.forget(self)

    @property
    def is_idle(self) -> bool:
        return not self.waiting_bytes and not self.is_busy

    def add(self, view: memoryview) -> None:
        self._views.append(view)
        self.waiting_bytes += len(view)

    def first(self) -> memoryview:
        """What is to be hashed next."""
        return self._views[0][:_PIECE_BYTES]

    def drop(self, done: int) -> None:
        """So many bytes of it are hashed."""
        self.waiting_bytes -= done
        rest = self._views.popleft()[done:]
        if len(rest):
            self._views.appendleft(rest)


def _hash(streams: list[HashedStream]) -> tuple[int, ...]:
    """A piece of one file, or of two; returns how many bytes of each."""
    if len(streams) == 1:
        view = streams[0].first()
        streams[0].digest.update(view)
        return (len(view),)
    one, other = streams
    assert isinstance(one.digest, BlockDigest) and isinstance(other.digest, BlockDigest)
    return one.digest.update_with(one.first(), other.digest, other.first())
