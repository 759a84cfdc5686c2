"""The shipped sets: as listed, of every domain, and nothing of the held-out set in the one for calibration."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omni import VOCAB, omni_folder

from mimoquant import micro_checkpoint
from mimoquant.calibration.tokens import load_tokens
from mimoquant.shipped import calib_folder, shipped_sets

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts/make/calib.py"
HANDBOOK = Path("/usr/share/doc")  # where Debian's package debian-handbook puts its pages
DOMAINS = {
    "heldout-v1": {"chat", "chinese", "code", "french", "maths", "prose", "tools"},
    "mixed-v1": {
        "agents",
        "chat",
        "chinese",
        "code",
        "european",
        "languages",
        "long",
        "manuals",
        "maths",
        "prose",
        "tools",
    },
    "omni-heldout-v1": {"charts", "pages", "shapes", "tables"},
    "omni-v1": {"charts", "pages", "shapes", "tables"},
}
OMNI = ("omni-v1", "omni-heldout-v1")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_calib", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def records(file: Path) -> list[dict[str, Any]]:
    text = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
    return [json.loads(line) for line in text.decode("utf-8").split("\n") if line]


def domain(file: Path) -> str:
    return file.name.split(".")[0]


def files(name: str) -> list[Path]:
    return sorted((calib_folder() / name).iterdir())


def test_every_set_has_its_files() -> None:
    assert {name: {domain(file) for file in files(name)} for name in shipped_sets()} == DOMAINS
    assert sum(file.stat().st_size for name in DOMAINS for file in files(name)) < 3_000_000


def test_the_files_are_those_that_are_listed() -> None:
    lines = (calib_folder() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {
        f"{name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for name in DOMAINS for file in files(name)
    }
    assert found == listed


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_the_readme_lists_every_file(name: str) -> None:
    readme = (calib_folder() / "README.md").read_text(encoding="utf-8")
    for file in files(name):
        content = records(file)
        assert {record["domain"] for record in content} == {domain(file)}
        assert len({json.dumps(record, sort_keys=True) for record in content}) == len(content)
        assert f"| `{file.name}` | {len(content)} | {file.stat().st_size} |" in readme


@pytest.mark.parametrize("name", sorted(DOMAINS))
def test_every_domain_gives_sequences(name: str, tmp_path: Path) -> None:
    folder = omni_folder(tmp_path) if name in OMNI else micro_checkpoint()
    found = load_tokens([name], folder, sequences=44, tokens=256, vocab=VOCAB, takes_media=True)
    assert any(found.media) == (name in OMNI)
    assert found.ids.shape == (44, 256)
    assert set(found.domains) == DOMAINS[name]
    assert found.left_out == ()
    turns = Counter(found.domains).values()
    assert max(turns) - min(turns) <= 1
    assert len(set(found.sequence_hashes)) == 44


def test_chats_read_without_a_chat_template(tmp_path: Path) -> None:
    shutil.copy(micro_checkpoint() / "tokenizer.json", tmp_path)
    found = load_tokens(["mixed-v1"], tmp_path, sequences=22, tokens=64, vocab=1024)
    assert set(found.domains) == DOMAINS["mixed-v1"]


def test_what_the_calibration_set_holds() -> None:
    content = {domain(file): records(file) for file in files("mixed-v1")}
    for name in ("agents", "chat", "maths", "tools"):
        assert all("messages" in record and record["plain"] for record in content[name])
    assert all(record["tools"] for name in ("agents", "tools") for record in content[name])
    turns = [turn for record in content["agents"] for turn in record["messages"]]
    assert {turn["role"] for turn in turns} == {"user", "assistant", "tool"}
    calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
    assert calls and all(isinstance(call["arguments"], dict) for call in calls)
    thought = sum("reasoning_content" in record["messages"][-1] for record in content["maths"])
    assert 0.4 < thought / len(content["maths"]) < 0.6
    assert min(len(record["text"]) for record in content["long"]) >= 26_000
    languages = {record["source"].split("/")[1] for record in content["languages"]}
    assert languages == {"ar-MA", "es-ES", "id-ID", "it-IT", "ja-JP", "pt-BR", "ru-RU"}


def test_no_domain_is_much_smaller_than_another() -> None:
    """In the micro tokenizer's tokens these are unequal; characters of ASCII text and others are near enough."""
    sizes = {}
    for file in files("mixed-v1"):
        text = "".join(json.dumps(record, ensure_ascii=False) for record in records(file))
        ascii_characters = sum(character.isascii() for character in text)
        sizes[domain(file)] = ascii_characters / 4.2 + (len(text) - ascii_characters) / 1.5
    assert max(sizes.values()) < 2.5 * min(sizes.values())
    assert sum(sizes.values()) > 1_000_000


