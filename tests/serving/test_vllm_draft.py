"""A real vLLM speculates with the first MTP layer, and accepts as many guesses as our scores say of the same text.

`scripts/test_engines` makes vLLM's environment and runs this. Left out: sampling, depths 2 and 3 (vLLM runs the first
layer at every depth), 4-bit experts (`test_vllm_cpu` has them), a GPU's kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engine_cases import HEAD, PYTHON
from padded_twin import padded_twin

import mimoquant
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.evaluation.acceptance import compare_drafts
from mimoquant.evaluation.drafts import Mtp
from mimoquant.evaluation.evaluate import open_layout

pytestmark = pytest.mark.engine
MICRO = mimoquant.micro_checkpoint()
SEQUENCES, PROMPT, NEW = 14, 96, 160


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


def test_vllm_accepts_what_we_say(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("vLLM's environment is missing (scripts/setup_vllm_cpu)")
    twin = padded_twin(MICRO, tmp_path / "twin", HEAD, mtp=True)
    prompts = load_tokens(["heldout-v1"], MICRO, sequences=SEQUENCES, tokens=PROMPT, vocab=1024)
    job = {"checkpoint": str(twin), "ids": prompts.ids.tolist(), "new": NEW, "out": str(tmp_path / "told.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run([PYTHON, Path(__file__).with_name("vllm_drafter.py"), tmp_path / "job.json"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    text = np.concatenate([prompts.ids, np.array(told["generated"])], 1)
    tokens = TokenSet("generated", text, prompts.domains, "", tuple(map(str, range(SEQUENCES))), ())
    layout = open_layout(twin)
    scores = compare_drafts(layout, layout, tokens, Mtp(1))[0]
    assert scores.match.shape == (SEQUENCES, PROMPT + NEW - 1, 1)
    drafted, accepted = np.sum([counted(row) for row in scores.match[..., 0]], axis=0)
    print(f"\nvLLM drafted {told['drafted']}, accepted {told['accepted']}; ours {drafted}, {accepted}")
    assert abs(drafted - told["drafted"]) <= 2 and abs(accepted - told["accepted"]) <= 2  # a tie may fall either way
    assert 0.5 < accepted / drafted < 0.95
