"""OUT/README.md as the Hub takes it, before and after an evaluation; the gate as a CI system takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from headers import at_scale
from huggingface_hub import ModelCard
from micro import MICRO
from typer.main import get_command
from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app
from mimoquant.output.documents import QuantizeReport
from mimoquant.output.model_card import Origin, model_card, without_quality

ORIGIN = Origin("MiMo-V2.5-Pro", "XiaomiMiMo/MiMo-V2.5-Pro")
FEW = ("--sequences", "7", "--tokens", "32", "--device", "cpu", "--no-noise-floor")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "out"
    mimoquant.quantize(MICRO, "int4-g32-mse", folder, device="cpu")
    return folder


def written(container: str, formats: dict[str, list[int]]) -> QuantizeReport:
    """What a run without calibration, notes or carve-outs reports."""
    return QuantizeReport(
        schema_version=1,
        container=container,
        method="rtn",
        scale_search="absmax",
        formats=formats,
        carve_outs={},
        source_bytes=2 * 10**9,
        output_bytes=10**9,
        fallbacks={},
        notes=[],
        shards=[],
        calibration=None,
    )


def test_the_hub_reads_the_front_matter(out: Path) -> None:
    data = ModelCard.load(out / "README.md", ignore_metadata_errors=False).data
    assert data.license == "mit" and data.pipeline_tag == "text-generation" and data.base_model is None
    assert data.tags == ["mimoquant", "compressed-tensors", "int4"]


def test_a_format_in_two_sizes_is_one_tag() -> None:
    served = at_scale("v2.5", "mxfp4")
    formats = {"int4 g128": [1], "int4 g32": [2]}
    report = written(served.container, formats)
    assert ModelCard(model_card(report, served, ORIGIN, real_fold=False)).data.tags == [
        "mimoquant",
        served.container,
        "int4",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "library"), [("native", None), ("mxfp4", "transformers"), ("nvfp4", None)])
@pytest.mark.parametrize("variant", ["v2.5", "v2.5-pro"])
def test_a_real_model_gets_its_base_and_commands_that_serve_it(variant: str, form: str, library: str | None) -> None:
    served = at_scale(variant, form)
    report = written(served.container, {"mxfp4 g32": [1]})
    card = ModelCard(model_card(report, served, ORIGIN, real_fold=False))
    assert card.data.base_model == "XiaomiMiMo/MiMo-V2.5-Pro"
    assert "# MiMo-V2.5-Pro, routed experts in 4 bits" in card.text
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.library_name == library  # transformers loads the other two wrong
    commands = [line for line in card.text.splitlines() if line.startswith(("vllm serve .", "python3 -m sglang"))]
    assert len(commands) == (1 if form == "mxfp4" else 2), card.text  # SGLang takes MXFP4 in the native container only
    assert ("SGLang: layers " in card.text) == (form == "mxfp4")  # and why not


def test_an_evaluation_is_written_into_the_card_and_verify_still_holds(out: Path, tmp_path: Path) -> None:
    before = (out / "README.md").read_text()
    assert "Not measured yet" in before
    done = call("eval-kl", MICRO, out, *FEW, "--card", "--json")
    assert done.exit_code == 0, done.output
    after = (out / "README.md").read_text()
    assert f"| symmetric KL, J | {json.loads(done.stdout)['j']['mean']:.4g} (95 % " in after
    assert without_quality(after) == before and not list(out.glob("*.tmp"))
    measured = call("verify", out, "--source", MICRO)
    assert measured.exit_code == 0 and "edited" not in measured.stdout
    (out / "README.md").write_text(after.replace("Only the routed", "All the routed"))
    edited = call("verify", out, "--source", MICRO)
    assert edited.exit_code == 0 and "README.md: edited, not part of the proof" in edited.stdout
    (out / "README.md").write_text("a card of another kind")
    refused = call("eval-kl", MICRO, out, *FEW, "--card")
    assert refused.exit_code == 2 and "no section on quality" in refused.stderr and "layer" not in refused.stderr
    (out / "README.md").write_text(before)


@pytest.mark.parametrize(("limit", "failures", "code"), [(9.0, 0, 0), (1e-6, 1, 5)])
def test_a_gate_as_junit(out: Path, tmp_path: Path, limit: float, failures: int, code: int) -> None:
    file = tmp_path / "gate.xml"
    assert call("eval-kl", MICRO, out, *FEW, "--max-kl", limit, "--junit", file).exit_code == code
    suite = ElementTree.parse(file).getroot()
    assert suite.tag == "testsuite" and suite.get("failures") == str(failures)
    assert len(suite.findall("testcase")) == int(suite.get("tests", 0)) == 2
    assert len(suite.findall("testcase/failure")) == failures
    refused = call("eval-kl", MICRO, out, *FEW, "--junit", file)
    assert refused.exit_code == 2 and "--max-kl" in refused.stderr


def test_rows_that_are_not_finite_fail_a_gate(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(call("eval-kl", MICRO, out, *FEW, "--json").stdout) | {"nonfinite_share": 0.25}
    monkeypatch.setattr("mimoquant.assembly.evaluations.eval_kl", lambda *arguments, **options: dict(facts))
    failed = call("eval-kl", MICRO, out, "--max-kl", "9", "--junit", tmp_path / "gate.xml")
    assert failed.exit_code == 5 and "25 % of the rows are not finite" in failed.stderr
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "1"
    assert call("eval-kl", MICRO, out).exit_code == 0  # without a gate it is told, not judged


def test_every_option_has_help() -> None:
    for name, verb in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert verb.help and all(
            getattr(one, "help", None) for one in verb.params if one.param_type_name == "option"
        ), name