def test_nothing_held_out_is_in_the_calibration_set(script: ModuleType) -> None:
    """No 13 words in a row, in any record: sharing less than 1 % of them would have been enough."""
    held_out = set().union(*(script.shingles(record) for record in script.read_set("heldout-v1")))
    assert len(held_out) > 100_000
    shared_passages = [
        (record["domain"], passage)
        for record in script.read_set("mixed-v1")
        for passage in script.shingles(record) & held_out
    ]
    assert shared_passages == []


def test_nothing_held_out_of_images_is_in_their_calibration_set(script: ModuleType, tmp_path: Path) -> None:
    """Neither words nor images, of this or any other pair of sets; and each image is another."""

    def words(name: str) -> set[str]:
        found: set[str] = set()
        for record in script.read_set(name):
            for turn in record["messages"] if name in OMNI else ():
                if isinstance(turn["content"], list):
                    turn["content"] = [part for part in turn["content"] if part["type"] == "text"]
            found |= script.shingles(record)
        return found

    held_out = words("omni-heldout-v1")
    assert len(held_out) > 5_000 and not held_out & words("omni-v1") and not held_out & words("mixed-v1")
    folder = omni_folder(tmp_path)
    of_set = {
        name: load_tokens([name], folder, sequences=None, tokens=256, vocab=VOCAB, takes_media=True) for name in OMNI
    }
    media = [of_set[name].fingerprints.media for name in OMNI]
    assert not set(media[0]) & set(media[1])
    assert [len(prints) for prints in media] == [sum(map(len, of_set[name].media)) for name in OMNI]


@pytest.mark.slow
@pytest.mark.parametrize("name", OMNI)
def test_the_script_draws_the_same_images(name: str, tmp_path: Path) -> None:
    script = SCRIPT.with_name("omni.py")
    subprocess.run([sys.executable, script, "--set", name, "--out", tmp_path], check=True, capture_output=True)
    for file in files(name):
        assert records(tmp_path / file.name) == records(file)


def test_a_shared_passage_is_found(script: ModuleType) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    spoken = {"messages": [{"role": "user", "content": f"Well: {words.upper()}, fourteen!"}]}
    assert script.shingles({"text": words}) & script.shingles(spoken)
    assert not script.shingles({"text": words.replace("seven", "7")}) & script.shingles(spoken)
    poem = "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。"
    assert script.shingles({"text": poem}) & script.shingles({"text": f"靜夜思\n李白\n{poem}"})


def test_draw_leaves_shared_passages_out(script: ModuleType) -> None:
    mine, other = ({"text": f"{word} " * 20} for word in ("mine", "other"))
    lines = script.draw([mine, other], "seed", "x", 10_000, script.shingles(other))
    assert [json.loads(line) for line in lines] == [mine | {"domain": "x"}]


@pytest.mark.parametrize("name", ["agents", "maths"])
def test_the_script_rebuilds_a_domain(shared: Path, tmp_path: Path, name: str) -> None:
    sources = shared / "text" / "calibration"
    if not sources.is_dir():
        pytest.skip("the source texts are not beside this clone")
    command: list[str | Path] = [
        sys.executable,
        SCRIPT,
        sources,
        "--set",
        "mixed-v1",
        "--out",
        tmp_path,
        "--only",
        name,
    ]
    subprocess.run(command, check=True, capture_output=True)
    again = tmp_path / f"{name}.jsonl.xz"
    assert records(again) == records(calib_folder() / "mixed-v1" / again.name)


@pytest.mark.slow
def test_the_script_rebuilds_the_calibration_set(shared: Path, tmp_path: Path) -> None:
    sources = shared / "text" / "calibration"
    if not sources.is_dir() or not (HANDBOOK / "debian-handbook").is_dir():
        pytest.skip("the source texts are not beside this clone, or debian-handbook is not installed")
    command: list[str | Path] = [sys.executable, SCRIPT, sources, HANDBOOK, "--set", "mixed-v1", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for file in files("mixed-v1"):
        assert records(tmp_path / file.name) == records(file)
