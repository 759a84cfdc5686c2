"""Speaks to a running vLLM or SGLang: given ids in, log-probabilities out.

Key idea: nothing is generated. A sequence goes in as a prompt of token ids, and the server says what it thought of the
token that followed each position. Which of a server's ways of saying it is used (`MODES`) is found out by a request of
two tokens, best first, before any expensive work:

    vLLM    /inference/v1/generate   `prompt_logprob_token_ids`: any ids at each position. Needs --enable-scale-out
                                     and model runner V2 (the default on GPUs since 0.32)
            /v1/completions          `prompt_logprobs`: the server's own N most likely ids, or all with -1
    SGLang  /generate                `token_ids_logprob`: one list of ids for all positions; asked for in windows

An id whose log-probability the server does not give is NaN, never a floor; so is the -9999 by which vLLM writes -inf.
Only the given address is spoken to: no redirects, no proxies. A key comes from the environment (`KEY_NAME`), goes into
a header and is never told. Left out: streaming, parallel requests.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from mimoquant.errors import CheckpointError, UsageError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MODES = {
    "reference-ids": "the server scored exactly the reference's ids",
    "whole-vocabulary": "the server gave its whole vocabulary, the reference's ids were taken from it",
    "server-top": "the server gave only its own most likely ids; what the reference has beside them is lumped",
}
HIDDEN = "***"
DEFAULT_TOP_K = 256  # asked for if the user does not say; a server that allows fewer says how many
CONNECT_S, ANSWER_S = 10.0, 900.0  # a long prompt's prefill is one answer
RETRY_AFTER_S = (0.5, 2.0)
_WHOLE_ENTRIES = 2**18  # of an answer with the whole vocabulary: about 20 MB of JSON
_WINDOW_ENTRIES = 2**18  # of an answer of SGLang: a window's positions times the ids asked for
KEY_NAME = "MIMOQUANT_API_KEY"  # in the environment: a command line can be read by everybody on the machine
_VLLM_MINUS_INFINITY = -9000.0


@dataclass(frozen=True)
class Answer:
    """What a server says of a sequence's T - 1 scored positions. NaN (and -1 for `top`) where it says nothing."""

    log_probabilities: Floats  # [T - 1, K] of the ids that were asked for, nats
    label: Floats  # [T - 1] of the token that follows
    top: Ids  # [T - 1] the most likely id


class Refusal(CheckpointError):
    """The server answered with a status of 300 or above; redirects are not followed."""

    def __init__(self, where: str, status: int, said: str, *, key_sent: bool = False) -> None:
        asks = f"the server asks for an API key: put it into the environment as {KEY_NAME}"
        key = f"the server does not take the key that {KEY_NAME} holds" if key_sent else asks
        hints = {
            401: key,
            404: "is this the address of a vLLM or SGLang server?",
        }
        hint = hints.get(status, "the server's log says more" if status >= 500 else None)
        super().__init__(f"{where}: answered {status}{f': {said}' if said else ''}", hint=hint)
        self.status, self.said = status, said

    @property
    def allowed(self) -> int | None:
        """How many log-probabilities vLLM's --max-logprobs allows, if that is why it refuses."""
        found = re.search(r"greater than max(?:imum)? allowed: (\d+)", self.said)
        return int(found[1]) if found else None


def printable(text: object, length: int = 300) -> str:
    """What a server says, as one short line that does nothing to a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def shown_address(url: str) -> str:
    """An address as it may be told: without user, password, query and fragment, also where it is none."""
    scheme, slashes, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    _, at, place = rest.rpartition("@")
    host = re.split("[?#]", place, maxsplit=1)
    return printable(f"{scheme}{slashes}{f'{HIDDEN}@' if at else ''}{host[0]}{HIDDEN if len(host) > 1 else ''}")


def _key_of_environment() -> str:
    """The server's API key, "" for none. Raises UsageError where a header cannot hold it."""
    key = os.environ.get(KEY_NAME, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"{KEY_NAME}: has characters that no header can hold", hint="it is plain text, of one line")
    return key


