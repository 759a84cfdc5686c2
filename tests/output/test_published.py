"""An output after it was published: what the Hub adds, what people edit, links; and what is still tampering."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_cache import hub_cache
from micro import MICRO, edit_json
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.output.verify import VerifyReport, verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro checkpoint with a template of its own file, a licence, a second template and a drafter."""
    folder = Path(shutil.copytree(MICRO, tmp_path_factory.mktemp("source") / "micro"))
    shutil.copytree(mimoquant.micro_drafter(), folder / "dflash")
    put(folder, "LICENSE", "MIT")
    put(folder, "chat_template.jinja", TEMPLATE)
    put(folder, "additional_chat_templates/tools.jinja", TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    pipeline.quantize(make_plan(source, load_recipe("mxfp4-rtn")), out, device="cpu")
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def put(folder: Path, name: str, text: str = "x\n") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def append(folder: Path, name: str, text: str = "\nmore\n") -> None:
    with (folder / name).open("a") as file:
        file.write(text)


HUB = (
    ".gitattributes",
    ".gitignore",
    ".git/HEAD",
    ".cache/huggingface/.gitignore",
    ".cache/huggingface/download/config.json.metadata",
    ".cache/huggingface/download/model-00001-of-00007.safetensors.lock",
    ".huggingface/download/config.json.metadata",
    "dflash/.gitattributes",
    ".DS_Store",
)


def test_what_the_hub_and_git_add_is_no_part_of_a_checkpoint(source: Path, out: Path) -> None:
    for name in HUB:
        put(out, name)
    report = verify(out, source)
    assert report.ok and report.set_aside == [], report.problems


def template_gone_to_its_file(out: Path) -> None:
    edit_json(out / "tokenizer_config.json", lambda held: held.pop("chat_template"))


EDITS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "the card": (lambda out: put(out, "README.md", "# Ours\n"), ["README.md: edited"]),
    "the card, at length": (lambda out: put(out, "README.md", "x" * 11_000_000), ["README.md: edited"]),
    "the card, in Latin-1": (lambda out: (out / "README.md").write_bytes(b"\xe9\xff"), ["README.md: edited"]),
    "the drafter's card": (lambda out: append(out, "dflash/README.md"), ["dflash/README.md: edited"]),
    "the template": (lambda out: append(out, "chat_template.jinja"), ["chat_template.jinja: edited"]),
    "a second template": (
        lambda out: append(out, "additional_chat_templates/tools.jinja"),
        ["additional_chat_templates/tools.jinja: edited"],
    ),
    "the template inside the tokenizer's config": (
        lambda out: edit_json(out / "tokenizer_config.json", lambda held: held.update(chat_template=TEMPLATE)),
        ["tokenizer_config.json: its chat_template was edited"],
    ),
    "the template moved into its file": (
        template_gone_to_its_file,
        ["tokenizer_config.json: its chat_template was edited"],
    ),
    "the licence": (lambda out: append(out, "LICENSE"), ["LICENSE: edited"]),
    "pictures, a notice, a changelog": (
        lambda out: [put(out, name) for name in ("figures/a.png", "NOTICE.txt", "CHANGELOG.md")],
        ["CHANGELOG.md: added", "NOTICE.txt: added", "figures/a.png: added"],
    ),
    "what a download left": (
        lambda out: [put(out, name) for name in ("model-00001-of-00007.safetensors.incomplete", "a.aria2")],
        ["a.aria2: left by a download", "model-00001-of-00007.safetensors.incomplete: left by a download"],
    ),
    "an index of weights that are not there": (
        lambda out: put(out, "pytorch_model.bin.index.json", json.dumps({"weight_map": {"a": "a.bin"}})),
        ["pytorch_model.bin.index.json: an index of weights that are not here"],
    ),
    "other forms of the weights": (
        lambda out: [put(out, name) for name in ("onnx/model.onnx", "original/params.json")],
        ["onnx/: another form of the weights", "original/: another form of the weights"],
    ),
}


@pytest.mark.parametrize(("edit", "told"), EDITS.values(), ids=EDITS.keys())
def test_what_is_edited_for_publishing_is_told(
    edit: Callable[[Path], object], told: list[str], source: Path, out: Path
) -> None:
    edit(out)
    report = verify(out, source)
    assert report.ok and len(report.set_aside) == len(told), (report.problems, report.set_aside)
    for text, begin in zip(sorted(report.set_aside), told, strict=True):
        assert text.startswith(begin) and "not part of the proof" in text


def test_it_is_printed(source: Path, out: Path) -> None:
    put(out, "README.md", "# Ours\n")
    done = CliRunner().invoke(app, ["verify", str(out), "--source", str(source)])
    assert done.exit_code == 0 and "beside     README.md: edited, not part of the proof" in done.stdout


