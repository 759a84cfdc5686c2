"""Our router against the engines' arithmetic: V2.5's in float32, V2.6's in bf16.

Engines round neither logits nor correction bias: a router in bf16 multiplies bf16 values with a float32 result, which
is our product of the same values. So one forward is right for both. `golden/router.json` has what vLLM 0.32 and SGLang
0.5.23 answered (`router_engines.py`); `MIMOQUANT_GOLDEN=write` writes it anew where the engines are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_cases import ask_engines

from mimoquant.model.decoder_layer import Router, route

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "router.json"
ENGINES, DTYPES = ("vllm", "sglang"), ("float32", "bf16")
TOKENS, HIDDEN, EXPERTS, TOP_K = 16, 96, 64, 8

Array = npt.NDArray[Any]


def inputs() -> dict[str, Array]:
    """Tokens and weights that bf16 holds, as the released files have them; a bias that does not fit bf16."""
    draw = np.random.default_rng(26)
    tokens, weight = draw.standard_normal((TOKENS, HIDDEN)), draw.standard_normal((EXPERTS, HIDDEN)) * 0.1
    held = {
        name: torch.from_numpy(x).bfloat16().float().numpy() for name, x in (("tokens", tokens), ("weight", weight))
    }
    return held | {"bias": (draw.standard_normal(EXPERTS) * 0.01 + 5).astype(np.float32), "top_k": np.array(TOP_K)}


def held_to_ours(answers: dict[str, Any], engine: str) -> None:
    """The experts it chose, in whatever order, their weights, and what its router in bf16 multiplies."""
    given = {name: torch.from_numpy(x) for name, x in inputs().items()}
    ours = route(given["tokens"], Router(given["weight"], given["bias"]), TOP_K)
    experts, order = ours.experts.sort(-1)
    weights = ours.weights.gather(-1, order)
    for dtype in DTYPES:
        theirs, places = torch.tensor(answers[f"{engine}_{dtype}_experts"]).sort(-1)
        assert torch.equal(theirs, experts)
        told = torch.tensor(answers[f"{engine}_{dtype}_weights"]).gather(-1, places)
        assert (told - weights).abs().max() < 1e-6
    assert answers[f"{engine}_bf16_asked"] == ["bfloat16", "bfloat16", "float32"]


@pytest.mark.parametrize("engine", ENGINES)
def test_our_router_is_the_engines_in_either_dtype(engine: str) -> None:
    held_to_ours(json.loads(GOLDEN.read_text()), engine)


def test_a_rounding_to_bf16_would_be_seen() -> None:
    """Of the logits or the bias, as vLLM 0.26 does: other experts for many tokens."""
    given = {name: torch.from_numpy(x) for name, x in inputs().items()}
    ours = route(given["tokens"], Router(given["weight"], given["bias"]), TOP_K).experts.sort(-1).values
    scores = (given["tokens"] @ given["weight"].T).bfloat16().sigmoid()
    rounded = torch.topk(scores + given["bias"].bfloat16(), TOP_K, dim=-1).indices.sort(-1).values
    assert (ours != rounded).any(-1).float().mean() > 0.5


@pytest.mark.engine
def test_the_golden_answers_are_the_engines_own(tmp_path: Path) -> None:
    given = inputs()
    np.savez(tmp_path / "in.npz", **given)
    exact = given["tokens"].astype(np.float64) @ given["weight"].astype(np.float64).T
    answers: dict[str, Any] = {}
    for engine in ENGINES:
        ask_engines("router_engines.py", engine, tmp_path / "in.npz", tmp_path / f"{engine}.npz", cwd=tmp_path)
        found = dict(np.load(tmp_path / f"{engine}.npz"))
        for dtype in DTYPES:
            assert np.abs(found.pop(f"{dtype}_logits") - exact).max() < 2e-6
            found[f"{dtype}_weights"] = found[f"{dtype}_weights"].astype(np.float64).round(7)
        answers |= {f"{engine}_{name}": values.tolist() for name, values in found.items()}
        held_to_ours(answers, engine)
    if os.environ.get("MIMOQUANT_GOLDEN") == "write":
        GOLDEN.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in sorted(answers.items())) + "\n}\n")
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == answers.keys()
    assert all(np.allclose(golden[name], values, atol=1e-6) for name, values in answers.items() if "asked" not in name)