class Link:
    """JSON over HTTP to one address. `url`: http(s)://host[:port][/path], a trailing /v1 is dropped."""

    def __init__(self, url: str) -> None:
        shown = shown_address(url)
        if "@" in url or "?" in url or "#" in url:
            raise UsageError(
                f"--server {shown}: is not an address alone, it has a user, a password, a query or a fragment",
                hint=f"it is like http://localhost:8000; a key for it is put into the environment as {KEY_NAME}",
            )
        try:
            parts = urlsplit(url)
            self.tls, self.host, self.port = parts.scheme == "https", parts.hostname or "", parts.port
            self.host.encode("idna")
        except ValueError as error:
            raise UsageError(f"--server {shown}: is not an address ({printable(error)})") from error
        plain = url.isascii() and url.isprintable() and " " not in url
        if not plain or parts.scheme not in ("http", "https") or not self.host:
            raise UsageError(f"--server {shown}: is not an address", hint="it is like http://localhost:8000")
        self._key = _key_of_environment()
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.path}"

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON; POST if there is a body. Lost connections are tried again, nothing else is.

        Raises Refusal (status 300 or above); CheckpointError: no connection, no answer in time, no JSON.
        """
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                status, raw = self._exchange(path, body)
                break
            except TimeoutError as error:
                raise CheckpointError(f"{self.url}{path}: no answer in time ({error})") from error
            except (OSError, http.client.HTTPException) as error:
                if wait_s is None:
                    problem = f"{self.url}: cannot be reached ({printable(error) or type(error).__name__})"
                    raise CheckpointError(problem, hint="is the server up, and is the address right?") from error
                time.sleep(wait_s)
        if status >= 300:
            raise Refusal(f"{self.url}{path}", status, _reason(self._untold(raw)), key_sent=bool(self._key))
        try:
            return json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.url}{path}: the answer is not JSON ({printable(error)})") from error

    def _untold(self, raw: bytes) -> bytes:
        """What a server says, which may repeat the key that it was sent."""
        return raw.replace(self._key.encode(), HIDDEN.encode()) if self._key else raw

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_S)
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(ANSWER_S)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Accept": "application/json"} | ({"Content-Type": "application/json"} if data else {})
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request("GET" if data is None else "POST", self.path + path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _reason(raw: bytes) -> str:
    """The sentence in an error's body, in any of the shapes that the engines use."""
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        return printable(raw.decode(errors="replace"))
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    return printable(said)


@dataclass
class Server:
    """An endpoint that was found to answer: how to ask it, and what it said of itself."""

    link: Link
    engine: str  # vllm | sglang
    version: str | None
    model: str
    vocab: int  # the reference's
    mode: str = ""
    top_k: int = 0

    def ask(self, tokens: Ids, ids: Ids) -> Answer:
        """Score a sequence.

        Args:
            tokens: [T], the sequence. ids: [T - 1, K], those that are wanted at each position but the last.
        Raises CheckpointError: the server failed, or its answer is not what was asked for.
        """
        way: Callable[[Server, Ids, Ids], Answer] = _WAYS[self.engine, self.mode]
        try:
            answer = way(self, tokens, ids)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, EOFError) as error:
            raise self.complaint(f"does not have the shape that is known of {self.engine}", error) from error
        shapes = answer.log_probabilities.shape, answer.label.shape, answer.top.shape
        if shapes != (ids.shape, ids.shape[:1], ids.shape[:1]):
            raise self.complaint(f"is of {len(answer.log_probabilities)} positions, {len(ids)} were asked for")
        if answer.top.max(initial=0) >= self.vocab:
            raise self.complaint(f"has the id {answer.top.max()}, outside the reference's vocabulary of {self.vocab}")
        mass = np.exp(np.where(np.isnan(answer.log_probabilities), -np.inf, answer.log_probabilities)).sum(-1)
        if mass.max(initial=0) > 1.01:
            raise self.complaint(
                f"has probabilities that sum to {mass.max():.4g}",
                hint="with vLLM, start the server with --logprobs-mode raw_logprobs",
            )
        return answer

    def complaint(self, problem: str, error: Exception | None = None, hint: str | None = None) -> CheckpointError:
        """The error for an answer that is not what was asked for."""
        cause = f" ({type(error).__name__}: {printable(error, 80)})" if error else ""
        same = "is it the same model as the reference, and a version of the engine that is known here?"
        return CheckpointError(f"{self.link.url}: the answer {problem}{cause}", hint=hint or same)


# --- finding out what there is ----------------------------------------------------------------------------------------


