"""Weights that are not zero and have no scale in the format: few are counted wherever a run is told of, many end it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from clamped_weights import EXPERT, FEW, GRAM, scaled, with_one_small_group
from micro import MICRO, edit_json
from typer.testing import CliRunner

from mimoquant.checkpoint.journal import JOURNAL_NAME, read_journal
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError

DATA = ("--sequences", "8", "--tokens", "64")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_one_small_group(tmp_path_factory.mktemp("few") / "source")


def test_few_are_told_in_text_report_and_card(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("quantize", few, "-r", "nvfp4-mse", "-o", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    told = f"most in {EXPERT}.up_proj.weight, 1 of 2048 (0.05 %)"
    assert re.search(
        rf"^clamped    in 1 weight .* 1 became zero, 0 were clamped; {re.escape(told)}$", done.stdout, re.M
    )
    report = json.loads((out / "report.json").read_text())
    assert report["clamped_groups"] == FEW and any(told in note for note in report["notes"])
    assert told in (out / "README.md").read_text()
    proven = call("verify", out, "--source", few)
    assert proven.exit_code == 0, proven.output
    finished = call("quantize", few, "-r", "nvfp4-mse", "-o", out, "--resume", "--device", "cpu", "--json")
    assert json.loads(finished.stdout)["clamped_groups"] == FEW


def test_of_ordinary_weights_nothing_is_told(tmp_path: Path) -> None:
    for recipe in ("nvfp4-mse", "mxfp4-mse", "int4-g128-mse"):
        done = call("quantize", MICRO, "-r", recipe, "-o", tmp_path / recipe, "--device", "cpu")
        assert done.exit_code == 0 and "clamped" not in done.stdout
        assert "clamped" not in (tmp_path / recipe / "report.json").read_text()
        assert "clamped" not in (tmp_path / recipe / JOURNAL_NAME).read_text()


def test_a_small_group_that_takes_up_others_errors_has_a_scale_of_its_own(few: Path, tmp_path: Path) -> None:
    """GPTQ chooses a group's scale for what the columns before have left to it, which is no longer small."""
    options = ("--objective", "output", "--device", "cpu", "--json", "-q")
    done = call("quantize", few, "-r", "gptq-nvfp4", "-o", tmp_path / "out", *DATA, *options)
    assert done.exit_code == 0 and "clamped_groups" not in json.loads(done.stdout), done.output


def test_searches_by_statistics_count_them_and_so_does_the_page(few: Path, tmp_path: Path) -> None:
    recipe, page = tmp_path / "gram.yaml", tmp_path / "page.html"
    recipe.write_text(GRAM)
    arguments = ("quantize", few, "-r", recipe, "-o", tmp_path / "out", *DATA, "--html", page, "--device", "cpu")
    done = call(*arguments, "--json", "-q")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["clamped_groups"] == FEW
    assert f"most in {EXPERT}.up_proj.weight, 1 of 2048" in page.read_text()


LOST: dict[str, tuple[str, float, str]] = {
    "nvfp4": ("nvfp4-mse", 1e-36, "2048 of its 2048 groups (100.00 %)"),
    "mxfp4": ("mxfp4-rtn", 1e-38, "of its 1024 groups"),
    "int4": ("int4-g128-rtn", 1e-40, "of its 256 groups"),
    "asymmetric int4": ("asymmetric", 1e-40, "of its 256 groups"),
    "gptq nvfp4": ("gptq-nvfp4", 1e-36, "2048 of its 2048 groups (100.00 %)"),
    "gptq int4": ("gptq-int4-g128", 1e-39, "of its 256 groups"),
}
ASYMMETRIC = (
    "default_stage: {default_modifiers: {QuantizationModifier: {scheme: W4A16_ASYM, targets: ['re:.*experts.*']}}}\n"
)


@pytest.mark.parametrize("name", list(LOST))
def test_a_weight_that_is_lost_ends_the_run(name: str, tmp_path: Path) -> None:
    recipe, factor, numbers = LOST[name]
    (tmp_path / "asymmetric.yaml").write_text(ASYMMETRIC)
    recipe = str(tmp_path / "asymmetric.yaml") if recipe == "asymmetric" else recipe
    source = scaled(tmp_path / "source", factor)
    data = (*DATA, "--objective", "output") if name.startswith("gptq") else ()
    done = call("quantize", source, "-r", recipe, "-o", tmp_path / "out", *data, "--device", "cpu", "-q")
    assert done.exit_code == 5, done.output
    assert f"{EXPERT}.gate_proj.weight (layer 2): " in done.stderr and numbers in done.stderr, done.stderr
    assert "at most 0.10 % may" in done.stderr and "carve_outs: {2: bf16}" in done.stderr
    assert ("quantize to int4" in done.stderr) == ("int4" not in name)
    assert not (tmp_path / "out").exists()


def test_what_reads_as_inf_ends_the_run_were_it_one_group(tmp_path: Path) -> None:
    source = with_one_small_group(tmp_path / "source", size=3.38e38)
    done = call("quantize", source, "-r", "mxfp4-rtn", "-o", tmp_path / "out", "--device", "cpu", "-q")
    assert done.exit_code == 5, done.output
    assert "1 of its 1024 groups (0.10 %)" in done.stderr and "none may read as Inf" in done.stderr


def test_the_hint_is_right(tmp_path: Path) -> None:
    source, recipe = scaled(tmp_path / "source", 1e-36), tmp_path / "r.yaml"
    recipe.write_text(
        "default_stage: {default_modifiers: {QuantizationModifier: {scheme: NVFP4A16, targets: ['re:.*experts.*']}}}\n"
        "mimoquant: {carve_outs: {2: bf16}}"
    )
    for number, name in enumerate((recipe, "int4-g128-mse")):
        done = call("quantize", source, "-r", name, "-o", tmp_path / str(number), "--device", "cpu", "-q")
        assert done.exit_code == 0 and "clamped" not in done.stdout, done.output


@pytest.mark.parametrize(
    "clamped",
    [
        [],
        {},
        {"a": 1},
        {"a": [1, 0]},
        {"a": [1, 0, 0]},
        {"a": [0, 0, 8]},
        {"a": [-1, 3, 8]},
        {"a": [True, 0, 8]},
        {"a": [1.0, 0, 8]},
    ],
)
def test_a_journal_with_other_counts_is_damaged(clamped: object, tmp_path: Path) -> None:
    line = {"unit": "a", "file": "a", "size_bytes": 1, "sha256": "0"}
    good, bad = (json.dumps(line | {"clamped": value}) + "\n" for value in ({"a": [1, 2, 3]}, clamped))
    (tmp_path / "journal").write_text(good)
    assert read_journal(tmp_path / "journal")[0].clamped == {"a": [1, 2, 3]}
    (tmp_path / "journal").write_text(bad + good)
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        read_journal(tmp_path / "journal")


def test_verify_finds_counts_that_were_changed(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("quantize", few, "-r", "nvfp4-mse", "-o", out, "--device", "cpu", "-q").exit_code == 0
    edit_json(out / "report.json", lambda report: report.pop("clamped_groups"))
    done = call("verify", out, "--source", few)
    assert done.exit_code == 3 and "report.json" in done.stdout, done.output
