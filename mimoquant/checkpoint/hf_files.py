"""The files of a Hugging Face folder that are not weights: what is carried over and how.

Key idea: tokenizer, chat template, processor, remote code and sub-folders are copied as bytes, never opened or run.
Weights, the index, config.json and the README have their own writers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mimoquant.checkpoint.index import INDEX_NAME, resolve_inside
from mimoquant.checkpoint.writer import copy_file_durably, fsync_folder, stopping
from mimoquant.errors import CheckpointError

CONFIG_NAME = "config.json"
MODELOPT_CONFIG_NAME = "hf_quant_config.json"  # what ModelOpt says of a checkpoint, beside config.json
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
}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack")


def side_files(folder: Path) -> dict[str, int]:
    """Relative path → bytes of the files to carry over, sorted. Hidden files and top-level weights are not among them.

    Raises CheckpointError for one that cannot be read, leads out of the folder or is no regular file: before anything
    is done, rather than after hours.
    """

    def fail(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error

    names: list[str] = []
    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(root).relative_to(folder)
        for file in files:
            if file.startswith(".") or (file in _WRITTEN_ANEW and relative == Path()):
                continue
            if relative == Path() and file.endswith(_WEIGHT_SUFFIXES):
                continue
            names.append((relative / file).as_posix())
    sizes: dict[str, int] = {}
    for name in sorted(names):
        path = resolve_inside(folder, name)
        if not os.access(path, os.R_OK):
            raise CheckpointError(f"{path}: cannot be read (Permission denied)")
        sizes[name] = path.stat().st_size
    return sizes


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
