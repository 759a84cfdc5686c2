"""Rebuild a shipped set from its source texts.

usage: scripts/make/calib.py SOURCES… [--set heldout-v1] [--out calib/heldout-v1]

Key idea: what is taken is decided by a hash of each record and the set's name, not by a random generator, so that the
same sources give the same records with every version of Python. One file per domain, one record a line. Chats and tool
requests are stored as `messages`; their `plain` lets a tokenizer without a chat template read them as paragraphs.

A set for calibration shares no passage with the held-out set: a record that has any 13 words in a row with it is left
out. Origin and licence of every file: `calib/README.md`, which also says how to make another set.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXCERPT_CHARACTERS = 6000
MIN_CHARACTERS = 300
LONG_CHARACTERS = 26_000  # more than 8 k tokens in most of these texts, and less than a source file may hold
SHINGLE_WORDS = 13
CALIB = Path(__file__).resolve().parents[2] / "calib"
Record = dict[str, Any]
Reader = Callable[[Path], Iterable[Record]]


@dataclass(frozen=True)
class Part:
    """What a domain takes from some sources: how each is read, and how many bytes of records together."""

    kilobytes: int
    sources: dict[str, Reader]


@dataclass(frozen=True)
class DataSet:
    """A shipped set: the parts of each domain. `disjoint_from` names a set that must not be seen in it."""

    name: str
    domains: dict[str, list[Part]]
    compressed: bool = False
    disjoint_from: str | None = None


# --- reading ----------------------------------------------------------------------------------------------------------


def whole(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def json_lines(path: Path) -> Iterator[Record]:
    return (json.loads(line) for line in whole(path).split("\n") if line.strip())


def excerpts(text: str, limit: int = EXCERPT_CHARACTERS) -> Iterator[str]:
    """Neighbouring paragraphs, up to `limit` characters of them together."""
    taken: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        if taken and sum(map(len, taken)) + len(paragraph) > limit:
            yield "\n\n".join(taken)
            taken = []
        taken.append(paragraph)
    yield "\n\n".join(taken)


def chat(messages: list[Record]) -> Record:
    return {"messages": messages, "plain": True}


def question(user: str, assistant: str) -> Record:
    return chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def digest(text: str) -> int:
    """A number that depends on the text alone, to choose by."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- the held-out set -------------------------------------------------------------------------------------------------


def novels(path: Path) -> Iterator[Record]:
    for book in json_lines(path):
        for excerpt in excerpts(book["text"]):
            yield {"text": excerpt}


def wikitext(path: Path) -> Iterator[Record]:
    """Neighbouring sentences in which no word is missing, with the spacing of ordinary English put back."""
    for line in whole(path).split("\n"):
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


def poems(path: Path) -> Iterator[Record]:
    return ({"text": poem["text"]} for poem in json_lines(path))


def human_eval(path: Path) -> Iterator[Record]:
    return ({"text": task["prompt"] + task["canonical_solution"]} for task in json_lines(path))


def mbpp(path: Path) -> Iterator[Record]:
    for task in json_lines(path):
        code = "\n".join(line.rstrip() for line in task["code"].replace("\r\n", "\n").split("\n")).strip()
        yield {"text": "\n".join([f"# {task['text'].strip()}", code, "", *task["test_list"], ""])}


def grade_school(path: Path) -> Iterator[Record]:
    """Question and worked answer, without the marks for a calculator."""
    return ({"text": without_marks(item["text"])} for item in json_lines(path))


def without_marks(text: str) -> str:
    return re.sub(r"<<[^>]*>>", "", text)


def function_calls(path: Path) -> Iterator[Record]:
    """A request to a program with functions. No function appears twice, or the schemas would mostly repeat."""
    seen: set[str] = set()
    for item in json_lines(path):
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


