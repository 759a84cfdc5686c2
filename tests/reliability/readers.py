"""The readers of untrusted files, each as a function of the file's bytes, with small valid files to start from.

A reader may return or refuse with one of our errors, in one printable line. Anything else is a finding.
"""

from __future__ import annotations

import atexit
import copy
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_runs import small_checkpoint

import mimoquant
from mimoquant.calibration.tokenizer import load_tokenizer
from mimoquant.checkpoint.index import INDEX_NAME, open_index, read_json_inside, read_shard_header
from mimoquant.checkpoint.journal import read_journal
from mimoquant.checkpoint.torch_file import read_vector
from mimoquant.errors import MimoquantError
from mimoquant.model.drafter import open_drafter
from mimoquant.model.layout import read_layout
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.planning.relayout import RECORD_NAME, plan_again
from mimoquant.shipped import recipes_folder


@dataclass(frozen=True)
class Reader:
    """`read` gets a folder in which it may write; `words` are what mutations put in, beside their own."""

    seeds: list[bytes]
    read: Callable[[bytes, Path], object]
    words: tuple[bytes, ...] = ()


def _header(data: bytes, folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(data)
    read_shard_header(folder, "x.safetensors")


def _index(data: bytes, folder: Path) -> None:
    target = folder / INDEX_NAME
    target.write_bytes(data)
    open_index(folder)


def _config(data: bytes, folder: Path) -> None:
    (folder / "c.json").write_bytes(data)
    config = read_json_inside(folder, "c.json", max_bytes=50_000_000)
    for packed in (False, True):
        read_layout(open_index(folder), config, packed=packed)


def _recipe(data: bytes, folder: Path) -> None:
    (folder / "r.yaml").write_bytes(data)
    load_recipe(str(folder / "r.yaml"))
    parse_recipe(data.decode(errors="replace"), "fuzzed")


def _tokenizer(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("a few words")[:8])


def _tokenizer_config(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    (folder / "tokenizer_config.json").write_bytes(data)
    load_tokenizer(folder)


def _journal(data: bytes, folder: Path) -> None:
    (folder / "journal.jsonl").write_bytes(data)
    read_journal(folder / "journal.jsonl")


def _relayout(data: bytes, folder: Path) -> None:
    (folder / RECORD_NAME).write_bytes(data)
    plan_again(folder, folder)


def _drafter(data: bytes, folder: Path) -> None:
    (folder / "dflash").mkdir(exist_ok=True)
    for path in _DRAFTER.iterdir():
        (folder / "dflash" / path.name).write_bytes(data if path.name == "config.json" else path.read_bytes()[:20_000])
    open_drafter(folder / "dflash")


def _vector(data: bytes, folder: Path) -> None:
    (folder / "v.pt").write_bytes(data)
    read_vector(folder / "v.pt")


_DRAFTER = mimoquant.micro_drafter()
_CHECKPOINT = Path(tempfile.mkdtemp(prefix="readers-"))
atexit.register(shutil.rmtree, _CHECKPOINT, ignore_errors=True)
small_checkpoint(vocab_size=8, hidden_size=32, intermediate_size=32, moe_intermediate_size=32).save(_CHECKPOINT)
_SHARD = (_CHECKPOINT / "model-1.safetensors").read_bytes()
_TOKENIZER = json.loads((mimoquant.micro_checkpoint() / "tokenizer.json").read_bytes())
_FEW = {word: number for word, number in _TOKENIZER["model"]["vocab"].items() if number < 300}
TOKENIZER = json.dumps(_TOKENIZER | {"model": _TOKENIZER["model"] | {"vocab": _FEW, "merges": []}}).encode()
_HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
}
_LINE = {"unit": "layer 0", "file": "a.safetensors", "size_bytes": 3, "sha256": "0" * 64, "facts": {"x": [1, 2.5]}}


def header_file(header: object, payload: int = 19) -> bytes:
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(raw)) + raw + bytes(payload)


