"""`mimoquant eval-kl` as a user meets it, and the regression that a change in numerics cannot pass unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

# J in nats a token of every data-free recipe on the micro checkpoint, 28 x 128 tokens of heldout-v1. The outputs are
# the same bytes everywhere; J may move in its last digits with the order of float32 sums in another torch or CPU.
GOLDEN_J = json.loads((Path(__file__).parent / "golden_j.json").read_text())


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    for recipe in GOLDEN_J:
        pipeline.quantize(make_plan(MICRO, load_recipe(recipe)), folder / recipe, device="cpu")
    return folder


@pytest.mark.parametrize("recipe", list(GOLDEN_J))
def test_j_of_every_recipe_is_the_golden_one(outputs: Path, recipe: str) -> None:
    result = call(
        "eval-kl",
        MICRO,
        outputs / recipe,
        "--sequences",
        "28",
        "--tokens",
        "128",
        "--no-noise-floor",
        "--device",
        "cpu",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["j"]["mean"] == pytest.approx(GOLDEN_J[recipe], rel=2e-3)


def test_the_golden_values_have_the_order_that_theory_gives() -> None:
    assert GOLDEN_J["nvfp4-mse"] < GOLDEN_J["int4-g32-mse"] < GOLDEN_J["int4-g128-mse"] < GOLDEN_J["int4-g128-rtn"]


def test_the_gate_fails_with_5_and_says_by_how_much(outputs: Path, tmp_path: Path) -> None:
    arguments = ["eval-kl", MICRO, outputs / "mxfp4-rtn", "--sequences", "7", "--tokens", "64", "--device", "cpu"]
    page = tmp_path / "report.html"
    failed = call(*arguments, "--max-kl", "0.0001", "--html", page, "--no-noise-floor")
    assert failed.exit_code == 5
    assert "above the gate of 0.0001" in failed.stderr and "J" in failed.stdout
    assert page.read_text().startswith("<!doctype html>") or "<html" in page.read_text()[:200].lower()
    passed = call(*arguments, "--max-kl", "9", "--baseline", outputs / "nvfp4-mse", "--json")
    facts = json.loads(passed.stdout)
    assert passed.exit_code == 0 and facts["passed"] is True
    assert facts["baseline"]["difference"] > 0 and facts["noise_floor"]["relative_noise"] > 0
    assert len(facts["worst_tokens"]) == 20 and facts["worst_tokens"][0]["j"] == facts["j"]["max"]


def test_mistakes_end_in_one_sentence(outputs: Path, tmp_path: Path) -> None:
    good = outputs / "mxfp4-rtn"
    cases = [
        (("eval-kl", MICRO, tmp_path / "no"), 2, "not a checkpoint folder"),
        (("eval-kl", MICRO, good, "--data", "heldout-v9"), 2, "heldout-v9"),
        (("eval-kl", MICRO, good, "--device", "tpu"), 2, "known are auto, cpu and cuda"),
        (
            ("eval-kl", MICRO, good, "--sequences", "2", "--tokens", "16", "--html", tmp_path / "a" / "b.html"),
            2,
            "--html",
        ),
    ]
    for arguments, code, message in cases:
        result = call(*arguments)
        assert result.exit_code == code and message in result.stderr, result.output
        assert "Traceback" not in result.output


@pytest.mark.slow
def test_the_page_says_what_was_changed_and_what_calibration_reached(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    few = ("--sequences", "8", "--tokens", "32", "--device", "cpu")
    assert call("quantize", MICRO, "-r", "gptq-mxfp4", "--objective", "output", "-o", out, *few).exit_code == 0
    assert call("eval-kl", MICRO, out, *few, "--html", page).exit_code == 0
    text = page.read_text()
    for said in ("What was changed and what was not", "mxfp4 in 4 layers (gptq", "lm_head, MTP layers", "mixed-v1"):
        assert said in text
    assert text.count('class="map"') == 1 and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    (out / "report.json").write_text('{"formats": 3}')  # as others, or a damaged disk, may leave it
    assert call("eval-kl", MICRO, out, *few, "--html", page).exit_code == 0
    assert "What was changed" not in page.read_text()
