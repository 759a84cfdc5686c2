"""A real vLLM speculates, by the first MTP layer or a DFlash drafter, and accepts what our scores say of the same text.

`scripts/test_engines` makes vLLM's environment and runs this. Left out: sampling, depths 2 and 3 (vLLM runs the first
layer at every depth), 4-bit experts (`test_vllm_cpu` has them), a GPU's kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_cases import HEAD, PYTHON
from micro import MICRO
from padded_twin import padded_twin
from safetensors.torch import load_file, save_file

import mimoquant
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.evaluation.drafts import Blocks, Draft, Mtp
from mimoquant.evaluation.eval_draft import compare_drafts
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.model.drafter import open_drafter

pytestmark = pytest.mark.engine
SEQUENCES, PROMPT, NEW = 14, 96, 160
DRAFTER = "dflash_draft_model.safetensors"
# Of blocks: no longer than the drafter's window, so that nothing hangs on how an engine counts it.
SHORT_SEQUENCES, SHORT_PROMPT, SHORT_NEW = 56, 16, 40


def told_by_vllm(
    tmp_path: Path, checkpoint: Path, prompts: TokenSet, new: int, more: int, speculative: dict[str, Any]
) -> Any:
    job = {
        "checkpoint": str(checkpoint),
        "ids": prompts.ids.tolist(),
        "new": new,
        "more": more,
        "speculative": speculative,
        "out": str(tmp_path / "told.json"),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_drafter.py"), tmp_path / "job.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "told.json").read_text())


def matches(checkpoint: Path, prompts: TokenSet, generated: list[list[int]], draft: Draft) -> np.ndarray:
    """Our greedy matches [sequences, starts, depths] of the text that vLLM generated."""
    text = np.concatenate([prompts.ids, np.array(generated)], 1)
    tokens = TokenSet("generated", text, prompts.domains, "", tuple(map(str, range(len(text)))), ())
    layout = open_layout(checkpoint)
    return compare_drafts(layout, layout, tokens, draft)[0].match


def counted(match: np.ndarray) -> tuple[int, int]:
    """(guesses, accepted ones) of a generation, from the greedy matches [starts] of its text at depth 1.

    The first start is the prompt's last token, the last one's guess is the last token. A wrong guess is replaced by one
    token; a right one brings one more.
    """
    start, drafted, accepted = PROMPT - 1, 0, 0
    while start < len(match) - 1:
        drafted, accepted = drafted + 1, accepted + int(match[start])
        start += 1 + int(match[start])
    return drafted, accepted


def counted_blocks(match: np.ndarray) -> tuple[int, int]:
    """The same of blocks [starts, depths], all of whose guesses are made and judged, also past the last token."""
    done, drafted, accepted = 1, 0, 0  # the prompt's own step brings a token and no guess
    while done < SHORT_NEW:
        right = int(match[SHORT_PROMPT - 2 + done].cumprod().sum())
        done, drafted, accepted = done + 1 + right, drafted + match.shape[1], accepted + right
    return drafted, accepted


def prompts_of(sequences: int, tokens: int) -> TokenSet:
    return load_tokens(["heldout-v1"], MICRO, sequences=sequences, tokens=tokens, vocab=1024)


def test_vllm_accepts_what_we_say(tmp_path: Path) -> None:
    prompts = prompts_of(SEQUENCES, PROMPT)
    twin = padded_twin(MICRO, tmp_path / "twin", HEAD, mtp=True)
    told = told_by_vllm(tmp_path, twin, prompts, NEW, 0, {"method": "mtp", "num_speculative_tokens": 1})
    match = matches(twin, prompts, told["generated"], Mtp(1))
    assert match.shape == (SEQUENCES, PROMPT + NEW - 1, 1)
    drafted, accepted = np.sum([counted(row) for row in match[..., 0]], axis=0)
    print(f"\nvLLM drafted {told['drafted']}, accepted {told['accepted']}; ours {drafted}, {accepted}")
    assert abs(drafted - told["drafted"]) <= 2 and abs(accepted - told["accepted"]) <= 2  # a tie may fall either way
    assert 0.5 < accepted / drafted < 0.95


def with_one_key_norm(folder: Path) -> Path:
    """The shipped drafter, with the first layer's norm of keys in all layers: vLLM's kernel for CPUs takes that one for
    the context's keys of every layer. (Ours, made to do so, drafts as vLLM does with the shipped one.)"""
    shutil.copytree(mimoquant.micro_drafter(), folder)
    tensors = load_file(folder / DRAFTER)
    for name in [name for name in tensors if name.endswith("self_attn.k_norm.weight")]:
        tensors[name] = tensors["layers.0.self_attn.k_norm.weight"].clone()
    save_file(tensors, folder / DRAFTER, {"format": "pt"})
    return folder


def test_vllm_accepts_of_blocks_what_we_say(tmp_path: Path) -> None:
    prompts = prompts_of(SHORT_SEQUENCES, SHORT_PROMPT)
    twin, folder = padded_twin(MICRO, tmp_path / "twin", HEAD), with_one_key_norm(tmp_path / "drafter")
    blocks = Blocks(*open_drafter(folder))
    told = told_by_vllm(
        tmp_path,
        twin,
        prompts,
        SHORT_NEW,
        blocks.depth + 1,
        {"method": "dflash", "model": str(folder), "num_speculative_tokens": blocks.depth},
    )
    match = matches(twin, prompts, told["generated"], blocks)
    drafted, accepted = np.sum([counted_blocks(row) for row in match], axis=0)
    print(f"\nvLLM drafted {told['drafted']}, accepted {told['accepted']}; ours {drafted}, {accepted}")
    tie = blocks.depth + 1  # may fall either way, and moves all steps after it
    assert abs(drafted - told["drafted"]) <= tie and abs(accepted - told["accepted"]) <= tie
    assert accepted / (drafted / blocks.depth) > 0.15
