"""A run that is started again with --resume when its output is finished has nothing to do; another run is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, contents, edit_json
from small_runs import small_checkpoint
from typer.testing import CliRunner

import mimoquant
from mimoquant.checkpoint.journal import RUN_NAME
from mimoquant.cli.app import app
from mimoquant.errors import UsageError

CALIBRATED = ("quantize", MICRO, "-r", "gptq-int4-g128", "--sequences", "8", "--tokens", "64", "--device", "cpu")
CALIBRATED += ("--objective", "output")
DATA_FREE = ("quantize", MICRO, "-r", "mxfp4-rtn", "--device", "cpu")
RELAYOUT = ("relayout", MICRO, "--qkv", "split", "--dtype", "bf16")
RUNS = {"calibrated": CALIBRATED, "data-free": DATA_FREE, "relayout": RELAYOUT}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    for name, arguments in RUNS.items():
        done = call(*arguments, "--out", folder / name, "--json")
        assert done.exit_code == 0, done.output
        (folder / f"{name}.json").write_text(done.stdout)
    return {name: folder / name for name in RUNS}


@pytest.fixture
def copy(outputs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(outputs[name], tmp_path / "out"))


@pytest.mark.parametrize("name", list(RUNS))
def test_what_is_finished_is_told_and_left_as_it_is(name: str, outputs: dict[str, Path]) -> None:
    before = contents(outputs[name])
    again = call(*RUNS[name], "--out", outputs[name], "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert (
        f"note: {outputs[name]}: is finished already" in again.stderr and "left" not in again.stderr.split("is left")[0]
    )
    told, first = json.loads(again.stdout), json.loads(outputs[name].with_suffix(".json").read_text())
    assert told.pop("found_finished") is True and first.pop("found_finished") is False
    text = call(*RUNS[name], "--out", outputs[name], "--resume").stdout
    assert text.startswith(f"finished   {outputs[name]}, nothing was written: ") and "wrote" not in text, text
    for changing in ("elapsed_s", "bound_by"):
        told.pop(changing, None), first.pop(changing, None)
    assert told == first and contents(outputs[name]) == before
    assert not list(outputs[name].parent.glob("*.partial"))
    refused = call(*RUNS[name], "--out", outputs[name])
    assert refused.exit_code == 2 and "exists already" in refused.stderr


def test_the_page_of_a_finished_run_can_still_be_written(outputs: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert call(*CALIBRATED, "--out", outputs["calibrated"], "--resume", "--html", page).exit_code == 0
    assert page.stat().st_size > 1000


OTHERS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "recipe": ("data-free", ("-r", "mxfp4-mse"), "recipe.mimoquant.scale_search was absmax, is now mse"),
    "format": ("data-free", ("-r", "int4-g128-rtn"), "container was native, is now compressed-tensors"),
    "container": (
        "data-free",
        ("--container", "compressed-tensors"),
        "container was native, is now compressed-tensors",
    ),
    "sequences": ("calibrated", ("--sequences", "9"), "recipe.mimoquant.calibration.sequences was 8, is now 9"),
    "tokens": ("calibrated", ("--tokens", "32"), "recipe.mimoquant.calibration.tokens was 64, is now 32"),
    "data": (
        "calibrated",
        ("--data", "heldout-v1"),
        "recipe.mimoquant.calibration.set was mixed-v1, is now heldout-v1",
    ),
    "refine": ("calibrated", ("--refine", "1"), "recipe.mimoquant.calibration.reconstruct was None, is now 1"),
    "qkv": ("relayout", ("--qkv", "canonical"), "qkv was split, is now canonical"),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_another_run_is_refused_with_the_first_difference(what: str, outputs: dict[str, Path]) -> None:
    name, options, message = OTHERS[what]
    before = contents(outputs[name])
    done = call(*RUNS[name], *options, "--out", outputs[name], "--resume")
    assert done.exit_code == 2 and f"{outputs[name]}: is finished, and its {message}" in done.stderr, done.output
    assert contents(outputs[name]) == before


def test_calibration_data_of_the_same_name_with_another_content(tmp_path: Path) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "out"
    few = ("--data", data, "--sequences", "4", "--tokens", "32", "--objective", "output", "--device", "cpu")
    arguments = (*CALIBRATED[:4], *few, "--out", out)
    data.write_text("".join(f"{n} men walked over {n * n} hills to the sea. " for n in range(300)))
    assert call(*arguments).exit_code == 0
    assert call(*arguments, "--resume").exit_code == 0
    data.write_text("".join(f"{n} men came back from {n * n} hills and seas. " for n in range(300)))
    done = call(*arguments, "--resume")
    assert done.exit_code == 2 and "its calibration tokens was " in done.stderr, done.output


def test_another_source_config_or_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = small_checkpoint().save(tmp_path / "source"), tmp_path / "out"
    arguments = {"recipe": "int4-g128-rtn", "out": out, "device": "cpu", "resume": True}
    mimoquant.quantize(source, **arguments)
    mimoquant.quantize(source, **arguments)
    edit_json(source / "config.json", lambda config: config.update(rope_theta=123456))
    with pytest.raises(UsageError, match=r"its config\.rope_theta was None, is now 123456"):
        mimoquant.quantize(source, **arguments)
    other = small_checkpoint(n_routed_experts=4).save(tmp_path / "other")
    with pytest.raises(UsageError, match="its source headers was "):
        mimoquant.quantize(other, **arguments)
    monkeypatch.setattr("mimoquant.planning.plan.__version__", "9.9")
    with pytest.raises(UsageError, match=r"its version was .*, is now 9\.9"):
        mimoquant.quantize(source, **arguments)


def test_layers_by_number_are_the_same_as_in_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "default_stage: {default_modifiers: {QuantizationModifier: {scheme: W4A16, targets: ['re:.*experts.*']}}}\n"
        "mimoquant: {carve_outs: {2: bf16}}"
    )
    for resume in (False, True):
        mimoquant.quantize(MICRO, str(recipe), tmp_path / "out", device="cpu", resume=resume)


def spoil_shard(out: Path) -> None:
    path = sorted(out.glob("*.safetensors"))[1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (spoil_shard, "its bytes are not those of the journal"),
    "shard": (lambda out: sorted(out.glob("*.safetensors"))[0].unlink(), "is missing"),
    "short": (lambda out: sorted(out.glob("*.safetensors"))[0].write_bytes(b"x"), "not those of the journal"),
    "line": (lambda out: (out / "journal.jsonl").write_text(""), "its journal does not have"),
    "index": (lambda out: (out / "model.safetensors.index.json").write_text("{}"), "is not what the run wrote"),
    "tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "prints": (lambda out: (out / "calibration.fingerprints").write_bytes(b""), "is not what the run wrote"),
    "report": (lambda out: (out / "report.json").unlink(), "report.json is missing"),
}


@pytest.mark.parametrize("what", list(SPOILED))
def test_a_finished_output_that_is_damaged_is_not_called_finished(what: str, copy: Callable[[str], Path]) -> None:
    out, (spoil, message) = copy("calibrated"), SPOILED[what]
    spoil(out)
    done = call(*CALIBRATED, "--out", out, "--resume")
    assert done.exit_code == 3 and message in done.stderr and "is finished already" not in done.stderr, done.output


def test_an_edited_card_is_no_other_run_and_a_folder_of_others_is_in_the_way(copy: Callable[[str], Path]) -> None:
    out = copy("data-free")
    (out / "README.md").write_text("# Mine")
    assert call(*DATA_FREE, "--out", out, "--resume").exit_code == 0
    (out / "recipe.yaml").unlink()
    done = call(*DATA_FREE, "--out", out, "--resume")
    assert done.exit_code == 2 and "exists already" in done.stderr
    shutil.rmtree(out)
    out.mkdir()
    done = call(*DATA_FREE, "--out", out, "--resume")
    assert done.exit_code == 2 and "exists already" in done.stderr


def test_an_output_that_was_killed_at_its_last_step_is_taken_up_as_before(copy: Callable[[str], Path]) -> None:
    out = copy("data-free")
    (out / RUN_NAME).write_text("{}")
    done = call(*DATA_FREE, "--out", out, "--resume")
    assert done.exit_code == 2 and "cannot be resumed" in done.stderr


def test_the_functions_do_the_same(outputs: dict[str, Path]) -> None:
    report = mimoquant.quantize(MICRO, "mxfp4-rtn", outputs["data-free"], device="cpu", resume=True)
    assert report["shards"] and report["out"] == str(outputs["data-free"])
    assert mimoquant.relayout(MICRO, outputs["relayout"], qkv="split", bf16=True, resume=True)["shards"]
    with pytest.raises(UsageError, match="exists already"):
        mimoquant.relayout(MICRO, outputs["data-free"], qkv="split", bf16=True, resume=True)


NO_OUTPUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no journal": (lambda out: (out / "journal.jsonl").unlink(), "journal.jsonl is missing"),
    "no recipe": (lambda out: (out / "recipe.yaml").unlink(), "recipe.yaml is missing"),
    "no config": (lambda out: (out / "config.json").unlink(), "config.json is missing"),
    "a broken recipe": (lambda out: (out / "recipe.yaml").write_text("{"), "config.json or recipe.yaml is not what"),
    "another's recipe": (lambda out: (out / "recipe.yaml").write_text("a: 1"), "config.json or recipe.yaml is not"),
    "nothing in it": (lambda out: [path.unlink() for path in out.iterdir()], "journal.jsonl is missing"),
    "a file": (lambda out: [shutil.rmtree(out), out.write_text("x")], "it is no folder"),
    "a link to nothing": (lambda out: [shutil.rmtree(out), out.symlink_to("nowhere")], "it is no folder"),
}


@pytest.mark.parametrize("what", list(NO_OUTPUT))
def test_what_is_no_output_is_told_with_what_it_lacks(what: str, copy: Callable[[str], Path]) -> None:
    out = copy("data-free")
    edit, lacks = NO_OUTPUT[what]
    edit(out)
    done = call(*DATA_FREE, "--out", out, "--resume")
    assert done.exit_code == 2, done.output
    assert f"{out}: exists already, and is no finished output: {lacks}" in done.stderr, done.stderr
    assert not list(out.parent.glob("*.partial")) and not (out.parent / "nowhere").exists()