READERS = {
    "header": Reader(
        [header_file(_HEADER), header_file({"__metadata__": {"format": "pt"}}, 0)],
        _header,
        (b'"BF16"', b'"shape"', b"[0]", b"[18446744073709551616]", b'"data_offsets"'),
    ),
    "index": Reader(
        [(_CHECKPOINT / INDEX_NAME).read_bytes(), b'{"metadata":{"tp_size":2},"weight_map":{"a":"b"}}'],
        _index,
        (b'"../x"', b'"/etc/passwd"', b'"\\ud800"', b'"a\\u0000b"', b'"model-1.safetensors"'),
    ),
    "config": Reader(
        [(_CHECKPOINT / "config.json").read_bytes(), (mimoquant.micro_checkpoint() / "config.json").read_bytes()],
        _config,
        (b"1e999", b"NaN", b"4294967296", b'"fused_qkv"', b'"modelopt"', b'"quantization_config"'),
    ),
    "recipe": Reader(
        [path.read_bytes() for path in sorted(recipes_folder().glob("*.yaml"))],
        _recipe,
        (b"&a ", b"*a", b"!!python/object", b"re:(", b"<<: ", b"!!bool x", b"0x", b"? ", b"|\n"),
    ),
    "tokenizer": Reader([TOKENIZER], _tokenizer, (b'"type"', b'"BPE"', b'"Unigram"', b"\\ud800", b'"content"')),
    "tokenizer config": Reader(
        [
            b'{"eos_token":"<|im_end|>","chat_template":"{{ messages }}"}',
            b'{"chat_template":[{"name":"default","template":"{% for m in x %}{% endfor %}"}]}',
        ],
        _tokenizer_config,
        (b"{%", b"%}", b"{{", b"**", b'"content"'),
    ),
    "journal": Reader([json.dumps(_LINE).encode() + b"\n" + json.dumps(_LINE).encode() + b"\n"], _journal),
    "relayout": Reader(
        [b'{"schema_version":1,"qkv":"split","tp":null,"bf16":true,"source_headers_sha256":"0"}'],
        _relayout,
        (b'"canonical"', b'"interleaved"', b"true"),
    ),
    "drafter": Reader(
        [(_DRAFTER / "config.json").read_bytes()],
        _drafter,
        (b"1e999", b"NaN", b"4294967296", b'"qwen3"', b'"dflash_config"', b'"sliding_attention"'),
    ),
    "vector": Reader(
        [(_DRAFTER / "mask_embedding.pt").read_bytes()],
        _vector,
        (b"PK\x03\x04", b"PK\x01\x02", b"data.pkl", b"cos\nsystem\n", b"\x93", b"ctorch\nFloatStorage\n"),
    ),
}


def check(reader: Reader, data: bytes, folder: Path) -> str | None:
    """Read `data`; returns what refused it, if anything did. Raises AssertionError for what is no sentence, and
    whatever else a reader let through."""
    for name in ("config.json", "model-1.safetensors", INDEX_NAME):
        target = folder / name
        if not target.exists() or name == INDEX_NAME:
            target.write_bytes((_CHECKPOINT / name).read_bytes())
    try:
        reader.read(data, folder)
    except MimoquantError as error:
        text = str(error)
        assert text and text.isprintable() and len(text) < 2100, text
        assert error.exit_code in (2, 3)
        return text
    return None


_WORDS = (
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"-1",
    b"0",
    b"1e400",
    b"9" * 40,
    b"true",
    b"[[[[",
    b"\\u0000",
    b"\xff\xfe",
    b"\r\n",
    b"\x00\x00\x00\x00\x00\x00\x00\x80",
    b"\xff" * 8,
    b'{"a":',
    b",",
    b"\xe2\x80\xae",
    b"\x1b[2J",
)


_VALUES = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64 - 1,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "a",
    [],
    {},
    [[]],
    [0] * 9,
    "x" * 3000,
    "../a",
    "/etc/passwd",
    "a\nb\x1b[2J",
    "\ud800",
    "\0",
    {"a": {}},
    ["a"],
    [2**62] * 5,
)


def _edited(value: Any, dice: random.Random) -> Any:
    """A JSON value with one place of it changed."""
    places = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not places or dice.random() < 0.15:
        return copy.deepcopy(dice.choice(_VALUES))
    place, kind = dice.choice(places), dice.randrange(8)
    if kind == 0:
        del value[place]
    elif kind == 1 and isinstance(value, dict):
        value[dice.choice([*places, "a", "\ud800", "x\ny"])] = value.pop(place)
    elif kind == 2:
        value[place] = copy.deepcopy(value[dice.choice(places)])
    else:
        value[place] = _edited(value[place], dice)
    return value


def mutated(data: bytes, words: tuple[bytes, ...], dice: random.Random) -> bytes:
    """A few random edits: half of the time of what the JSON says, which may have a header's length before it."""
    if dice.random() < 0.5:
        prefixed = len(data) > 8 and struct.unpack("<Q", data[:8])[0] < len(data)
        try:
            value = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]] if prefixed else data)
            for _ in range(dice.choice((1, 1, 2, 4))):
                value = _edited(value, dice)
            return header_file(value) if prefixed else json.dumps(value).encode()
        except (ValueError, RecursionError):
            pass
    return _with_edits(data, words, dice)


def _with_edits(data: bytes, words: tuple[bytes, ...], dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 8))):
        at = dice.randrange(len(out) + 1)
        end = min(len(out), at + dice.choice((0, 1, 1, 2, 8, 40)))
        kind = dice.randrange(6)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del out[at:end]
        elif kind == 2:
            out[at:end] = dice.choice(_WORDS + words)
        elif kind == 3:
            begin = dice.randrange(len(out) + 1)
            out[at:at] = out[begin : begin + dice.randrange(60)]
        elif kind == 4:
            out[at:end] = bytes(dice.randrange(256) for _ in range(end - at))
        else:
            out[at:end] = out[at:end] * dice.choice((2, 3, 300))
    return bytes(out[:200_000])
