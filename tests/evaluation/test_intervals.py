"""Few sequences say nothing of others: wherever an interval is told, of fewer than 5 there is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from typer.testing import CliRunner

from mimoquant import micro_checkpoint
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.cli.app import app
from mimoquant.evaluation.divergence import TokenScores, bootstrap
from mimoquant.evaluation.eval_draft import DraftScores, summarize_drafts
from mimoquant.evaluation.summary import paired_difference, summarize
from mimoquant.mixing.attribution import Estimate
from mimoquant.output.model_card import BEGIN, END, write_quality
from mimoquant.report.draft_text import draft_text
from mimoquant.report.eval_page import eval_page
from mimoquant.report.eval_text import eval_text, verdict
from mimoquant.wording import interval, json_text

MICRO = micro_checkpoint()
NONE = (-math.inf, math.inf)


def held_out(sequences: int) -> TokenSet:
    return load_tokens(["heldout-v1"], MICRO, sequences=sequences, tokens=16, vocab=1024)


def scores(tokens: TokenSet, seed: int = 0) -> TokenScores:
    rng, count = np.random.default_rng(seed), tokens.ids[:, 1:].size
    values = {name: rng.random(count) for name in ("kl_forward", "kl_reverse", "j", "reference_loss")}
    agree, every = rng.random(count) < 0.9, np.ones(count, np.bool_)
    losses = {"candidate_loss": rng.random(count), "confidence": rng.random(count)}
    return TokenScores(**values, **losses, agree=agree, finite=every, predicts=every)


def evaluation(sequences: int) -> dict[str, Any]:
    tokens = held_out(sequences)
    other = {"candidate": "/m/b"} | paired_difference(scores(tokens), scores(tokens, 1), tokens)
    names = {
        "reference": "/m/a",
        "reference_stored": "bf16",
        "candidate": "/m/c",
        "recipe": None,
        "left_out": [],
        "data": {"name": "x", "sha256": "", "origins": [], "shared_with_calibration": None},
    }
    rest = {"layers": [], "worst_tokens": [], "noise_floor": {"batch": 9.0, "relative_noise": 9.0}, "baseline": other}
    ran = {"device": "cpu", "elapsed_s": 1.0, "peak_rss_bytes": 1000, "max_kl": 9.0, "passed": True}
    return summarize(scores(tokens), tokens) | names | rest | ran


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 5, 64])
@pytest.mark.parametrize("each", [1, 50])
def test_no_interval_from_fewer_than_five_sequences(sequences: int, each: int) -> None:
    names = np.repeat(np.arange(sequences) * 7, each)
    low, high = bootstrap(np.random.default_rng(0).random(len(names)), names)
    assert ((low, high) == NONE) == (sequences < 5) and high - low > 1e-9


@pytest.mark.parametrize(
    ("low", "sequences", "said"),
    [
        (-math.inf, 1, "n/a, 1 sequence"),
        (-math.inf, 4, "n/a, 4 sequences"),
        (-math.inf, 7, "n/a, under 5 finite sequences"),
        (-math.inf, None, "n/a"),
        (-0.5, 1, "-0.5 to 2"),
        (-0.5, 9, "-0.5 to 2"),
    ],
)
def test_how_it_is_said(low: float, sequences: int | None, said: str) -> None:
    assert interval({"low": low, "high": 2.0}, sequences=sequences) == said


def test_domains_and_differences_have_none_either() -> None:
    facts = evaluation(8)  # of seven domains
    assert facts["j"]["low"] > 0 and facts["baseline"]["high"] < math.inf
    assert all((part["low"], part["high"]) == NONE and part["sequences"] <= 2 for part in facts["by_domain"])
    text = eval_text(facts)
    assert text.count("n/a, 1 sequence") == 6 and text.count("n/a, 2 sequences") == 1 and "inf" not in text
    few = evaluation(3)
    assert (few["baseline"]["low"], few["baseline"]["high"]) == NONE
    assert "(95 % interval n/a, 3 sequences): not told apart" in " ".join(eval_text(few).split())


def test_sequences_that_are_not_finite_do_not_count() -> None:
    tokens = held_out(7)
    broken = scores(tokens)
    broken.finite[: 3 * 15] = False
    facts = summarize(broken, tokens)
    assert (facts["j"]["low"], facts["j"]["high"]) == NONE and facts["sequences"] == 7


def test_a_limit_is_held_against_the_mean_and_that_is_said() -> None:
    said = verdict(evaluation(2))
    assert said[:2] == ("good", "PASSED")
    assert "95 % interval n/a, 2 sequences" in said[2] and "held against the mean, of which there is no" in said[2]
    assert "against the mean" not in verdict(evaluation(7))[2]
    assert "against the mean" not in verdict(evaluation(2) | {"max_kl": None, "passed": None})[2]
    over = evaluation(2) | {"max_kl": 0.01, "passed": False}
    assert verdict(over)[1] == "FAILED" and "held against the mean" in verdict(over)[2]


def test_without_an_interval_nothing_is_within_noise() -> None:
    free = {"max_kl": None, "passed": None}
    assert verdict(evaluation(7) | free)[1] == "WITHIN NOISE" and verdict(evaluation(4) | free)[1] == "MEASURED"


def test_pages_and_cards_say_it_too(tmp_path: Path) -> None:
    facts = evaluation(1)
    (tmp_path / "README.md").write_text(f"{BEGIN}\n\n{END}\n")
    write_quality(tmp_path, facts)
    page, card = eval_page(facts), (tmp_path / "README.md").read_text()
    assert page.count("n/a, 1 sequence") >= 3 and "n/a, 1 sequence" in card and "inf" not in card
    assert ">inf" not in page and "-inf" not in page


def test_drafts() -> None:
    for sequences in (4, 7):
        tokens = held_out(sequences)
        one = DraftScores(np.full((sequences, 13, 3), 0.5), np.ones((sequences, 13, 3)))
        facts = summarize_drafts(one, one, tokens)
        rest = {
            "draft": "mtp",
            "reference": "a",
            "reference_stored": "FP8",
            "candidate": "b",
            "recipe": None,
            "rounding": None,
            "device": "cpu",
            "elapsed_s": 1.0,
        }
        rest |= {
            "data": {"name": "x", "sha256": "", "origins": [], "shared_with_calibration": None},
            "peak_rss_bytes": 9,
        }
        text = draft_text(facts | rest)
        assert ("n/a, 4 sequences" in text) == (sequences == 4) and "n/a, 1 sequence" in text and "inf" not in text


def test_shares_of_layers() -> None:
    values = np.arange(2001.0)
    assert Estimate.of(values, 4) == Estimate(0.0, -math.inf, math.inf)
    assert Estimate.of(values, 5) == Estimate.of(values) and Estimate.of(values).high < 2001


def test_an_interval_without_ends_is_still_json() -> None:
    """By a strict reader, which knows no Infinity; a name that looks like one stays."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(name)

    document = {"low": -math.inf, 'a "b": -Infinity': [math.inf, "Infinity", '": Infinity,'], "j": 0.5, "n": None}
    assert json.loads(json_text(document), parse_constant=refuse) == document


def test_the_verb_says_it(tmp_path: Path) -> None:
    few = ("--sequences", "1", "--tokens", "32", "--no-noise-floor", "--device", "cpu")
    made = CliRunner().invoke(app, ["quantize", str(MICRO), "-r", "mxfp4-rtn", "-o", str(tmp_path / "o"), "-q"])
    assert made.exit_code == 0
    told = CliRunner().invoke(app, ["eval-kl", str(MICRO), str(tmp_path / "o"), *few, "--max-kl", "9", "--json"])
    facts = json.loads(told.stdout)
    assert (facts["j"]["low"], facts["j"]["high"]) == NONE and facts["passed"] is True
    assert "--max-kl is held against the mean; its interval is n/a, 1 sequence" in told.stderr
