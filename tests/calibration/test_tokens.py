"""Token sets: every kind of input, the same ids every time, every prefix balanced, and errors that name the place."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import mimoquant.calibration.tokenizer as tokenizer_module
from mimoquant import micro_checkpoint
from mimoquant.calibration.conversations import FORMS
from mimoquant.calibration.tokenizer import load_tokenizer
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.shipped import calib_folder, shipped_sets

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
REPOSITORY = Path(__file__).resolve().parents[2]
VOCAB = 1024
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. "
CHAT = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "Not any more."}]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection or look-up is a failure, in every test of this file."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError(f"reached for the network: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture(scope="session")
def encode() -> Any:
    return load_tokenizer(micro_checkpoint()).encode


def load(
    *data: str | Path, sequences: int | None = None, tokens: int = 16, vocab: int = VOCAB, folder: Path | None = None
) -> TokenSet:
    return load_tokens(
        [str(entry) for entry in data], folder or micro_checkpoint(), sequences=sequences, tokens=tokens, vocab=vocab
    )


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def micro_with(tmp_path: Path, **changes: Any) -> Path:
    """The micro checkpoint's tokenizer with another tokenizer_config.json; None deletes a key."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(micro_checkpoint() / "tokenizer.json", folder)
    config = json.loads((micro_checkpoint() / "tokenizer_config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: Path) -> NoReturn:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(tokenizer_module, "_auto_tokenizer", missing)


# --- kinds of input ---------------------------------------------------------------------------------------------------


def test_text_is_cut_into_sequences_without_padding(tmp_path: Path, encode: Any) -> None:
    (tmp_path / "story.txt").write_text(TEXT * 20, encoding="utf-8")
    ids = encode(TEXT * 20)
    found = load(tmp_path / "story.txt")
    assert found.ids.dtype == np.int64
    assert found.ids.shape == (len(ids) // 16, 16)
    assert found.ids.ravel().tolist() == ids[: len(ids) // 16 * 16]
    assert set(found.domains) == {"story"}
    assert found.name == "story.txt"


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    for name, text in (("a.txt", TEXT * 20), ("b.jsonl", json.dumps({"text": TEXT * 20}) + "\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(text.encode()))
        plain, compressed = load(tmp_path / name), load(tmp_path / f"{name}.xz")
        assert plain.sha256 == compressed.sha256
        assert plain.domains == compressed.domains
        assert plain.name != compressed.name


def test_records_are_separated_by_the_end_of_text(tmp_path: Path, encode: Any) -> None:
    eos = load_tokenizer(micro_checkpoint()).eos
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": TEXT},
        {"text": ""},
        {"text": "One."},
        {"input_ids": [3, 4, eos]},
        {"input_ids": [5] * 20},
    )
    expected = [*encode(TEXT), eos, *encode("One."), eos, 3, 4, eos, *[5] * 20]
    found = load(path, tokens=8).ids.ravel().tolist()
    assert found == expected[: len(expected) // 8 * 8]


def test_messages_go_through_the_chat_template(tmp_path: Path, encode: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "plain": True})
    text = "<|im_start|>user\nIs it raining?<|im_end|>\n<|im_start|>assistant\nNot any more.<|im_end|>\n"
    ids = encode(text)
    assert load(path, tokens=len(ids)).ids[0].tolist() == ids


def test_plain_messages_are_paragraphs_where_there_is_no_template(tmp_path: Path, encode: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "plain": True})
    ids = encode("User: Is it raining?\n\nAssistant: Not any more.")
    folder = micro_with(tmp_path, chat_template=None)
    assert load(path, tokens=len(ids), folder=folder).ids[0].tolist() == ids


def test_tools_reach_the_template_and_empty_fields_do_not(tmp_path: Path, encode: Any) -> None:
    template = "{{ tools[0].name }}{% for m in messages %}{{ m.content is defined }}{{ m.thinking }}{% endfor %}"
    folder = micro_with(tmp_path, chat_template=template)
    turn = {"role": "assistant", "content": None, "thinking": "why"}
    path = jsonl(tmp_path / "a.jsonl", {"messages": [turn], "tools": [{"name": "look"}]})
    ids = encode("lookFalsewhy")
    assert load(path, tokens=len(ids), folder=folder).ids[0].tolist() == ids


def test_arrays_are_used_as_they_are(tmp_path: Path) -> None:
    values = np.arange(96, dtype=np.int32).reshape(6, 16)
    np.save(tmp_path / "a.npy", values)
    found = load(tmp_path / "a.npy", sequences=4, folder=tmp_path)  # no tokenizer there, and none needed
    assert (found.ids == values[:4]).all()
    assert found.domains == ("a",) * 4


def test_a_data_set_on_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    records = [{"text": TEXT, "messages": None, "domain": "x"}, {"text": None, "messages": CHAT, "domain": "y"}]
    datasets.Dataset.from_list(records * 4).save_to_disk(tmp_path / "saved")
    jsonl(tmp_path / "same.jsonl", *records * 4)
    found, same = load(tmp_path / "saved"), load(tmp_path / "same.jsonl")
    assert (found.sha256, found.domains) == (same.sha256, same.domains)
    datasets.DatasetDict({"train": datasets.load_from_disk(tmp_path / "saved")}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UsageError, match=r"splits: holds 1 splits \(train\)") as caught:
        load(tmp_path / "splits")
    assert load(str(caught.value.hint).removeprefix("give one: ")).sha256 == found.sha256
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="saved: is not a data set"):
        load(tmp_path / "saved")


def test_a_folder_of_files_and_a_mixture(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "b.txt").write_text(TEXT * 3)
    jsonl(folder / "a.jsonl", {"text": TEXT * 3}, {"text": TEXT * 3, "domain": "other"})
    (folder / "README.md").write_text("not data")
    np.save(tmp_path / "c.npy", np.ones((2, 16), np.int64))
    found = load(folder, tmp_path / "c.npy")
    assert found.name == "mine+c.npy"
    assert found.domains[:4] == ("a", "other", "b", "c")
    names = [origin.split()[0] for origin in found.origins]
    assert names == ["mine/a.jsonl", "mine/b.txt", "c.npy", "tokenizer:"]
    digest = hashlib.sha256((folder / "b.txt").read_bytes()).hexdigest()
    assert found.origins[1] == f"mine/b.txt sha256:{digest}"


# --- order, hashes ----------------------------------------------------------------------------------------------------


def test_domains_are_dealt_out_in_turn(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", *({"input_ids": [i] * 4 * n, "domain": "abc"[i]} for i, n in enumerate((3, 1, 2)))
    )
    found = load(path, tokens=4)
    assert "".join(found.domains) == "abcaca"
    assert [row[0] for row in found.ids.tolist()] == [0, 1, 2, 0, 2, 0]


def test_a_domain_that_is_too_short_is_told(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"input_ids": [1] * 4, "domain": "long"}, {"input_ids": [1] * 3, "domain": "short"}
    )
    assert load(path, tokens=4).left_out == ("short",)


def test_every_prefix_is_the_same_and_balanced() -> None:
    whole = load("heldout-v1", tokens=64)
    again = load("heldout-v1", tokens=64)
    assert (again.sha256, again.sequence_hashes, again.origins) == (whole.sha256, whole.sequence_hashes, whole.origins)
    for sequences in (1, 7, 20, 48):
        part = load("heldout-v1", tokens=64, sequences=sequences)
        assert part.sequence_hashes == whole.sequence_hashes[:sequences]
        assert part.domains == whole.domains[:sequences]
        counts = Counter(part.domains)
        assert len(counts) == min(sequences, 7)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_hashes_are_of_the_ids_as_little_endian_int64(tmp_path: Path) -> None:
    values = np.arange(8, dtype="<i8").reshape(2, 4)
    np.save(tmp_path / "a.npy", values.astype(np.uint16))
    found = load(tmp_path / "a.npy", tokens=4)
    assert found.sha256 == hashlib.sha256(values.tobytes()).hexdigest()
    assert found.sequence_hashes == tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in values)


def test_overlap_is_found_by_hash(tmp_path: Path) -> None:
    values = np.arange(32).reshape(4, 8)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values[[3, 3]] + [[0], [1]])
    ours, theirs = load(tmp_path / "a.npy", tokens=8), load(tmp_path / "b.npy", tokens=8)
    assert set(ours.sequence_hashes) & set(theirs.sequence_hashes) == {ours.sequence_hashes[3]}


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_both_readers_of_a_tokenizer_agree(without_transformers: None) -> None:
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    plain = load("heldout-v1", sequences=21, tokens=64)
    assert "read by tokenizers" in plain.origins[-1]
    tokenizer = load_tokenizer(micro_checkpoint())
    assert tokenizer.render is not None
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(str(micro_checkpoint()), local_files_only=True)
    assert tokenizer.eos == auto.eos_token_id
    assert tokenizer.render(CHAT, None) == auto.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.encode(TEXT) == auto(TEXT, add_special_tokens=False)["input_ids"]


