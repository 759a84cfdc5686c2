"""What we write is what the safetensors library reads, and a step out of order is an error at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mimoquant.checkpoint.writer import Entry, ShardWriter, shard_header, write_file_durably
from mimoquant.errors import StoppedError

ENTRIES = [Entry("shape", "I64", (2,)), Entry("scale", "BF16", (3, 5)), Entry("codes", "U8", (4, 3))]


def written(path: Path) -> str:
    writer = ShardWriter(path, ENTRIES)
    writer.write("shape", np.array([7, 9], np.int64))
    writer.write("scale", (np.arange(15, dtype=np.uint16) + 0x3F80).reshape(3, 5))
    writer.write("codes", np.arange(12, dtype=np.uint8).reshape(4, 3))
    return writer.close()


def test_safetensors_reads_back_equal_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    sha256 = written(tmp_path / "s.safetensors")
    assert sha256 == hashlib.sha256((tmp_path / "s.safetensors").read_bytes()).hexdigest()
    tensors = load_file(tmp_path / "s.safetensors")
    assert tensors["shape"].tolist() == [7, 9]
    assert tensors["codes"].tolist() == np.arange(12).reshape(4, 3).tolist()
    assert tensors["scale"].dtype is torch.bfloat16 and tensors["scale"].shape == (3, 5)
    assert (tensors["scale"].view(torch.int16).flatten() == torch.arange(15) + 0x3F80).all()
    with safe_open(tmp_path / "s.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == {"shape", "scale", "codes"}
        assert opened.get_slice("codes").get_shape() == [4, 3]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F32", np.array([1.5, -0.0, np.inf], np.float32)),
        ("I32", np.array([-1, 2**31 - 1, 0], np.int32)),
        ("U8", np.array([0, 255, 7], np.uint8)),
        ("F64", np.array([np.pi, 1e300, -1], np.float64)),
        ("BOOL", np.array([True, False, True])),
        ("I64", np.array([-(2**63), 0, 5], np.int64)),
    ],
)
def test_every_dtype_comes_back_as_its_bytes(tmp_path: Path, dtype: str, values: np.ndarray) -> None:
    from safetensors.numpy import load_file

    writer = ShardWriter(tmp_path / "s.safetensors", [Entry("x", dtype, (3,))])
    writer.write("x", values)
    writer.close()
    back = load_file(tmp_path / "s.safetensors")["x"]
    assert back.dtype == values.dtype and back.tobytes() == values.tobytes()


def test_a_tensor_may_come_in_parts(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole")
    writer = ShardWriter(tmp_path / "parts", ENTRIES)
    writer.write("shape", np.array([7], np.int64))
    writer.write("shape", np.array([9], np.int64))
    for row in (np.arange(15, dtype=np.uint16) + 0x3F80).reshape(3, 5):
        writer.write("scale", row)
    for byte in range(12):
        writer.write("codes", np.array([byte], np.uint8))
    assert writer.close() == whole
    assert writer.size_bytes == (tmp_path / "parts").stat().st_size
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_hash_is_of_all_bytes_in_order_though_it_lags(tmp_path: Path) -> None:
    """Large tensors are hashed beside what is written next, small ones among them."""
    sizes = [2**22, 1, 2**18, 2**18 - 1, 7, 2**20, 2**20, 2**20, 2**20, 3]
    writer = ShardWriter(tmp_path / "s", [Entry(f"{i}", "U8", (size,)) for i, size in enumerate(sizes)])
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        writer.write(f"{i}", rng.integers(0, 256, size, np.uint8))
    assert writer.close() == hashlib.sha256((tmp_path / "s").read_bytes()).hexdigest()
    assert len((tmp_path / "s").read_bytes()) == writer.size_bytes


def test_steps_out_of_order_raise(tmp_path: Path) -> None:
    shape, codes = np.array([7, 9], np.int64), np.zeros((4, 3), np.uint8)
    writer = ShardWriter(tmp_path / "s", ENTRIES)
    with pytest.raises(ValueError, match="codes where 16 of shape follow"):
        writer.write("codes", codes)
    with pytest.raises(ValueError, match="24 bytes of shape where 16"):
        writer.write("shape", np.zeros(3, np.int64))
    writer.write("shape", shape)
    with pytest.raises(ValueError, match="shape where 30 of scale follow"):
        writer.write("shape", shape)
    writer.write("scale", np.zeros(14, np.uint16))
    with pytest.raises(ValueError, match="scale was never written in full"):
        writer.close()
    writer.write("scale", np.zeros(1, np.uint16))
    writer.write("codes", codes)
    with pytest.raises(ValueError, match="the end"):
        writer.write("codes", codes)
    writer.close()


def test_empty_tensors_are_entries_without_bytes(tmp_path: Path) -> None:
    """A source may hold them, and a copy hands on what it reads: nothing, under the tensor's name."""
    from safetensors.numpy import load_file

    entries = [Entry("first", "U8", (0, 4)), Entry("x", "U8", (2,)), Entry("last", "U8", (3, 0))]
    writer = ShardWriter(tmp_path / "s", entries)
    writer.write("first", np.empty((0, 4), np.uint8))
    writer.write("x", np.array([1, 2], np.uint8))
    writer.write("last", np.empty((3, 0), np.uint8))
    writer.close()
    assert {name: tensor.shape for name, tensor in load_file(tmp_path / "s").items()} == {
        "first": (0, 4),
        "x": (2,),
        "last": (3, 0),
    }


def test_the_header_is_padded_and_has_one_metadata_key() -> None:
    for length in range(1, 12):
        raw = shard_header([Entry("n" * length, "F32", (2,))])
        (size,) = struct.unpack("<Q", raw[:8])
        assert len(raw) == 8 + size and size % 8 == 0
        assert json.loads(raw[8:])["__metadata__"] == {"format": "pt"}


def test_the_size_is_known_before_the_first_byte(tmp_path: Path) -> None:
    written(tmp_path / "s")
    expected = len(shard_header(ENTRIES)) + sum(entry.size_bytes for entry in ENTRIES)
    assert (tmp_path / "s").stat().st_size == expected


def test_a_tensor_at_an_odd_address_is_refused() -> None:
    with pytest.raises(ValueError, match="wide: F32 would start at the odd byte 3"):
        shard_header([Entry("bytes", "U8", (3,)), Entry("wide", "F32", (1,))])


def test_a_folder_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match=r"gone/s\.safetensors: cannot be written") as caught:
        ShardWriter(tmp_path / "gone" / "s.safetensors", ENTRIES)
    assert caught.value.exit_code == 4 and "--resume" in (caught.value.hint or "")


def test_a_small_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_file_durably(path, b"old")
    write_file_durably(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_shard_that_cannot_be_begun_leaves_no_descriptor_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoppedError, match="No space left"):
        ShardWriter(tmp_path / "s.safetensors", ENTRIES)
    assert len(os.listdir("/proc/self/fd")) == before
