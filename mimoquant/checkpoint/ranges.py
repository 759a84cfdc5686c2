"""Bytes of files on the Hub: by ranges over several connections, asked for again until they are there.

Key idea: an answer is read only if it says that it is the range that was asked for, of a file of the size and etag that
the listing had: a proxy that ignores ranges, or a file that was exchanged, is an error and never data. What came before
a connection broke is kept, so a retry asks for the rest. The address that a redirect led to is used again until it is
refused, so that the Hub itself is asked once a file.

Left out: Xet's own protocol; its files are served over HTTP too.
Reference: RFC 9110, 14 (range requests), 10.2.3 (Retry-After); draft-ietf-httpapi-ratelimit-headers (RateLimit);
huggingface_hub's `http_get`.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import httpx
from huggingface_hub import constants, get_session, hf_raise_for_status
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from mimoquant.checkpoint.remote import RemoteFile, Wanted
from mimoquant.checkpoint.repository import NETWORK_ERRORS, RESUME, Repository, refused
from mimoquant.errors import CheckpointError, StoppedError
from mimoquant.machine.overlap import is_given_up

T = TypeVar("T")
CONNECTIONS = 8
ATTEMPTS = 6  # in a row, without a byte between them
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 600.0
_POLL_S = 0.1  # between looks at whether somebody still waits
SMALLEST_PART, LARGEST_PART = 2**20, 2**24
_AGAIN = (408, 425, 429, *range(500, 600))
_OUTDATED = (401, 403, 404, 410)  # what an address says that was signed for some minutes
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RESET = re.compile(r";\s*t=(\d{1,6})", re.ASCII)
_PROXY = (
    "something on the way does not pass ranges through: go round that proxy (NO_PROXY), or download first (hf download)"
)
_EXCHANGED = "start again, with the revision named by its commit"


class _Again(Exception):
    """An answer that another attempt may better. `wait_s`: what the server asks for; None: it does not say."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


@dataclass
class _Part:
    """A range that is one request, over the memory of tensors that follow each other in the file."""

    file: str
    begin: int
    end: int
    targets: list[memoryview]

    def put(self, data: bytes) -> None:
        """Take the next bytes of the range."""
        view = memoryview(data)
        if len(view) > self.end - self.begin:
            raise _Again(f"{len(view) - (self.end - self.begin)} bytes too many came")
        self.begin += len(view)
        while view:
            target = self.targets[0]
            count = min(len(target), len(view))
            target[:count] = view[:count]
            view = view[count:]
            if count == len(target):
                self.targets.pop(0)
            else:
                self.targets[0] = target[count:]


