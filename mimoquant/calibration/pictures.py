"""An image file's bytes → pixels → the patches that a vision tower takes, as the engines that serve it make them.

Key idea: what is served is what is measured. vLLM and SGLang read an image with Pillow, put what is transparent on
white, resize bilinearly without a filter, in float32, and do not ask transformers' processor, which resizes otherwise.
So do we; mean and deviation are those of preprocessor_config.json, whose values SGLang has and vLLM 0.32 has not. An
image whose sides are whole tokens is not resized, and then all of them make the same patches.

Left out: video; colour profiles; what engines read in more than one way (CMYK, 16 bits, several frames, sides below
one token) is refused. Pillow is asked for the formats named here and no other: some of its readers start programs.
Reference: `Qwen2VLImageProcessor` of transformers; vLLM 0.32 and SGLang 0.5.23, processors of MiMo-V2-Omni.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import math
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mimoquant.calibration.tokenizer import one_line
from mimoquant.checkpoint.folders import is_there
from mimoquant.checkpoint.index import read_json_inside
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.media import Picture
from mimoquant.model.tower_config import VisionConfig

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**26  # of an image as it lies there: 200 MB
MAX_RATIO = 200  # of its sides, as in every engine
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_NAME = "preprocessor_config.json"
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor")
_SAID_TWICE = {"patch_size": "patch", "temporal_patch_size": "temporal_patch", "merge_size": "merge"}
_KNOWN: dict[str, tuple[Any, ...]] = {
    "image_processor_type": (None, *_PROCESSORS),
    "do_resize": (None, True),
    "do_rescale": (None, True),
    "do_normalize": (None, True),
    "do_convert_rgb": (None, True),
}


@dataclass(frozen=True)
class PictureSettings:
    """How images become patches. `mean` and `deviation`: of red, green and blue, of values from 0 to 1."""

    vision: VisionConfig
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @property
    def side(self) -> int:
        """Of one token, in pixels."""
        return self.vision.patch * self.vision.merge

    @property
    def told(self) -> str:
        """For the record of what data was made of."""
        version = importlib.metadata.version("pillow")
        return (
            f"images: read by Pillow {version}; resized to {self.min_pixels} to {self.max_pixels} pixels, bilinear; "
            f"mean {', '.join(map(str, self.mean))}; deviation {', '.join(map(str, self.deviation))}"
        )


def read_settings(folder: Path, config: dict[str, Any], vision: VisionConfig) -> PictureSettings:
    """What a checkpoint says of images, in config.json and beside it.

    Raises CheckpointError: it says nothing of mean and deviation, or what is not known here, or contradicts itself.
    """
    where = folder / _NAME
    if not is_there(folder, _NAME):
        raise CheckpointError(
            f"{folder}: has no {_NAME}, which says how images become numbers",
            hint="copy it beside config.json: the engines' own values differ from each other",
        )
    keys = read_json_inside(folder, _NAME)
    for key, known in _KNOWN.items():
        if keys.get(key) not in known:
            raise CheckpointError(f"{where}: {key} is {keys[key]!r}, known is {' or '.join(map(repr, known[1:]))}")
    factor = keys.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"{where}: rescale_factor is {factor!r}, known is 1/255")
    if vision.channels != 3:
        raise CheckpointError(f"{folder}/config.json: the vision tower takes {vision.channels} colours, known is 3")
    for key, name in _SAID_TWICE.items():
        ours = getattr(vision, name)
        if keys.get(key, ours) != ours:
            raise CheckpointError(f"{where}: {key} is {keys[key]!r}, and config.json makes it {ours}: which holds?")
    unit = (vision.patch * vision.merge) ** 2
    beside = config.get("processor_config") or {}
    least, most = (
        _pixels(beside.get(key), default, f"{folder}/config.json: processor_config.{key}")
        for key, default in (("image_min_pixels", 4 * unit), ("image_max_pixels", 4096 * unit))
    )
    if most < max(least, unit):
        raise CheckpointError(f"{folder}/config.json: images have at least {least} pixels and at most {most}")
    return PictureSettings(vision, least, most, _colours(keys, "image_mean", where), _colours(keys, "image_std", where))


def _pixels(value: Any, default: int, where: str) -> int:
    """The engines' default where none is told."""
    if value is None:
        return default
    if type(value) is not int or not 0 < value < 2**31:
        raise CheckpointError(f"{where} is {value!r}, expected a number of pixels")
    return value


def _colours(keys: dict[str, Any], key: str, where: Path) -> tuple[float, float, float]:
    value = keys.get(key)
    if isinstance(value, list) and len(value) == 3 and all(type(item) in (int, float) for item in value):
        red, green, blue = map(float, value)
        if min(red, green, blue) >= 0 and max(red, green, blue) <= 1 and (key == "image_mean" or red * green * blue):
            return red, green, blue
    raise CheckpointError(f"{where}: {key} is {value!r}, expected three numbers from 0 to 1")


# --- bytes to pixels --------------------------------------------------------------------------------------------------


