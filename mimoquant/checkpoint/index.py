"""What a safetensors folder holds, from its headers alone.

Key idea: one `CheckpointIndex` maps every tensor name to file, dtype, shape and byte range. Nothing but headers is
read, so a terabyte opens in a second. Everything a hostile or broken folder can do wrong is refused here, once:
paths out of the folder, headers longer than their file, holes and overlaps, an index that disagrees with the files.

Left out: pickle files are never opened.
Reference: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from mimoquant.checkpoint.folders import (
    LFS_HINT,
    LFS_POINTER,
    is_there,
    open_inside,
    read_inside,
    top_level_names,
)
from mimoquant.checkpoint.remote import Remote, remote_of
from mimoquant.errors import CheckpointError, UsageError

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_INDEX_BYTES = 100_000_000  # the largest model of the family has 160 000 tensors in 20 MB; as objects ten times that
_DAMAGED = "the file is damaged: download it again"
MAX_DIMENSIONS = 8
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"  # of a LoRA, which is not in the weights: with it libraries load another model
_FAR_HEADERS = 8  # that are asked for at once
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `offset` counts from the start of `file`; sizes are in bytes."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint folder, by name."""

    folder: Path
    tensors: dict[str, TensorInfo]
    file_sizes: dict[str, int]
    header_sha256: dict[str, str]
    metadata: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.tensors.values())

    def stamps(self) -> dict[str, str]:
        """Size and time of change of every shard, or its etag: what tells, without reading it, that a payload is
        another."""
        if remote := remote_of(self.folder):
            return {file: remote.stamp(file) for file in sorted(self.file_sizes)}
        found = {file: (self.folder / file).stat() for file in sorted(self.file_sizes)}
        return {file: f"{stat.st_size} bytes of {_moment(stat.st_mtime_ns)}" for file, stat in found.items()}

    def headers_fingerprint(self) -> str:
        """sha256 over file names, sizes and headers; says nothing about the payload."""
        digest = hashlib.sha256()
        for file in sorted(self.file_sizes):
            digest.update(f"{file}\0{self.file_sizes[file]}\0{self.header_sha256[file]}\n".encode())
        return digest.hexdigest()


Header = tuple[list[TensorInfo], int, str]  # a shard's tensors, its size, sha256 of its header


