"""Everything a broken or hostile folder can do wrong is refused in one sentence that names it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimoquant.checkpoint.index import INDEX_NAME, open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, MimoquantError, UsageError

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
F32_NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def write_shard(path: Path, header: Any, payload: bytes = b"", *, claim: int | None = None) -> Path:
    """A shard byte by byte. `claim` replaces the true header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if claim is None else claim) + raw + payload)
    return path


def write_index(folder: Path, weight_map: Any, **extra: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **extra}), encoding="utf-8")


def refused(folder: Path, *fragments: str, kind: type[MimoquantError] = CheckpointError, code: int = 3) -> str:
    """The message of the one-sentence refusal of `folder`; it holds the folder's path and every fragment."""
    with pytest.raises(kind) as caught:
        open_index(folder)
    message = str(caught.value)
    assert type(caught.value) is kind and caught.value.exit_code == code
    assert "\n" not in message
    for fragment in (str(folder), *fragments):
        assert fragment in message, f"{fragment!r} is not in: {message}"
    return message


def test_a_folder_without_an_index_file_is_its_only_shard(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "a": F32_PAIR, "b": F32_NEXT}, bytes(16)
    )
    index = open_index(tmp_path)
    assert list(index.tensors) == ["a", "b"] and index.size_bytes == 16
    assert index.tensors["b"].offset == index.tensors["a"].offset + 8 == index.file_sizes["model.safetensors"] - 8


def test_bytes_are_read_from_where_the_header_says(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"b": F32_NEXT, "a": F32_PAIR}, bytes(range(16)))
    with CheckpointReader(open_index(tmp_path)) as reader:
        assert reader.read("a").tobytes() == bytes(range(8))
        assert reader.read("b").tobytes() == bytes(range(8, 16))
        assert reader.bytes_read == 16


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "model.safetensors", {"a": F32_PAIR}, bytes(8))
    index = open_index(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with CheckpointReader(index) as reader, pytest.raises(CheckpointError, match=r"ends inside a, 3 of 8 bytes short"):
        reader.read("a")


def test_the_headers_fingerprint_follows_the_headers(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "model.safetensors", {"a": F32_PAIR}, bytes(8))
    before = open_index(tmp_path).headers_fingerprint()
    write_shard(path, {"a": F32_PAIR}, bytes([1] * 8))
    assert open_index(tmp_path).headers_fingerprint() == before, "the payload is not part of it"
    write_shard(path, {"A": F32_PAIR}, bytes(8))
    assert open_index(tmp_path).headers_fingerprint() != before


@pytest.mark.parametrize("prefix", [b"\xef\xbb\xbf", b""], ids=["BOM", "plain"])
def test_an_index_with_bom_and_crlf_is_read(tmp_path: Path, prefix: bytes) -> None:
    write_shard(tmp_path / "m.safetensors", {"a": F32_PAIR}, bytes(8))
    text = json.dumps({"metadata": {"tp_size": 4}, "weight_map": {"a": "m.safetensors"}}, indent=2)
    (tmp_path / INDEX_NAME).write_bytes(prefix + text.replace("\n", "\r\n").encode())
    index = open_index(tmp_path)
    assert index.tensors["a"].file == "m.safetensors" and index.metadata == {"tp_size": 4}


def test_a_path_that_is_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "does not exist", kind=UsageError, code=2)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file", kind=UsageError, code=2)


def test_folders_without_one_readable_shard_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04never unpickled")
    refused(tmp_path, "pickle", "pytorch_model.bin")
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.safetensors", {name: F32_PAIR}, bytes(8))
    refused(tmp_path, "2 safetensors files", INDEX_NAME)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", "[" * 100_000, '"\xff"']
)
def test_an_unusable_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_bytes(text.encode("latin-1"))
    refused(tmp_path, INDEX_NAME)


def test_an_empty_weight_map_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {})
    refused(tmp_path, INDEX_NAME, "empty")


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside.safetensors", "sub/../../outside.safetensors", "..\\outside", "", "a\0b"]
)
def test_an_index_that_points_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_shard(tmp_path / "outside.safetensors", {"a": F32_PAIR}, bytes(8))
    write_index(folder, {"a": name})
    refused(folder, repr(name), "leads out of")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "model-2.safetensors"})
    refused(tmp_path, "model-2.safetensors is missing")


def test_an_index_with_an_impossible_file_name_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x" * 300 + ".safetensors"})
    refused(tmp_path, "x" * 300)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", write_shard(tmp_path / "secret.safetensors", {"a": F32_PAIR}, bytes(8))
    folder.mkdir()
    (folder / "m.safetensors").symlink_to(outside)
    refused(folder, "m.safetensors", "link", str(outside))
    write_index(folder, {"a": "m.safetensors"})
    refused(folder, "m.safetensors", "link", str(outside))


def test_a_folder_in_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    refused(tmp_path, "m.safetensors", "not a regular file")


def test_the_links_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--XiaomiMiMo--MiMo-V2.5"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_shard(blobs / "sha", {"a": F32_PAIR}, bytes(8))
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/sha"))
    assert list(open_index(snapshot).tensors) == ["a"]
    (repo / "elsewhere").mkdir()
    (blobs / "sha").rename(repo / "elsewhere" / "sha")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(Path("../../elsewhere/sha"))
    refused(snapshot, "link")


