"""Rebuild the held-out set from its source texts: `make_calib.py SOURCES [--out calib/heldout-v1] [--kilobytes 110]`.

Key idea: what is taken is decided by a hash of each excerpt and the seed, not by a random generator, so that the same
sources give the same bytes with every version of Python. One file per domain, one record a line. Chats and tool
requests are stored as `messages`; their `plain` lets a tokenizer without a chat template read them as paragraphs.
Origin and licence of every file: `calib/README.md`, which also says how to make another set.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = "heldout-v1"
EXCERPT_CHARACTERS = 6000
MIN_CHARACTERS = 300
CALIB = Path(__file__).resolve().parent.parent / "calib"
Record = dict[str, Any]


@dataclass(frozen=True)
class Domain:
    """A file of the set: which sources it is made from and how they are read."""

    name: str
    sources: dict[str, Callable[[str], Iterable[Record]]]


def json_lines(text: str) -> Iterator[Record]:
    return (json.loads(line) for line in text.split("\n") if line.strip())


def excerpts(text: str) -> Iterator[str]:
    """Neighbouring paragraphs, up to EXCERPT_CHARACTERS of them together."""
    taken: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        if taken and sum(map(len, taken)) + len(paragraph) > EXCERPT_CHARACTERS:
            yield "\n\n".join(taken)
            taken = []
        taken.append(paragraph)
    yield "\n\n".join(taken)


def novels(text: str) -> Iterator[Record]:
    for book in json_lines(text):
        for excerpt in excerpts(book["text"]):
            yield {"text": excerpt}


def wikitext(text: str) -> Iterator[Record]:
    """Neighbouring sentences in which no word is missing, with the spacing of ordinary English put back."""
    for line in text.split("\n"):
        if line.strip().startswith("="):
            continue
        complete = [" ".join(run) for run in runs(re.split(r"(?<= \.) (?=[A-Z\"])", line.strip()))]
        for passage in complete:
            if len(passage) >= MIN_CHARACTERS and passage.count('"') % 2 == 0:
                yield {"text": untokenized(passage)}


def runs(sentences: Iterable[str]) -> Iterator[list[str]]:
    """The stretches of sentences between those that hold an unknown word."""
    for known, group in itertools.groupby(sentences, key=lambda sentence: "<unk>" not in sentence):
        if known:
            yield list(group)


def untokenized(line: str) -> str:
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r"(\d) – (\d)", r"\1–\2", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r" ([,.;:?!)\]%])", r"\1", line)
    line = re.sub(r"([(\[$£€]) ", r"\1", line)
    return re.sub(r" ('(?:s|t|re|ve|ll|d|m)\b|n't\b|')", r"\1", line)


def poems(text: str) -> Iterator[Record]:
    return ({"text": poem["text"]} for poem in json_lines(text))


def human_eval(text: str) -> Iterator[Record]:
    return ({"text": task["prompt"] + task["canonical_solution"]} for task in json_lines(text))


def mbpp(text: str) -> Iterator[Record]:
    for task in json_lines(text):
        code = "\n".join(line.rstrip() for line in task["code"].replace("\r\n", "\n").split("\n")).strip()
        yield {"text": "\n".join([f"# {task['text'].strip()}", code, "", *task["test_list"], ""])}


def grade_school(text: str) -> Iterator[Record]:
    """Question and worked answer, without the marks for a calculator."""
    return ({"text": re.sub(r"<<[^>]*>>", "", item["text"])} for item in json_lines(text))


def function_calls(text: str) -> Iterator[Record]:
    """A request to a program with functions. No function appears twice, or the schemas would mostly repeat."""
    seen: set[str] = set()
    for item in json_lines(text):
        task = json.loads(item["text"])
        names = {function["name"] for function in task["function"]}
        if names & seen:
            continue
        seen |= names
        functions = json.dumps(task["function"], ensure_ascii=False)
        turns = [turn for turns in task["question"] for turn in turns]
        rules = [turn["content"] for turn in turns if turn["role"] == "system"]
        system = "\n\n".join([*rules, f"You can call these functions:\n{functions}"])
        yield chat([{"role": "system", "content": system}, *(turn for turn in turns if turn["role"] != "system")])


def dialogues(text: str) -> Iterator[Record]:
    """`calib/dialogues.txt`: a line @role before each turn, a line ==== between two dialogues."""
    for block in text.split("\n====\n"):
        parts = re.split(r"^@(system|user|assistant|tool)\n", block.strip() + "\n", flags=re.MULTILINE)[1:]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        yield chat([{"role": role, "content": content.strip()} for role, content in pairs])


def chat(messages: list[dict[str, str]]) -> Record:
    return {"messages": messages, "plain": True}


DOMAINS = (
    Domain("prose", {"prose_wikitext2_test.txt.xz": wikitext}),
    Domain("french", {"prose_fra_eltec.jsonl.xz": novels}),
    Domain("chinese", {"zh_poetry.jsonl.xz": poems}),
    Domain("code", {"code_humaneval.jsonl.xz": human_eval, "code_mbpp.jsonl.xz": mbpp}),
    Domain("maths", {"math_gsm8k_test.jsonl.xz": grade_school}),
    Domain("tools", {"tools_bfcl_live_multiple.jsonl.xz": function_calls}),
    Domain("chat", {"dialogues.txt": dialogues}),
)


def draw(records: Iterable[Record], domain: str, limit_bytes: int) -> list[str]:
    """Lines of a domain's file: in the order of their hash, as many as fit."""
    lines = {json.dumps(record | {"domain": domain}, ensure_ascii=False) for record in records}
    drawn, size_bytes = [], 0
    for line in sorted(lines, key=lambda line: hashlib.sha256(f"{SEED}\n{line}".encode()).digest()):
        line_bytes = len(line.encode()) + 1
        if size_bytes + line_bytes <= limit_bytes:
            drawn.append(line)
            size_bytes += line_bytes
    return drawn


def build(sources: Path, out: Path, limit_bytes: int) -> dict[str, int]:
    """Write the set; domain → bytes written."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for domain in DOMAINS:
        records: list[Record] = []
        for name, read in domain.sources.items():
            path = sources / name if (sources / name).exists() else CALIB / name
            data = path.read_bytes()
            records += read((lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8"))
        text = "".join(f"{line}\n" for line in draw(records, domain.name, limit_bytes))
        (out / f"{domain.name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        sizes[domain.name] = len(text.encode())
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the held-out set from its source texts.")
    parser.add_argument("sources", type=Path, help="folder with the source files named in calib/README.md")
    parser.add_argument("--out", type=Path, default=CALIB / SEED, help="folder to write (default: calib/heldout-v1)")
    parser.add_argument("--kilobytes", type=int, default=110, help="size of a domain at most (default: 110)")
    arguments = parser.parse_args()
    for domain, size_bytes in build(arguments.sources, arguments.out, arguments.kilobytes * 1000).items():
        print(f"{domain:8} {size_bytes:7} bytes")


if __name__ == "__main__":
    main()