def connect(url: str, model: str | None, *, top_k: int | None, tokens: int, vocab: int) -> Server:
    """Find engine, model and the best way to ask it.

    Args:
        top_k: ids a position; None takes DEFAULT_TOP_K, or as many as the server allows. tokens: of a sequence.
        vocab: the reference's vocabulary size.
    Raises UsageError: the address, model, --top-k or --tokens do not fit the server. CheckpointError: no such server.
    """
    link = Link(url)
    listed = link.call("/v1/models")
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list) or not cards or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise CheckpointError(f"{link.url}/v1/models: lists no model", hint="is this a vLLM or SGLang server?")
    card = _chosen(link, cards, model)
    limit = card.get("max_model_len")  # both engines give it
    if isinstance(limit, int) and tokens + 1 > limit:
        problem = f"--tokens {tokens}: the server's context is {limit} tokens, one of which it must generate"
        raise UsageError(problem, hint=f"use --tokens {limit - 1} or less, or start the server with a longer context")
    engine, version = _engine(link, card)
    server = Server(link, engine, version, str(card["id"]), vocab)
    _choose_mode(server, top_k, tokens)
    return server


def _chosen(link: Link, cards: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    names = ", ".join(printable(card["id"], 80) for card in cards[:8])
    if model is None:
        cards = [card for card in cards if not card.get("parent")]  # adapters have one
        if len(cards) != 1:
            raise UsageError(f"{link.url}: serves several models", hint=f"choose one by --model: {names}")
        return cards[0]
    for card in cards:
        if card["id"] == model:
            return card
    raise UsageError(f"--model {model}: the server does not have it", hint=f"it serves {names}")


def _engine(link: Link, card: dict[str, Any]) -> tuple[str, str | None]:
    """(engine, its version). Taken from what only one of them answers; a gateway may have renamed the owner."""
    for engine, path in (("vllm", "/version"), ("sglang", "/server_info")):
        if card.get("owned_by") in ("vllm", "sglang") and card["owned_by"] != engine:
            continue
        try:
            told = link.call(path)
        except CheckpointError:
            told = None
        if card.get("owned_by") == engine or (isinstance(told, dict) and "version" in told):
            version = told.get("version") if isinstance(told, dict) else None
            return engine, printable(version, 40) if version else None
    raise CheckpointError(
        f"{link.url}: is neither vLLM nor SGLang", hint="other engines give no prompt log-probabilities"
    )


def _choose_mode(server: Server, top_k: int | None, tokens: int) -> None:
    """Set mode and top_k: the first that the server answers to, asked about two tokens."""
    modes = ["reference-ids"]
    if server.engine == "vllm":
        modes += ["whole-vocabulary"] * (server.vocab * tokens <= _WHOLE_ENTRIES) + ["server-top"]
    refusals = []
    for server.mode in modes:
        whole = server.mode == "whole-vocabulary"  # if it can be had and nothing else is asked for, all of it is scored
        server.top_k = min(top_k or (server.vocab if whole else DEFAULT_TOP_K), server.vocab)
        refusal = _probe(server)
        if refusal and refusal.allowed is not None and not whole:
            if top_k is not None or not refusal.allowed:
                raise UsageError(
                    f"--top-k {server.top_k}: the server allows {refusal.allowed} log-probabilities a token",
                    hint=f"start it with --max-logprobs {server.top_k}"
                    + (f", or use --top-k {refusal.allowed}" if refusal.allowed else ""),
                )
            server.top_k = refusal.allowed
            refusal = _probe(server)
        if refusal is None:
            return
        refusals.append(refusal)
    raise refusals[-1]


def _probe(server: Server) -> Refusal | None:
    """None if the server answers; the refusal if it does not do this. Trouble of its own (5xx) is raised at once."""
    try:
        server.ask(np.zeros(2, np.int64), np.arange(server.top_k, dtype=np.int64)[None])
    except Refusal as refusal:
        if refusal.status >= 500 and refusal.status != 501:
            raise
        return refusal
    except CheckpointError as error:
        if server.mode == "server-top" or server.engine == "sglang":
            raise
        return Refusal(server.link.url, 400, printable(error))  # an older version that overlooks what it does not know
    return None


# --- the ways of asking -----------------------------------------------------------------------------------------------


def _vllm_ids(server: Server, tokens: Ids, ids: Ids) -> Answer:
    """Each position's own ids; `prompt_logprobs` of 1 adds the most likely one and the token that follows."""
    said = server.link.call(
        "/inference/v1/generate",
        {
            "model": server.model,
            "token_ids": tokens.tolist(),
            "sampling_params": {
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": 1,
                "prompt_logprob_token_ids": ids.tolist(),
            },
        },
    )
    raw = io.BytesIO(base64.b64decode(said["prompt_token_id_logprobs"], validate=True))
    scores = np.load(raw, allow_pickle=False).astype(np.float64)
    _, label, top = _prompt_logprobs(server, said["prompt_logprobs"], tokens, ids[:, :0])
    return Answer(_told(scores), label, top)


def _vllm_top(server: Server, tokens: Ids, ids: Ids) -> Answer:
    """The server's own most likely ids (all of them in mode whole-vocabulary) and the token that follows."""
    whole = server.mode == "whole-vocabulary"
    said = server.link.call(
        "/v1/completions",
        {
            "model": server.model,
            "prompt": tokens.tolist(),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": -1 if whole else ids.shape[1],
        },
    )
    given = said["choices"][0]["prompt_logprobs"]
    if whole and len(given[1]) != server.vocab:
        raise server.complaint(f"has {len(given[1])} ids, the reference's vocabulary is {server.vocab}")
    return Answer(*_prompt_logprobs(server, given, tokens, ids))


def _prompt_logprobs(
    server: Server, given: list[dict[str, dict[str, Any]] | None], tokens: Ids, ids: Ids
) -> tuple[Floats, Floats, Ids]:
    """vLLM's list of {id: {logprob, rank, ...}}, null for the first token → the fields of an Answer."""
    scores = np.full(ids.shape, np.nan)
    label, top = np.full(len(ids), np.nan), np.full(len(ids), -1, np.int64)
    for row, (entry, token) in enumerate(zip(given[1:], tokens[1:].tolist(), strict=True)):
        if entry is None:
            raise ValueError(f"nothing about token {row + 1}")
        held = {int(name): float(value["logprob"]) for name, value in entry.items()}
        label[row], top[row] = held[token], max(held, key=lambda name: held[name])
        scores[row] = [held.get(name, np.nan) for name in ids[row].tolist()]
    return _told(scores), _told(label), top


def _told(scores: Floats) -> Floats:
    return np.where(scores > _VLLM_MINUS_INFINITY, scores, np.nan)


def _sglang_ids(server: Server, tokens: Ids, ids: Ids) -> Answer:
    """Ids of a window of positions are asked for together: its answer has every one of them at every position.

    What stands before a window comes out of the server's prefix cache, so windows cost little compute.
    """
    step = max(8, int((_WINDOW_ENTRIES / max(1, ids.shape[1])) ** 0.5))
    parts = [
        _sglang_window(server, tokens[: begin + step + 1], ids[begin : begin + step], begin)
        for begin in range(0, len(ids), step)
    ]
    return Answer(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _sglang_window(server: Server, tokens: Ids, ids: Ids, begin: int) -> tuple[Floats, Floats, Ids]:
    """`begin`: the first position. Lists start there with an entry that says nothing; values are [logprob, id, …]."""
    names, places = np.unique(ids, return_inverse=True)
    said = server.link.call(
        "/generate",
        {
            "input_ids": tokens.tolist(),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": begin,
            "top_logprobs_num": 1,
            "token_ids_logprob": names.tolist(),
        },
    )["meta_info"]
    rows = [[value[0] for value in row] for row in said["input_token_ids_logprobs"][1:]]
    table = np.array(rows, np.float64).reshape(len(ids), len(names))  # null, for what is not finite, becomes NaN
    followers = said["input_token_logprobs"][1:]
    label = np.array([value[0] for value in followers], np.float64)
    top = np.array([row[0][1] for row in said["input_top_logprobs"][1:]], np.int64)
    # SGLang writes 0 for the vocabulary's last id, which it takes for an image's
    for value, token in zip(followers, tokens[begin + 1 :].tolist(), strict=True):
        if value[1] not in (token, 0):
            raise server.complaint(f"is about token {printable(value[1], 20)} where {token} was sent")
    scores = np.take_along_axis(table, places.reshape(ids.shape), 1)
    return np.where(np.isfinite(scores), scores, np.nan), label, top


_WAYS = {
    ("vllm", "reference-ids"): _vllm_ids,
    ("vllm", "whole-vocabulary"): _vllm_top,
    ("vllm", "server-top"): _vllm_top,
    ("sglang", "reference-ids"): _sglang_ids,
}
