#!/usr/bin/env python
"""Does vLLM or SGLang on this machine's GPU answer with our numbers? Every container, real head sizes, drafts, server.

Writes random checkpoints with 192/128 heads in Flash's layout (split q, k, v in bf16) and in that of V2.5 and Pro (FP8,
fused), has them quantized, asks the engine for the log-probabilities of whole prompts, and holds them against our
float32 forward of the same output. Rows of drafts and of a server use the micro checkpoint, whose heads are padded to
128. Prints which kernels the engine names.

usage: scripts/judge_gpu.py --engine vllm|sglang [--site DIR[:DIR]] [--out DIR] [--only TEXT...] [--budget-s N] [--tp N]

Each row is a process with a limit of its own, so a failure costs one row; the record of a row (results.jsonl in --out:
numbers, kernels, versions, the end of the log if it failed) is written when the row ends. Rows start in the order of
ROWS as places get free, and none after --budget-s. `--site`: where the engine's packages are, if they are not installed
in this environment. vLLM 0.26 or later, SGLang 0.5.17 or later, nvcc for the kernels SGLang builds at first use.

All experts see all tokens (top 8 of 8): a rounding that flips a route would say nothing about a container.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import mimoquant
from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.divergence import logits_of
from mimoquant.evaluation.drafts import MTP, Blocks, Draft, Mtp
from mimoquant.evaluation.eval_draft import compare_drafts
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.model.drafter import open_drafter
from mimoquant.model.layer_stream import walk
from mimoquant.model.served_rounding import FP8, NONE, NOTHING, Rounding
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import parse_recipe
from mimoquant.synthetic.checkpoint import SynthSizes, synth
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.layer_rounding import layer_roundings

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("tests/serving", "tests"))]

from engine_cases import INT4, MXFP4, NVFP4, Case, recipe, with_remote_code  # noqa: E402
from kernel_arithmetic import compare_captured, exact_weights, sums_in_float64  # noqa: E402
from padded_twin import padded_twin  # noqa: E402

SIZES = {
    "layers": 6,
    "hidden": 512,
    "experts": 8,
    "top_k": 8,
    "expert_intermediate": 512,
    "dense_intermediate": 512,
    "vocab": 2048,
    "heads": 16,
    "kv_heads": 2,
    "swa_kv_heads": 2,
    "head_dim": 192,
    "v_head_dim": 128,
    "mtp_layers": 0,
}
SOURCES: dict[str, tuple[str, dict[str, int]]] = {  # layout, and what is not SIZES
    "flash": ("flash", {}),
    "pro": ("pro", {}),
    "v2.5": ("pro", {"swa_kv_heads": 4}),  # V2.5's attention, without its towers
    "v2.5 towers": ("v2.5", {"swa_kv_heads": 4}),
}
MICRO_HEAD = 128
LENGTHS = (96, 96, 96)
WINDOWS = {"sliding_window", "sliding_window_size"}
PARSERS = {  # of a chat's reasoning and tool calls
    "sglang": ("--reasoning-parser", "mimo", "--tool-call-parser", "mimo"),
    "vllm": ("--reasoning-parser", "mimo", "--tool-call-parser", "mimo", "--enable-auto-tool-choice"),
}
DRAFTER = "dflash_draft_model.safetensors"
SPOKEN = re.compile(
    r"(?:Using \S.*?(?:backend|Experts|Marlin|kernel|Method|MoE|scheme)\S*[^\n]*|\S*Marlin\S*[^\n]*)", re.I
)
TAIL = 40  # lines of a failure's log that are kept


@dataclass(frozen=True)
class Row:
    """What is asked of an engine. `source`: of SOURCES, or "micro"; `case`: how it is quantized, None: not at all."""

    source: str
    case: Case | None = None
    kind: str = "rows"  # of JUDGES
    settings: dict[str, Any] = field(default_factory=dict)  # keywords of the engine


def quantized(source: str, scheme: Any, settings: str = "", container: str = "compressed-tensors", **more: Any) -> Row:
    kept = {key: more.pop(key) for key in ("method",) if key in more}
    return Row(source, Case(source, scheme, settings, container, **kept), **more)


MIXED = ((1, INT4 % 128), (3, MXFP4), (4, NVFP4))
UNIT = "input_scales: unit, "
CALIBRATED = "calibration: {sequences: 32, tokens: 64}, signed_scales: true, "
ROWS = {
    "int4 g128, V2.5": quantized("v2.5", INT4 % 128),
    "NVFP4, V2.5": quantized("v2.5", NVFP4),
    "NVFP4 ModelOpt, V2.5": quantized("v2.5", NVFP4, container="modelopt"),
    "int4 g32, V2.5": quantized("v2.5", INT4 % 32),
    "int4 g128, Flash": quantized("flash", INT4 % 128),
    "MTP drafts, int4 g64": quantized("micro", INT4 % 64, kind="mtp"),
    "MXFP4 native, Flash": quantized("flash", MXFP4, container="native"),
    "MXFP4 native, V2.5": quantized("v2.5", MXFP4, container="native"),
    "server, int4 g64": quantized("micro", INT4 % 64, kind="server"),
    "server, int4 g128 of one group a rank": quantized("micro", INT4 % 128, kind="server"),
    "quantize, serve, chat, J, int4 g64": quantized("micro", INT4 % 64, kind="loop"),
    "a mixture by layer, V2.5": quantized("v2.5", MIXED, "carve_outs: {2: fp8, 5: bf16}, "),
    "NVFP4, a layer FP8, V2.5": quantized("v2.5", NVFP4, "carve_outs: {2: fp8}, "),
    "int4 g128, a layer bf16, V2.5": quantized("v2.5", INT4 % 128, "carve_outs: {2: bf16}, "),
    "MXFP4 native, a layer bf16, V2.5": quantized("v2.5", MXFP4, "carve_outs: {2: bf16}, ", "native"),
    "NVFP4 ModelOpt, a layer bf16, V2.5": quantized("v2.5", NVFP4, "carve_outs: {2: bf16}, ", "modelopt"),
    "DFlash drafts, int4 g64": quantized("micro", INT4 % 64, kind="dflash"),
    "bf16, micro": Row("micro"),
    "MTP drafts, bf16": Row("micro", kind="mtp"),
    "DFlash drafts, bf16": Row("micro", kind="dflash"),
    "server, bf16": Row("micro", kind="server"),
    "DFlash drafts, other key norms": Row("micro", kind="key norms"),
    "int4 g32 asymmetric, V2.5": quantized("v2.5", INT4.replace("symmetric: true", "symmetric: false") % 32),
    "MXFP4, V2.5": quantized("v2.5", MXFP4),
    "NVFP4, Flash": quantized("flash", NVFP4),
    "int4 g32, Flash": quantized("flash", INT4 % 32),
    "FP8 source, Flash": Row("flash"),
    "FP8 source, V2.5": Row("v2.5"),
    "FP8 activations, FP8 source, V2.5": Row("v2.5", kind="fp8"),  # vLLM's alone
    "FP8 activations, MXFP4 native, V2.5": quantized("v2.5", MXFP4, container="native", kind="fp8"),
    "FP8 sums, FP8 source, V2.5": Row("v2.5", kind="sums"),
    "FP8 sums, MXFP4 native, V2.5": quantized("v2.5", MXFP4, container="native", kind="sums"),
    "int4 g128, V2.5 with towers": quantized("v2.5 towers", INT4 % 128),
    "NVFP4 W4A4, V2.5": quantized("v2.5", NVFP4, UNIT),
    "NVFP4 W4A4 ModelOpt, V2.5": quantized("v2.5", NVFP4, UNIT, container="modelopt"),
    "int4 g64 by GPTQ, negative scales, micro": quantized("micro", INT4 % 64, CALIBRATED, method="GPTQModifier"),
}
FIRST = {  # which rows come first; the rest follow in the order above
    "sglang": (
        "int4 g128, V2.5",
        "NVFP4, V2.5",
        "NVFP4 ModelOpt, V2.5",
        "int4 g32, V2.5",
        "int4 g128, Flash",
        "MTP drafts, int4 g64",
        "MXFP4 native, Flash",
        "MXFP4 native, V2.5",
        "server, int4 g64",
        "quantize, serve, chat, J, int4 g64",
    ),
    "vllm": (
        "MXFP4 native, Flash",
        "a mixture by layer, V2.5",
        "NVFP4, a layer FP8, V2.5",
        "int4 g128, a layer bf16, V2.5",
        "MTP drafts, int4 g64",
        "DFlash drafts, int4 g64",
        "DFlash drafts, other key norms",
        "NVFP4 W4A4, V2.5",
        "NVFP4 W4A4 ModelOpt, V2.5",
        "server, int4 g64",
        "quantize, serve, chat, J, int4 g64",
        "MXFP4 native, a layer bf16, V2.5",
        "NVFP4 ModelOpt, a layer bf16, V2.5",
    ),
}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def source(name: str, work: Path) -> Path:
    """A source by its name. Flash's too has a config class of its own beside it where the engine is SGLang, which
    stops at the rope_parameters of transformers' class (0.5.23)."""
    folder = work / "sources" / slug(name)
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    if name == "micro":
        layout = "flash"
        padded_twin(mimoquant.micro_checkpoint(), folder, MICRO_HEAD, mtp=True)
    else:
        layout, sizes = SOURCES[name]
        synth(folder, layout, sizes=SynthSizes(**(SIZES | sizes)))
    return folder if layout == "flash" and work.name != "sglang" else with_remote_code(folder)


