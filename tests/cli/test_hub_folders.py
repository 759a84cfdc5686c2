"""Every verb on folders as the Hub makes them says what it says of a plain one; links that lead out are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_cache import hub_cache
from micro import MICRO, contents
from typer.testing import CliRunner

import mimoquant
from mimoquant.checkpoint.index import INDEX_NAME
from mimoquant.cli.app import app

FEW = ("--sequences", "2", "--tokens", "64", "--device", "cpu")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x\n")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` and `out`, as they were made."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(MICRO, folder / "source")
    shutil.copytree(mimoquant.micro_drafter(), folder / "source" / "dflash")
    mimoquant.quantize(folder / "source", "mxfp4-rtn", folder / "out", device="cpu")
    return folder


def cached(folder: Path, into: Path) -> Path:
    """A snapshot of the Hub's cache, under a name of its own."""
    into.symlink_to(hub_cache(folder, into.parent, into.name))
    return into


def local_dir(folder: Path, into: Path) -> Path:
    """`hf download --local-dir`, into a clone."""
    shutil.copytree(folder, into)
    put(into, ".gitattributes", ".cache/huggingface/.gitignore", ".cache/huggingface/download/config.json.metadata")
    put(into, ".git/HEAD", ".git/lfs/objects/ab/model.safetensors", "dflash/.gitattributes")
    return into