def dialogues(path: Path) -> Iterator[Record]:
    """`calib/dialogues*.txt`: a line @role before each turn, a line ==== between two dialogues."""
    for block in whole(path).split("\n====\n"):
        parts = re.split(r"^@(system|user|assistant|tool)\n", block.strip() + "\n", flags=re.MULTILINE)[1:]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        yield chat([{"role": role, "content": content.strip()} for role, content in pairs])


# --- the calibration set: text and code -------------------------------------------------------------------------------

# E. M. Forster died in 1970; Flaubert is in the held-out set.
LEFT_OUT_AUTHORS = ("Forster", "Flaubert")


def books(path: Path) -> Iterator[Record]:
    for book in json_lines(path):
        if any(author in book["src"] for author in LEFT_OUT_AUTHORS):
            continue
        text = book["text"].replace("\r\n", "\n")
        for excerpt in list(excerpts(text))[1:-1]:  # the first and the last begin or end within a sentence
            yield {"text": excerpt, "source": book["src"]}


def collected_poems(path: Path) -> Iterator[Record]:
    """Without the tone patterns that the collection keeps in a folder of their own."""
    for poem in json_lines(path):
        if "strains" not in poem["src"] and len(poem["text"].strip()) >= 20:
            yield {"text": poem["text"].strip(), "source": poem["src"]}


def python_code(path: Path) -> Iterator[Record]:
    """Files cut at lines that begin a class, a function or another statement of the module."""
    for file in json_lines(path):
        if re.search(r"Permission is hereby granted|Alexander Kirillov", file["text"]):  # another licence inside
            continue
        taken = ""
        for piece in re.split(r"\n(?=\n[^\s)\]}])", file["text"].replace("\r\n", "\n")):
            if taken and len(taken) + len(piece) > EXCERPT_CHARACTERS:
                yield {"text": taken.strip("\n") + "\n", "source": file["src"]}
                taken = ""
            taken += piece + "\n"
        yield {"text": taken.strip("\n") + "\n", "source": file["src"]}


