"""Files that were made to do harm, or were damaged: an answer or one sentence, in little time and memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from micro import contents, edit_json
from readers import READERS, TOKENIZER, check, header_file, mutated
from small_runs import quantize, small_checkpoint

import mimoquant
from mimoquant.checkpoint.index import INDEX_NAME, open_index
from mimoquant.errors import CheckpointError, MimoquantError, RecipeError
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe


@pytest.mark.parametrize("name", READERS)
def test_readers_answer_or_refuse(name: str, tmp_path: Path) -> None:
    dice, reader, refused = random.Random(1), READERS[name], 0
    for number in range(40 if name.startswith(("token", "recipe")) else 200):
        data = mutated(reader.seeds[number % len(reader.seeds)], reader.words, dice)
        refused += check(reader, data, tmp_path) is not None
    assert refused


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | _json,
        "shape": st.lists(st.integers(-1, 2**70), max_size=10) | _json,
        "data_offsets": st.lists(st.integers(-1, 2**70), min_size=1, max_size=3) | _json,
    },
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(header=st.dictionaries(st.text(), _entry | _json, max_size=4), payload=st.integers(0, 40))
def test_made_up_headers(tmp_path: Path, header: dict[str, object], payload: int) -> None:
    check(READERS["header"], header_file(header, payload), tmp_path)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.binary(max_size=300) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("name", ["header", "index", "config", "recipe", "journal"])
def test_any_bytes_at_all(name: str, tmp_path: Path, data: bytes) -> None:
    check(READERS[name], data, tmp_path)


BOMBS = {
    "a header of 2^63 bytes": ("header", struct.pack("<Q", 2**63) + b"{}"),
    "a header of 2^64 - 1 bytes": ("header", b"\xff" * 8 + b"{}"),
    "a big-endian length": ("header", struct.pack(">Q", 40) + b"{}" + bytes(100)),
    "a shape that overflows": (
        "header",
        header_file({"a": {"dtype": "U8", "shape": [2**32, 2**32, 2**32], "data_offsets": [0, 0]}}, 0),
    ),
    "200 000 dimensions": (
        "header",
        header_file({"a": {"dtype": "U8", "shape": [2**62] * 200_000, "data_offsets": [0, 0]}}, 0),
    ),
    "a name twice": (
        "header",
        header_file(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            1,
        ),
    ),
    "nested without end": ("header", header_file(b'{"a":' * 100_000, 0)),
    "a number of a million digits": ("config", b'{"vocab_size": ' + b"9" * 1_000_000 + b"}"),
    "a journal nested without end": ("journal", b"[" * 100_000 + b"\n" + b"[" * 100_000 + b"\n{}\n"),
    "half a character in a path": ("index", b'{"weight_map": {"a": "\\ud800"}}'),
    "half a character in the config": ("config", b'{"model_type": "\\udfff"}'),
    "a name of terminal codes": ("header", header_file({"\x1b[2J\nerror: all is well": 3}, 0)),
    "a name of a megabyte": ("header", header_file({"x" * 2**20: 3}, 0)),
    "billions of laughs": (
        "recipe",
        b"a: &a [x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (98 + i, 98 + i, 97 + i, 97 + i) for i in range(20)),
    ),
    "YAML nested without end": ("recipe", b"[" * 20_000),
    "a pattern that never ends": ("recipe", READERS["recipe"].seeds[1].replace(b"'re:.*", b"'re:" + b".*" * 40)),
    "groups in groups": ("recipe", READERS["recipe"].seeds[1].replace(b"'re:.*", b"'re:" + b"(" * 400 + b")" * 400)),
    "a pattern in a pattern": ("recipe", READERS["recipe"].seeds[1].replace(b"'re:.*", rb"'re:(\w+\.?)+" + b"!")),
    "a Python object": ("recipe", b"!!python/object/apply:os.system ['exit 1']"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly_and_in_little_memory(name: str, tmp_path: Path) -> None:
    reader, data = BOMBS[name]
    tracemalloc.start()
    begin = time.process_time()
    try:
        assert check(READERS[reader], data, tmp_path), "it was read"
        assert time.process_time() - begin < 20  # 2 at most on a quiet core; without a limit it is hours
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


def test_a_tokenizer_prints_nothing_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Found by the fuzzer: what tokenizers does not know of a token's settings it prints, where our data goes."""
    pytest.importorskip("transformers", reason="transformers is not installed (scripts/setup --dev)")
    tokenizer = json.loads(TOKENIZER)
    tokenizer["added_tokens"][0]['"\x1b[2J'] = True
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"of": 1}}')  # so that transformers is asked, too
    assert "; transformers: " in str(check(READERS["tokenizer"], json.dumps(tokenizer).encode(), tmp_path))
    assert capfd.readouterr().out == ""