class Ranges:
    """Reads files of one repository at one commit. Thread-safe. `name`: the repository, in messages."""

    def __init__(self, repository: Repository, files: Mapping[str, RemoteFile]) -> None:
        self._repository, self._files = repository, files
        self._places: dict[str, tuple[str, str]] = {}  # file → where it was redirected to, its etag there
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub")

    def abort(self) -> None:
        """End what is under way, soon."""
        self._stop.set()

    def close(self) -> None:
        self.abort()
        self._pool.shutdown(cancel_futures=True)

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Fill all that is wanted. Raises StoppedError: it could not be read, or was given up; CheckpointError: it is
        another file."""
        parts, left = list(_parts(wanted)), threading.Event()
        if len(parts) == 1:
            self._read(parts[0], left)
            return
        try:
            self.map(lambda part: self._read(part, left), parts)
        finally:
            left.set()

    def map(self, function: Callable[[T], object], things: Iterable[T]) -> None:
        """Call it with each, several at once; what it calls must not come here again."""
        working = [self._pool.submit(function, thing) for thing in things]
        try:
            while wait(working, _POLL_S, FIRST_EXCEPTION).not_done and not any(_failed(one) for one in working):
                if is_given_up():
                    raise _given_up(str(self._repository))
            for future in working:
                if future.done():
                    future.result()
        finally:
            for future in working:
                future.cancel()

    def content(self, file: str) -> bytes:
        """A small file, whole."""
        size = self._files[file].size_bytes

        def ask() -> bytes:
            found = bytearray()
            with self._answer(file, None) as response:
                for chunk in response.iter_bytes():
                    found += chunk
                    if len(found) > size:
                        break
            if len(found) != size:
                least = "at least " if len(found) > size else ""
                raise CheckpointError(
                    f"{self._repository}/{file}: {least}{len(found)} bytes came, the Hub lists {size}", hint=_EXCHANGED
                )
            return bytes(found)

        return self._retried(file, ask, self._stop.is_set)

    def _read(self, part: _Part, left: threading.Event) -> None:
        """All of a range, in as many requests as connections that break make of it. `left`: nobody waits any more."""

        def is_left() -> bool:
            return self._stop.is_set() or left.is_set()

        def ask() -> None:
            with self._answer(part.file, part) as response:
                for chunk in response.iter_raw():
                    if is_left() or is_given_up():
                        raise _given_up(f"{self._repository}/{part.file}")
                    part.put(chunk)
            if part.begin < part.end:
                raise _Again(f"{part.end - part.begin} bytes too few came")

        self._retried(part.file, ask, is_left, lambda: part.begin)

    def _retried(
        self, file: str, ask: Callable[[], T], is_left: Callable[[], bool], done: Callable[[], int] = lambda: 0
    ) -> T:
        try:
            return retried(ask, f"{self._repository}/{file}", is_left, done)
        except NETWORK_ERRORS as error:
            raise self._refusal(file, error) from error

    @contextlib.contextmanager
    def _answer(self, file: str, part: _Part | None) -> Iterator[httpx.Response]:
        """The response that has a part of a file, or all of it; checked, its body not read yet."""
        place = self._places.get(file)
        url = place[0] if place else self._repository.url_of(file)
        headers = self._repository.headers_for(url)
        if part:
            headers["range"] = f"bytes={part.begin}-{part.end - 1}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code in _OUTDATED and (place or response.history):
                self._places.pop(file, None)
                raise _Again(f"status {response.status_code}", wait_s=0 if place else None)
            if response.status_code != 416:
                check_status(response)
            self._check_file(file, response, place)
            if part:
                self._check_range(part, response)
            yield response

    def _check_file(self, file: str, response: httpx.Response, place: tuple[str, str] | None) -> None:
        """Raises CheckpointError where the file is not the one that was listed."""
        known = self._files[file]
        etag = _etag(response.headers.get("etag"))
        if place:
            if etag != place[1]:
                raise self._exchanged(file, "etag", place[1], etag)
            return
        told = next((r.headers for r in (*response.history, response) if "x-linked-etag" in r.headers), None)
        told = told or (response.history[0].headers if response.history else response.headers)
        linked = _etag(told.get("x-linked-etag") or ("" if response.history else told.get("etag")))
        if known.etag and linked and linked != known.etag:
            raise self._exchanged(file, "etag", known.etag, linked)
        size = told.get("x-linked-size")
        if size is not None and size != str(known.size_bytes):
            raise self._exchanged(file, "size", str(known.size_bytes), size)
        commit = told.get("x-repo-commit")
        if commit is not None and commit != self._repository.revision:
            raise self._exchanged(file, "commit", str(self._repository.revision), commit)
        if response.history:
            self._places[file] = (str(response.url), etag)

    def _check_range(self, part: _Part, response: httpx.Response) -> None:
        """Raises where this is not the range that was asked for."""
        size, status = self._files[part.file].size_bytes, response.status_code
        asked = f"bytes {part.begin} to {part.end - 1} of {size}"
        where = f"{self._repository}/{part.file}"
        if status != 206:
            raise StoppedError(f"{where}: {asked} were asked for, the answer has status {status}", hint=_PROXY)
        told, coded = response.headers.get("content-range", ""), response.headers.get("content-encoding", "identity")
        found = _CONTENT_RANGE.fullmatch(told)
        if found is None or coded != "identity":
            raise StoppedError(
                f"{where}: {asked} were asked for, the answer has {told[:80] or 'no range'} in {coded[:20]}",
                hint=_PROXY,
            )
        begin, last, total = map(int, found.groups())
        if total != size:
            raise self._exchanged(part.file, "size", str(size), str(total))
        if (begin, last) != (part.begin, part.end - 1):
            raise StoppedError(f"{where}: {asked} were asked for, the answer has {begin} to {last}", hint=_PROXY)

    def _exchanged(self, file: str, what: str, was: str, now: str) -> CheckpointError:
        return CheckpointError(
            f"{self._repository}/{file}: was exchanged while it was read, its {what} was {was[:64]}, is now {now[:64]}",
            hint=_EXCHANGED,
        )

    def _refusal(self, file: str, error: Exception) -> Exception:
        if isinstance(error, EntryNotFoundError):
            return CheckpointError(f"{self._repository}/{file}: is no longer there", hint=_EXCHANGED)
        if isinstance(error, HfHubHTTPError) and not error.response.headers.get("x-error-code"):
            status = error.response.status_code
            return StoppedError(f"{self._repository}/{file}: cannot be read (status {status})", hint=RESUME)
        return refused(self._repository, error)


def retried(
    ask: Callable[[], T],
    where: str,
    is_left: Callable[[], bool] = lambda: False,
    done: Callable[[], int] = lambda: 0,
) -> T:
    """What `ask` gives, at last. `is_left`: whether nobody waits for it any more. `done`: grows while it gets on, which
    begins the count of attempts anew.

    Raises StoppedError: nobody waits, or too many attempts were in vain. What else `ask` raises.
    """
    failures, before = 0, done()
    while True:
        try:
            return ask()
        except (_Again, httpx.TransportError) as error:
            if done() > before:
                failures, before = 0, done()
            failures += 1
            why = str(error) if isinstance(error, _Again) else type(error).__name__
            if failures == ATTEMPTS:
                raise StoppedError(
                    f"{where}: could not be read{f' on from byte {before}' if before else ''}, "
                    f"after {failures} attempts ({why})",
                    hint=RESUME,
                ) from error
            wait_s = min(FIRST_WAIT_S * 2 ** (failures - 1), LONGEST_WAIT_S)
            if isinstance(error, _Again) and error.wait_s is not None:
                wait_s = min(error.wait_s, LONGEST_RETRY_AFTER_S)
        until = time.monotonic() + wait_s
        while (left_s := until - time.monotonic()) > 0:
            if is_left() or is_given_up():
                raise _given_up(where)
            time.sleep(min(left_s, _POLL_S))


def _failed(future: Future[object]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _given_up(where: str) -> StoppedError:
    return StoppedError(f"{where}: reading was given up", hint=RESUME)


def check_status(response: httpx.Response) -> None:
    """Raises what `retried` waits for, and for a refusal what huggingface_hub makes of it."""
    if response.status_code in _AGAIN:
        raise _Again(f"status {response.status_code}", _retry_after(response))
    if response.status_code >= 400:
        response.read()
        hf_raise_for_status(response)


def _etag(header: str | None) -> str:
    return (header or "").removeprefix("W/").strip('"')


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds; a date is taken as nothing said. The Hub itself says when its count begins anew in RateLimit."""
    told = response.headers.get("retry-after", "").strip()
    reset = _RESET.search(response.headers.get("ratelimit", "")) if response.status_code == 429 else None
    if told.isascii() and told.isdigit():
        return float(told)
    return float(reset[1]) + 1 if reset else None


def _parts(wanted: Sequence[Wanted]) -> Iterator[_Part]:
    """Requests for what is wanted: neighbours together, what is large in parts, so that all connections have work."""
    runs: list[_Part] = []
    for file, offset, target in sorted((one for one in wanted if len(one[2])), key=lambda one: one[:2]):
        if runs and (runs[-1].file, runs[-1].end) == (file, offset):
            runs[-1].end += len(target)
            runs[-1].targets.append(target)
        else:
            runs.append(_Part(file, offset, offset + len(target), [target]))
    share = -(-sum(run.end - run.begin for run in runs) // CONNECTIONS)
    largest = min(max(share, SMALLEST_PART), LARGEST_PART)
    for run in runs:
        yield from _cut(run, largest)


def _cut(run: _Part, largest: int) -> Iterator[_Part]:
    targets, begin = list(run.targets), run.begin
    while begin < run.end:
        size = min(largest, run.end - begin)
        part = _Part(run.file, begin, begin + size, [])
        while size:
            target = targets.pop(0)
            if len(target) > size:
                targets.insert(0, target[size:])
                target = target[:size]
            part.targets.append(target)
            size -= len(target)
        begin = part.end
        yield part