def with_leftovers(folder: Path, into: Path) -> Path:
    """Other forms of the weights, downloads that were broken off, indexes of what is not there."""
    shutil.copytree(folder, into)
    put(into, "original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "openvino/m.xml")
    put(into, "model-00002-of-00009.safetensors.incomplete", "model.safetensors.aria2", "dflash/a.lock")
    for name in ("pytorch_model.bin.index.json", "model.fp32.safetensors.index.json"):
        (into / name).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.bin"}}))
    return into


def in_subfolders(folder: Path, into: Path) -> Path:
    """A source whose shards lie in subfolders; an output keeps its own."""
    shutil.copytree(folder, into)
    if into.name == "out":
        return into
    index = json.loads((into / INDEX_NAME).read_text())
    for place, name in zip(("a", "a/b", "c", "c"), sorted(set(index["weight_map"].values())), strict=False):
        (into / place).mkdir(parents=True, exist_ok=True)
        (into / name).rename(into / place / name)
        moved = {key: f"{place}/{name}" for key, file in index["weight_map"].items() if file == name}
        index["weight_map"] |= moved
    (into / INDEX_NAME).write_text(json.dumps(index))
    return into


LAYOUTS = {"cache": cached, "local dir": local_dir, "leftovers": with_leftovers, "subfolders": in_subfolders}


@pytest.fixture(params=LAYOUTS)
def hub(request: pytest.FixtureRequest, plain: Path, tmp_path: Path) -> Path:
    for name in ("source", "out"):
        LAYOUTS[request.param](plain / name, tmp_path / name)
    return tmp_path


def verbs(folder: Path) -> list[tuple[object, ...]]:
    source, out = folder / "source", folder / "out"
    return [
        ("inspect", source),
        ("inspect", out),
        ("plan", source, "-r", "int4-g128-rtn"),
        ("launch", out, "--engine", "vllm", "--gpu", "h100", "--gpus", "1"),  # 3: the micro checkpoint has no class
        ("verify", out, "--engine", "transformers", "-q"),  # 3, for the same
        ("eval-kl", source, out, *FEW, "-q"),
    ]


def said(done: Any, folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors, without where it lies and without spaces: a long path is broken over lines."""
    lines = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith(("memory", "time", "disk", "run  ", "note: not c"))
    ]
    told = ("".join(text.split()).replace(str(folder), "DIR") for text in ("\n".join(lines), done.stderr))
    return done.exit_code, *told


OfPlain = tuple[list[tuple[int, str, str]], dict[str, bytes]]


@pytest.fixture(scope="module")
def of_plain(plain: Path) -> OfPlain:
    """What verbs say of the folders as they were made, and what a relayout writes."""
    return [said(call(*verb), plain) for verb in verbs(plain)], relaid(plain, plain / "relaid")


def relaid(folder: Path, to: Path) -> dict[str, bytes]:
    done = call("relayout", folder / "source", "--qkv", "split", "--dtype", "bf16", "-q", "--out", to)
    assert done.exit_code == 0, done.output
    return contents(to)


def test_verbs_say_the_same(hub: Path, of_plain: OfPlain) -> None:
    for there, here in zip(verbs(hub), of_plain[0], strict=True):
        assert said(call(*there), hub) == here, there[0]


@pytest.mark.slow
def test_verify_and_relayout_do_the_same(hub: Path, plain: Path, of_plain: OfPlain, tmp_path: Path) -> None:
    verified = call("verify", hub / "out", "--source", plain / "source", "-q")
    assert verified.exit_code == 0, verified.output
    there, here = relaid(hub, tmp_path / "there"), of_plain[1]
    told = ("relayout.json", "journal.jsonl")  # the fingerprint of the source's headers has the files' names
    assert {name: held for name, held in there.items() if name not in told} == {
        name: held for name, held in here.items() if name not in told
    }
    assert call("verify", tmp_path / "there", "--source", hub / "source", "-q").exit_code == 0


SECRET = "root:x:0:0"
OPENED: dict[str, list[tuple[str, str]]] = {  # verb → the files it opens, of the source or the output
    "inspect": [("out", "config.json"), ("out", INDEX_NAME), ("out", "SHARD"), ("source", "dflash/config.json")],
    "launch": [("out", "config.json"), ("out", "SHARD")],
    "verify --engine": [("out", "config.json"), ("out", "tokenizer.json"), ("out", "tokenizer_config.json")],
    "verify --source": [
        ("out", name) for name in ("recipe.yaml", "journal.jsonl", "report.json", "README.md", "SHARD")
    ],
    "eval-kl": [("source", "tokenizer.json"), ("source", "SHARD"), ("out", "recipe.yaml"), ("out", "SHARD")],
    "relayout": [("source", "tokenizer.json"), ("source", "README.md"), ("source", "dflash/config.json")],
}
COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "inspect": lambda folder: ("inspect", folder / "out"),
    "launch": lambda folder: ("launch", folder / "out", "--engine", "vllm", "--gpu", "h100", "--gpus", "1"),
    "verify --engine": lambda folder: ("verify", folder / "out", "--engine", "vllm", "-q"),
    "verify --source": lambda folder: ("verify", folder / "out", "--source", folder / "source", "-q"),
    "eval-kl": lambda folder: ("eval-kl", folder / "source", folder / "out", *FEW, "-q"),
    "relayout": lambda folder: (
        "relayout",
        folder / "source",
        "--qkv",
        "split",
        "--dtype",
        "bf16",
        "-o",
        folder / "new",
        "-q",
    ),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_link_that_leads_out_is_refused_by_every_verb(verb: str, plain: Path, tmp_path: Path) -> None:
    for name in ("source", "out"):
        cached(plain / name, tmp_path / name)
    secret = tmp_path / "secret"
    for which, name in OPENED[verb]:
        folder = tmp_path / which
        path = folder / (min(file.name for file in folder.glob("*.safetensors")) if name == "SHARD" else name)
        before = path.readlink()
        shutil.copy(path.resolve(), secret)
        with secret.open("ab") as file:
            file.write(b"" if path.suffix in (".json", ".safetensors") else f"\n# {SECRET}\n".encode())
        path.unlink()
        path.symlink_to(secret)
        asked = COMMANDS[verb](tmp_path)
        if verb == "inspect" and which == "source":
            asked = ("inspect", tmp_path / "source")
        done = call(*asked)
        path.unlink()
        path.symlink_to(before)
        assert done.exit_code == 3 and "leads out" in done.output, (name, done.output)
        assert SECRET not in done.output
