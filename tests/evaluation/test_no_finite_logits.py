"""Where nothing of an evaluation is finite, the error names the checkpoint and the first layer."""

from __future__ import annotations

import functools
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO, held_out
from typer.testing import CliRunner

from mimoquant.checkpoint.index import INDEX_NAME
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.divergence import token_divergences
from mimoquant.evaluation.not_finite import Walked, all_finite, first_of, nothing_finite
from mimoquant.evaluation.summary import summarize

LARGEST = b"\x7f\x7f"  # 3.4e38 in bf16: finite, and twice it is not


def grown(folder: Path, tensor: str) -> Path:
    """The micro checkpoint with a tensor as large as can be, whose products overflow."""
    shutil.copytree(MICRO, folder)
    path = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][tensor]
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    begin, end = (8 + length + at for at in json.loads(raw[8 : 8 + length])[tensor]["data_offsets"])
    raw[begin:end] = LARGEST * ((end - begin) // 2)
    path.write_bytes(raw)
    return folder


def error(verb: str, reference: Path, candidate: Path) -> str:
    data = ("--sequences", "2", "--tokens", "16", "--device", "cpu", "-q")
    done: Any = CliRunner().invoke(app, [verb, str(reference), str(candidate), *data])
    assert done.exit_code == 3 and "Traceback" not in done.output, done.output
    return str(done.stderr)


CASES = [  # one of each kind, the others are slow
    ("eval-kl", "model.layers.2.self_attn.o_proj.weight", "first after layer 2"),
    ("eval-draft", "lm_head.weight", "its logits, or its draft's"),
    ("eval-kl", "model.layers.0.self_attn.o_proj.weight", "first after layer 0"),
    ("eval-kl", "lm_head.weight", "its logits"),
    ("eval-draft", "model.layers.2.self_attn.o_proj.weight", "first after layer 2"),
]


@pytest.mark.parametrize(
    ("verb", "tensor", "where"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (place > 1)) for place, case in enumerate(CASES)],
)
def test_the_checkpoint_and_the_layer_are_named(verb: str, tensor: str, where: str, tmp_path: Path) -> None:
    bad = grown(tmp_path / "bad", tensor)
    assert f"NaN or Inf in the candidate {bad} ({where})\n" in error(verb, MICRO, bad)
    if verb == "eval-draft" and "layers.2" in tensor:
        assert f"NaN or Inf in the reference {bad} ({where})\n" in error(verb, bad, MICRO)
        both = error(verb, bad, bad)
        assert f"in the reference {bad} ({where}) and the candidate {bad} ({where})" in both


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bad", [0, 1])
def test_scores_tell_the_side_where_no_layer_does(value: float, bad: int) -> None:
    tokens = held_out(2, 5)
    labels = torch.from_numpy(tokens.ids[:, 1:]).flatten()
    logits = [torch.zeros(8, 1024), torch.zeros(8, 1024)]
    logits[bad][:] = value
    ours, theirs = (functools.partial(block, of_side) for of_side in logits)
    with pytest.raises(CheckpointError, match=rf"NaN or Inf in {('here', 'there')[bad]} \(its logits\)$"):
        summarize(token_divergences(ours, [theirs], 1024, labels)[0], tokens, ("here", "there"))


def block(logits: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    return logits[:, begin:end]


@pytest.mark.parametrize(
    ("sides", "told"),
    [
        ((Walked("a", True), Walked("b", False, 3)), "NaN or Inf in b (first after layer 3)"),
        ((Walked("a", False, 0), Walked("b", True)), "NaN or Inf in a (first after layer 0)"),
        ((Walked("a", False), Walked("b", False)), "NaN or Inf in a (its logits) and b (its logits)"),
        ((Walked("a", False, 1), Walked("b", False)), "NaN or Inf in a (first after layer 1)"),
        ((Walked("a", True), Walked("b", True)), "in both a and b"),  # some of a, the others of b
    ],
)
def test_the_sentence(sides: tuple[Walked, Walked], told: str) -> None:
    assert told in str(nothing_finite(sides)) and nothing_finite(sides).exit_code == 3


def test_states_are_looked_at_to_the_last() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for at in (0, 7, 11):
            states = torch.full((3, 4), 3e38)
            assert all_finite([states, -states])
            states.view(-1)[at] = value
            assert not all_finite([torch.ones(2), states])
    both = torch.tensor([math.inf, -math.inf])
    assert not all_finite([both]) and all_finite([])
    assert first_of([True, True]) is None and first_of([True, False, True]) == 1
