"""A server on the loopback address that speaks the Hub's API as its client asks it, with faults on demand.

One model at one commit: `api/models` lists its files, `resolve` answers small ones and redirects LFS's to another host
name, which wants no token, as the Hub's storage does. What was asked for and sent is counted, byte by byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from micro import contents

REPO = "me/micro"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
MESSAGE = ""  # what a refusal says beside its code
Fault = Callable[[str, int, int], str | None]  # of a file's range; see `_Handler.faulty`


def git_blob(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves the files of `folder`. `names`: other names for them in the listing; `fault`: what goes wrong where;
    `refuse`: what the API and `resolve` answer instead, (status, X-Error-Code)."""

    daemon_threads = True

    def __init__(self, folder: Path, repo: str = REPO) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = contents(folder)
        self.sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in self.content.items()}
        self.repo, self.commit, self.token = repo, COMMIT, ""
        self.fault: Fault | None = None
        self.refuse: tuple[int, str] | None = None
        self.listed: dict[str, dict[str, Any]] = {}  # what the listing says otherwise of a file
        self.etags: dict[str, str] = {}  # what storage says otherwise
        self.linked: dict[str, str] = {}  # what `resolve` says otherwise
        self.asked: dict[str, list[tuple[int, int]]] = {}  # ranges of files on the storage host, in order
        self.resolved: list[str] = []
        self.strangers: list[str] = []  # requests that no source should make
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def shards(self) -> list[str]:
        return [name for name in self.content if name.endswith(".safetensors")]

    def is_lfs(self, name: str) -> bool:
        return name.endswith(".safetensors")

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.content.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
            if self.is_lfs(name):
                entry["lfs"] = {"sha256": self.sha256[name], "size": len(data), "pointerSize": 134}
            siblings.append(entry | self.listed.get(name, {}))
        return {"id": self.repo, "sha": self.commit, "siblings": siblings, "private": False, "tags": []}

    def times_asked(self, name: str) -> set[int]:
        """How often each byte of a file was asked for, whichever numbers there are."""
        edges: dict[int, int] = {0: 0, len(self.content[name]): 0}
        for begin, end in self.asked.get(name, []):
            edges[begin] = edges.get(begin, 0) + 1
            edges[end] = edges.get(end, 0) - 1
        depth, found, places = 0, set(), sorted(edges)
        for place, following in itertools.pairwise(places):
            depth += edges[place]
            if following > place:
                found.add(depth)
        return found


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        hub, own = self.server, self.headers["host"].startswith("127.")
        if own and hub.token and self.headers.get("authorization") != f"Bearer {hub.token}":
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif own and hub.refuse:
            says = {"X-Error-Code": hub.refuse[1]} if hub.refuse[1] else {}
            self.answer(hub.refuse[0], b"", says | ({"X-Error-Message": MESSAGE} if MESSAGE else {}))
        elif own and (found := re.fullmatch(rf"/api/models/{hub.repo}(?:/revision/(.+))?", path)):
            known = found[1] in (None, "main", "v1", hub.commit)
            self.answer(200, json.dumps(hub.listing()).encode(), {}) if known else self.answer(
                404, b"", {"X-Error-Code": "RevisionNotFound"}
            )
        elif own and (found := re.fullmatch(rf"/{hub.repo}/resolve/(\w+)/(.+)", path)):
            self.resolve(found[1], found[2])
        elif not own and (found := re.fullmatch(r"/storage/(.+)", path)):
            if "authorization" in self.headers:
                hub.strangers.append(f"token sent to storage: {path}")
            self.serve(found[1], {"ETag": f'"{hub.etags.get(found[1], "cdn-" + found[1])}"'}, stored=True)
        else:
            hub.strangers.append(self.path)
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def resolve(self, revision: str, name: str) -> None:
        hub = self.server
        with hub.lock:
            hub.resolved.append(name)
        if revision not in ("main", hub.commit) or name not in hub.content:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = hub.content[name]
        headers = {"X-Repo-Commit": hub.commit}
        if not hub.is_lfs(name):
            self.serve(name, headers | {"ETag": f'"{hub.linked.get(name, git_blob(data))}"'}, stored=False)
            return
        place = f"http://localhost:{hub.server_port}/storage/{name}?Signature=secretsignature"
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hub.linked.get(name, hub.sha256[name])}"'}
        self.answer(302, b"", headers | linked | {"Location": place})

    def serve(self, name: str, headers: dict[str, str], *, stored: bool) -> None:
        hub = self.server
        data = hub.content[name]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(data))
        with hub.lock:
            if stored:
                hub.asked.setdefault(name, []).append((begin, end))
            fault = hub.fault(name, begin, end) if hub.fault else None
        if fault and self.faulty(fault, name, begin, end, headers):
            return
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self.answer(206 if asked else 200, data[begin:end], headers)

    def faulty(self, fault: str, name: str, begin: int, end: int, headers: dict[str, str]) -> bool:
        """Answer with a fault: `drop N` bytes come, a status with or without Retry-After, `whole` for a range, another
        `range`, `coded`, `longer`; `trickle N` sends it in so many pieces."""
        data, (kind, _, number) = self.server.content[name], fault.partition(" ")
        told = headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        if kind == "drop":
            self.answer(206 if "range" in self.headers else 200, data[begin:end], told, only=int(number))
            self.close_connection = True
        elif kind.isdigit():
            self.answer(int(kind), b"", {"Retry-After": number} if number else {})
        elif kind == "whole":
            self.answer(200, data, headers)
        elif kind == "range":
            self.answer(206, data[: end - begin], headers | {"Content-Range": f"bytes 0-{end - begin - 1}/{len(data)}"})
        elif kind == "coded":
            self.answer(206, data[begin:end], told | {"Content-Encoding": "gzip"})
        elif kind == "trickle":
            self.answer(206, data[begin:end], told, pieces=int(number))
        elif kind == "longer":
            self.answer(206, data[begin:end], told | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data) + 1}"})
        else:
            return False
        return True

    def answer(
        self, status: int, data: bytes, headers: dict[str, str], only: int | None = None, pieces: int = 1
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                sent = data if only is None else data[:only]
                for begin in range(0, len(sent), size := -(-len(sent) // pieces) or 1):
                    self.wfile.write(sent[begin : begin + size])
                    time.sleep(0.001 * (pieces > 1))


@contextlib.contextmanager
def serving(folder: Path, repo: str = REPO) -> Iterator[HubServer]:
    """The server at work, and this process's client of the Hub pointed at it."""
    with HubServer(folder, repo) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        patch.setenv("HF_ENDPOINT", server.endpoint)
        for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_TOKEN_PATH", str(folder / "no-token"))
        try:
            yield server
        finally:
            server.shutdown()
