"""What a message names as its image or sound → bytes → the medium, and the placeholders that stand for it in the ids.

Key idea: data names files of its own folder and no other. A name is resolved once, what it leads to is held against
the folder of the data, and that very file is read; a data URL is bytes that lie in the record. Nothing is fetched.
Sound comes as the codes that the model reads, a plain .npy; the tokenizer that makes them is a network of its own.

Left out: video, waveforms. Reference: RFC 2397 (data URLs); the parts of OpenAI's and transformers' messages.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from mimoquant.calibration.conversations import Address
from mimoquant.calibration.pictures import PictureFile, PictureSettings, read_picture, read_settings
from mimoquant.calibration.tokenizer import one_line
from mimoquant.checkpoint.folders import lies_inside, open_resolved
from mimoquant.checkpoint.hf_files import CONFIG_NAME
from mimoquant.checkpoint.index import read_json_inside
from mimoquant.errors import CheckpointError
from mimoquant.model.media import Medium, Picture, Placed, Sound, placeholder, sound_tokens, tokens_of
from mimoquant.model.tower_config import AudioConfig, TowerConfig, read_tower_config

MAX_BYTES = 2**26  # of a file
_SHOWN = 80  # characters of an address
_NPY = b"\x93NUMPY"
_HEADS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_WAVES = {b"RIFF": "a WAV file", b"fLaC": "a FLAC file", b"OggS": "an Ogg file", b"ID3": "an MP3 file"}


class DataFolder(NamedTuple):
    """Where a data file lies, and the folder that was given as data, which nothing may lead out of."""

    place: Path
    root: Path


class MediaReader:
    """Reads images and sounds as the model of a checkpoint takes them. What that folder says of them is read when the
    first is, and so are Pillow and torch."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def towers(self) -> TowerConfig:
        return read_tower_config(self._config, f"{self.checkpoint}/{CONFIG_NAME}")

    @cached_property
    def _config(self) -> dict[str, object]:
        return read_json_inside(self.checkpoint, CONFIG_NAME)

    @cached_property
    def pictures(self) -> PictureSettings:
        return read_settings(self.checkpoint, self._config, self.towers.need_vision())

    @property
    def told(self) -> list[str]:
        """How images were read, where any was."""
        return [self.pictures.told] if "pictures" in vars(self) else []

    def read(self, address: Address, folder: DataFolder, where: str) -> Medium:
        """Raises CheckpointError: the address leads elsewhere, or what it names cannot be read. UsageError: Pillow is
        missing."""
        settings = self.pictures if address.kind == "image" else None
        sizes = self.towers.need_audio() if address.kind == "audio" else None
        data = _bytes(address, folder, where)
        where = f"{where}, {address.kind} {_short(address.target)}"
        if settings is not None:
            return read_picture(data, settings, where)
        assert sizes is not None
        return self._sound(data, sizes, where)

    def _sound(self, data: bytes, sizes: AudioConfig, where: str) -> Sound:
        sound = Sound(_codes(data, sizes, where, self.checkpoint))
        try:
            sound_tokens(sound, self.towers)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        return sound

    def laid(self, ids: list[int], media: Sequence[Medium], where: str) -> Laid:
        """The ids with each placeholder repeated as often as its medium has tokens. A template writes one for each.

        Raises CheckpointError: the ids have others than the media call for.
        """
        wanted = [placeholder(medium, self.towers) for medium in media]
        marks = set(wanted)
        found = [token for token in ids if token in marks]
        if found != wanted:
            raise CheckpointError(
                f"{where}: has {len(wanted)} images and sounds, and its text as the chat template writes it has "
                f"{len(found)} placeholders, or in another order",
                hint="the template has to write one for each, and no text may spell one",
            )
        out: list[int] = []
        placed: list[Placed] = []
        for token in ids:
            if token in marks:
                medium = media[len(placed)]
                placed.append(Placed(len(out), self._tokens(medium), medium))
                out += [token] * placed[-1].tokens
            else:
                out.append(token)
        return Laid(out, tuple(placed))

    def _tokens(self, medium: Medium) -> int:
        """Of a file that was looked at already, without its patches."""
        return medium.tokens if isinstance(medium, PictureFile) else tokens_of(medium, self.towers)


class Laid(NamedTuple):
    """Ids, and what stands in place of some."""

    ids: list[int]
    media: tuple[Placed, ...]


