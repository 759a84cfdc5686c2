"""`eval-kl --server`: the lumped bound and its laws, and the engines' ways of answering, played by a small server."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import MICRO
from test_documents import valid
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation import divergence, eval_kl, server
from mimoquant.evaluation.divergence import LumpedScores, head_divergences, lumped_divergence, top_log_probabilities
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.model.layer_stream import walk
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.weights.decoded import CheckpointWeights

VOCAB = 1024


# --- the bound --------------------------------------------------------------------------------------------------------


def pair(seed: int, spread: float = 3.0, noise: float = 0.5, vocab: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of float64 log-probabilities [7, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(7, vocab, dtype=torch.float64, generator=generator)
    other = z + noise * torch.randn(7, vocab, dtype=torch.float64, generator=generator)
    return z.log_softmax(-1).numpy(), other.log_softmax(-1).numpy()


def lumped(log_p: np.ndarray, log_q: np.ndarray, k: int, known: np.ndarray | None = None) -> LumpedScores:
    ids = np.argsort(-log_p, axis=-1)[:, :k]
    ours, theirs = (np.take_along_axis(one, ids, 1) for one in (log_p, log_q))
    seen = np.ones_like(ids, dtype=bool) if known is None else np.take_along_axis(known, ids, 1)
    return lumped_divergence(ours, theirs, seen, complete=k == log_p.shape[1])


def full_j(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return ((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)).sum(-1) / 2


@pytest.mark.parametrize("k", [1, 2, 5, 59])
def test_lumped_agrees_with_brute_force(k: int) -> None:
    log_p, log_q = pair(k)
    scores = lumped(log_p, log_q, k)
    for row, (p, q) in enumerate(zip(np.exp(log_p), np.exp(log_q), strict=True)):
        order = sorted(range(len(p)), key=lambda i: -p[i])
        cells = [(p[i], q[i]) for i in order[:k]] + [(sum(p[order[k:]]), sum(q[order[k:]]))]
        while min(cells[-1]) < divergence.RESOLUTION:
            (a, b), (c, d) = cells.pop(), cells.pop()
            cells.append((a + c, b + d))
        forward = sum(a * math.log(a / b) for a, b in cells)
        reverse = sum(b * math.log(b / a) for a, b in cells)
        assert abs(scores.kl_forward[row] - forward) < 1e-10 and abs(scores.kl_reverse[row] - reverse) < 1e-10
        assert abs(scores.j[row] - (forward + reverse) / 2) < 1e-10
        assert scores.ids[row] == len(cells) - 1
        assert abs(scores.reference_tail[row] - cells[-1][0]) < 1e-12


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0, 20), st.floats(0, 5))
def test_laws_of_the_bound(seed: int, spread: float, noise: float) -> None:
    """Never above the full value, growing with K, equal to it at K = vocabulary; any subset of ids is a bound too."""
    log_p, log_q = pair(seed, spread, noise)
    full = full_j(log_p, log_q)
    before = np.zeros(len(full))
    for k in (1, 3, 10, 30, 60):
        scores = lumped(log_p, log_q, k)
        assert (scores.j <= full + 1e-9).all() and (scores.j >= before - 1e-9).all()
        assert (scores.gap_estimate >= 0).all() and (scores.gap_ceiling >= -1e-12).all()
        before = scores.j
    assert np.abs(before - full).max() < 1e-9 * (1 + full.max())
    seen = np.random.default_rng(seed % 1000).random(log_p.shape) < 0.5
    for k in (10, 60):
        assert (lumped(log_p, log_q, k, seen).j <= full + 1e-9).all()


def test_an_id_that_is_not_known_is_lumped_and_not_floored() -> None:
    log_p, log_q = pair(0)
    known = np.ones_like(log_p, dtype=bool)
    row, best = 2, int(log_p[2].argmax())
    known[row, best] = False
    shadowed = log_q.copy()
    shadowed[row, best] = np.nan  # what is not known is not looked at either
    scores = lumped(log_p, shadowed, 10, known)
    assert np.isfinite(scores.j).all() and scores.ids[row] == 9
    assert scores.reference_tail[row] > np.exp(log_p[row, best])
    minus_infinity = np.where(known, log_q, -np.inf)
    assert np.array_equal(lumped(log_p, minus_infinity, 10).j, scores.j)


def test_a_tail_that_float32_cannot_resolve_is_merged() -> None:
    """Two sums that come out as 1 + 1e-8 and 1 - 1e-3: the logarithm of the tails' ratio does not exist."""
    p, q = np.array([[0.9, 0.1 + 1e-8]]), np.array([[0.9, 0.099]])
    scores = lumped_divergence(np.log(p), np.log(q), np.ones((1, 2), bool))
    assert scores.ids[0] == 1 and 0 <= scores.j[0] < 1e-6