def other_value(key: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda held: held.update({key: value})


def leads_out(name: str) -> Callable[[Path], object]:
    def link(out: Path) -> None:
        shutil.move(out / name, out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    return link


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (
        lambda out: edit_json(out / "config.json", other_value("rope_theta", 1.0)),
        "config.json: is not what the recipe makes",
    ),
    "index": (
        lambda out: edit_json(out / "model.safetensors.index.json", other_value("metadata", {})),
        "model.safetensors.index.json: is not what the recipe makes",
    ),
    "recipe": (lambda out: append(out, "recipe.yaml", "\n# x\n"), "recipe.yaml: is not what the recipe makes"),
    "report": (lambda out: append(out, "report.json"), "report.json: is not what the recipe makes"),
    "tokenizer": (lambda out: append(out, "tokenizer.json"), "tokenizer.json: differs from the source's"),
    "tokenizer's config beside the template": (
        lambda out: edit_json(out / "tokenizer_config.json", other_value("eos_token", "<|im_end|>")),
        "tokenizer_config.json: differs from the source's",
    ),
    "a truth value for a number": (
        lambda out: edit_json(out / "tokenizer_config.json", other_value("model_max_length", True)),
        "tokenizer_config.json: differs from the source's",
    ),
    "a key of the tokenizer's config twice": (
        lambda out: put(
            out,
            "tokenizer_config.json",
            (out / "tokenizer_config.json").read_text().rstrip()[:-1] + ', "bos_token": "<|endoftext|>"}',
        ),
        "tokenizer_config.json: differs from the source's",
    ),
    "sampling": (lambda out: put(out, "generation_config.json", "{}"), "generation_config.json: differs"),
    "the drafter's weights": (
        lambda out: append(out, "dflash/dflash_draft_model.safetensors"),
        "dflash/dflash_draft_model.safetensors: differs",
    ),
    "code": (lambda out: put(out, "modeling_mimo.py"), "modeling_mimo.py: is an extra file"),
    "compiled code": (lambda out: put(out, "__pycache__/modeling.pyc"), "__pycache__/: is an extra folder"),
    "a pickle": (lambda out: put(out, "pytorch_model.bin"), "pytorch_model.bin: is an extra file"),
    "another index of the shards": (
        lambda out: shutil.copy(out / "model.safetensors.index.json", out / "model.fp16.safetensors.index.json"),
        "model.fp16.safetensors.index.json: is an extra file",
    ),
    "a vocabulary": (lambda out: put(out, "vocab.txt"), "vocab.txt: is an extra file"),
    "a template elsewhere": (lambda out: put(out, "a/chat_template.jinja"), "a/chat_template.jinja: is an extra file"),
    "no card": (lambda out: (out / "README.md").unlink(), "README.md: is missing"),
    "no template": (lambda out: (out / "chat_template.jinja").unlink(), "chat_template.jinja: is missing"),
    "a folder for a card": (
        lambda out: [(out / "README.md").unlink(), (out / "README.md").mkdir()],
        "README.md: is not a regular file",
    ),
    "a card that leads out": (leads_out("README.md"), "README.md: is a link that leads out"),
    "a template that leads out": (leads_out("chat_template.jinja"), "chat_template.jinja: is a link that leads out"),
    "a shard that leads out": (
        lambda out: leads_out(min(path.name for path in out.glob("*.safetensors")))(out),
        ".safetensors: is a link that leads out",
    ),
    "a tokenizer that leads out": (leads_out("tokenizer.json"), "tokenizer.json: is a link that leads out"),
    "a journal that leads out": (leads_out("journal.jsonl"), "journal.jsonl: is a link that leads out"),
    "a link to a folder": (lambda out: (out / "docs").symlink_to("/usr/share"), "docs: is a link to a folder"),
    "a loop": (
        lambda out: [(out / "README.md").unlink(), (out / "README.md").symlink_to("README.md")],
        "README.md: is a link to README.md, where there is no file",
    ),
}


@pytest.mark.parametrize(("tamper", "said"), TAMPERED.values(), ids=TAMPERED.keys())
def test_tampering_is_still_a_problem(tamper: Callable[[Path], object], said: str, source: Path, out: Path) -> None:
    tamper(out)
    report: VerifyReport = verify(out, source)
    assert not report.ok and any(said in problem for problem in report.problems), report.problems


def test_a_recipe_that_leads_out_is_not_read(source: Path, out: Path) -> None:
    leads_out("recipe.yaml")(out)
    done = CliRunner().invoke(app, ["verify", str(out), "--source", str(source)])
    assert done.exit_code == 3 and "recipe.yaml: is a link that leads out" in done.stderr


def test_an_output_and_its_source_in_the_hubs_cache(source: Path, out: Path, tmp_path: Path) -> None:
    ours, theirs = hub_cache(out, tmp_path / "a"), hub_cache(source, tmp_path / "b")
    report = verify(ours, theirs)
    assert report.ok and report.set_aside == [], report.problems
    (ours / "README.md").unlink()
    (ours / "README.md").symlink_to("/etc/passwd")
    assert any("README.md: is a link that leads out" in problem for problem in verify(ours, theirs).problems)
    os.unlink(ours / "README.md")
    assert verify(ours, theirs).problems == ["README.md: is missing"]