@pytest.mark.parametrize(
    ("write", "fragments"),
    [
        (lambda p: p.write_bytes(b"1234567"), ["7 bytes"]),
        (lambda p: p.write_bytes(b""), ["0 bytes"]),
        (lambda p: write_shard(p, {"a": F32_PAIR}, bytes(8), claim=10_000), ["10000"]),
        (lambda p: write_shard(p, {"a": F32_PAIR}, bytes(8), claim=2**63), [str(2**63)]),
        (lambda p: write_shard(p, {"a": F32_PAIR}, bytes(8), claim=2**64 - 1), [str(2**64 - 1)]),
        (lambda p: write_shard(p, {"a": F32_PAIR}, bytes(8), claim=5), ["not valid JSON"]),
        (lambda p: write_shard(p, b"\xff\xfe{}"), ["not valid JSON"]),
        (lambda p: write_shard(p, b"[" * 200_000), ["not valid JSON"]),
        (lambda p: write_shard(p, [1]), ["list"]),
        (lambda p: write_shard(p, {"a": F32_PAIR}, bytes(7)), ["has {size}"]),
        (lambda p: write_shard(p, {"a": F32_PAIR}, bytes(9)), ["has {size}"]),
        (
            lambda p: write_shard(p, {"a": F32_PAIR, "b": {**F32_NEXT, "data_offsets": [4, 12]}}, bytes(16)),
            ["b at byte", "overlaps"],
        ),
        (
            lambda p: write_shard(p, {"a": F32_PAIR, "b": {**F32_NEXT, "data_offsets": [12, 20]}}, bytes(20)),
            ["b at byte", "hole"],
        ),
        (lambda p: write_shard(p, {"a": {**F32_PAIR, "data_offsets": [4, 12]}}, bytes(12)), ["a at byte", "hole"]),
        (lambda p: write_shard(p, {"a": F32_PAIR, "b": F32_PAIR}, bytes(8)), ["overlaps"]),
    ],
    ids=[
        "seven bytes",
        "empty",
        "header longer than the file",
        "header of 2^63",
        "header of 2^64-1",
        "header cut",
        "not UTF-8",
        "deep nesting",
        "a list",
        "truncated",
        "trailing byte",
        "overlap",
        "hole",
        "hole at the start",
        "same place twice",
    ],
)
def test_a_damaged_shard_is_refused(tmp_path: Path, write: Callable[[Path], object], fragments: list[str]) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    refused(tmp_path, "model.safetensors", *(part.format(size=path.stat().st_size) for part in fragments))


@pytest.mark.parametrize(
    ("entry", "fragment"),
    [
        ({**F32_PAIR, "dtype": "F7"}, "'F7'"),
        ({**F32_PAIR, "dtype": None}, "dtype"),
        ({**F32_PAIR, "dtype": ["F32"]}, "malformed"),
        ({**F32_PAIR, "dtype": "F16"}, "= 4 bytes but its offsets span 8"),
        ({**F32_PAIR, "shape": [3]}, "= 12 bytes but its offsets span 8"),
        ({**F32_PAIR, "shape": [2**62, 2**62]}, "offsets span 8"),
        ({**F32_PAIR, "shape": [2.0]}, "natural numbers"),
        ({**F32_PAIR, "shape": ["2"]}, "natural numbers"),
        ({**F32_PAIR, "shape": [True, 2]}, "natural numbers"),
        ({**F32_PAIR, "shape": [-1, -2]}, "natural numbers"),
        ({**F32_PAIR, "shape": 2}, "malformed"),
        ({**F32_PAIR, "shape": None}, "malformed"),
        ({**F32_PAIR, "data_offsets": [0]}, "malformed"),
        ({**F32_PAIR, "data_offsets": [-8, 0]}, "natural numbers"),
        ({**F32_PAIR, "data_offsets": [8, 0]}, "offsets span -8"),
        ({**F32_PAIR, "data_offsets": [0, 2**70]}, f"offsets span {2**70}"),
        ({"dtype": "F32", "shape": [2]}, "malformed"),
        ("F32", "malformed"),
        (None, "malformed"),
    ],
)
def test_a_malformed_tensor_entry_is_refused_by_name(tmp_path: Path, entry: Any, fragment: str) -> None:
    write_shard(tmp_path / "model.safetensors", {"some.weight": entry}, bytes(8))
    refused(tmp_path, "some.weight", fragment)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.safetensors", {"a": F32_PAIR, "b": F32_NEXT}, bytes(16))
    write_shard(tmp_path / "2.safetensors", {"c": F32_PAIR}, bytes(8))
    agreed = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    write_index(tmp_path, agreed)
    assert set(open_index(tmp_path).tensors) == {"a", "b", "c"}
    write_index(tmp_path, agreed | {"d": "2.safetensors"})
    refused(tmp_path, "1 of 4 tensors", "d in 2.safetensors")
    write_index(tmp_path, {name: file for name, file in agreed.items() if name != "b"})
    refused(tmp_path, "1 tensors are in a file but not in the index", "b in 1.safetensors")
    write_index(tmp_path, agreed | {"b": "2.safetensors"})
    refused(tmp_path, "b", "1.safetensors", "2.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.safetensors", {"a": F32_PAIR}, bytes(8))
    write_shard(tmp_path / "2.safetensors", {"a": F32_PAIR, "b": F32_NEXT}, bytes(16))
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    refused(tmp_path, "2.safetensors", "holds a", "1.safetensors")


def test_every_dtype_has_the_width_that_safetensors_gives_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.uint32,
        torch.int32,
        torch.float32,
        torch.uint64,
        torch.int64,
        torch.float64,
    ]
    tensors = {str(dtype): torch.zeros(3, 5, dtype=torch.uint8).to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    index = open_index(tmp_path)
    for name, tensor in tensors.items():
        info = index.tensors[name]
        assert info.shape == (3, 5) and info.size_bytes == math.prod(info.shape) * tensor.element_size()
