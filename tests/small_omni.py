"""A small omni checkpoint with random towers, pictures and sounds for it, and data in which they are."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from micro import edit_json
from omni import MARKS, VOCAB, omni_folder
from PIL import Image

from mimoquant.model.media import Picture, Sound
from mimoquant.synthetic.checkpoint import SynthSizes, synth

SIZES = SynthSizes(
    layers=4,
    hidden=32,
    experts=8,
    top_k=2,
    expert_intermediate=32,
    dense_intermediate=64,
    vocab=256,
    heads=4,
    kv_heads=2,
)
WIDTH, CODEBOOKS, CODES = 96, 4, 16  # of a patch; of its sounds
GRIDS = ((1, 2, 2), (1, 4, 6), (1, 10, 6), (1, 4, 22), (2, 4, 8))
FRAMES = (1, 4, 9)


def omni_checkpoint(out: Path) -> Path:
    """A tiny model in V2.5's layout; equal at every call."""
    synth(out, "v2.5", sizes=SIZES)
    return out


def readable_omni(out: Path) -> Path:
    """One whose folder has what data is read with: a tokenizer with marks for media, a template, an image processor."""
    synth(out, "v2.5", sizes=replace(SIZES, vocab=VOCAB))
    beside = omni_folder(out.with_name(f"{out.name}-beside"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(beside / name, out / name)
    shutil.rmtree(beside)
    names = ("vision_start", "vision_end", "image", "audio_start", "audio_end", "audio")
    ids = {f"{name}_token_id": VOCAB - len(MARKS) + number for number, name in enumerate(names)}

    def mark(config: dict[str, Any]) -> None:
        config |= {name: ids[name] for name in config.keys() & ids.keys()}
        config["processor_config"] |= ids

    edit_json(out / "config.json", mark)
    edit_json(out / "preprocessor_config.json", lambda held: held.update(patch_size=4))
    return out


def chats(folder: Path, count: int, seed: int = 0) -> Path:
    """Data: chats of which most show a picture of some size, some let a sound be heard, and every fourth is text."""
    folder.mkdir()
    draw, records = np.random.default_rng(seed), []
    for number in range(count):
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"What is number {number}? " + "Say it plainly. " * 4}]
        if number % 4 != 3:
            height, width = (8 * int(side) for side in draw.integers(2, 5, 2))
            Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
            parts.insert(0, {"type": "image", "image": f"{number}.png"})
        if number % 4 == 1:
            np.save(folder / f"{number}.npy", draw.integers(0, CODES, (int(draw.integers(3, 14)), CODEBOOKS)))
            parts.append({"type": "audio", "audio": f"{number}.npy"})
        answer = {"role": "assistant", "content": f"It is the {number}th of {count}, and there is no more to it."}
        records.append({"messages": [{"role": "user", "content": parts}, answer]})
    data = folder / "chats.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return data


def pictures() -> list[Picture]:
    """Of several sizes: a single token; less than a window of patches and more, along rows and columns; two frames."""
    stream = np.random.Generator(np.random.SFC64(1))
    return [Picture(_values(stream, int(np.prod(grid)), WIDTH), grid) for grid in GRIDS]


def sounds() -> list[Sound]:
    """A frame alone, a whole group, and one that is filled up."""
    stream = np.random.SFC64(2)
    return [Sound((stream.random_raw(n * CODEBOOKS) % CODES).astype(np.int64).reshape(n, CODEBOOKS)) for n in FRAMES]


def _values(stream: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Numbers in [-2, 2) with few digits, from bits: numpy promises those to stay as they are."""
    bits = stream.bit_generator.random_raw(rows * width) >> np.uint64(54)
    return (bits.astype(np.float32) / 256 - 2).reshape(rows, width)
