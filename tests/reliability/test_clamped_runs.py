"""Weights that are not zero and have no scale in the format: few are counted wherever a run is told of, many end it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clamped_weights import EXPERT, FEW, GRAM, edit, scaled, with_one_small_group
from micro import MICRO, edit_json
from typer.testing import CliRunner

from mimoquant.checkpoint.journal import JOURNAL_NAME, read_journal
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.quant.cast import E4M3_VALUES
from mimoquant.weights.stored import bf16_bits, lost_blocks

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


def test_verify_counts_again(few: Path, tmp_path: Path) -> None:
    """And tells it; a journal that was changed, with all that follows from it, is found."""
    out = tmp_path / "out"
    assert call("quantize", few, "-r", "nvfp4-mse", "-o", out, "--device", "cpu", "-q").exit_code == 0
    proven = call("verify", out, "--source", few, "--json")
    assert proven.exit_code == 0 and json.loads(proven.stdout)["clamped_groups"] == FEW, proven.output
    assert "clamped    in 1 weight the format has no scale for 1 group" in call("verify", out, "--source", few).stdout
    lines = [json.loads(line) for line in (out / JOURNAL_NAME).read_text().splitlines()]
    for line in lines:
        line.pop("clamped", None)
    (out / JOURNAL_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call("verify", out, "--source", few)
    told = (
        "up_proj.weight: has 1 groups of 2048 that became zero and 0 that were clamped, the journal tells of no groups"
    )
    assert done.exit_code == 3 and told in done.stdout, done.output


def test_verify_counts_calibrated_runs_again(few: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "gram.yaml", tmp_path / "out"
    recipe.write_text(GRAM)
    assert call("quantize", few, "-r", recipe, "-o", out, *DATA, "--device", "cpu", "-q").exit_code == 0
    proven = call("verify", out, "--source", few, "--json")
    assert proven.exit_code == 0 and json.loads(proven.stdout)["clamped_groups"] == FEW, proven.output


def test_blocks_that_bf16_cannot_hold_are_counted() -> None:
    """Beside the product in float64: zero, below the least normal number, above it; zeros and zero scales are none."""
    codes = np.full((384, 256), 0x38, np.uint8)
    codes[256:, 128:] = 0
    codes[0, 0] = 0x7E
    scales = np.array([[2.0**-136, 2.0**-130], [2.0**-126, 0.0], [2.0**-140, 2.0**-140]], np.float32)
    row = np.repeat(np.arange(3), 128)
    wide = np.repeat(scales[row].astype(np.float64), 128, axis=1) * E4M3_VALUES[codes]
    bits = bf16_bits(np.ascontiguousarray(wide.astype(np.float32)))
    assert lost_blocks(codes, scales, row, bits) == (1, 2)  # [0, 0] has one value that bf16 holds roughly


LOST_IN_BF16: dict[str, tuple[str, tuple[object, ...], str]] = {
    "dense MLP": ("model.layers.0.mlp.gate_proj.weight", ("quantize", "-r", "int4-g128-mse"), "of its 4 groups"),
    "attention": ("model.layers.1.self_attn.qkv_proj.weight", ("quantize", "-r", "int4-g128-mse"), "of its "),
    "relayout": ("model.layers.1.self_attn.qkv_proj.weight", ("relayout", "--qkv", "split", "--dtype", "bf16"), ""),
    "kept experts": (f"{EXPERT}.gate_proj.weight", ("quantize", "-r", "kept"), "of its 2 groups"),
}


@pytest.mark.parametrize("name", list(LOST_IN_BF16))
def test_fp8_that_is_lost_in_bf16_ends_the_run(name: str, tmp_path: Path) -> None:
    weight, (verb, *more), numbers = LOST_IN_BF16[name]
    source, out = Path(shutil.copytree(MICRO, tmp_path / "source")), tmp_path / "out"
    edit(source, f"{weight}_scale_inv", lambda held: held.__setitem__((0, 0), 1e-44))
    kept = tmp_path / "kept.yaml"
    kept.write_text(
        "default_stage: {default_modifiers: {QuantizationModifier: {scheme: W4A16, targets: ['re:.*experts.*']}}}\n"
        "mimoquant: {carve_outs: {2: bf16}}"
    )
    more = [kept if word == "kept" else word for word in more]
    done = call(verb, source, *more, "-o", out, *(("--device", "cpu", "-q") if verb == "quantize" else ()))
    assert done.exit_code == 5 and not out.exists(), done.output
    assert f"{weight}: 1 {numbers}" in done.stderr and "have no scale in bf16: 1 became zero" in done.stderr, (
        done.stderr
    )
    assert "at most 0.10 % may" in done.stderr and "hint: look whether the source's weights" in done.stderr


def test_verify_finds_counts_that_were_changed(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("quantize", few, "-r", "nvfp4-mse", "-o", out, "--device", "cpu", "-q").exit_code == 0
    edit_json(out / "report.json", lambda report: report.pop("clamped_groups"))
    done = call("verify", out, "--source", few)
    assert done.exit_code == 3 and "report.json" in done.stdout, done.output