def prepared(name: str, work: Path) -> Path:
    """The folder of the checkpoint that a row asks about."""
    row = ROWS[name]
    base = source(row.source, work)
    if row.case is None:
        return base
    out = work / slug(name) / "checkpoint"
    plan = make_plan(base, parse_recipe(recipe(row.case), slug(name)), container=row.case.container)
    pipeline.quantize(plan, out, device="cuda" if torch.cuda.is_available() else "cpu")
    return out


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


# --- our side ---------------------------------------------------------------------------------------------------------


def prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(4, vocab, length).tolist() for length in LENGTHS]


@torch.no_grad()
def ours(folder: Path, wider: int = 0, rounding: Rounding = NOTHING, in_bf16: bool = True) -> np.ndarray:
    """Log-probabilities after every token but the last of each prompt, float64 [positions, vocabulary]. `wider`: this
    many keys more in the window of sliding layers. `rounding`: of inputs; `in_bf16`: False takes its bf16 between
    operations away."""
    layout = open_layout(folder)
    config = dict(layout.config)
    for key in WINDOWS & config.keys():
        config[key] += wider
    layout = replace(layout, config=config)
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        [stream] = streams_of(weights, [[torch.tensor(prompts(layout.geometry.vocab))]])
        layers = layer_roundings(reader, layout, rounding)
        stream.roundings = [replace(layer, in_bf16=layer.in_bf16 and in_bf16) for layer in layers]
        walk([stream])
        hidden = final_hidden(stream, weights.tensor("model.norm.weight"))
        rows = logits_of(hidden, weights.tensor("lm_head.weight")).log_softmax(-1)
    return rows.numpy().astype(np.float64)