def decoded(data: bytes, where: str) -> Pixels:
    """The pixels of an image file, upright, on white.

    Raises CheckpointError: it is no image of a known format, damaged, too large, or may be read in several ways.
    UsageError: Pillow is missing.
    """
    image_module, operations = _pillow(where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at below, and of odd metadata
            image = image_module.open(BytesIO(data), formats=FORMATS)
            _check(image, where)
            image.load()
            with contextlib.suppress(Exception):  # as vLLM: an image whose metadata is damaged stands as it is
                image = operations.exif_transpose(image)
            return np.array(_on_white(image, image_module), np.uint8)
    except image_module.UnidentifiedImageError as error:
        raise CheckpointError(
            f"{where}: is no image, or a damaged one; it begins with {data[:8]!r}",
            hint=f"formats that are read are {', '.join(FORMATS)}",
        ) from error
    except image_module.DecompressionBombError as error:
        raise CheckpointError(f"{where}: has more than the {MAX_PIXELS} pixels that an image may have") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        raise CheckpointError(f"{where}: is damaged ({one_line(error)})", hint="copy or save the file again") from error


def _pillow(where: str) -> tuple[Any, Any]:
    try:
        return importlib.import_module("PIL.Image"), importlib.import_module("PIL.ImageOps")
    except ImportError as error:
        raise UsageError(
            f"{where}: reading images needs the package Pillow", hint="pip install 'mimoquant[omni]'"
        ) from error


def _check(image: Any, where: str) -> None:
    """Of the header, before any pixel is read."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise CheckpointError(
            f"{where}: has {width} x {height} pixels, more than the {MAX_PIXELS} that an image may have",
            hint="models scale images down to far fewer: save it smaller",
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise CheckpointError(
            f"{where}: has {width} x {height} pixels; no engine takes sides of more than {MAX_RATIO} to 1",
            hint="cut it into several images",
        )
    if image.mode not in _MODES:
        raise CheckpointError(
            f"{where}: has pixels of the kind {image.mode}, of which readers make different colours",
            hint="save it as RGB with 8 bits a colour",
        )
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise CheckpointError(
            f"{where}: is animated, with {frames} frames; video cannot be read", hint="save the frame that is meant"
        )


def _on_white(image: Any, image_module: Any) -> Any:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        out = image_module.new("RGB", image.size, (255, 255, 255))
        out.paste(image, mask=image.getchannel("A"))
        return out
    return image.convert("RGB")


# --- pixels to patches ------------------------------------------------------------------------------------------------


class PictureFile(Picture):
    """A picture kept as its file has it: patches take a hundred times as much memory, and are made when asked for.

    `digest`: sha256 over its pixels, in hex, whatever the format of the file.
    """

    digest: str
    settings: PictureSettings
    _data: bytes
    _where: str

    def __init__(self, data: bytes, where: str, settings: PictureSettings, grid: tuple[int, int, int], digest: str):
        held = {"grid": grid, "digest": digest, "settings": settings, "_data": data, "_where": where}
        for name, value in held.items():
            object.__setattr__(self, name, value)  # it is frozen

    @property
    def tokens(self) -> int:
        return self.grid[1] * self.grid[2] // self.settings.vision.merge**2

    @property
    def patches(self) -> npt.NDArray[np.float32]:
        return picture(decoded(self._data, self._where), self.settings).patches


def read_picture(data: bytes, settings: PictureSettings, where: str) -> PictureFile:
    """Raises CheckpointError and UsageError as `decoded`; CheckpointError also for sides below one token."""
    pixels = decoded(data, where)
    height, width, _ = pixels.shape
    if min(height, width) < settings.side:
        raise CheckpointError(
            f"{where}: has {width} x {height} pixels; one token takes {settings.side} x {settings.side}",
            hint="enlarge it: engines do so in different ways",
        )
    high, wide = resized(height, width, settings)
    grid = (1, high // settings.vision.patch, wide // settings.vision.patch)
    digest = hashlib.sha256(f"{height} {width}\n".encode() + pixels.tobytes()).hexdigest()
    return PictureFile(data, where, settings, grid, digest)


def resized(height: int, width: int, settings: PictureSettings) -> tuple[int, int]:
    """Whole tokens nearest to the size, within the limits of pixels; as `smart_resize` of transformers and engines."""
    side = settings.side
    high, wide = round(height / side) * side, round(width / side) * side
    if high * wide > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        high, wide = (max(side, math.floor(length / shrink / side) * side) for length in (height, width))
    elif high * wide < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        high, wide = (math.ceil(length * grow / side) * side for length in (height, width))
    return high, wide


def picture(pixels: Pixels, settings: PictureSettings) -> Picture:
    """Patches in the order of transformers' processor: merged ones together; in each channel, time, row, column."""
    import torch  # text alone needs none

    vision, (height, width) = settings.vision, resized(pixels.shape[0], pixels.shape[1], settings)
    values = torch.from_numpy(pixels).permute(2, 0, 1).float()[None]
    values = torch.nn.functional.interpolate(values, (height, width), mode="bilinear", align_corners=False)
    mean, deviation = (255.0 * torch.tensor(of)[:, None, None] for of in (settings.mean, settings.deviation))
    planes = values.sub_(mean).div_(deviation)[0]
    patch, merge = vision.patch, vision.merge
    rows, columns = height // patch, width // patch
    cut = planes.view(3, rows // merge, merge, patch, columns // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    out = planes.new_empty(*cut.shape[:5], vision.temporal_patch, patch, patch)
    out.copy_(cut[:, :, :, :, :, None])
    return Picture(out.view(rows * columns, vision.patch_width).numpy(), (1, rows, columns))
