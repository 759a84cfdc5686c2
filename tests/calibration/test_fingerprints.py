"""Fingerprints: what shares a passage shares some of them, in whatever form it comes; what does not shares none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from micro import MICRO, plain_gptq
from typer.testing import CliRunner

from mimoquant import pipeline, relayout
from mimoquant.calibration import fingerprints
from mimoquant.calibration.fingerprints import GRAM, LEAST, WINDOW, Fingerprints, of_ids, of_texts
from mimoquant.calibration.tokenizer import load_tokenizer
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet, load_tokens
from mimoquant.checkpoint.hf_files import FINGERPRINTS_NAME
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.planning.plan import make_plan

SYLLABLES = ["ka", "mi", "to", "re", "shu", "vel", "dor", "in", "pax", "ul"]


def words(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(SYLLABLES, k=3)) for _ in range(count)]


def prose(seed: int, count: int = 300) -> str:
    return " ".join(words(seed, count))


def load(*data: Path | str, sequences: int | None = None, tokens: int = 64, folder: Path = MICRO) -> TokenSet:
    return load_tokens([str(entry) for entry in data], folder, sequences=sequences, tokens=tokens, vocab=1024)


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# --- against a plain reference ----------------------------------------------------------------------------------------


def winnowed(units: list[Any]) -> set[Any]:
    """What the paper says, with runs of units in the place of their hashes' order: which run is least is the hash's
    choice, so each is looked up by the hash that the fast path gives it alone."""
    grams = [hash_of(units[i : i + GRAM]) for i in range(len(units) - GRAM + 1)]
    if not grams:
        return {hash_of(units)} if len(units) >= LEAST else set()
    windows = [grams[i : i + WINDOW] for i in range(max(len(grams) - WINDOW + 1, 1))]
    return {min(window) for window in windows}


def hash_of(units: list[Any]) -> int:
    """Of a record that is one run, so that nothing is chosen."""
    (only,) = of_texts([" ".join(units)]) if isinstance(units[0], str) else of_ids([np.array(units, np.int64)])
    return int(only)


@pytest.mark.parametrize("count", [0, 7, 8, 31, 32, 33, 63, 64, 65, 200])
def test_winnowing_is_that_of_the_paper(count: int) -> None:
    text = words(count, count)
    assert set(of_texts([" ".join(text)]).tolist()) == winnowed(text)
    ids = np.random.default_rng(count).integers(0, 1000, count)
    assert set(of_ids([ids]).tolist()) == winnowed(ids.tolist())


@pytest.mark.parametrize("batch", [2000, 2**16])
def test_records_do_not_see_each_other(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(seed, seed * 7 % 130) for seed in range(40)]
    alone = {value for text in texts for value in of_texts([text]).tolist()}
    monkeypatch.setattr(fingerprints, "_BATCH", batch)
    assert set(of_texts(texts).tolist()) == alone == set(of_texts(texts[::-1]).tolist())


def test_a_passage_is_found_wherever_it_stands() -> None:
    for seed in range(50):
        passage = words(seed, GRAM + WINDOW - 1)
        one = words(1000 + seed, seed) + passage + words(2000 + seed, 90)
        other = words(3000 + seed, 70 - seed) + passage + words(4000 + seed, 5)
        assert np.isin(of_texts([" ".join(one)]), of_texts([" ".join(other)])).any()
    assert not np.isin(of_texts([prose(1)]), of_texts([prose(2)])).any()


@pytest.mark.parametrize(
    "same",
    [
        lambda text: text.replace(" ", "\n\t "),
        lambda text: text.replace(" ", ", "),
        lambda text: f"  {text}.",
        lambda text: text.replace(" ", "-"),
        lambda text: text.replace(" ", " — "),
        lambda text: text.replace(" ", "\r\n> "),
    ],
)
def test_spacing_and_punctuation_do_not_count(same: Any) -> None:
    assert (of_texts([same(prose(3))]) == of_texts([prose(3)])).all()


@pytest.mark.parametrize("first", [0x4E00, 0x3041, 0x0E01, 0x1780, 0x20000])
def test_scripts_without_spaces_have_words_of_one_character(first: int) -> None:
    """Otherwise a paragraph were one word, and a change in it another paragraph."""
    rng = random.Random(first)
    text = "".join(chr(first + rng.randrange(40)) for _ in range(200))
    ours, theirs = of_texts([text]), of_texts([f"{text[3:]}{text[:3]}"])
    assert len(ours) >= 1 and (first >= 0x10000 or np.isin(ours, theirs).mean() > 0.7)


def test_accents_and_letters_of_all_scripts_make_words() -> None:
    for text in ("déjà vu ", "Ελληνικά γράμματα ", "русские слова ", "عربي نص ", "한국어 글 "):
        assert len(of_texts([text * 4])) == 1 and len(of_texts([text])) == 0


def test_bytes_and_back() -> None:
    held = Fingerprints.of([prose(1)], [np.arange(99)])
    again = Fingerprints.from_bytes(held.as_bytes())
    assert (again.words == held.words).all() and (again.ids == held.ids).all() and len(held.ids) and len(held.words)
    for damage in (b"", held.as_bytes()[:-8], held.as_bytes() + bytes(8), b"\xff" * 32, held.as_bytes()[:-3]):
        with pytest.raises(ValueError):
            Fingerprints.from_bytes(damage)


# --- sets of sequences ------------------------------------------------------------------------------------------------


@pytest.mark.slow  # `test_nothing_held_out_is_in_the_calibration_set` finds passages in a fifth of the time
def test_the_shipped_sets_share_nothing() -> None:
    calibration, held_out = load("mixed-v1", sequences=None, tokens=2048), load("heldout-v1", tokens=512)
    assert held_out.fingerprints.share_in(calibration.fingerprints) == 0
    assert len(held_out.fingerprints.words) > 1000 and len(calibration.fingerprints.as_bytes()) < 2**19


FORMS = {
    "renamed": lambda texts: [{"text": text} for text in texts],
    "shuffled": lambda texts: [{"text": text} for text in texts[::-1]],
    "chat": lambda texts: [{"messages": turns(text)} for text in texts],
    "one record": lambda texts: [{"text": "\n\n".join(texts)}],
    "with a preface": lambda texts: [{"text": f"{prose(99, 40)} {text}"} for text in texts],
    "ids": lambda texts: [{"input_ids": load_tokenizer(MICRO).encode(text)} for text in texts],
    "another domain": lambda texts: [{"text": text, "domain": "x"} for text in texts],
    "spaced": lambda texts: [{"text": text.replace(" ", "  \n")} for text in texts],
    "excerpts": lambda texts: [{"text": text[len(text) // 3 :]} for text in texts],
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("tokens", [16, 200])
def test_content_decides(form: str, tokens: int, tmp_path: Path) -> None:
    texts = [prose(seed) for seed in range(8)]
    ours = load(jsonl(tmp_path / "a.jsonl", *FORMS["renamed"](texts)))
    theirs = load(jsonl(tmp_path / "b.jsonl", *FORMS[form](texts)), tokens=tokens)
    assert theirs.fingerprints.share_in(ours.fingerprints) > 0.6
    new = load(jsonl(tmp_path / "c.jsonl", *FORMS[form]([prose(100 + seed) for seed in range(8)])), tokens=tokens)
    assert new.fingerprints.share_in(ours.fingerprints) < (0.2 if form == "with a preface" else 1e-9)


def test_arrays_are_compared_as_text_and_without_a_tokenizer_as_ids(tmp_path: Path) -> None:
    text = prose(1, 2000)
    ids = np.array(load_tokenizer(MICRO).encode(text))
    np.save(tmp_path / "a.npy", ids[: len(ids) // 64 * 64].reshape(-1, 64))
    np.save(tmp_path / "b.npy", ids[100 : 100 + 30 * 48].reshape(-1, 48))
    (tmp_path / "t.txt").write_text(text)
    array, other = load(tmp_path / "a.npy"), load(tmp_path / "b.npy", tokens=48)
    written = load(tmp_path / "t.txt")
    assert written.fingerprints.share_in(array.fingerprints) > 0.9 < array.fingerprints.share_in(written.fingerprints)
    assert array.origins == load(tmp_path / "a.npy", folder=tmp_path).origins  # its sequences need no tokenizer
    bare = [load(tmp_path / f"{name}.npy", tokens=n, folder=tmp_path) for name, n in (("a", 64), ("b", 48))]
    assert bare[1].fingerprints.share_in(bare[0].fingerprints) > 0.9 and not len(bare[0].fingerprints.words)
    assert other.fingerprints.share_in(bare[0].fingerprints) > 0.9


def test_records_that_no_sequence_holds_do_not_count(tmp_path: Path) -> None:
    texts = [{"text": prose(seed)} for seed in range(8)]
    ours = load(jsonl(tmp_path / "a.jsonl", *texts[:4]))
    both = jsonl(tmp_path / "b.jsonl", *({"text": prose(50 + seed)} for seed in range(4)), *texts)
    assert load(both).fingerprints.share_in(ours.fingerprints) > 0.2
    assert load(both, sequences=4).fingerprints.share_in(ours.fingerprints) == 0
    jsonl(tmp_path / "c.jsonl", *texts[:4])
    assert load(both, tmp_path / "c.jsonl", sequences=1).fingerprints.share_in(ours.fingerprints) == 0


def test_a_system_prompt_is_not_what_is_held_out(tmp_path: Path) -> None:
    system = {"role": "system", "content": prose(7)}
    one, other = ([{"messages": [system, *turns(prose(seed))]}] for seed in (1, 2))
    ours, theirs = load(jsonl(tmp_path / "a.jsonl", *one)), load(jsonl(tmp_path / "b.jsonl", *other))
    assert theirs.fingerprints.share_in(ours.fingerprints) == 0
    alone = load(jsonl(tmp_path / "c.jsonl", {"messages": [system]}))
    assert alone.fingerprints.share_in(load(jsonl(tmp_path / "d.jsonl", {"text": prose(7)})).fingerprints) == 1


# --- a checkpoint and what it is judged on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was calibrated on `mine.jsonl` beside it."""
    folder = tmp_path_factory.mktemp("calibrated")
    jsonl(folder / "mine.jsonl", *({"text": prose(seed)} for seed in range(8)))
    settings = {"data": [str(folder / "mine.jsonl")], "sequences": 8, "tokens": 32, "max_starved_experts": None}
    pipeline.quantize(make_plan(MICRO, plain_gptq("int4-g128").calibrated_on(settings)), folder / "out", device="cpu")
    return folder


