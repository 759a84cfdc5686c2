"""A vector that torch.save wrote, read without unpickling: its program is disassembled, never run.

Key idea: the file is a zip archive of raw storages beside a pickle that says what they are. The pickle of a dict with
one tensor and numbers names three harmless functions and nothing else; its opcodes tell dtype and numbers.
Left out: every other use of the format. Source: the archives of torch 2.x; Python's pickletools.
"""

from __future__ import annotations

import itertools
import pickletools
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mimoquant.errors import CheckpointError

_STORAGES = {"torch FloatStorage": "F32", "torch BFloat16Storage": "BF16", "torch HalfStorage": "F16"}
_MAKERS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
_MOST_BYTES = 2**24  # of either member: no vector is larger
_BROKEN = (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)  # what zipfile raises
_MEMO = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
_NAMING = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # what asks for a function or class


@dataclass(frozen=True)
class SavedVector:
    """The dict's keys, the numbers under them, and the tensor: little-endian, `dtype` is safetensors' name for its."""

    keys: set[str]
    numbers: dict[str, int]
    dtype: str
    data: npt.NDArray[np.uint8]


def read_vector(path: Path) -> SavedVector:
    """Raises CheckpointError: no such archive, or it holds anything but numbers and one plain tensor."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            if "data/1" in members or any(info.file_size > _MOST_BYTES for info in members.values()):
                raise CheckpointError(f"{path}: holds more than one vector")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: is not little-endian")
            program, data = archive.read(members["data.pkl"]), archive.read(members["data/0"])
        operations = [(code.name, value) for code, value, _ in pickletools.genops(program) if code.name not in _MEMO]
        storage = operations.index(("BINUNICODE", "storage"))  # then its class, its key, its device, its length
    except _BROKEN as error:
        raise CheckpointError(f"{path}: is no vector that torch.save wrote ({error})") from error
    named = {str(value) for name, value in operations if name in _NAMING}
    dtypes = [dtype for storage_class, dtype in _STORAGES.items() if storage_class in named]
    if foreign := sorted(named - _STORAGES.keys() - _MAKERS) or len(dtypes) != 1:
        raise CheckpointError(f"{path}: holds {foreign if dtypes else 'no floats'}, expected is one plain tensor")
    rest = operations[:storage] + operations[storage + 5 :]
    keys = {value for name, value in rest if name not in _NAMING and isinstance(value, str)}
    numbers = {
        str(key): value for (_, key), (_, value) in itertools.pairwise(rest) if key in keys and isinstance(value, int)
    }
    return SavedVector(keys, numbers, dtypes[0], np.frombuffer(data, np.uint8).copy())