def counted(checkpoint: Path, told: dict[str, Any], asked: TokenSet, new: int, draft: Draft) -> dict[str, Any]:
    """What our greedy matches of the engine's own text make of a generation of `new` tokens.

    A step starts at the last known token, takes all guesses up to the first wrong one, and one token more.
    """
    text = np.concatenate([asked.ids, np.array(told["generated"])], 1)
    tokens = TokenSet("generated", text, asked.domains, "", tuple(map(str, range(len(text)))), ())
    layout = open_layout(checkpoint)
    match = compare_drafts(layout, layout, tokens, draft)[0].match
    steps, accepted = 0, 0
    for row in match:
        done = 1  # the prompt's own step brings a token and no guess
        while done < new and asked.ids.shape[1] - 2 + done < len(row):
            right = int(row[asked.ids.shape[1] - 2 + done].cumprod().sum())
            steps, accepted, done = steps + 1, accepted + right, done + 1 + right
    return {
        "steps": steps,
        "drafted": steps * match.shape[-1],
        "accepted": accepted,
        "accepted_per_step": round(accepted / max(1, steps), 4),
    }


def with_key_norms(folder: Path, factor: float) -> Path:
    """The shipped drafter with the first layer's norm of keys, times a factor, in all layers after it."""
    shutil.copytree(mimoquant.micro_drafter(), folder)
    tensors = load_file(folder / DRAFTER)
    first = "layers.0.self_attn.k_norm.weight"
    for name in [name for name in tensors if name.endswith("self_attn.k_norm.weight") and name != first]:
        tensors[name] = tensors[first] * factor
    save_file(tensors, folder / DRAFTER, {"format": "pt"})
    return folder


