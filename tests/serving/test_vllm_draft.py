"""A real vLLM speculates, by the first MTP layer or a DFlash drafter, and accepts what our scores say of the same text.

`scripts/test_engines` makes vLLM's environment and runs this. Left out: sampling, depths 2 and 3 (vLLM runs the first
layer at every depth), 4-bit experts (`test_vllm_cpu` has them), a GPU's kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_cases import HEAD, PYTHON
from padded_twin import padded_twin

import mimoquant
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.evaluation.acceptance import compare_drafts
from mimoquant.evaluation.drafts import Blocks, Draft, Mtp
from mimoquant.evaluation.evaluate import open_layout
from mimoquant.model.drafter import open_drafter

pytestmark = pytest.mark.engine
MICRO = mimoquant.micro_checkpoint()
SEQUENCES, PROMPT, NEW = 14, 96, 160


def told_by_vllm(tmp_path: Path, checkpoint: Path, prompts: TokenSet, more: int, speculative: dict[str, Any]) -> Any:
    if not PYTHON.exists():
        pytest.skip("vLLM's environment is missing (scripts/setup_vllm_cpu)")
    job = {"checkpoint": str(checkpoint), "ids": prompts.ids.tolist(), "new": NEW, "more": more,
           "speculative": speculative, "out": str(tmp_path / "told.json")}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run([PYTHON, Path(__file__).with_name("vllm_drafter.py"), tmp_path / "job.json"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
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
    while done < NEW:
        right = int(match[PROMPT - 2 + done].cumprod().sum())
        done, drafted, accepted = done + 1 + right, drafted + match.shape[1], accepted + right
    return drafted, accepted


@pytest.fixture(scope="module")
def prompts() -> TokenSet:
    return load_tokens(["heldout-v1"], MICRO, sequences=SEQUENCES, tokens=PROMPT, vocab=1024)


def test_vllm_accepts_what_we_say(prompts: TokenSet, tmp_path: Path) -> None:
    twin = padded_twin(MICRO, tmp_path / "twin", HEAD, mtp=True)
    told = told_by_vllm(tmp_path, twin, prompts, 0, {"method": "mtp", "num_speculative_tokens": 1})
    match = matches(twin, prompts, told["generated"], Mtp(1))
    assert match.shape == (SEQUENCES, PROMPT + NEW - 1, 1)
    drafted, accepted = np.sum([counted(row) for row in match[..., 0]], axis=0)
    print(f"\nvLLM drafted {told['drafted']}, accepted {told['accepted']}; ours {drafted}, {accepted}")
    assert abs(drafted - told["drafted"]) <= 2 and abs(accepted - told["accepted"]) <= 2  # a tie may fall either way
    assert 0.5 < accepted / drafted < 0.95


def test_vllm_accepts_of_blocks_what_we_say(prompts: TokenSet, tmp_path: Path) -> None:
    twin, folder = padded_twin(MICRO, tmp_path / "twin", HEAD), mimoquant.micro_drafter()
    blocks = Blocks(*open_drafter(folder))
    told = told_by_vllm(tmp_path, twin, prompts, blocks.depth + 1, {
        "method": "dflash", "model": str(folder), "num_speculative_tokens": blocks.depth})  # fmt: skip
    match = matches(twin, prompts, told["generated"], blocks)
    drafted, accepted = np.sum([counted_blocks(row) for row in match], axis=0)
    print(f"\nvLLM drafted {told['drafted']}, accepted {told['accepted']}; ours {drafted}, {accepted}")
    assert abs(drafted - told["drafted"]) <= 2 * blocks.depth and abs(accepted - told["accepted"]) <= 4  # ties, again
    assert 0.3 < accepted / (drafted / blocks.depth) < blocks.depth
