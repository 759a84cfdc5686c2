"""J by what a token follows, and tokens of experts by what they stand for: the places, the parts, the words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mimoquant.calibration.layer_facts import LayerFacts
from mimoquant.calibration.statistics import counts, counts_of_kinds
from mimoquant.calibration.tokens import TokenSet
from mimoquant.evaluation.contexts import CONTEXTS, contexts_of
from mimoquant.evaluation.divergence import TokenScores
from mimoquant.evaluation.summary import summarize
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.media import Picture, Placed, Sound
from mimoquant.report.coverage_text import coverage_text
from mimoquant.report.eval_text import context_rows
from mimoquant.wording import media_note

PICTURE = Picture(np.zeros((4, 1536), np.float32), (1, 2, 2))
SOUND = Sound(np.zeros((4, 20), np.int64))


def test_a_position_belongs_to_what_its_next_token_follows() -> None:
    media = ((), (Placed(2, 3, PICTURE), Placed(40, 1, SOUND)))
    found = contexts_of(media, 64)
    assert found.shape == (2, 63) and not found[0].any()
    names = [CONTEXTS[place] for place in found[1]]
    scored = [name for position, name in enumerate(names) if position + 1 not in (2, 3, 4, 40)]
    assert scored == [
        "text alone",  # token 1: the only one before the picture that is predicted
        *["right after an image"] * 16,
        *["after an image"] * (40 - 5 - 16),
        *["right after a sound"] * 16,
        *["after a sound"] * (64 - 41 - 16),
    ]


def scores(j: Any) -> TokenScores:
    plain, yes = np.zeros(len(j)), np.ones(len(j), bool)
    values = dict.fromkeys(("kl_forward", "kl_reverse", "reference_loss", "candidate_loss", "confidence"), plain)
    flags = {name: yes for name in TokenScores.__dataclass_fields__ if name not in (*values, "j")}
    return TokenScores(**values, j=np.array(j, float), **flags)


def test_parts_make_up_the_whole() -> None:
    ids = np.ones((6, 40), np.int64)
    media = tuple((Placed(4, 2, PICTURE),) if row % 2 else () for row in range(6))
    tokens = TokenSet("test", ids, ("a",) * 6, "", ("",) * 6, (), media=media)
    place = contexts_of(media, 40).reshape(-1)
    found = summarize(scores(10.0**place), tokens)
    parts = found["by_context"]
    assert [(part["context"], part["j"], part["sequences"]) for part in parts] == [
        ("text alone", 1, 6),
        ("right after an image", 10, 3),
        ("after an image", 100, 3),
    ]
    assert sum(part["tokens"] for part in parts) == found["tokens"] == 6 * 39
    weighed = sum(part["tokens"] * part["j"] for part in parts) / found["tokens"]
    assert found["j"]["mean"] == pytest.approx(weighed)
    rows = context_rows(found)
    assert rows[1][:2] == ("right after an image", "10") and rows[1][4] == "48"
    alone = summarize(scores(10.0**place), replace(tokens, media=()))
    assert "by_context" not in alone and {**alone, "by_context": parts} == found


def test_tokens_are_counted_by_what_they_stand_for() -> None:
    generator, blocks = torch.Generator().manual_seed(0), []
    kinds = torch.randint(0, 3, (100,), generator=generator)
    expected = torch.zeros(3, 8, dtype=torch.int64)
    for begin, end in ((0, 60), (60, 100)):
        experts = torch.rand(end - begin, 8, generator=generator).argsort(-1)[:, :2]
        for token, chosen in enumerate(experts):
            for expert in chosen:
                expected[kinds[begin + token], expert] += 1
        dispatch = Dispatch.of(Routing(experts, torch.ones(experts.shape)), 8)
        blocks.append((torch.zeros(end - begin, 4), dispatch))
    found = counts_of_kinds(blocks, kinds, 3)
    assert found == expected.tolist()
    assert np.sum(found, 0).tolist() == counts([dispatch for _, dispatch in blocks], 0, 8)


def test_kinds_stand_where_media_do() -> None:
    media = ((Placed(1, 2, PICTURE), Placed(5, 1, SOUND)), ())
    tokens = TokenSet("test", np.ones((2, 7), np.int64), ("a", "b"), "", ("", ""), (), media=media)
    assert tokens.kinds is not None
    assert tokens.kinds.tolist() == [[0, 1, 1, 0, 0, 2, 0], [0] * 7]
    assert replace(tokens, media=()).kinds is None


def test_what_is_said_of_images_that_experts_saw() -> None:
    facts = LayerFacts(1, tokens=[10, 6, 4, 0], relmse=[0.1] * 4, relmse_plain=[0.2] * 4, shrunk=[0.5] * 4)
    facts.effective = [1.0] * 4
    plain = facts.as_plain()
    assert "image_tokens" not in plain and media_note([plain]) is None
    facts.image_tokens, facts.sound_tokens = [5, 4, 0, 0], [0, 2, 0, 0]
    told = facts.as_plain()
    assert {**told, "image_tokens": 0, "sound_tokens": 0} == {**plain, "image_tokens": 0, "sound_tokens": 0}
    said = "of the tokens that experts saw, 45.00 % of images and 10.00 % of sounds; of 4 experts 1 saw nothing else"
    assert said in (media_note([told]) or "")
    assert said in coverage_text({"layer 1": told}) and "images" not in coverage_text({"layer 1": plain})