@pytest.mark.parametrize(("new", "refused"), [(10, True), (200, False)])
def test_a_hundredth_is_refused_and_less_is_told(new: int, refused: bool, calibrated: Path, tmp_path: Path) -> None:
    data = jsonl(
        tmp_path / "b.jsonl", {"text": prose(0, 150)}, *({"text": prose(500 + seed, 600)} for seed in range(new))
    )
    few = ["--data", str(data), "--tokens", "16", "--no-noise-floor", "--device", "cpu"]
    tokens = load(data, tokens=16)
    if refused:
        with pytest.raises(
            UsageError, match=r"shares 1\.\d+ % of its text with what .* was calibrated on .*; less than 1\.00 % may be"
        ):
            refuse_shared_data(calibrated / "out", tokens)
        done = CliRunner().invoke(app, ["eval-kl", str(MICRO), str(calibrated / "out"), *few])
        assert done.exit_code == 2 and "of its text" in done.stderr
    else:
        share = refuse_shared_data(calibrated / "out", tokens)
        assert share is not None and 0 < share < 0.01


@pytest.mark.slow
def test_what_is_told(calibrated: Path, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "b.jsonl", {"text": prose(0, 64)}, *({"text": prose(500 + s, 64)} for s in range(150)))
    few = ["--data", str(data), "--tokens", "3000", "--no-noise-floor", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, ["eval-kl", str(MICRO), str(calibrated / "out"), *few])
    facts = json.loads(done.stdout)
    assert facts["data"]["shared_with_calibration"] == pytest.approx(1 / 151, rel=0.3)