def test_transformers_reads_what_tokenizers_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a vocabulary without tokenizer.json; both give the same ids and text."""
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    first = load_tokenizer(micro_checkpoint())

    def fail(folder: Path) -> None:
        raise OSError("no tokenizer.json")

    monkeypatch.setattr("mimoquant.calibration.tokenizer._plain_tokenizer", fail)
    second = load_tokenizer(micro_checkpoint())
    assert "read by tokenizers" in first.origin and "of transformers" in second.origin
    assert first.encode(TEXT) == second.encode(TEXT)
    assert first.decode(first.encode(TEXT)) == second.decode(second.encode(TEXT)) == TEXT


def test_a_tokenizer_that_asks_for_code_is_read_without_it(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    changes = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    folder = micro_with(tmp_path, **changes)
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    expected = load_tokenizer(micro_checkpoint()).encode(TEXT)
    assert load_tokenizer(folder).encode(TEXT) == expected
    assert not proof.exists()


def test_chat_template_beside_the_tokenizer(tmp_path: Path, without_transformers: None) -> None:
    folder = micro_with(
        tmp_path, chat_template=[{"name": "default", "template": "{{ messages | tojson }}{{ eos_token }}"}]
    )
    render = load_tokenizer(folder).render
    assert render is not None
    assert render([{"role": "user", "content": "日本"}], None) == '[{"role": "user", "content": "日本"}]<|endoftext|>'
    (folder / "chat_template.jinja").write_text("from the file")
    render = load_tokenizer(folder).render
    assert render is not None
    assert render(CHAT, None) == "from the file"


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path, without_transformers: None) -> None:
    folder = micro_with(tmp_path, eos_token=None)
    path = jsonl(tmp_path / "a.jsonl", {"input_ids": [1, 2]}, {"input_ids": [3, 4]})
    assert load(path, tokens=4, folder=folder).ids.tolist() == [[1, 2, 3, 4]]


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, without_transformers: None) -> None:
    folder = micro_with(tmp_path, chat_template="{{ messages.__class__.__mro__ }}")
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CheckpointError, match=r"line 1: the chat template refuses it .*SecurityError"):
        load(path, folder=folder)


# --- errors -----------------------------------------------------------------------------------------------------------

USAGE = [
    ({"tokens": 1}, ["heldout-v1"], "sequences of 1 tokens were asked for; at least 2"),
    ({"sequences": 0}, ["heldout-v1"], "0 sequences were asked for; at least 1"),
    ({}, [], "no data was given"),
    ({}, ["heldout-v9"], "no data set is named 'heldout-v9'"),
    ({}, ["dialogues"], "no data set is named 'dialogues'"),
    ({}, ["missing/a.jsonl"], "missing/a.jsonl: there is no such file"),
    ({}, ["missing.txt"], "missing.txt: there is no such file"),
]


@pytest.mark.parametrize(("options", "data", "message"), USAGE, ids=[message for *_, message in USAGE])
def test_usage_errors(options: dict[str, Any], data: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load(*data, **options)
    assert caught.value.exit_code == 2


def test_an_unknown_set_names_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        load("heldout")
    assert "heldout-v1" in str(caught.value.hint)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("text\n")
    with pytest.raises(UsageError, match=r"a\.pdf: is not a kind of file"):
        load(tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="has neither a data set nor any file to read"):
        load(tmp_path)


def test_too_few_tokens_gives_both_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"input_ids": [1] * 9, "domain": "x"}, {"input_ids": [1] * 11, "domain": "y"})
    with pytest.raises(UsageError, match=r"data a\.jsonl: 11 tokens, fewer than the 16 of one sequence") as caught:
        load(path)
    assert caught.value.hint == "that is y, the largest of its 2 domains"
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="0 tokens, fewer than the 16"):
        load(tmp_path / "empty.jsonl")


BROKEN_LINES = [
    ('{"text": ', "line 3 is not JSON (Expecting value in column"),
    ("[1, 2]", "line 3 is a list, not a record with input_ids, messages, conversations, text"),
    (
        '{"content": "x", "id": 4}',
        "line 3 has none of input_ids, messages, conversations, text, prompt and completion, ",
    ),
    ("{}", f"line 3 has none of {FORMS}; it has nothing"),
    ('{"text": null}', "line 3 has null as its text"),
    ('{"text": 4}', "line 3 has a text that is a whole number"),
    ('{"text": "x", "domain": 4}', "line 3 has a domain that is a whole number"),
    ('{"text": "\\ud800"}', "line 3 holds half of a surrogate pair"),
    ('{"input_ids": [1, 2.0]}', "line 3 has input_ids that are not a list of integers"),
    ('{"input_ids": [true]}', "line 3 has input_ids that are not a list of integers"),
    ('{"input_ids": "12"}', "line 3 has input_ids that are not a list of integers"),
    ('{"input_ids": [1, 1024, 3]}', "line 3: has the id 1024, outside the vocabulary of 1024"),
    ('{"input_ids": [-1]}', "line 3: has the id -1, outside the vocabulary of 1024"),
    ('{"input_ids": [99999999999999999999]}', "line 3: has the id 99999999999999999999, outside"),
    (f'{{"input_ids": [{"9" * 5000}]}}', "line 3 cannot be read (ValueError"),
    ("[" * 200_000, "line 3 cannot be read (RecursionError"),
    ('{"messages": []}', "line 3 has no turns in its messages"),
    ('{"messages": ["x"]}', "line 3 has messages that are not a list of turns with a role"),
    ('{"messages": [{"content": "x"}]}', "line 3 has messages that are not a list of turns with a role"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES, ids=[message for _, message in BROKEN_LINES])
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {message}")) as caught:
        load(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": TEXT})
    with pytest.raises(CheckpointError, match=r"line 1: has the id \d+, outside the vocabulary of 40"):
        load(path, vocab=40)


def test_an_end_of_text_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = micro_with(tmp_path, eos_token="dog")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 1024, "content": "dog"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="the end-of-text token: has the id 1024, outside the vocabulary of 1024"):
        load(jsonl(tmp_path / "a.jsonl", {"input_ids": [1] * 16}), folder=folder)


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    folder = micro_with(tmp_path, chat_template=None)
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CheckpointError, match="line 1 has messages, and the tokenizer has no chat template") as caught:
        load(path, folder=folder)
    assert "chat_template.jinja" in str(caught.value.hint)


@pytest.mark.parametrize("reader", ["transformers", "tokenizers"])
def test_a_chat_template_that_refuses(tmp_path: Path, reader: str, request: pytest.FixtureRequest) -> None:
    if reader == "tokenizers":
        request.getfixturevalue("without_transformers")
    folder = micro_with(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CheckpointError, match=r"line 1: the chat template refuses it .*roles must alternate"):
        load(path, folder=folder)


def test_no_tokenizer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": TEXT})
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load(path, folder=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read .*tokenizers: "):
        load(path, folder=tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(b"text " * 1000)[:-20])
    (tmp_path / "c.jsonl.xz").write_bytes(b"not xz")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    for name in ("a.txt", "b.txt.xz", "c.jsonl.xz", "d.jsonl"):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: cannot be read"):
            load(tmp_path / name)


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((2, 8), np.int64))
    with pytest.raises(UsageError, match="its sequences have 8 tokens; 16 were asked for"):
        load(path)
    np.save(path, np.full((2, 16), 1024))
    with pytest.raises(CheckpointError, match="has the id 1024, outside the vocabulary of 1024"):
        load(path)
    for wrong, found in ((np.ones(16, np.int64), r"int64\[16\]"), (np.ones((2, 16)), r"float64\[2, 16\]")):
        np.save(path, wrong)
        with pytest.raises(CheckpointError, match=rf"holds {found}; expected integers"):
            load(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"is not a plain \.npy array"):
        load(path)
    with path.open("wb") as stream:
        np.savez(stream, ids=np.ones((2, 16), np.int64))
    with pytest.raises(CheckpointError, match="holds an archive"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is not a plain \.npy array"):
        load(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UsageError, match="needs the package datasets"):
        load(tmp_path)


# --- the shipped set --------------------------------------------------------------------------------------------------


def test_the_shipped_set_is_small_and_has_its_domains() -> None:
    assert shipped_sets() == ["heldout-v1", "mixed-v1", "omni-heldout-v1", "omni-v1"]
    files = sorted((calib_folder() / "heldout-v1").iterdir())
    assert [file.name for file in files] == [
        f"{domain}.jsonl" for domain in ("chat", "chinese", "code", "french", "maths", "prose", "tools")
    ]
    assert sum(file.stat().st_size for file in files) < 1_000_000
    readme = (calib_folder() / "README.md").read_text(encoding="utf-8")
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == len(lines)
        assert {json.loads(line)["domain"] for line in lines} == {file.stem}
        assert f"| `{file.name}` | {len(lines)} | {file.stat().st_size} |" in readme


def test_the_shipped_set_fills_what_the_issue_asks() -> None:
    found = load("heldout-v1", sequences=48, tokens=512)
    assert found.ids.shape == (48, 512)
    assert len(set(found.domains)) == 7
    assert found.left_out == ()
    assert len(set(found.sequence_hashes)) == 48


def test_the_shipped_set_reads_without_a_chat_template(tmp_path: Path) -> None:
    assert load("heldout-v1", sequences=14, folder=micro_with(tmp_path, chat_template=None)).left_out == ()


def test_the_script_rebuilds_the_shipped_set(shared: Path, tmp_path: Path) -> None:
    sources = shared / "text" / "heldout"
    if not sources.is_dir():
        pytest.skip("the source texts are not beside this clone")
    script = REPOSITORY / "scripts/make/calib.py"
    subprocess.run([sys.executable, script, sources, "--out", tmp_path / "again"], check=True, capture_output=True)
    ours = {file.name: file.read_bytes() for file in (calib_folder() / "heldout-v1").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()} == ours


@pytest.mark.slow
def test_no_held_out_text_is_in_the_calibration_texts(shared: Path) -> None:
    """The middle of every record, looked for in everything that is set apart for calibration."""
    folder = shared / "text" / "calibration"
    if not folder.is_dir():
        pytest.skip("the calibration texts are not beside this clone")
    known = "\n".join(lzma.decompress(file.read_bytes()).decode("utf-8") for file in sorted(folder.iterdir()))
    shared_records = []
    for file in (calib_folder() / "heldout-v1").iterdir():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            text = record["text"] if "text" in record else record["messages"][-1]["content"]
            middle = json.dumps(text[len(text) // 3 :][:100], ensure_ascii=False)[1:-1]
            if len(text) > 60 and middle in known:
                shared_records.append((file.name, middle))
    assert shared_records == []


# --- what it loads ----------------------------------------------------------------------------------------------------


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, mimoquant.calibration.tokens; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "tokenizers", "datasets", "jinja2"} & set(loaded) == set()


def test_the_network_guard_of_this_file_works() -> None:
    with pytest.raises(AssertionError, match="reached for the network"):
        socket.create_connection(("192.0.2.1", 80))