def test_ten_million_tensors_are_refused_by_their_header_alone(tmp_path: Path) -> None:
    """A file with holes: its size is claimed, not stored."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 600_000_000) + b'{"a":{"dtype":')
    os.truncate(path, 700_000_000)
    with pytest.raises(CheckpointError, match="claims 600000000 bytes"):
        open_index(tmp_path)
    path.unlink()
    (tmp_path / INDEX_NAME).touch()
    os.truncate(tmp_path / INDEX_NAME, 900_000_000)
    with pytest.raises(CheckpointError, match="900000000 bytes, more than the 100000000"):
        open_index(tmp_path)


# --- whole checkpoints ------------------------------------------------------------------------------------------------

Edit = Callable[[Path, random.Random], None]


def _shard(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(folder.glob("*.safetensors")))


def flip_bits(folder: Path, dice: random.Random) -> None:
    path = _shard(folder, dice)
    raw = bytearray(path.read_bytes())
    for _ in range(dice.choice((1, 20, 500))):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    path.write_bytes(raw)


def edit_header(folder: Path, dice: random.Random) -> None:
    path = _shard(folder, dice)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    changed = mutated(raw[: 8 + length], (), dice)
    path.write_bytes(changed.removesuffix(bytes(19)) + raw[8 + length :])


def edit_text(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(["config.json", INDEX_NAME])
    path.write_bytes(mutated(path.read_bytes(), (), dice))


def spoil_values(folder: Path, dice: random.Random) -> None:
    """Zero, NaN, Inf, negative, subnormal and huge scales and weights."""
    index = open_index(folder)
    for info in dice.sample(sorted(index.tensors.values(), key=lambda info: info.name), 3):
        raw = bytearray((folder / info.file).read_bytes())
        value = {
            "F32": [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0xBF800000, 0x7F7FFFFF],
            "BF16": [0, 0x8000, 0x7F80, 0x7FC0, 1, 0x7F7F],
            "F8_E4M3": [0, 0x80, 0x7F, 0xFF, 1, 0x7E],
        }[info.dtype]
        size = {"F32": 4, "BF16": 2, "F8_E4M3": 1}[info.dtype]
        count = dice.choice((1, info.size_bytes // size))
        begin = info.offset + dice.randrange(info.size_bytes // size - count + 1) * size
        raw[begin : begin + count * size] = dice.choice(value).to_bytes(size, "little") * count
        (folder / info.file).write_bytes(raw)


def resize(folder: Path, dice: random.Random) -> None:
    path = dice.choice(sorted(folder.iterdir()))
    size = path.stat().st_size
    os.truncate(path, dice.choice((0, 7, 8, size // 2, size - 1, size + 1, size + 4096)))


def misplace(folder: Path, dice: random.Random) -> None:
    path = dice.choice(sorted(folder.iterdir()))
    kind = dice.randrange(5)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.rename(folder.parent / path.name)
        path.symlink_to(folder.parent / path.name)
    elif kind == 2:
        path.unlink()
        path.mkdir()
    elif kind == 3:
        edit_json(
            folder / INDEX_NAME,
            lambda index: index["weight_map"].update(
                {
                    dice.choice(sorted(index["weight_map"])): dice.choice(
                        ["../x", "/etc/passwd", "config.json", "a\0", "."]
                    )
                }
            ),
        )
    else:
        path.unlink()
        path.symlink_to(path.name)


def swap_endianness(folder: Path, dice: random.Random) -> None:
    path = _shard(folder, dice)
    raw = path.read_bytes()
    path.write_bytes(raw[:8][::-1] + raw[8:])


EDITS: list[Edit] = [flip_bits, edit_header, edit_text, spoil_values, spoil_values, resize, misplace, swap_endianness]
RECIPES = ("int4-g32-mse", "mxfp4-rtn", "nvfp4-mse")


def fate(folder: Path, out: Path, recipe: str) -> str:
    """What became of a spoiled checkpoint: refused, or written and proven. Raises AssertionError for all else."""
    before = contents(folder) if all(path.is_file() for path in folder.iterdir()) else None
    try:
        quantize(folder, out, recipe=recipe)
    except MimoquantError as error:
        assert str(error).isprintable() and error.exit_code in (2, 3, 5), str(error)  # 5: no scale holds it
        assert not out.exists()
        return "refused"
    finally:
        assert before is None or contents(folder) == before, "the source was changed"
    report = verify(out, folder)
    assert report.ok, report.problems[:3]
    return "proven"


def small_source(number: int, folder: Path) -> Path:
    """Two layers, in all published kinds of tensors in turn."""
    settings = {"fp8": number % 3 > 0, "fused": number % 2 > 0, "mtp": number % 4 == 0, "seed": number % 5}
    return small_checkpoint(**settings).save(folder)


def shipped_source(number: int, folder: Path) -> Path:
    """The micro checkpoint."""
    return Path(shutil.copytree(mimoquant.micro_checkpoint(), folder))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (small_source, 64),
        pytest.param(small_source, 2000, marks=pytest.mark.slow),
        pytest.param(shipped_source, 240, marks=pytest.mark.slow),
    ],
)
def test_spoiled_checkpoints_are_refused_or_proven(
    make: Callable[[int, Path], Path], count: int, tmp_path: Path
) -> None:
    fates: dict[str, int] = {}
    for number in range(count):
        dice, work = random.Random(number), tmp_path / str(number)
        folder, edit = make(number, work / "source"), EDITS[number % len(EDITS)]
        try:
            edit(folder, dice)
            found = fate(folder, work / "out", RECIPES[number % 3])
        except Exception as error:
            raise AssertionError(f"number {number}, {edit.__name__}: {error}") from error
        fates[found] = fates.get(found, 0) + 1
        shutil.rmtree(work)
    print(fates)
    assert min(fates["refused"], fates["proven"]) > count / 8, fates


def test_a_recipe_cannot_name_what_it_may_not(tmp_path: Path) -> None:
    source = small_checkpoint().save(tmp_path / "source")
    for text in ("a: &a 1\nb: *a", "!!python/name:os.system x", "mimoquant: {version: 1e999}"):
        with pytest.raises(RecipeError):
            parse_recipe(text, "hostile")
    assert make_plan(source, load_recipe("mxfp4-rtn")).units
