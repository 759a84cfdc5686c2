"""What safetensors, compressed-tensors and transformers say of outputs: nothing of ours, their own words of others."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from loguru import logger
from micro import MICRO, edit_json
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.checkpoint.index import CheckpointIndex, open_index
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.cli.app import app
from mimoquant.model.geometry import read_geometry
from mimoquant.output.libraries import ask_libraries
from mimoquant.output.schemes import Schemes
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe

EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
ASYMMETRIC = f"""
default_stage:
  default_modifiers:
    QuantizationModifier:
      config_groups:
        experts:
          targets: ['{EXPERTS}']
          weights: {{num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 32}}
      ignore: ['re:.*layers\\.2\\.mlp\\.experts\\..*', 're:.*layers\\.4\\.mlp\\.experts\\..*']
mimoquant: {{version: 1, carve_outs: {{2: bf16, 4: fp8}}}}
"""
MADE = {
    "int4": ("int4-g128-mse", "compressed-tensors"),
    "mxfp4": ("mxfp4-rtn", "compressed-tensors"),
    "nvfp4": ("nvfp4-mse", "compressed-tensors"),
    "native": ("mxfp4-rtn", "native"),
    "modelopt": ("nvfp4-mse", "modelopt"),
    "asymmetric, kept layers": ("asymmetric", "compressed-tensors"),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    for name, (recipe, container) in MADE.items():
        read = parse_recipe(ASYMMETRIC, recipe) if recipe == "asymmetric" else load_recipe(recipe)
        pipeline.quantize(make_plan(MICRO, read, container=container), folder / name, device="cpu")
    return {name: folder / name for name in MADE}


@pytest.fixture
def out(outputs: dict[str, Path], tmp_path: Path) -> Path:
    """An int4 output, to be edited."""
    return Path(shutil.copytree(outputs["int4"], tmp_path / "out"))


def said(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)  # of which the sizes are no part
    return ask_libraries(open_index(folder), read_geometry(config, "config.json")).problems


@pytest.mark.parametrize("name", MADE)
def test_nothing_is_said_against_what_we_write(outputs: dict[str, Path], name: str) -> None:
    index = open_index(outputs[name])
    answers = ask_libraries(index, make_plan(MICRO, load_recipe("mxfp4-rtn")).layout.geometry)
    assert answers.problems == answers.set_aside == []
    assert answers.checked["shards by safetensors"] == len(index.file_sizes)
    of_compressed_tensors = MADE[name][1] == "compressed-tensors"
    assert bool(answers.checked["modules by compressed-tensors"]) == of_compressed_tensors
    assert answers.checked["tokenizer by transformers"] == answers.checked["template by transformers"] == 1


# --- safetensors ------------------------------------------------------------------------------------------------------


def header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the JSON of the first shard's header."""

    def edit(folder: Path) -> None:
        path = folder / min(open_index(folder).file_sizes)
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        text = change(raw[8:end])
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return edit


def with_metadata(value: object) -> Callable[[bytes], bytes]:
    return lambda text: json.dumps(json.loads(text) | {"__metadata__": value}).encode().ljust(len(text) + 64)


HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a number in its metadata": (with_metadata({"format": "pt", "step": 7}), "invalid JSON in header"),
    "metadata that is a list": (with_metadata(["pt"]), "invalid JSON in header"),
    "a byte order mark": (lambda text: b"\xef\xbb\xbf" + text + b"     ", "invalid"),
    "metadata that is a word": (with_metadata("pt"), "invalid JSON in header"),
    "an odd length": (lambda text: text + b" ", "no multiple of the"),
}


