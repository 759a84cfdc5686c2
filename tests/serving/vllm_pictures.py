"""Give image files to vLLM's own loader and processor of MiMo-V2-Omni. Runs in vLLM's own environment, not in ours.

    python vllm_pictures.py JOB.json     {"files": [path, ...], "limits": [least, most pixels], "out": file}

`out`: an .npz with `patches N` float32 [n, C * T * P * P] and `grid N` [3] of each file. vLLM's colours' mean and
deviation are constants of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from vllm.multimodal.media.image import ImageMediaIO
from vllm.transformers_utils.processors.mimo_v2_omni import ImageInput, MiMoVLProcessor


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    least, most = job["limits"]
    limits = dict.fromkeys(("video_min_pixels", "video_max_pixels", "video_total_max_pixels"), most)
    processor = MiMoVLProcessor(
        None, patch_size=16, image_min_pixels=least, image_max_pixels=most, fps=1.0, audio_channels=20, **limits
    )
    out = {}
    for number, file in enumerate(job["files"]):
        loaded = ImageMediaIO().load_file(Path(file))
        tensor = processor.process_image(ImageInput(image=loaded.media))
        patches, grid = processor._flatten_visual(tensor, "image")
        out |= {f"patches {number}": patches.numpy(), f"grid {number}": grid.numpy()}
    np.savez(job["out"], **out)


if __name__ == "__main__":
    main()