def pages(path: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of the pages of a manual, without the navigation above them; indexes and collections left out."""
    for page in json_lines(path):
        text, source = page["text"], page["src"]
        if re.search(
            r"print\.html|second-edition|oldnews|keyword_index|crossref|/docs\.html|consortium|changes", source
        ):
            continue
        text = re.sub(r"\ALight \(default\)\n\nRust\n\nCoal\n\nNavy\n\nAyu\n\n", "", text)
        text = re.sub(
            r"\ASmall\. Fast\. Reliable\..*?\nSearch Documentation Search Changelog\n\n", "", text, flags=re.S
        )
        text = re.sub(r"► Table Of Contents\n\n(?:\d[^\n]*\n\n)+?(?=1\. )", "", text)
        yield source, text.strip()


INTERFACE = "SQLite C Interface\n\n"


def manual(path: Path) -> Iterator[Record]:
    """Pages of more than a few lines. SQLite's function reference is in `chat`."""
    for source, text in pages(path):
        if len(text) >= 1200 and len(text) < LONG_CHARACTERS and not text.startswith(INTERFACE):
            for excerpt in excerpts(text, 2 * EXCERPT_CHARACTERS):
                if len(excerpt) >= MIN_CHARACTERS:
                    yield {"text": excerpt, "source": source}


def long_pages(path: Path) -> Iterator[Record]:
    return ({"text": text, "source": source} for source, text in pages(path) if len(text) >= LONG_CHARACTERS)


def long_proposals(path: Path) -> Iterator[Record]:
    """Python Enhancement Proposals that say themselves that they are in the public domain."""
    for proposal in json_lines(path):
        dedicated = re.search(r"public\s+domain|CC0", proposal["text"][-1500:])
        if dedicated and len(proposal["text"]) >= LONG_CHARACTERS:
            yield {"text": proposal["text"], "source": proposal["src"]}


# --- the calibration set: the Debian Administrator's Handbook ---------------------------------------------------------

BLOCK = re.compile(r"</?(?:p|div|li|dt|dd|td|th|tr|h\d|ul|ol|dl|table|blockquote)\b[^>]*>")


def blocks(page: Path) -> list[str]:
    """The paragraphs, titles and list items of a page, without listings."""
    text = page.read_text(encoding="utf-8")
    start = re.search(r'<div class="(?:section|chapter|appendix|preface)"', text)
    body = text[start.start() :].split('<ul class="docnav">')[0] if start else ""
    return plain(re.sub(r"<pre.*?</pre>", "<p>", body, flags=re.S))


def plain(body: str) -> list[str]:
    lines = (" ".join(html.unescape(re.sub(r"<[^>]*>", "", part)).split()) for part in BLOCK.split(body))
    return [line for line in lines if line]


def translated(language: Path) -> Iterator[tuple[str, list[str]]]:
    """(source, blocks) of each page. A block that reads as in English was not translated, and is dropped."""
    english = {block for page in (language.parent / "en-US").glob("*.html") for block in blocks(page)}
    seen: set[str] = set()  # a chapter's page repeats the beginning of its sections
    for page in sorted(language.glob("*.html")):
        own = [block for block in blocks(page) if block not in english and block not in seen]
        seen.update(own)
        yield f"debian-handbook/{language.name}/{page.name}", own


def handbook(language: Path) -> Iterator[Record]:
    for source, own in translated(language):
        for excerpt in excerpts("\n\n".join(own)):
            if len(excerpt) >= MIN_CHARACTERS:
                yield {"text": excerpt, "source": source}


def long_handbook(language: Path) -> Iterator[Record]:
    """The whole book in pieces that are long, page after page."""
    taken: list[str] = []
    for source, own in translated(language):
        taken += own
        if sum(map(len, taken)) >= 1.2 * LONG_CHARACTERS:
            yield {"text": "\n\n".join(taken), "source": source}
            taken = []


ASKED = {
    "en-US": "I am learning to administer a Debian system. Please explain in a few sentences: {}",
    "ca-ES": "Estic aprenent a administrar un sistema Debian. Explica'm en poques frases: {}",
    "nb-NO": "Jeg lærer å administrere et Debian-system. Forklar med noen få setninger: {}",
}


def sidebars(language: Path) -> Iterator[Record]:
    """The boxes beside the text explain one thing each: the title is the question, what follows the answer."""
    seen = set() if language.name == "en-US" else {answer for _, _, answer in boxes(language.parent / "en-US")}
    for source, topic, answer in boxes(language):
        if len(answer) >= MIN_CHARACTERS and answer not in seen:
            seen.add(answer)
            yield question(ASKED[language.name].format(topic), answer) | {"source": source}


def boxes(language: Path) -> Iterator[tuple[str, str, str]]:
    """(source, title, text) of each box."""
    for page in sorted(language.glob("*.html")):
        for box in page.read_text(encoding="utf-8").split('<div class="sidebar">')[1:]:
            box = re.sub(r"<pre.*?</pre>", "<p>", box, flags=re.S)
            title = re.search(r"<strong><span[^>]*><em>[^<]*</em></span>(.*?)</strong></p></div></div></div>", box)
            paragraphs = re.findall(r'\s*<div class="para">(.*?)</div>', end_of_box(box), flags=re.S)
            text = "\n\n".join(" ".join(plain(paragraph)) for paragraph in paragraphs)
            if title:
                yield f"debian-handbook/{language.name}/{page.name}", " ".join(plain(title[1])), text


def end_of_box(box: str) -> str:
    """A sidebar ends where more `div` are closed than were opened in it."""
    depth = 1
    for tag in re.finditer(r"<(/?)div\b", box):
        depth += -1 if tag[1] else 1
        if depth == 0:
            return box[: tag.start()]
    return box


# --- the calibration set: chats and tools -----------------------------------------------------------------------------


def reasoned(path: Path) -> Iterator[Record]:
    """GSM8K as chats: half of the answers show their steps, half have thought them (`reasoning_content`)."""
    for item in json_lines(path):
        asked, _, worked = without_marks(item["text"]).removeprefix("Question: ").partition("\nAnswer: ")
        steps, _, result = worked.partition("\n#### ")
        record = question(asked.strip(), f"{steps.strip()}\n\nThe answer is {result.strip()}.")
        if digest(asked) % 2:
            record["messages"][1] = {
                "role": "assistant",
                "reasoning_content": steps.strip(),
                "content": f"The answer is {result.strip()}.",
            }
        yield record


def interface_chats(path: Path) -> Iterator[Record]:
    """SQLite's function reference: the title of a page is asked for, its text answers."""
    for source, text in pages(path):
        if text.startswith(INTERFACE) and MIN_CHARACTERS < len(text) < EXCERPT_CHARACTERS:
            title, _, answer = text.removeprefix(INTERFACE).partition("\n\n")
            answer = answer.split("\n\nSee also lists of")[0].strip()
            yield question(f"How do I use this part of SQLite's C interface: {title}?", answer) | {"source": source}


TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string", "list": "array", "int": "integer"}


def schema(value: Any) -> Any:
    """The types of BFCL are Python's, Java's or JavaScript's; tools are described in JSON Schema's."""
    if isinstance(value, list):
        return [schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    known = {key: schema(item) for key, item in value.items()}
    if isinstance(value.get("type"), str):
        known["type"] = TYPES.get(value["type"], value["type"])
    return known


def tool_requests(path: Path) -> Iterator[Record]:
    """What a user asks for, with the functions as `tools`. No function appears twice."""
    seen: set[str] = set()
    for item in json_lines(path):
        if "format_sensitivity" in item["src"]:  # lists of names, no requests
            continue
        task = json.loads(item["text"])
        names = {function["name"] for function in task.get("function", [])}
        if not names or names & seen:
            continue
        seen |= names
        tools = [{"type": "function", "function": schema(function)} for function in task["function"]]
        turns = [turn for turns in task["question"] for turn in turns]
        yield chat(turns) | {"tools": tools, "source": f"{Path(item['src']).name}#{task['id']}"}


@dataclass(frozen=True)
class Api:
    """One record of APIBench: what was asked for, the entry that answers it, and how it is explained."""

    source: str
    asked: str
    entry: Record
    explanation: str
    code: str


def apis(path: Path) -> Iterator[Api]:
    """No entry twice: the collection asks about each of its models ten times."""
    seen = set()
    for item in json_lines(path):
        record = json.loads(item["text"])
        answer, entry = record["code"], record["api_data"]
        asked = re.search(r"Instruction'?: [\"']?(.*?)[\"']?(?:, 'Output'|\n###Output)", answer, re.S)
        explained = re.search(r"explanation(?:>>>: ?|': [\"'])(.*?)(?:[\"'], 'code'|\s*<<<code>>>)", answer, re.S)
        code = re.search(r"code(?:>>>: ?|': [\"'])(.*?)(?:[\"']}*)?\Z", answer, re.S)
        name = (entry["framework"], entry["api_call"])
        if asked and explained and code and name not in seen:
            seen.add(name)
            yield Api(item["src"], asked[1].strip(), entry, explained[1].strip(), code[1].strip())


def recommendations(path: Path) -> Iterator[Record]:
    for api in apis(path):
        if "torchhub" in api.source:
            yield question(api.asked, finished(api)) | {"source": api.source}


def finished(api: Api) -> str:
    return f"{api.explanation}\n\n```python\n{api.code}\n```"


def searches(path: Path) -> Iterator[Record]:
    """Sessions of an agent: a request, the search it makes, what the catalogue returns, the answer; three of them."""
    frameworks: dict[str, list[Api]] = {}
    for api in sorted(apis(path), key=lambda api: digest(api.asked)):
        if "torchhub" not in api.source:  # those are in `chat`
            frameworks.setdefault(api.entry["framework"], []).append(api)
    for framework, found in frameworks.items():
        for first in range(0, len(found) - 2, 3):
            session = found[first : first + 3]
            yield chat([turn for api in session for turn in search(api)]) | {
                "tools": [catalogue(framework)],
                "source": session[0].source,
            }


def search(api: Api) -> list[Record]:
    function = catalogue(api.entry["framework"])["function"]
    arguments = {"domain": api.entry["domain"], "functionality": api.entry["functionality"]}
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return [
        {"role": "user", "content": api.asked},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(api.entry, ensure_ascii=False)},
        {"role": "assistant", "content": finished(api)},
    ]


def catalogue(framework: str) -> Record:
    name = "search_" + re.sub(r"\W+", "_", framework.lower())
    domain = {"type": "string", "description": "What kind of task the model is for, as the catalogue names it."}
    functionality = {"type": "string", "description": "What exactly the model does."}
    parameters = {
        "type": "object",
        "properties": {"domain": domain, "functionality": functionality},
        "required": ["domain", "functionality"],
    }
    description = f"Search the models of {framework}. Returns the entry that fits best."
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# --- the sets ---------------------------------------------------------------------------------------------------------

HANDBOOK = "debian-handbook/html"
HELD_OUT = DataSet(
    "heldout-v1",
    {
        "prose": [Part(110, {"prose_wikitext2_test.txt.xz": wikitext})],
        "french": [Part(110, {"prose_fra_eltec.jsonl.xz": novels})],
        "chinese": [Part(110, {"zh_poetry.jsonl.xz": poems})],
        "code": [Part(110, {"code_humaneval.jsonl.xz": human_eval, "code_mbpp.jsonl.xz": mbpp})],
        "maths": [Part(110, {"math_gsm8k_test.jsonl.xz": grade_school})],
        "tools": [Part(110, {"tools_bfcl_live_multiple.jsonl.xz": function_calls})],
        "chat": [Part(110, {"dialogues.txt": dialogues})],
    },
)
MIXED = DataSet(
    "mixed-v1",
    {
        "agents": [Part(400, {"tools_apibench.jsonl.xz": searches})],
        "chat": [
            Part(110, {"dialogues-mixed.txt": dialogues}),
            Part(220, {f"{HANDBOOK}/en-US": sidebars}),
            Part(25, {f"{HANDBOOK}/ca-ES": sidebars}),
            Part(25, {f"{HANDBOOK}/nb-NO": sidebars}),
            Part(140, {"docs_sqlite3-doc.jsonl.xz": interface_chats}),
            Part(100, {"tools_apibench.jsonl.xz": recommendations}),
        ],
        "chinese": [Part(200, {"zh_poetry.jsonl.xz": collected_poems}), Part(220, {f"{HANDBOOK}/zh-CN": handbook})],
        "code": [Part(460, {"code_python.jsonl.xz": python_code})],
        "european": [Part(180, {"prose_fra_eltec.jsonl.xz": books}), Part(180, {"prose_deu_eltec.jsonl.xz": books})],
        "languages": [
            Part(64, {f"{HANDBOOK}/{language}": handbook})
            for language in ("ar-MA", "es-ES", "id-ID", "it-IT", "ja-JP", "pt-BR", "ru-RU")
        ],
        "long": [
            Part(240, {"docs_peps.jsonl.xz": long_proposals}),
            Part(75, {"docs_rust-doc.jsonl.xz": long_pages}),
            Part(65, {"docs_sqlite3-doc.jsonl.xz": long_pages}),
            Part(40, {f"{HANDBOOK}/de-DE": long_handbook}),
            Part(40, {f"{HANDBOOK}/fr-FR": long_handbook}),
        ],
        "manuals": [Part(230, {"docs_rust-doc.jsonl.xz": manual}), Part(230, {"docs_sqlite3-doc.jsonl.xz": manual})],
        "maths": [Part(360, {"math_gsm8k_train.jsonl.xz": reasoned})],
        "prose": [Part(440, {"prose_en_novels.jsonl.xz": books})],
        "tools": [Part(215, {"tools_bfcl.jsonl.xz": tool_requests})],
    },
    compressed=True,
    disjoint_from="heldout-v1",
)
SETS = {data_set.name: data_set for data_set in (HELD_OUT, MIXED)}


# --- building ---------------------------------------------------------------------------------------------------------


def strings(value: Any) -> Iterator[str]:
    """Every text in a record, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def shingles(record: Record) -> set[str]:
    """All runs of 13 words; case, spacing and punctuation do not count, and each Chinese character is a word.

    Runs go on from one text of a record into the next. A record of fewer words is one run.
    """
    content = {key: value for key, value in record.items() if key not in ("domain", "source", "plain")}
    words = re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", "\n".join(strings(content)).lower()
    )
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def read_set(name: str) -> Iterator[Record]:
    for file in sorted((CALIB / name).iterdir()):
        yield from json_lines(file)


def draw(records: Iterable[Record], seed: str, domain: str, limit_bytes: int, avoid: set[str]) -> list[str]:
    """Lines of a domain's file: in the order of their hash, as many as fit, none that has a shingle of `avoid`."""
    lines = {json.dumps(record | {"domain": domain}, ensure_ascii=False) for record in records}
    drawn, size_bytes = [], 0
    for line in sorted(lines, key=lambda line: order(seed, line)):
        line_bytes = len(line.encode()) + 1
        if size_bytes + line_bytes <= limit_bytes and not (avoid and shingles(json.loads(line)) & avoid):
            drawn.append(line)
            size_bytes += line_bytes
    return drawn


def order(seed: str, line: str) -> bytes:
    return hashlib.sha256(f"{seed}\n{line}".encode()).digest()


def find(sources: list[Path], name: str) -> Path:
    """A source in the folders that were given, or beside the sets."""
    for folder in [*sources, CALIB]:
        if (folder / name).exists():
            return folder / name
    raise SystemExit(f"{name}: is in none of the folders of sources; calib/README.md says where it comes from")


def domain_lines(data_set: DataSet, domain: str, sources: list[Path], avoid: set[str]) -> list[str]:
    lines: list[str] = []
    for part in data_set.domains[domain]:
        records = [record for name, read in part.sources.items() for record in read(find(sources, name))]
        lines += draw(records, data_set.name, domain, part.kilobytes * 1000, avoid)
    return sorted(lines, key=lambda line: order(data_set.name, line))


def build(data_set: DataSet, sources: list[Path], out: Path, only: list[str]) -> Iterator[str]:
    """Write the set, or some domains of it; yields a line about each file."""
    out.mkdir(parents=True, exist_ok=True)
    avoid: set[str] = set()
    if data_set.disjoint_from is not None:
        avoid.update(*map(shingles, read_set(data_set.disjoint_from)))
    for domain in only or data_set.domains:
        lines = domain_lines(data_set, domain, sources, avoid)
        data = "".join(f"{line}\n" for line in lines).encode()
        stored = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if data_set.compressed else data
        (out / f"{domain}.jsonl{'.xz' if data_set.compressed else ''}").write_bytes(stored)
        yield f"{domain:10} {len(lines):5} records {len(data):7} bytes {len(stored):7} stored"


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild a shipped set from its source texts.")
    parser.add_argument("sources", type=Path, nargs="+", help="folders with the sources named in calib/README.md")
    parser.add_argument("--set", choices=SETS, default=HELD_OUT.name, help="which set (default: heldout-v1)")
    parser.add_argument("--out", type=Path, help="folder to write (default: calib/ and the set's name)")
    parser.add_argument("--only", nargs="+", default=[], metavar="DOMAIN", help="some domains of the set")
    arguments = parser.parse_args()
    data_set = SETS[arguments.set]
    for line in build(data_set, arguments.sources, arguments.out or CALIB / data_set.name, arguments.only):
        print(line)


if __name__ == "__main__":
    main()