def _moment(time_ns: int) -> str:
    """A time in UTC to the nanosecond, as `touch -d` takes it."""
    seconds = datetime.fromtimestamp(time_ns // 10**9, UTC)
    return f"{seconds:%Y-%m-%dT%H:%M:%S}.{time_ns % 10**9:09d}Z"


def open_index(folder: Path | str) -> CheckpointIndex:
    """Read all headers of a checkpoint folder.

    Raises:
        UsageError: not a directory.
        CheckpointError: anything about the folder that is not a well-formed safetensors checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(
            f"{folder}: not a checkpoint folder ({what})",
            hint="give the folder that holds config.json, or hf://ORG/NAME for what is on the Hub",
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder}: cannot be read (Permission denied)")
    weight_map, metadata = _read_weight_map(folder)
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for file, held in _read_headers(folder, sorted(set(weight_map.values()))):
        infos, sizes[file], hashes[file] = held
        for info in infos:
            if weight_map.get(info.name, file) != file:
                raise CheckpointError(
                    f"{folder / file}: holds {info.name}, which the index places in {weight_map[info.name]}",
                    hint="one tensor in two shards: download the checkpoint again",
                )
            tensors[info.name] = info
    _check_agreement(folder, weight_map, tensors)
    return CheckpointIndex(folder, tensors, sizes, hashes, metadata)


def open_shard(path: Path) -> CheckpointIndex:
    """One shard as an index of its own. Raises CheckpointError where it is not well formed."""
    infos, size, sha256 = read_shard_header(path.parent, path.name)
    return CheckpointIndex(path.parent, {info.name: info for info in infos}, {path.name: size}, {path.name: sha256}, {})


def _read_headers(folder: Path, files: list[str]) -> Iterator[tuple[str, Header]]:
    """Of each file in turn; what is far away is asked for beforehand, several at once."""
    remote = remote_of(folder)
    if remote is None:
        yield from ((file, read_shard_header(folder, file)) for file in files)
        return
    with ThreadPoolExecutor(_FAR_HEADERS) as pool:
        yield from zip(files, pool.map(functools.partial(read_shard_header, folder), files), strict=True)


def read_shard_header(folder: Path, file: str) -> Header:
    """Parse and check one shard's header; returns its tensors, the file's size and the header's sha256."""
    path, remote = folder / file, remote_of(folder)
    if remote and remote.is_away(file):
        raw, file_size = _raw_header(_far(remote, file), remote.size_of(file), path), remote.size_of(file)
    else:
        try:
            with open_inside(folder, file) as handle:
                file_size = os.fstat(handle.fileno()).st_size
                raw = _raw_header(lambda begin, length: handle.read(length), file_size, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    header = _parse_json_object(raw, path, unique=True)
    header.pop("__metadata__", None)
    data_start = 8 + len(raw)
    infos = [_tensor_info(name, entry, file, data_start, path) for name, entry in header.items()]
    _check_layout(infos, data_start, file_size, path)
    return infos, file_size, hashlib.sha256(raw).hexdigest()


def _raw_header(read: Callable[[int, int], bytes], file_size: int, path: Path) -> bytes:
    """The JSON of a header. `read`: bytes from a place on, so many; it is asked for them in their order."""
    prefix = read(0, min(8, file_size))
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {file_size} bytes are too few for a safetensors file", hint=_DAMAGED)
    if LFS_POINTER.startswith(prefix):
        raise CheckpointError(f"{path}: is a pointer of git-lfs, not the file", hint=LFS_HINT)
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(file_size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: the header claims {header_bytes} bytes but the file has {file_size}",
            hint="the file is truncated or not safetensors: download it again",
        )
    return read(8, header_bytes)


def _far(remote: Remote, file: str) -> Callable[[int, int], bytes]:
    def read(begin: int, length: int) -> bytes:
        data = bytearray(length)
        remote.read([(file, begin, memoryview(data))])
        return bytes(data)

    return read


def read_json_inside(
    folder: Path, name: str, max_bytes: int = MAX_INDEX_BYTES, *, unique: bool = False
) -> dict[str, Any]:
    """A JSON file of a checkpoint folder, which may be a snapshot of links (see `folders`); it must hold an object.

    Size-limited, UTF-8 (CRLF and a BOM are fine). `unique`: its keys are.
    """
    return _parse_json_object(read_inside(folder, name, max_bytes), folder / name, unique=unique)


def _parse_json_object(raw: bytes, path: Path, *, unique: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None)
        if b"\\ud" in raw.lower():  # half a character is none, and could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({str(error)[:120]})", hint=_DAMAGED) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two tensors with one name, which is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return found


def shard_names(folder: Path) -> list[str]:
    """The shards of a checkpoint folder, from the names alone; sorted."""
    if is_there(folder, INDEX_NAME):
        return sorted(set(_read_weight_map(folder)[0].values()))
    return sorted(name for name in top_level_names(folder) if name.endswith(".safetensors"))


def _read_weight_map(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """name → file from the index file, or from the only shard when there is no index."""
    index_path = folder / INDEX_NAME
    if is_there(folder, INDEX_NAME):  # a link to a file that is missing is an incomplete download
        index = read_json_inside(folder, INDEX_NAME, unique=True)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index_path}: has no usable weight_map", hint=_DAMAGED)
        if not weight_map:
            raise CheckpointError(f"{index_path}: the weight_map is empty", hint=_DAMAGED)
        if pickles := sorted({file for file in weight_map.values() if file.endswith(_PICKLE_SUFFIXES)}):
            raise CheckpointError(
                f"{index_path}: places tensors in {pickles[0]}, and pickles are never opened",
                hint="download the index that belongs to the safetensors files, or convert all to safetensors",
            )
        plain = {file: _plain(file) for file in set(weight_map.values())}
        weight_map = {name: plain[file] for name, file in weight_map.items()}
        metadata = index.get("metadata")
        return weight_map, metadata if isinstance(metadata, dict) else {}
    names = top_level_names(folder)
    if ADAPTER_NAME in names and "config.json" not in names:
        raise CheckpointError(
            f"{folder}: holds a LoRA adapter, no model",
            hint="merge it into its base model first (PEFT's merge_and_unload), and give the folder of that",
        )
    shards = sorted(name for name in names if name.endswith(".safetensors"))
    if len(shards) > 1:
        raise CheckpointError(
            f"{folder}: {len(shards)} safetensors files but no {INDEX_NAME}",
            hint="download the index that belongs to the shards",
        )
    if not shards:
        pickles = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES))
        if pickles:
            raise CheckpointError(
                f"{folder}: holds pickle weights ({pickles[0]}), which are never opened",
                hint="convert the checkpoint to safetensors first",
            )
        hint = "give the folder that holds the shards"
        if snapshots := sorted(folder.glob("snapshots/*/config.json")):
            hint = f"a folder of the Hub's cache has them in a snapshot: give {snapshots[-1].parent}"
        raise CheckpointError(f"{folder}: holds no safetensors file", hint=hint)
    infos, _, _ = read_shard_header(folder, shards[0])
    return {info.name: shards[0] for info in infos}, {}


def _plain(file: str) -> str:
    """A file's name without what says nothing, as in "./a//b": one file has one name, whoever wrote the index."""
    return str(PurePosixPath(file)) if file and not file.startswith("/") else file


def _tensor_info(name: str, entry: Any, file: str, data_start: int, path: Path) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        item_bytes = DTYPE_BYTES.get(dtype)
        integers = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} is malformed") from error
    if item_bytes is None:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {name} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if not integers:
        raise CheckpointError(f"{path}: {name} has a shape or offsets that are not natural numbers")
    size = math.prod(shape) * item_bytes
    if end - begin != size:
        raise CheckpointError(
            f"{path}: {name} is {dtype}{list(shape)} = {size} bytes but its offsets span {end - begin}"
        )
    return TensorInfo(name, file, dtype, shape, data_start + begin, size)


def _check_layout(infos: list[TensorInfo], data_start: int, file_size: int, path: Path) -> None:
    """Tensors must tile the file: no hole, no overlap, no rest."""
    position = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.size_bytes)):
        if info.offset != position:
            problem = "overlaps its predecessor" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: {info.name} at byte {info.offset} {problem} (expected {position})")
        position += info.size_bytes
    if position != file_size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes but the file has {file_size}",
            hint="the file is truncated or damaged: download it again",
        )


def _check_agreement(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    missing = weight_map.keys() - tensors.keys()
    if missing:
        name = min(missing)
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(weight_map)} tensors of the index are not in their file, "
            f"first {name} in {weight_map[name]}"
        )
    extra = tensors.keys() - weight_map.keys()
    if extra:
        name = min(extra)
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors are in a file but not in the index, first {name} in {tensors[name].file}"
        )