def test_the_estimate_is_closer_than_the_bound() -> None:
    log_p, log_q = pair(4, spread=2, noise=0.3, vocab=5000)
    full, scores = full_j(log_p, log_q).mean(), lumped(log_p, log_q, 100)
    estimate, ceiling = (scores.j + scores.gap_estimate).mean(), (scores.j + scores.gap_ceiling).mean()
    assert abs(estimate / full - 1) < 0.15 < 1 - scores.j.mean() / full and ceiling > full


@pytest.mark.parametrize("k", [1, 17, 70])
def test_top_log_probabilities_in_blocks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "VOCAB_BLOCK", 16)
    monkeypatch.setattr(divergence, "TOKEN_BLOCK", 5)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (13, 70))
    labels = torch.randint(0, 70, (13,), generator=generator)
    scores = top_log_probabilities(hidden, head, k, labels)
    values, ids = (hidden @ head.T).log_softmax(-1).topk(k, dim=-1)
    assert np.array_equal(scores.ids, ids.numpy())
    assert np.abs(scores.log_probabilities - values.numpy()).max() < 1e-12
    [full] = head_divergences((hidden, head), [(hidden, head)], labels)
    assert np.abs(scores.loss - full.reference_loss).max() < 1e-12


# --- a server that plays both engines ---------------------------------------------------------------------------------