@pytest.mark.parametrize(("change", "words"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_safetensors_reads_otherwise(change: Callable[[bytes], bytes], words: str, out: Path) -> None:
    header(change)(out)
    found = said(out)
    assert len(found) == 1 and words in found[0] and min(open_index(out).file_sizes) in found[0], found


def test_a_shard_that_says_another_dtype_to_the_library(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readers that disagree: here ours is made wrong."""
    index = open_index(out)
    name = min(index.tensors)
    other = copy.copy(index.tensors[name])
    object.__setattr__(other, "dtype", "F16")
    wrong = CheckpointIndex(out, index.tensors | {name: other}, index.file_sizes, index.header_sha256, {})
    found = ask_libraries(wrong, make_plan(MICRO, load_recipe("mxfp4-rtn")).layout.geometry).problems
    assert any(f"reads {name} as " in text and "here it is F16" in text for text in found)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda held: change(held["quantization_config"]))


def group(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return quantization(lambda held: change(held["config_groups"]["group_0"]))


def weights(**values: object) -> Callable[[Path], None]:
    return group(lambda held: held["weights"].update(values))


ALL, LAYER, ONE = 96, 24, 1
CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown key of weights": (
        weights(bits=4),
        "config_groups.group_0.weights.bits: Extra inputs are not permitted",
    ),
    "a string for bits": (weights(num_bits="four"), "num_bits"),
    "actorder that was removed": (weights(actorder="group"), "has been removed"),
    "a group without its size": (weights(group_size=None), "requires group_size"),
    "no groups": (quantization(lambda held: held.pop("config_groups")), "config_groups: Field required"),
    "a preset that is none": (
        quantization(lambda held: held.update(config_groups={"W9A1": ["Linear"]})),
        "Unknown preset scheme name W9A1",
    ),
    "a status that is none": (quantization(lambda held: held.update(quantization_status="done")), "frozen"),
    "mixed-precision for a group": (group(lambda held: held.update(format="mixed-precision")), "mixed-precision"),
    "a pattern that is none": (group(lambda held: held.update(targets=["re:*"])), "nothing to repeat"),
    "another group size": (weights(group_size=32), "wants weight_scale BF16[128, 8], stored is BF16[128, 2]"),
    "asymmetric": (weights(symmetric=False), "wants weight_zero_point I32[16, 2], stored are"),
    "eight bits": (weights(num_bits=8), "wants weight_packed I32[128, 64], stored is I32[128, 32]"),
    "another format": (
        group(lambda held: held.update(format="int-quantized")),
        "wants weight I8[128, 256], stored are weight_packed I32",
    ),
    "a target that matches nothing": (
        group(lambda held: held.update(targets=["re:model.experts.*"])),
        f"and {ALL - 1} others: compressed-tensors",
    ),
    "one layer ignored": (
        quantization(lambda held: held["ignore"].append(r"re:.*layers\.3\.mlp\.experts.*")),
        f"model.layers.3.mlp.experts.0.gate_proj and {LAYER - 1} others: compressed-tensors",
    ),
    "one expert ignored by name": (
        quantization(lambda held: held["ignore"].append("model.layers.3.mlp.experts.5.up_proj")),
        "model.layers.3.mlp.experts.5.up_proj: compressed-tensors",
    ),
    "all Linear, and attention not ignored": (
        quantization(
            lambda held: [held["config_groups"]["group_0"].update(targets=["Linear"]), held.update(ignore=[])]
        ),
        "self_attn.",
    ),
    "ignored by class": (
        quantization(lambda held: held.update(ignore=["Linear"])),
        f"and {ALL - 1} others: compressed-tensors",
    ),
}


@pytest.mark.parametrize(("edit", "words"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_compressed_tensors_reads_otherwise(edit: Callable[[Path], None], words: str, out: Path) -> None:
    edit(out)
    found = said(out)
    assert any(words in text and "compressed-tensors 0." in text for text in found), found


def test_what_the_library_warns_of_is_told_and_not_printed(out: Path) -> None:
    weights(group_size=256)(out)
    printed: list[str] = []
    sink = logger.add(printed.append)
    try:
        assert any("wants weight_scale BF16[128, 1], stored is BF16[128, 2]" in text for text in said(out))
    finally:
        logger.remove(sink)
    assert printed == []


SOUND: dict[str, Callable[[Path], None]] = {
    "a group as a preset": quantization(
        lambda held: held.update(config_groups={"W4A16": held["config_groups"]["group_0"]["targets"]})
    ),
    "no ignore list": quantization(lambda held: held.update(ignore=None)),
    "keys at their defaults": weights(observer="minmax", observer_kwargs={}, actorder="static", block_structure=None),
    "the format left to the library": group(lambda held: held.pop("format")),
    "each expert by its name": group(
        lambda held: held.update(
            targets=[
                f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
                for layer in range(1, 5)
                for expert in range(8)
                for part in ("gate", "up", "down")
            ]
        )
    ),
    "all Linear, the rest ignored": quantization(
        lambda held: [
            held["config_groups"]["group_0"].update(targets=["Linear"]),
            held.update(ignore=["lm_head", r"re:.*self_attn\..*", r"re:.*layers\.0\.mlp\..*"]),
        ]
    ),
}


@pytest.mark.parametrize("edit", SOUND.values(), ids=SOUND.keys())
def test_the_same_config_said_otherwise_is_sound(edit: Callable[[Path], None], out: Path) -> None:
    edit(out)
    assert said(out) == []


class Model(torch.nn.Module):
    """Modules of these names, to let the library do its own walk."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            *parents, last = name.split(".")
            place: torch.nn.Module = self
            for part in parents:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.add_module(last, torch.nn.Linear(32, 32, bias=False, device="meta"))


TARGETS = [
    ["Linear"],
    [EXPERTS],
    [r"re:.*experts\.1\..*", "Linear"],
    ["model.layers.1.mlp.experts.0.up_proj", "Linear"],
]
IGNORED = [
    [],
    ["lm_head"],
    [r"re:.*self_attn.*", "lm_head"],
    [r"re:^(?!.*\.mlp\.experts(\.|$)).*$"],
    ["Module"],
    ["model.layers.0"],
    [r"re:.*layers\.[01]\.mlp\.experts\.0\..*", "model.layers.1.mlp.experts.1.up_proj"],
]


@pytest.mark.parametrize("ignore", IGNORED, ids=str)
def test_schemes_are_those_of_the_librarys_own_walk(ignore: list[str]) -> None:
    names = [
        *(f"model.layers.{n}.mlp.experts.{e}.{p}_proj" for n in (0, 1) for e in (0, 1) for p in ("gate", "up", "down")),
        *(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in ("qkv", "o")),
        "lm_head",
    ]
    for first in TARGETS:
        for second in TARGETS:
            made = {"num_bits": 4, "group_size": 32}
            config = {
                "config_groups": {
                    "a": {"targets": first, "weights": made},
                    "b": {"targets": second, "weights": made | {"symmetric": False}},
                },
                "ignore": ignore,
            }
            model = Model(names)
            apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
            walked = {
                name: getattr(module, "quantization_scheme", None)
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
            schemes = {None: None, "a": True, "b": False}
            found = {name: schemes[group] for name, group in Schemes(config).groups(names).items()}
            assert found == {name: scheme and scheme.weights.symmetric for name, scheme in walked.items()}


# --- transformers -----------------------------------------------------------------------------------------------------


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer.json", change)


def settings(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer_config.json", lambda held: held.update(values))


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40]) and None


def beyond(held: dict[str, Any]) -> None:
    token = {"content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    held["added_tokens"].append(token | {"id": 1024, "special": True})


TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a template that is no template": (template("{% for m in messages %}{{ m }}"), "cannot compile default (line 1"),
    "a template with an unknown filter": (template("{{ messages | strangely }}"), "strangely"),
    "a template that calls what is not there": (template("{{ unheard_of(messages) }}"), "cannot render default"),
    "a broken template inside the config": (settings(chat_template="{% if %}"), "cannot compile default"),
    "a broken second template": (
        settings(chat_template=[{"name": "default", "template": "x"}, {"name": "tool_use", "template": "{% end %}"}]),
        "cannot compile tool_use",
    ),
    "a cut tokenizer": (cut("tokenizer.json"), "cannot build it"),
    "a cut config": (cut("tokenizer_config.json"), "cannot build it"),
    "a model that is none": (tokenizer(lambda held: held["model"].update(type="Nothing")), "cannot build it"),
    "an id beyond the embedding": (tokenizer(beyond), "gives '<far>' the id 1024, config.json has 1024 ids"),
}


@pytest.mark.parametrize(("edit", "words"), TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_that_transformers_does_not_build(edit: Callable[[Path], None], words: str, out: Path) -> None:
    edit(out)
    found = said(out)
    assert len(found) == 1 and words in found[0] and "transformers 5." in found[0], found


FITTING: dict[str, Callable[[Path], None]] = {
    "a template that asks for a system's message": template("{{ raise_exception('begin with a system message') }}"),
    "a template with the date": template("{{ strftime_now('%Y') }}{{ messages[0].content }}"),
    "a second template that wants documents": settings(
        chat_template=[
            {"name": "default", "template": "x"},
            {"name": "rag", "template": "{{ documents[0].text.upper() }}"},
        ]
    ),
    "a class that transformers does not know": settings(tokenizer_class="MiMoTokenizer"),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("edit", FITTING.values(), ids=FITTING.keys())
def test_what_transformers_builds_is_right(edit: Callable[[Path], None], out: Path) -> None:
    edit(out)
    assert said(out) == []


def test_a_tokenizer_of_its_own_code_is_told_and_not_run(out: Path) -> None:
    (out / "tokenization_mimo.py").write_text("raise SystemExit('ran')\n")
    settings(tokenizer_class="MiMoTokenizer", auto_map={"AutoTokenizer": ["tokenization_mimo.MiMoTokenizer", None]})(
        out
    )
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    answers = ask_libraries(open_index(out), read_geometry(config, "config.json"))
    assert answers.problems == [] and "code of its own" in answers.set_aside[0]


def test_a_tokenizer_that_leads_out_is_not_read(out: Path, tmp_path: Path) -> None:
    shutil.move(out / "tokenizer.json", tmp_path / "elsewhere.json")
    (out / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert any("tokenizer.json: is a link that leads out" in text for text in said(out))


# --- through the verbs ------------------------------------------------------------------------------------------------


def test_verify_asks_them_with_a_source(out: Path) -> None:
    """Also where the journal was made to fit."""
    header(HEADERS["a number in its metadata"][0])(out)
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    for line in lines:
        line["sha256"] = file_sha256(out / line["file"])
    (out / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("invalid JSON in header" in problem for problem in verify(out, MICRO).problems)


def test_an_edited_template_must_still_be_built(out: Path) -> None:
    template("{{ messages[0].content }}")(out)
    report = verify(out, MICRO)
    assert report.ok and report.set_aside == ["chat_template.jinja: added, not part of the proof"]
    template("{% if %}")(out)
    problems = verify(out, MICRO).problems
    assert len(problems) == 1 and "cannot compile default" in problems[0]


def test_a_tokenizer_that_was_broken_in_the_source_is_told(tmp_path: Path) -> None:
    """The output is what the recipe says; the source's fault is the source's."""
    source, out = Path(shutil.copytree(MICRO, tmp_path / "source")), tmp_path / "out"
    cut("tokenizer.json")(source)
    pipeline.quantize(make_plan(source, load_recipe("mxfp4-rtn")), out, device="cpu")
    report = verify(out, source)
    assert report.ok and len(report.set_aside) == 1, report.problems
    assert "cannot build it" in report.set_aside[0] and report.set_aside[0].endswith("so it is with the source's")
    settings(chat_template="{% if %}")(out)
    assert not verify(out, MICRO).ok


def test_verify_asks_them_with_an_engine_alone(out: Path) -> None:
    weights(observer_kwargs="none")(out)
    done = CliRunner().invoke(app, ["verify", str(out), "--engine", "vllm", "--json"])
    facts = json.loads(done.stdout)
    assert done.exit_code == 3 and not facts["ok"] and "engine" in facts
    assert "compressed-tensors" in facts["problems"][0] and "observer_kwargs" in facts["problems"][0]
    shown = CliRunner().invoke(app, ["verify", str(out), "--engine", "vllm"])
    assert "problem    config.json: compressed-tensors" in shown.stdout and "libraries that read it" in shown.stderr
