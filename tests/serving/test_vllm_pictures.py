"""Images become the patches that vLLM makes of the same files, but for the colours' mean and deviation, which it has
from another model than preprocessor_config.json names: they are given to ours here."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engine_cases import PYTHON
from omni import omni_folder
from PIL import Image

from mimoquant.calibration.pictures import read_picture, read_settings
from mimoquant.model.tower_config import read_tower_config

pytestmark = pytest.mark.engine
SIZES = [(32, 32), (32, 200), (33, 47), (64, 96), (97, 223), (150, 100), (400, 300), (40, 1999), (513, 511)]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def files(folder: Path) -> list[Path]:
    """Every size, kind of file and kind of pixel that is read."""
    rng, out = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
        mode = ("RGB", "RGBA", "L", "LA", "P", "1")[number % 6]
        kind = {"RGB": ("PNG", "JPEG", "BMP", "WEBP")[number // 6], "P": "GIF"}.get(mode, "PNG")
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        options = {"exif": exif} if kind in ("PNG", "JPEG") else {}
        out.append(folder / f"{number}.{kind.lower()}")
        image = image.convert("RGB") if mode == "P" else image  # a palette is made of no other
        image.convert(mode).save(out[-1], kind, **options)
    return out


def test_patches_are_those_of_vllm(tmp_path: Path) -> None:
    folder = omni_folder(tmp_path / "model")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | IMAGENET))
    config = json.loads((folder / "config.json").read_text())
    settings = read_settings(folder, config, read_tower_config(config, "here").need_vision())
    named = files(tmp_path)
    job = {"files": [str(file) for file in named], "limits": [settings.min_pixels, settings.max_pixels]}
    (tmp_path / "job.json").write_text(json.dumps(job | {"out": str(tmp_path / "out.npz")}))
    script = Path(__file__).with_name("vllm_pictures.py")
    subprocess.run([str(PYTHON), str(script), str(tmp_path / "job.json")], check=True, capture_output=True)
    theirs = np.load(io.BytesIO((tmp_path / "out.npz").read_bytes()))
    for number, file in enumerate(named):
        ours = read_picture(file.read_bytes(), settings, file.name)
        assert theirs[f"grid {number}"].tolist() == list(ours.grid), file
        np.testing.assert_allclose(ours.patches, theirs[f"patches {number}"], atol=1e-5, err_msg=str(file))