@torch.no_grad()
def log_probabilities(folder: Path) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Token ids → what a server of that checkpoint thinks, float32 [T, vocab]; by our own forward."""
    layout, held = eval_kl.open_layout(folder), {}

    def compute(tokens: tuple[int, ...]) -> np.ndarray:
        if tokens not in held:
            with CheckpointReader(layout.index) as reader, torch.no_grad():
                weights = CheckpointWeights(reader, layout, torch.device("cpu"))
                streams = streams_of(weights, [[torch.tensor([[*tokens, 0]])]])
                walk(streams)
                final = final_hidden(streams[0], weights.tensor("model.norm.weight"))
                logits = final @ weights.tensor("lm_head.weight").to(final.dtype).T
            held[tokens] = logits.log_softmax(-1).numpy()
        return held[tokens]

    return compute


class Fake(ThreadingHTTPServer):
    """`engine` decides the shapes; `answers[path]` replaces an answer: bytes, (status, bytes) or a function of it."""

    def __init__(self, engine: str, model: Callable[[tuple[int, ...]], np.ndarray], **settings: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.think = engine, model
        self.max_logprobs: int = settings.get("max_logprobs", 20)
        self.scale_out: bool = settings.get("scale_out", False)
        self.context: int = settings.get("context", 2048)
        self.answers: dict[str, Any] = settings.get("answers", {})
        self.drop = 0  # so many connections are closed without an answer
        self.asked: list[str] = []
        self.keys: set[str | None] = set()  # what came as Authorization
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Refuse(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *arguments: object) -> None:
        return

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        fake = self.server
        fake.asked.append(self.path)
        fake.keys.add(self.headers["Authorization"])
        if fake.drop:
            fake.drop -= 1
            self.connection.close()
            return
        routes = {"/v1/models": self.models}
        if fake.engine == "vllm":
            routes |= {"/version": lambda body: {"version": "0.33.0"}, "/v1/completions": self.completions}
            routes["/inference/v1/generate"] = self.vllm_generate
        else:
            routes |= {"/server_info": lambda body: {"version": "0.5.17"}, "/generate": self.sglang_generate}
        try:
            status, said = (200, routes[self.path](body)) if self.path in routes else (404, {"detail": "Not Found"})
        except Refuse as refusal:
            status, message = refusal.args
            said = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
        raw = json.dumps(said).encode()
        change = fake.answers.get(self.path)
        if change is not None and not (callable(change) and status != 200):
            change = change(said, body) if callable(change) else change
            status, raw = change if isinstance(change, tuple) else (status, change)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def models(self, body: Any) -> Any:
        card = {
            "object": "model",
            "created": 1,
            "owned_by": self.server.engine,
            "root": "/m",
            "parent": None,
            "max_model_len": self.server.context,
        }
        return {"object": "list", "data": [{"id": "m", **card}, {"id": "adapter", **card, "parent": "m"}]}

    def thought(self, tokens: list[int]) -> np.ndarray:
        """Log-probabilities [T - 1, vocab] of the tokens after the first."""
        if len(tokens) >= self.server.context:
            raise Refuse(400, "This model's maximum context length is exceeded")
        return self.server.think(tuple(tokens))[:-1]

    def vllm_prompt_logprobs(self, tokens: list[int], count: int) -> list[Any]:
        limit = self.server.max_logprobs
        if (VOCAB if count == -1 else count) > (VOCAB if limit == -1 else limit):
            raise Refuse(
                400,
                f"Requested prompt logprobs of {count}, which is greater than max allowed: {limit} "
                f"(parameter=prompt_logprobs, value={count})",
            )
        out: list[Any] = [None]
        for row, token in zip(self.thought(tokens), tokens[1:], strict=True):
            order = np.argsort(-row, kind="stable")
            chosen = [token, *(order if count == -1 else order[:count]).tolist()]
            rank = order.argsort().tolist()
            value = row.tolist()
            out.append({str(i): {"logprob": value[i], "rank": rank[i] + 1, "decoded_token": "x"} for i in chosen})
        return out

    def completions(self, body: Any) -> Any:
        given = self.vllm_prompt_logprobs(body["prompt"], body["prompt_logprobs"])
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "prompt_logprobs": given}
        return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice]}

    def vllm_generate(self, body: Any) -> Any:
        if not self.server.scale_out:
            raise Refuse(403, "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out")
        tokens, asked = body["token_ids"], body["sampling_params"]
        ids = np.array(asked["prompt_logprob_token_ids"])
        if ids.shape[1] > self.server.max_logprobs:
            raise Refuse(
                400,
                f"Requested {ids.shape[1]} token ids per row in prompt_logprob_token_ids, which is "
                f"greater than max allowed: {self.server.max_logprobs}. Set max_logprobs",
            )
        buffer = io.BytesIO()
        np.save(buffer, np.take_along_axis(self.thought(tokens), ids, 1).astype(np.float32))
        return {
            "request_id": "1",
            "model": body["model"],
            "prompt_token_ids": None,
            "prompt_logprobs": self.vllm_prompt_logprobs(tokens, asked["prompt_logprobs"]),
            "prompt_token_id_logprobs": base64.b64encode(buffer.getvalue()).decode(),
            "choices": [{"index": 0, "logprobs": None, "finish_reason": "length", "token_ids": [1]}],
        }

    def sglang_generate(self, body: Any) -> Any:
        assert body["return_logprob"] is True and body["top_logprobs_num"] == 1
        tokens, begin, ids = body["input_ids"], body["logprob_start_len"], body["token_ids_logprob"]
        assert all(isinstance(i, int) for i in ids)  # one flat list
        rows = self.thought(tokens)[begin:]
        following = [[None, tokens[begin], None]]
        following += [[float(row[t]), t, None] for row, t in zip(rows, tokens[begin + 1 :], strict=True)]
        return {
            "text": "x",
            "output_ids": [1],
            "meta_info": {
                "id": "1",
                "finish_reason": {"type": "length", "length": 1},
                "prompt_tokens": len(tokens),
                "input_token_logprobs": following,
                "output_token_logprobs": [[-1.0, 1, None]],
                "input_top_logprobs": [None, *([[float(row.max()), int(row.argmax()), None]] for row in rows)],
                "input_token_ids_logprobs": [None, *([[float(row[i]), i, None] for i in ids] for row in rows)],
            },
        }


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "out"
    pipeline.quantize(make_plan(MICRO, load_recipe("mxfp4-rtn")), folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def think(quantized: Path) -> dict[str, Callable[[tuple[int, ...]], np.ndarray]]:
    return {"reference": log_probabilities(MICRO), "quantized": log_probabilities(quantized)}


@pytest.fixture
def fake(think: Any) -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def start(engine: str = "vllm", model: str = "quantized", **settings: Any) -> Fake:
        made.append(Fake(engine, think[model], **settings))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


SIZE = ("--sequences", "2", "--tokens", "32", "--device", "cpu")


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in ("eval-kl", MICRO, *arguments)])


def facts_of(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, *SIZE, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def full(quantized: Path) -> dict[str, Any]:
    return facts_of(quantized, "--no-noise-floor")


def test_the_document_is_the_described_one(quantized: Path, fake: Callable[..., Fake]) -> None:
    done = call("--server", fake(scale_out=True).url, "--top-k", "20", "--max-kl", "9", *SIZE, "--json")
    assert valid("eval-kl-server", done.stdout)["passed"] is True


WAYS = {
    "vllm reference-ids": ({"scale_out": True, "max_logprobs": VOCAB}, "reference-ids"),
    "vllm whole-vocabulary": ({"max_logprobs": -1}, "whole-vocabulary"),
    "vllm server-top": ({"max_logprobs": 500}, "server-top"),
    "sglang reference-ids": ({}, "reference-ids"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_gives_a_bound_that_grows_to_the_full_value(
    way: str, fake: Callable[..., Fake], full: dict[str, Any]
) -> None:
    settings, mode = WAYS[way]
    url, before = fake(way.split()[0], **settings).url, 0.0
    for k in (5, 400):
        facts = facts_of("--server", url, "--top-k", str(k))
        said = facts["server"]
        assert (said["mode"], said["top_k"], said["engine"]) == (mode, k, way.split()[0])
        assert said["is_lower_bound"] and said["ids_scored"] <= k and said["version"]
        assert before < facts["j"]["mean"] <= full["j"]["mean"] + 1e-6
        assert facts["j"]["mean"] < said["j_estimate"] < said["j_ceiling_if_tail_is_like_the_rest"]
        assert facts["top1"] == pytest.approx(full["top1"]) and facts["data"] == full["data"]
        assert facts["perplexity"]["ratio"] == pytest.approx(full["perplexity"]["ratio"], rel=1e-5)
        before = facts["j"]["mean"]
    assert before == pytest.approx(full["j"]["mean"], rel=0.02)
    assert said["j_estimate"] == pytest.approx(full["j"]["mean"], rel=0.01)
    if mode != "server-top":
        facts = facts_of("--server", url, "--top-k", str(VOCAB))
        assert facts["j"]["mean"] == pytest.approx(full["j"]["mean"], rel=1e-4)
        assert not facts["server"]["is_lower_bound"] and facts["server"]["tail_mass"] == {"reference": 0, "server": 0}


@pytest.mark.parametrize("way", list(WAYS))
def test_a_server_of_the_reference_itself_is_at_zero(way: str, fake: Callable[..., Fake]) -> None:
    facts = facts_of("--server", fake(way.split()[0], "reference", **WAYS[way][0]).url, "--top-k", "64")
    assert 0 <= facts["j"]["mean"] <= facts["server"]["j_ceiling_if_tail_is_like_the_rest"] < 1e-6
    assert facts["top1"]["all"] == 1.0


def test_windows_of_sglang_do_not_show(fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    one = fake("sglang")
    whole = facts_of("--server", one.url, "--top-k", "20")
    few = len(one.asked)
    monkeypatch.setattr(server, "_WINDOW_ENTRIES", 20 * 10**2)
    parts = facts_of("--server", one.url, "--top-k", "20")
    assert len(one.asked) - few > few and parts["j"]["mean"] == pytest.approx(whole["j"]["mean"], rel=1e-6)


def test_without_top_k_the_server_says_how_many(fake: Callable[..., Fake]) -> None:
    result = call("--server", fake(max_logprobs=20).url, *SIZE)
    assert result.exit_code == 0 and "vllm is asked for 20 ids a position" in result.stderr
    assert "at least" in result.stdout and "server-top" in result.stdout and "--enable-scale-out" in result.stdout
    assert "[2/2] sequence 2" in result.stderr
    assert facts_of("--server", fake(scale_out=True, max_logprobs=33).url)["server"]["top_k"] == 33
    assert facts_of("--server", fake("sglang").url)["server"]["top_k"] == server.DEFAULT_TOP_K
    exact = call("--server", fake(max_logprobs=-1).url, *SIZE)
    assert exact.exit_code == 0 and "all 1024 ids" in exact.stdout and "at least" not in exact.stdout


def test_the_gate_refutes_and_does_not_prove(fake: Callable[..., Fake]) -> None:
    url = fake("sglang").url
    failed = call("--server", url, *SIZE, "--max-kl", "0.0001")
    assert failed.exit_code == 5 and "J is at least" in failed.stderr and failed.stdout.startswith("FAILED")
    kept = call("--server", url, *SIZE, "--max-kl", "9")
    assert kept.exit_code == 0 and kept.stdout.startswith("NOT REFUTED") and "PASSED" not in kept.stdout


def test_lost_connections_are_tried_again(fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RETRY_AFTER_S", (0.01, 0.01))
    one = fake("sglang")
    one.drop = 2
    assert server.Link(one.url).call("/v1/models")["object"] == "list"
    one.drop = 3
    with pytest.raises(CheckpointError, match="cannot be reached"):
        server.Link(one.url).call("/v1/models")
    asked = len(one.asked)
    one.answers["/v1/models"] = (503, b'{"message": "busy\\u001b[2J\\nnow"}')
    with pytest.raises(server.Refusal, match=r"answered 503: busy \[2J now$"):
        server.Link(one.url).call("/v1/models")
    assert len(one.asked) == asked + 1  # an answer is an answer


def test_an_address_is_read_strictly() -> None:
    assert server.Link("http://h:1/v1/").url == "http://h:1" and server.Link("https://h/base/v1").path == "/base"
    for url in (
        "localhost:8000",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://u:p@h",
        "http://h/?a=b",
        "http://h/ä",
        "http://a..b",
    ):
        with pytest.raises(UsageError, match="is not an address"):
            server.Link(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@h:8000/v1",
        "http://user:p@s3cret/@h",
        "http://:s3cret@h",
        "http://s3cret@h",
        "user:s3cret@h:8000",
        "http://user:s3cret@[bad",
        "http://user:s3cret@h:port",
        "http://h/v1?api_key=s3cret",
        "http://h/v1?a=b@c&token=s3cret",
        "http://h/#s3cret",
        "http:/u:s3cret@h",
        "http://us\ner:s3cret@h",
    ],
)
@pytest.mark.parametrize("more", [(), (MICRO,)])
def test_a_secret_in_an_address_is_refused_and_never_told(url: str, more: tuple[Path, ...]) -> None:
    result = call(*more, "--server", url, *SIZE)
    assert result.exit_code == 2 and "s3cret" not in result.output, result.output
    assert ("only one of them" if more else "is not an address") in result.stderr


def test_a_key_comes_from_the_environment_and_stays_there(
    fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(server.KEY_NAME, "sk-s3cret\n")
    junit, one = tmp_path / "j.xml", fake(max_logprobs=20)
    result = call("--server", one.url, *SIZE, "--json", "--max-kl", "9", "--junit", junit)
    assert result.exit_code == 0 and one.keys == {"Bearer sk-s3cret"}, result.output
    assert "s3cret" not in result.output + junit.read_text()
    one.answers["/v1/models"] = (401, b'{"error": "the key sk-s3cret is unknown"}')
    result = call("--server", one.url, *SIZE)
    assert result.exit_code == 3 and "401: the key *** is unknown" in result.stderr and "s3cret" not in result.output
    assert "does not take the key that MIMOQUANT_API_KEY holds" in result.stderr
    for key in ("s3cr\u00e9t", "s3cret\r\nX-Other: 1"):
        monkeypatch.setenv(server.KEY_NAME, key)
        result = call("--server", one.url, *SIZE)
        assert result.exit_code == 2 and "no header can hold" in result.stderr and "s3cr" not in result.output
    monkeypatch.setenv(server.KEY_NAME, "")
    free = fake()
    server.Link(free.url).call("/v1/models")
    assert free.keys == {None}


def change(part: Callable[[Any], None], probe: bool = False) -> Callable[[Any, Any], bytes]:
    """Damages an answer; the one to the probe of two tokens only where asked."""

    def damage(said: Any, body: Any) -> bytes:
        if probe or len(body.get("prompt") or body.get("input_ids") or body["token_ids"]) > 2:
            part(said)
        return json.dumps(said).encode()

    return damage


def set_label(said: Any) -> None:
    said["meta_info"]["input_token_logprobs"][5][1] = 3


def raise_all(said: Any) -> None:
    for row in said["choices"][0]["prompt_logprobs"][1:]:
        for value in row.values():
            value["logprob"] += 5


FAILURES: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "wrong model": ({}, ("--model", "other"), 2, "the server does not have it.*it serves m, adapter"),
    "top-k refused": ({}, ("--top-k", "100"), 2, "the server allows 20 log-probabilities.*--max-logprobs 100"),
    "top-k refused, ids": ({"scale_out": True}, ("--top-k", "100"), 2, "allows 20 log-prob.*use --top-k 20"),
    "no logprobs at all": ({"max_logprobs": 0}, (), 2, "allows 0 log-probabilities"),
    "short context": ({"context": 32}, (), 2, "--tokens 32: the server's context is 32.*use --tokens 31"),
    "not JSON": ({"answers": {"/v1/models": b"<html>"}}, (), 3, "the answer is not JSON"),
    "no models": ({"answers": {"/v1/models": b"{}"}}, (), 3, "lists no model"),
    "needs a key": ({"answers": {"/v1/models": (401, b'{"error":"Unauthorized"}')}}, (), 3, "401: Unauth.*API key"),
    "elsewhere": ({"answers": {"/v1/models": (302, b"")}}, (), 3, "answered 302"),
    "broken": ({"answers": {"/v1/completions": (500, b"out of memory")}}, (), 3, "answered 500: out of memory"),
    "no prompt logprobs": (
        {"answers": {"/v1/completions": change(lambda said: said["choices"][0].update(prompt_logprobs=None), True)}},
        (),
        3,
        "does not have the shape",
    ),
    "a token too few": (
        {"answers": {"/v1/completions": change(lambda said: said["choices"][0]["prompt_logprobs"].pop())}},
        (),
        3,
        "does not have the shape",
    ),
    "foreign vocabulary": (
        {
            "answers": {
                "/v1/completions": change(
                    lambda said: said["choices"][0]["prompt_logprobs"][3].update({"5000": {"logprob": -1e-9}})
                )
            }
        },
        (),
        3,
        "id 5000, outside the reference's vocabulary of 1024",
    ),
    "other tokens": (
        {"engine": "sglang", "answers": {"/generate": change(set_label)}},
        (),
        3,
        "is about token 3 where",
    ),
    "no log-probabilities": (
        {"answers": {"/v1/completions": change(raise_all)}},
        (),
        3,
        "sum to .*--logprobs-mode raw_logprobs",
    ),
    "token refused": (
        {"answers": {"/v1/completions": (400, b'{"error":{"message":"Token id 900 is out of vocabulary"}}')}},
        (),
        3,
        "answered 400: Token id 900 is out of vocabulary",
    ),
}


@pytest.mark.parametrize("name", list(FAILURES))
def test_failures_end_in_one_sentence(name: str, fake: Callable[..., Fake]) -> None:
    settings, arguments, code, message = FAILURES[name]
    result = call("--server", fake(**{"engine": "vllm", **settings}).url, *SIZE, *arguments)
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    errors = result.stderr[result.stderr.index("error: ") :]
    assert re.search(message, errors, re.DOTALL), result.output
    assert errors.count("\n") <= 2  # the sentence, and a hint


def test_mistakes_of_the_command_line(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RETRY_AFTER_S", ())
    nobody = "http://127.0.0.1:9"
    cases = [
        ((), 2, "nothing to compare"),
        ((quantized, "--server", nobody), 2, "only one of them"),
        (("--server", nobody, "--html", tmp_path / "a.html"), 2, "--html cannot go with --server"),
        (("--server", nobody, "--baseline", quantized), 2, "--baseline cannot go with --server"),
        ((quantized, "--top-k", "5"), 2, "--top-k cannot go with a CANDIDATE"),
        (("--server", nobody), 3, "cannot be reached"),
        (("--server", "nobody"), 2, "is not an address"),
    ]
    for arguments, code, message in cases:
        result = call(*arguments)
        assert result.exit_code == code and message in result.stderr, result.output
        assert "Traceback" not in result.output


def test_what_is_not_finite_is_counted(fake: Callable[..., Fake]) -> None:
    """SGLang writes NaN as null: such a position counts in its share and nowhere else."""

    def spoil(said: Any) -> None:
        said["meta_info"]["input_token_logprobs"][7][0] = None
        for value in said["meta_info"]["input_token_ids_logprobs"][7]:
            value[0] = None

    one = fake("sglang", answers={"/generate": change(spoil)})
    facts = facts_of("--server", one.url, "--top-k", "20")
    assert facts["nonfinite_share"] == pytest.approx(2 / (2 * 31)) and facts["tokens"] == 2 * 30