# --- the engine's side ------------------------------------------------------------------------------------------------


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Kernels that the first row compiled serve the others. SGLang builds its own without a lock: a copy for each."""
    cache, own = options.work / "cache", options.work / slug(options.row) / "tvm"
    if options.engine == "sglang" and not own.exists():
        built = cache / "tvm" if (cache / "tvm").exists() else Path(os.environ.get("TVM_FFI_CACHE_DIR", cache / "none"))
        shutil.copytree(built, own) if built.exists() else own.mkdir()
    told = {
        "CUDA_CACHE_PATH": str(cache / "cuda"),
        "CUDA_CACHE_MAXSIZE": str(4 << 30),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TVM_FFI_CACHE_DIR": str(own),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # a server's, too
        "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    }
    return os.environ | told | ({"PYTHONPATH": f"{options.site}:{HERE.parent}"} if options.site else {})


def asked_of(options: argparse.Namespace, checkpoint: Path, ids: list[list[int]], **job: Any) -> Path:
    """Ask, in a process of the engine's own; the folder of its answer. RuntimeError: it did not answer."""
    out: Path = options.work / slug(options.row) / "answer"
    out.mkdir(parents=True)
    by_engine = {
        "vllm": {
            "attention_backend": options.attention or vllm_attention(checkpoint),
            "tensor_parallel_size": options.tp,
        },
        "sglang": {"tp_size": options.tp},
    }[options.engine]
    job = {
        "engine": options.engine,
        "checkpoint": str(checkpoint),
        "ids": ids,
        "out": str(out),
        "new": 0,
        "more": 0,
        "vocab": open_layout(checkpoint).geometry.vocab,
    } | job
    job["settings"] = by_engine | job.get("settings", {}) | json.loads(options.settings)
    (out / "job.json").write_text(json.dumps(job))
    with (out / "log").open("w") as log:
        done = subprocess.run(
            [options.python, HERE / "ask_engine.py", out / "job.json"],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment(options),
            cwd=out,
        )
    if done.returncode or not (out / "engine.json").exists():
        raise RuntimeError(f"{options.engine} ended with {done.returncode} and without an answer")
    return out


def vllm_attention(checkpoint: Path) -> str:
    config = json.loads((checkpoint / "config.json").read_text())
    same = config.get("v_head_dim", config["head_dim"]) == config["head_dim"]
    return "TRITON_ATTN" if same else "TRITON_ATTN_DIFFKV"


def engine_log(options: argparse.Namespace, row: str) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted((options.work / slug(row)).glob("answer/log")))


# --- rows -------------------------------------------------------------------------------------------------------------


