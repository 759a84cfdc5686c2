"""The files of a Hugging Face folder that are not weights: what is carried over and how.

Key idea: tokenizer, chat template, processor, remote code and sub-folders are copied as bytes, never opened or run.
Weights, the index, config.json and the README have their own writers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mimoquant.checkpoint.folders import LFS_HINT, LFS_POINTER, read_inside, resolve_inside
from mimoquant.checkpoint.index import ADAPTER_NAME, INDEX_NAME
from mimoquant.checkpoint.remote import remote_of
from mimoquant.checkpoint.writer import copy_file_durably, fsync_folder, stopping
from mimoquant.errors import CheckpointError

CONFIG_NAME = "config.json"
MODELOPT_CONFIG_NAME = "hf_quant_config.json"  # what ModelOpt says of a checkpoint, beside config.json
FINGERPRINTS_NAME = "calibration.fingerprints"  # of what a checkpoint was calibrated on, beside its recipe.yaml
_WRITTEN_ANEW = {
    CONFIG_NAME,
    INDEX_NAME,
    MODELOPT_CONFIG_NAME,
    "README.md",
    "recipe.yaml",
    "report.json",
    "report.html",
    "journal.jsonl",
    "relayout.json",
    FINGERPRINTS_NAME,
}
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".npz", ".ot", ".tflite"),
    *(".onnx", ".onnx_data", ".onnx.data", ".mlmodel", ".nemo"),
)
_OTHER_FORMS = {"original", "onnx", "openvino", "gguf", "mlx", "coreml", "tflite", "metal"}  # of the same weights
_OF_TRAINING = re.compile(r"(checkpoint-\d+|global_step_?\d+|runs|wandb)$")  # earlier weights, optimizers, logs
_SECOND_COPY = re.compile(r"\.(safetensors|bin|gguf)\.(\d+|bak|old|orig|download|part\w*)$", re.IGNORECASE)
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload", ".lock", ".tmp")
_MAX_POINTER_BYTES = 1000
_MAX_SMALL_BYTES = 100_000_000
_SMALL = (".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".yaml", ".pt", FINGERPRINTS_NAME)
_WEIGHT_INDEX = ".index.json"  # of weights that are not carried, so it would lead nowhere


@dataclass(frozen=True, slots=True)
class SideFiles:
    """Files beside the shards. `sizes`: relative path → bytes of those to carry over, sorted; `left_out`: the others,
    a folder's with a slash at its end. Hidden files are in neither: the Hub's and git's own."""

    sizes: dict[str, int]
    left_out: list[str]


def side_files(folder: Path, shards: Collection[str]) -> SideFiles:
    """Sort what lies in a checkpoint folder beside `shards`, the files that its index names.

    A drafter's and a tokenizer's weights, in folders of their own, are carried over; other forms of the same weights,
    unfinished downloads and indexes of weights that are not carried are left out.

    Raises CheckpointError for one that cannot be read, leads out of the folder, is no regular file or a pointer of
    git-lfs: before anything is done, rather than after hours.
    """

    files, left_out = list_files(folder)
    names: list[str] = []
    held = {*shards, *_targets(folder, shards)}
    for name in files:
        if name not in held and name not in _WRITTEN_ANEW:
            (left_out if _is_left_out(name) else names).append(name)
    sizes: dict[str, int] = {}
    remote = remote_of(folder)
    for name in names:
        if remote and remote.is_away(name):
            sizes[name] = remote.size_of(name)
            continue
        path = resolve_inside(folder, name)
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{folder / name}: cannot be read (Permission denied)")
        sizes[name] = path.stat().st_size
        if sizes[name] < _MAX_POINTER_BYTES and read_inside(folder, name, _MAX_POINTER_BYTES).startswith(LFS_POINTER):
            raise CheckpointError(f"{folder / name}: is a pointer of git-lfs, not the file", hint=LFS_HINT)
    return SideFiles(sizes, sorted(left_out))


def _targets(folder: Path, shards: Collection[str]) -> Iterator[str]:
    """What shards that are links to files of the same folder lead to: the same weights under another name."""
    root = folder.resolve()
    for shard in shards:
        if (folder / shard).is_symlink() and (target := (folder / shard).resolve()).is_relative_to(root):
            yield target.relative_to(root).as_posix()


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """The relative paths of a checkpoint folder's files, sorted, and of its folders that hold other forms of the
    weights or what training left, which are not entered, with a slash at the end. What is hidden is in neither: the
    Hub's and git's own.

    Raises CheckpointError for a link to a folder, and for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error

    remote = remote_of(folder)
    if remote is not None:
        return _sorted_out(remote.names)
    found: list[str] = []
    other_forms: list[str] = []
    for root, folders, files in os.walk(folder, onerror=fail):
        relative, kept = Path(root).relative_to(folder), []
        for name in sorted(folders):
            if name.startswith("."):
                continue
            if Path(root, name).is_symlink():
                raise CheckpointError(
                    f"{Path(root, name)}: is a link to a folder, {os.readlink(Path(root, name))}",
                    hint="copy that folder here, or remove the link",
                )
            if _is_other_form(name, relative == Path()):
                other_forms.append(f"{(relative / name).as_posix()}/")
            else:
                kept.append(name)
        folders[:] = kept
        found += [(relative / file).as_posix() for file in files if not file.startswith(".")]
    return sorted(found), other_forms


def _sorted_out(names: list[str]) -> tuple[list[str], list[str]]:
    """The same of a list of files."""
    found, other_forms = [], set()
    for name in names:
        parts = name.split("/")
        forms = [place for place, part in enumerate(parts[:-1], start=1) if _is_other_form(part, place == 1)]
        if any(part.startswith(".") for part in parts):
            continue
        if forms:
            other_forms.add("/".join(parts[: forms[0]]) + "/")
        else:
            found.append(name)
    return sorted(found), sorted(other_forms)


def _is_other_form(folder: str, at_top: bool) -> bool:
    return folder == "__pycache__" or (at_top and bool(folder.lower() in _OTHER_FORMS or _OF_TRAINING.match(folder)))


def is_small(name: str, size_bytes: int) -> bool:
    """Whether a file is of those that settings, tokenizers and cards are made of: nobody waits long for it."""
    (found, _), top_level = _sorted_out([name]), "/" not in name
    weights = name.endswith(".safetensors") or (top_level and name.endswith(_WEIGHT_SUFFIXES))
    return bool(found) and size_bytes <= _MAX_SMALL_BYTES and name.endswith(_SMALL) and not weights


def is_unfinished(name: str) -> bool:
    """Whether a file is what a download leaves while it is under way."""
    return name.endswith(_UNFINISHED)


def _is_left_out(name: str) -> bool:
    is_copy = is_unfinished(name) or _SECOND_COPY.search(name) is not None
    return (
        is_copy
        or name == ADAPTER_NAME
        or ("/" not in name and name.lower().endswith((*_WEIGHT_SUFFIXES, _WEIGHT_INDEX)))
    )


def copy_side_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy `names` (from `side_files`) byte for byte; links out of the source folder are refused."""
    for name in names:
        origin, destination = resolve_inside(source, name), target / name
        with stopping(destination):
            destination.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            copy_file_durably(origin, destination)
            for folder in (destination.parent, *destination.parent.parents):
                fsync_folder(folder)  # also those between, which hold the names of the others
                if folder == target:
                    break