def content_digest(medium: Medium) -> str:
    """sha256 in hex over pixels or codes, which are the same whatever kind of file holds them and however it is cut."""
    if isinstance(medium, PictureFile):
        return medium.digest
    values = medium.patches if isinstance(medium, Picture) else medium.codes
    return hashlib.sha256(f"{values.shape}\n".encode() + values.tobytes()).hexdigest()


def media_digest(media: Iterable[Placed]) -> str:
    """sha256 over where media stand and what towers get of them; for the hash of a sequence."""
    told = hashlib.sha256()
    for start, tokens, medium in media:
        made = f" {medium.grid}" if isinstance(medium, Picture) else ""
        made += f" {medium.settings}" if isinstance(medium, PictureFile) else ""
        told.update(f"{start} {tokens} {content_digest(medium)}{made}\n".encode())
    return told.hexdigest()


# --- addresses to bytes -----------------------------------------------------------------------------------------------


def _short(target: str) -> str:
    return target if len(target) <= _SHOWN else f"{target[: _SHOWN // 2]}..."


def _bytes(address: Address, folder: DataFolder, where: str) -> bytes:
    target, kind = address.target, address.kind
    if target.startswith("data:"):
        return _in_record(target, where)
    scheme, colon, _ = target.partition("://")
    if colon and scheme.isalnum() and scheme != "file":
        raise CheckpointError(
            f"{where}: names its {kind} by {_short(target)}, and nothing is fetched",
            hint="download it into the folder of the data, and name it by its path",
        )
    return _in_folder(unquote(target.removeprefix("file://")) if scheme == "file" else target, folder, where)


def _in_record(url: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise CheckpointError(f"{where}: has a data URL that is not in base64: {_short(url)}")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise CheckpointError(f"{where}: has a data URL of {len(body)} characters, more than {MAX_BYTES} bytes")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{where}: has a data URL that is not base64 ({one_line(error)})") from error


def _in_folder(name: str, folder: DataFolder, where: str) -> bytes:
    """A file of the data's folder, by a path from the file that names it. Links may lead where the folder's own do."""
    if not name or "\0" in name:
        raise CheckpointError(f"{where}: names a file by {name!r}, which is no path")
    try:
        path = folder.place / name
        resolved = path.resolve()
        there = resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, or a loop of links
        raise CheckpointError(f"{where}: names {_short(name)}, which is no path ({one_line(error)})") from error
    if not lies_inside(resolved, folder.root):
        raise CheckpointError(
            f"{where}: names {_short(name)}, which leads out of the data's folder, {folder.root}",
            hint="copy the files there, or give a folder that holds both as data",
        )
    if not there:
        raise CheckpointError(f"{where}: names {_short(name)}, and there is no such file in {folder.place}")
    try:
        with open_resolved(resolved, folder.place, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise CheckpointError(f"{path}: has {size} bytes, more than the {MAX_BYTES} that it may have")
            return file.read(size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


# --- sound ------------------------------------------------------------------------------------------------------------


def _codes(
    data: bytes, sizes: AudioConfig, where: str, checkpoint: Path
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """int64 [frames, codebooks], from a .npy file of nothing else."""
    if not data.startswith(_NPY):
        kind = next((name for head, name in _WAVES.items() if data.startswith(head)), f"begins with {data[:8]!r}")
        raise CheckpointError(
            f"{where}: {'is ' * (kind in _WAVES.values())}{kind}, and sound is read as codes only",
            hint=_how(sizes, checkpoint),
        )
    stream = BytesIO(data)
    try:
        shape, by_columns, dtype = _HEADS[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{where}: is no plain .npy array ({one_line(error)})") from error
    held, need = len(data) - stream.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if dtype.kind not in "iu" or len(shape) != 2 or held != need:
        raise CheckpointError(
            f"{where}: holds {dtype}{list(shape)} in {held} bytes; expected integers [frames, {sizes.codebooks}]"
        )
    values = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")
    return values.astype(np.int64)


def _how(sizes: AudioConfig, checkpoint: Path) -> str:
    """What it would take to use a waveform."""
    name = "audio_tokenizer"
    place = checkpoint / name if (checkpoint / name).is_dir() else f"the {name} of the published checkpoint"
    return f"encode it with {place}, a network that is not run here, and save [frames, {sizes.codebooks}] by numpy.save"