def test_earlier_outputs_keep_their_check(calibrated: Path, tmp_path: Path) -> None:
    """Without fingerprints: sequences and files."""
    recipe = (calibrated / "out" / "recipe.yaml").read_text()
    held = yaml.safe_load(recipe)["mimoquant"]["provenance"]["calibration"]
    (tmp_path / "recipe.yaml").write_text(recipe.replace(f"fingerprints_sha256: {held['fingerprints_sha256']}", "a: 1"))
    same = load(calibrated / "mine.jsonl", sequences=8, tokens=32)
    with pytest.raises(UsageError, match="8 of 8 sequences"):
        refuse_shared_data(tmp_path, same)
    with pytest.raises(UsageError, match=r"the file mine\.jsonl"):
        refuse_shared_data(tmp_path, load(calibrated / "mine.jsonl", tokens=64))
    assert refuse_shared_data(tmp_path, load("heldout-v1", sequences=4)) == 0


def test_fingerprints_are_held_against_the_recipe(calibrated: Path, tmp_path: Path) -> None:
    path = calibrated / "out" / FINGERPRINTS_NAME
    kept = path.read_bytes()
    report = CliRunner().invoke(app, ["verify", str(calibrated / "out"), "--source", str(MICRO)])
    assert report.exit_code == 0, report.output
    try:
        path.write_bytes(kept[:-8])
        with pytest.raises(CheckpointError, match="is not what the recipe beside it names"):
            CalibrationRecord.read(calibrated / "out")
        report = CliRunner().invoke(app, ["verify", str(calibrated / "out"), "--source", str(MICRO)])
        assert report.exit_code == 3 and f"{FINGERPRINTS_NAME}: sha256 is" in report.output
        path.unlink()
        report = CliRunner().invoke(app, ["verify", str(calibrated / "out"), "--source", str(MICRO)])
        assert report.exit_code == 3 and f"{FINGERPRINTS_NAME}: is missing" in report.output
    finally:
        path.write_bytes(kept)


def test_a_relayout_keeps_them(calibrated: Path, tmp_path: Path) -> None:
    relayout(calibrated / "out", tmp_path / "other", qkv="canonical")
    assert (tmp_path / "other" / FINGERPRINTS_NAME).read_bytes() == (
        calibrated / "out" / FINGERPRINTS_NAME
    ).read_bytes()
    with pytest.raises(UsageError, match=r"13\.\d+ % of its text"):
        refuse_shared_data(tmp_path / "other", load(calibrated / "mine.jsonl"))