def judged_rows(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    out = asked_of(options, checkpoint, prompts(open_layout(checkpoint).geometry.vocab), settings=row.settings)
    theirs, own = np.load(out / "rows.npy").astype(np.float64), ours(checkpoint)
    kl = (np.exp(own) * (own - theirs)).sum(-1)
    origin = ours(source(row.source, options.work)) if row.case else own
    return {
        "positions": len(own),
        "not_finite": int((~np.isfinite(theirs)).sum()),
        "max_dlogp": float(np.abs(own - theirs).max()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "kl_median": float(np.median(kl)),
        "worst_positions": np.argsort(-kl)[:5].tolist(),  # of all prompts, one after the other
        "kl_mean_one_key_more": mean_kl(ours(checkpoint, wider=1), theirs),  # what SGLang's sliding layers see
        "kl_to_source": float((np.exp(origin) * (origin - own)).sum(-1).mean()),
    }


def mean_kl(own: np.ndarray, theirs: np.ndarray) -> float:
    return float((np.exp(own) * (own - theirs)).sum(-1).mean())


def judged_fp8(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    """FP8 activations: codes and scales captured in the engine, how near our forward comes that rounds so too, and how
    near on the engine's own sums."""
    vocab, experts = open_layout(checkpoint).geometry.vocab, FP8 if row.case is None else NONE
    out = asked_of(options, checkpoint, prompts(vocab), settings=row.settings, capture=6)
    theirs, rounding = np.load(out / "rows.npy").astype(np.float64), Rounding(experts, FP8)
    told: dict[str, Any] = {
        "positions": len(theirs),
        "captured": compare_captured(out / "captured.safetensors"),
        "kl_mean_unrounded": mean_kl(ours(checkpoint), theirs),
        "kl_mean_in_float32": mean_kl(ours(checkpoint, rounding=rounding, in_bf16=False), theirs),
    }
    own = ours(checkpoint, rounding=rounding)
    told |= {"kl_mean": mean_kl(own, theirs), "kl_max": float((np.exp(own) * (own - theirs)).sum(-1).max())}
    with exact_weights():
        told["kl_mean_exact_weights"] = mean_kl(ours(checkpoint, rounding=rounding), theirs)
    if (out / "rows_by_our_layers.npy").exists():
        asked = np.load(out / "rows_by_our_layers.npy").astype(np.float64)
        told |= {"kl_mean_on_its_sums": mean_kl(asked, theirs), "equal_on_its_sums": float((asked == theirs).mean())}
        told["kl_max_on_its_sums"] = float((np.exp(asked) * (asked - theirs)).sum(-1).max())
    return told


def judged_sums(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    """FP8 activations once more, with the engine's products and attention, and ours, in float64."""
    vocab, rounding = open_layout(checkpoint).geometry.vocab, Rounding(FP8 if row.case is None else NONE, FP8)
    out = asked_of(options, checkpoint, prompts(vocab), settings=row.settings, float64=True)
    theirs, summed = (np.load(out / f"{name}.npy").astype(np.float64) for name in ("rows", "rows_in_float64"))
    with exact_weights():
        stored = ours(checkpoint, rounding=rounding)
        with sums_in_float64():
            again = ours(checkpoint, rounding=rounding)
    return {
        "positions": len(theirs),
        "kl_of_the_order_of_our_sums": mean_kl(stored, again),
        "kl_of_the_kernels_sums": mean_kl(summed, theirs),
        "kl_mean_of_both_in_float64": mean_kl(again, summed),
    }


def micro_prompts(sequences: int, tokens: int) -> TokenSet:
    return load_tokens(["heldout-v1"], mimoquant.micro_checkpoint(), sequences=sequences, tokens=tokens, vocab=1024)


def judged_mtp(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    new, asked = 96, micro_prompts(8, 96)
    depth = 3 if options.engine == "sglang" else 1  # vLLM runs the first layer at every depth
    settings: dict[str, Any] = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    if options.engine == "sglang":
        settings = {
            "speculative_algorithm": "EAGLE",
            "speculative_num_steps": depth,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": depth + 1,
        }
    out = asked_of(options, checkpoint, asked.ids.tolist(), new=new, more=depth + 1, settings=settings | row.settings)
    told = json.loads((out / "text.json").read_text())
    ours = {name: counted(checkpoint, told, asked, new, Mtp(depth, name)) for name in MTP[: min(depth, 2)]}
    return {"engine_counts": told["counts"], "ours": ours}


def judged_dflash(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    return by_blocks(options, row, checkpoint, mimoquant.micro_drafter())[0]


def judged_key_norms(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    """Whose norm of keys do later layers of a drafter get? Here it is minus the first layer's."""
    made = options.work / slug(options.row)
    note, recount = by_blocks(options, row, checkpoint, with_key_norms(made / "drafter", -1.0))
    return note | {"ours_with_the_first_layers_norm": recount(with_key_norms(made / "one-norm", 1.0))}


def by_blocks(
    options: argparse.Namespace, row: Row, checkpoint: Path, drafter: Path
) -> tuple[dict[str, Any], Callable[[Path], dict[str, Any]]]:
    """What the engine counted of a DFlash drafter and what we do; and our count of its text by another drafter."""
    new, asked, blocks = 40, micro_prompts(56, 16), Blocks(*open_drafter(drafter))
    settings: dict[str, Any] = {
        "speculative_config": {
            "method": "dflash",
            "model": str(drafter),
            "num_speculative_tokens": blocks.depth,
            "attention_backend": options.attention or vllm_attention(checkpoint),
        }
    }
    if options.engine == "sglang":
        settings = {
            "speculative_algorithm": "DFLASH",
            "speculative_draft_model_path": str(drafter),
            "speculative_num_draft_tokens": blocks.depth + 1,
            "speculative_draft_window_size": 64,
        }
    more = blocks.depth + 1
    out = asked_of(options, checkpoint, asked.ids.tolist(), new=new, more=more, settings=settings | row.settings)
    told = json.loads((out / "text.json").read_text())

    def recount(folder: Path) -> dict[str, Any]:
        return counted(checkpoint, told, asked, new, Blocks(*open_drafter(folder)))

    return {"engine_counts": told["counts"], "ours": recount(drafter)}, recount


def judged_server(options: argparse.Namespace, row: Row, checkpoint: Path) -> dict[str, Any]:
    """J by `eval-kl --server` of a server that is started here, beside J of the file; in a loop, a chat before it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out: Path = options.work / slug(options.row) / "answer"
    out.mkdir(parents=True)
    with (out / "log").open("w") as log:
        server = subprocess.Popen(
            [*server_command(options, checkpoint, port), *(PARSERS[options.engine] if row.kind == "loop" else ())],
            stdout=log,
            stderr=log,
            cwd=out,
            stdin=subprocess.DEVNULL,
            env=environment(options) | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            base, data = source(row.source, options.work), ("--sequences", "8", "--tokens", "128")
            chat = {"chat": chatted(port, str(checkpoint))} if row.kind == "loop" else {}
            served = eval_kl(base, "--server", f"http://127.0.0.1:{port}", *data)
            filed = eval_kl(base, str(checkpoint), "--no-noise-floor", *data)
        finally:
            server.terminate()
    return chat | {"server": served, "file": filed}


def chatted(port: int, model: str) -> dict[str, Any]:
    """What a chat completion with a tool says of itself: the model's text is of no interest here, its form is."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "How warm is it in Rome?"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        told = json.load(answer)
    choice = told["choices"][0]
    fields = sorted(key for key, value in choice["message"].items() if value)
    return {"usage": told["usage"], "finish_reason": choice["finish_reason"], "message_has": fields}


def server_command(options: argparse.Namespace, checkpoint: Path, port: int) -> list[str]:
    if options.engine == "sglang":
        return [
            options.python,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(checkpoint),
            "--port",
            str(port),
            "--attention-backend",
            "triton",
            "--sampling-backend",
            "pytorch",
            "--grammar-backend",
            "none",
            "--disable-cuda-graph",
            "--mem-fraction-static",
            "0.15",
            "--max-total-tokens",
            "32768",
            "--context-length",
            "512",
            "--trust-remote-code",
            "--skip-server-warmup",
            "--disable-radix-cache",  # 0.5.23's, built for torch 2.14, takes an int64 tensor of 2.11 for another type
        ]
    command = [
        options.python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(checkpoint),
        "--port",
        str(port),
        "--max-model-len",
        "512",
        "--enforce-eager",
        "--logprobs-mode",
        "raw_logprobs",
        "--max-logprobs",
        "-1",
        "--attention-backend",
        vllm_attention(checkpoint),
        "--no-enable-prefix-caching",
        "--gpu-memory-utilization",
        "0.1",
        "--kv-cache-memory-bytes",
        str(2**29),
        "--trust-remote-code",
    ]
    said = subprocess.run(
        [options.python, "-c", "import vllm; print(vllm.__version__)"],
        env=environment(options),
        capture_output=True,
        text=True,
    ).stdout.split()
    newer = said and tuple(map(int, re.findall(r"\d+", said[-1])[:2])) >= (0, 32)
    return [*command, "--enable-scale-out"] if newer else command


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers; the row's own limit ends a longer wait."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server ended with {server.returncode}")


def eval_kl(*arguments: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mimoquant", "eval-kl", *map(str, arguments), "--json", "--quiet"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    if done.returncode:
        raise RuntimeError(f"eval-kl ended with {done.returncode}: {done.stderr[-500:]}")
    said = json.loads(done.stdout)
    return {
        key: said[key] for key in ("server", "j", "kl_forward", "kl_reverse", "top1", "lumped", "mode") if key in said
    } or said


JUDGES: dict[str, Callable[[argparse.Namespace, Row, Path], dict[str, Any]]] = {
    "rows": judged_rows,
    "fp8": judged_fp8,
    "sums": judged_sums,
    "mtp": judged_mtp,
    "dflash": judged_dflash,
    "key norms": judged_key_norms,
    "server": judged_server,
    "loop": judged_server,
}


def judge(options: argparse.Namespace) -> None:
    """One row, in a process of its own."""
    row, start = ROWS[options.row], time.monotonic()
    result = JUDGES[row.kind](options, row, prepared(options.row, options.work))
    result["row_s"] = round(time.monotonic() - start)
    (options.work / slug(options.row) / "result.json").write_text(json.dumps(result))


# --- all rows ---------------------------------------------------------------------------------------------------------


def record(options: argparse.Namespace, name: str, started: float) -> dict[str, Any]:
    """Run a row and say what came of it; never raises."""
    if options.budget_s and time.monotonic() - started > options.budget_s:
        return {"row": name, "engine": options.engine, "skipped": "no time left"}
    folder = options.work / slug(name)
    command = [sys.executable, __file__, *sys.argv[1:], "--work", str(options.work), "--row", name]
    note: dict[str, Any] = {"row": name, "engine": options.engine}
    try:
        folder.mkdir()
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                process.wait(options.row_s)
            except subprocess.TimeoutExpired:
                note["error"] = f"no answer in {options.row_s} s"
            finally:
                kill(process)
        spoken = engine_log(options, name)
        note["kernels"] = sorted(
            {" ".join(found.split())[:120] for found in SPOKEN.findall(spoken) if "Using" in found}
        )
        for part in (folder / "answer/engine.json", folder / "result.json"):
            note |= json.loads(part.read_text()) if part.exists() else {}
        if not (folder / "result.json").exists():
            lines = (folder / "log").read_text(errors="replace").splitlines()
            note.setdefault("error", lines[-1] if lines else "no word")
            note["log_tail"] = lines[-10:] + spoken.splitlines()[-TAIL:]
            reasons = [line for line in spoken.splitlines() if re.search(r"\b\w*(Error|Exception)\b: ", line)]
            note["engine_errors"] = [line[-300:] for line in reasons[-4:]]
    except Exception:
        note["error"] = traceback.format_exc()
    return note


def kill(process: subprocess.Popen[Any]) -> None:
    """The row, its engine and the engine's workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def told(note: dict[str, Any]) -> str:
    """A row of the printed table."""
    kernels = "; ".join(note.get("kernels", ()))
    if "kl_to_source" in note:
        numbers = f"{note['max_dlogp']:.3f} | {note['kl_mean']:.1e}, {note['kl_max']:.1e} | {note['kl_to_source']:.3f}"
        return f"| {note['row']} | {numbers} | {kernels} |"
    hidden = {"row", "engine", "kernels", "log_tail", "gpu"}
    return f"| {note['row']} | {json.dumps({k: v for k, v in note.items() if k not in hidden})[:900]} | | | {kernels} |"


def judge_all(options: argparse.Namespace) -> None:
    names = [*FIRST[options.engine], *(name for name in ROWS if name not in FIRST[options.engine])]
    names = [name for name in names if any(text.lower() in name.lower() for text in options.only)]
    names = [name for name in names if ROWS[name].kind not in ("fp8", "sums") or options.engine == "vllm"]
    started = time.monotonic()
    for name in dict.fromkeys(ROWS[row].source for row in names):
        try:
            source(name, options.work)
        except Exception:
            traceback.print_exc()
    print(
        "| output | max abs Δ log p | KL to ours: mean, max | KL to the source | kernels |\n|---|---|---|---|---|",
        flush=True,
    )
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(note: dict[str, Any]) -> None:
        with (options.out / "results.jsonl").open("a") as results:
            results.write(json.dumps(note) + "\n")
        print(told(note), flush=True)

    first, *rest = names
    keep(record(options, first, started))  # alone: it compiles kernels
    if (options.work / slug(first) / "tvm").exists():
        shutil.copytree(options.work / slug(first) / "tvm", options.work / "cache" / "tvm", dirs_exist_ok=True)
    with ThreadPoolExecutor(options.at_once) as pool:
        for job in as_completed([pool.submit(record, options, name, started) for name in rest]):
            keep(job.result())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--site", help="folders of the engine's packages, for PYTHONPATH")
    parser.add_argument("--python", default=sys.executable, help="the engine's Python")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints and logs, kept; else a temporary one")
    parser.add_argument("--out", type=Path, default=Path("judge_gpu"), help="where results.jsonl is appended to")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="rows with one of these texts in their names")
    parser.add_argument("--at-once", type=int, default=4, help="rows that share the GPU")
    parser.add_argument("--row-s", type=int, default=240, help="a row's limit, kernels' compilation included")
    parser.add_argument("--budget-s", type=int, default=0, help="start no row after so long; 0: no limit")
    parser.add_argument("--attention", help="vLLM's attention back end; default: Triton's")
    parser.add_argument("--settings", default="{}", help="more keywords of the engine, as JSON")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.row:
        return judge(options)
    with contextlib.ExitStack() as until_the_end:
        base = options.work or Path(until_the_end.enter_context(tempfile.TemporaryDirectory()))
        options.work = base.resolve() / options.engine
        options.work.mkdir(parents=True, exist_ok=True)
        judge_all(options)


if __name__ == "__main__":
    main()
