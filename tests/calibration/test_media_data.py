"""Images and sounds in data: placeholders where the model has them, never cut; what cannot be read, in a sentence."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from omni import CLIP_MEAN, CLIP_STD, VOCAB, omni_folder
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mimoquant import micro_checkpoint
from mimoquant.calibration import media_files, pictures
from mimoquant.calibration.fingerprints import Fingerprints
from mimoquant.calibration.pictures import decoded, picture, read_settings, resized
from mimoquant.calibration.records import notes
from mimoquant.calibration.tokenizer import load_tokenizer
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.folders import lies_inside
from mimoquant.errors import CheckpointError, MimoquantError, UsageError
from mimoquant.model.media import Picture, Sound, check_sequence
from mimoquant.model.tower_config import read_tower_config

SAY = "What does it show? Tell me all of it, from left to right and from the top down."
ANSWER = "It shows a square, and beside it another one, and no words at all."


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection or look-up is a failure, in every test of this file."""

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError(f"reached for the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return omni_folder(tmp_path_factory.mktemp("omni"))


def settings_of(folder: Path) -> pictures.PictureSettings:
    config = json.loads((folder / "config.json").read_text())
    return read_settings(folder, config, read_tower_config(config, "here").need_vision())


def pixels(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def array(codes: npt.NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, codes)
    return out.getvalue()


def ask(*parts: Any) -> dict[str, Any]:
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]}


def image(address: str) -> dict[str, Any]:
    return {"type": "image", "image": address}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(data: Path, folder: Path, tokens: int = 64, sequences: int | None = None, takes: bool = True) -> TokenSet:
    return load_tokens([str(data)], folder, sequences=sequences, tokens=tokens, vocab=VOCAB, takes_media=takes)


# --- pixels to patches ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(96, 96), (128, 320), (64, 160)])
def test_patches_are_those_of_the_library_that_the_config_names(omni: Path, height: int, width: int) -> None:
    """Where nothing has to be resized, which engines do otherwise than transformers."""
    transformers = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    settings, values = settings_of(omni), pixels(height, width)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(omni)
    theirs = processor([Image.fromarray(values)], min_pixels=1024, max_pixels=10**6, return_tensors="np")
    ours = picture(values, settings)
    assert ours.patches.dtype == np.float32 and ours.patches.shape == (height * width // 256, 1536)
    assert theirs["image_grid_thw"].tolist() == [list(ours.grid)]
    np.testing.assert_allclose(ours.patches, theirs["pixel_values"], atol=2e-6)


@pytest.mark.slow
def test_sizes_are_those_of_the_library(omni: Path) -> None:
    transformers = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    settings = settings_of(omni)
    for height in (*range(32, 400, 13), 1999, 6000):
        for width in (32, 33, 47, 48, 49, 333, 1000, 4097):
            if max(height, width) <= 200 * min(height, width):
                theirs = transformers.smart_resize(height, width, 32, settings.min_pixels, settings.max_pixels)
                assert resized(height, width, settings) == theirs


def test_an_image_is_resized_as_engines_do(omni: Path) -> None:
    """Bilinear between the two nearest pixels of each axis, their centres mapped on each other, in floating point."""
    settings, values = settings_of(omni), pixels(150, 100)
    height, width = resized(150, 100, settings)
    assert (height, width) == (160, 96)

    def taken(of: int, into: int) -> npt.NDArray[np.float64]:
        place = np.maximum((np.arange(into) + 0.5) * of / into - 0.5, 0)
        low = place.astype(int)
        out = np.zeros((into, of))
        out[np.arange(into), low] = 1 - (place - low)
        out[np.arange(into), np.minimum(low + 1, of - 1)] += place - low
        return out

    expected = np.einsum("ah,hwc,bw->cab", taken(150, height), values, taken(100, width))
    mean, deviation = (255 * np.array(of)[:, None, None] for of in (CLIP_MEAN, CLIP_STD))
    found = picture(values, settings)
    rows, columns = height // 16, width // 16
    cut = found.patches.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 16, 16)
    assert (cut[:, :, :, :, :, 0] == cut[:, :, :, :, :, 1]).all()  # an image is two equal frames
    planes = cut[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, height, width)
    np.testing.assert_allclose(planes, (expected - mean) / deviation, atol=2e-5)


def test_what_is_transparent_is_white_and_a_camera_stands_upright() -> None:
    clear = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    assert (decoded(encoded(clear), "here") == 255).all()
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (decoded(encoded(palette, transparency=0), "here") == [10, 20, 30]).all()
    values = pixels(32, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = decoded(encoded(Image.fromarray(values), exif=exif), "here")
    assert (turned == np.rot90(values, -1)).all()


# --- messages to sequences --------------------------------------------------------------------------------------------


def test_placeholders_stand_for_what_is_shown(omni: Path, tmp_path: Path) -> None:
    encode = load_tokenizer(omni).encode
    (tmp_path / "a.png").write_bytes(encoded(pixels(64, 96)))
    codes = np.random.default_rng(0).integers(0, 32, (10, 20))
    sound = "data:application/octet-stream;base64," + base64.b64encode(array(codes)).decode()
    data = write(tmp_path / "a.jsonl", ask("One: ", image("a.png"), SAY, {"type": "audio", "audio": sound}))
    text = "<|im_start|>user\nOne: {}" + SAY + "{}<|im_end|>\n<|im_start|>assistant\n" + ANSWER + "<|im_end|>\n"
    pictured, heard = "<|vision_start|>{}<|vision_end|>", "<|mimo_audio_start|>{}<|mimo_audio_end|>"
    expected = encode(text.format(pictured.format(6 * "<|image_pad|>"), heard.format(3 * "<|audio_pad|>")))
    found = load(data, omni, tokens=len(expected))
    assert found.ids.tolist() == [expected]
    (first, second) = found.media[0]
    assert isinstance(first.medium, Picture) and first.tokens == 6 and first.medium.grid == (1, 4, 6)
    assert isinstance(second.medium, Sound) and second.tokens == 3 and (second.medium.codes == codes).all()
    np.testing.assert_array_equal(first.medium.patches, picture(pixels(64, 96), settings_of(omni)).patches)
    config = json.loads((omni / "config.json").read_text())
    check_sequence(found.ids[0], found.media[0], read_tower_config(config, "here"), "here")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "b/a.png"}},
        {"type": "image_url", "image_url": "b/a.png"},
        {"type": "input_image", "image_url": "b/../b/a.png"},
        {"type": "image", "path": "b/a.png", "url": None},
        {"image": "b/a.png"},
        {"type": "image", "image": {"bytes": None, "path": "b/a.png"}},
    ],
)
def test_ways_to_name_an_image(omni: Path, tmp_path: Path, part: dict[str, Any]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.png").write_bytes(encoded(pixels(64, 64)))
    named = load(write(tmp_path / "a.jsonl", ask(part, SAY)), omni, tokens=16)
    url = (tmp_path / "b/a.png").resolve().as_uri()
    whole = load(write(tmp_path / "a.jsonl", ask(image(url), SAY)), omni, tokens=16)
    within = "data:image/png;base64," + base64.b64encode(encoded(pixels(64, 64))).decode()
    assert named.sha256 == whole.sha256 == load(write(tmp_path / "a.jsonl", ask(image(within), SAY)), omni, 16).sha256


def test_no_sequence_cuts_an_image(omni: Path, tmp_path: Path) -> None:
    """Whatever their length: each image whole or not at all, what is left out told."""
    rng = np.random.default_rng(1)
    for number, side in enumerate(range(64, 160, 32)):
        (tmp_path / f"{number}.png").write_bytes(encoded(pixels(side, side, number)))
    records = [ask(image(f"{rng.integers(3)}.png"), SAY[: rng.integers(70)], image("0.png")) for _ in range(30)]
    data = write(tmp_path / "a.jsonl", *records)
    config = read_tower_config(json.loads((omni / "config.json").read_text()), "here")
    for tokens in (17, 32, 50, 64):
        found = load(data, omni, tokens)
        kept = sum(len(placed) for placed in found.media)
        assert 0 < kept <= 60 and len(found.ids) > 5 and 0 < found.skipped < found.ids.size
        for number, placed in enumerate(found.media):
            check_sequence(found.ids[number], placed, config, f"sequence {number}")
        few = load(data, omni, tokens, sequences=5)
        assert (few.ids == found.ids[:5]).all() and few.sha256 == found.first(5).sha256
    with pytest.raises(CheckpointError, match=r"line 1: an image or a sound takes \d+ tokens, and sequences have 8"):
        load(data, omni, 8)


def test_text_alone_is_as_it_was(omni: Path, tmp_path: Path) -> None:
    """An omni model's folder, and that images are taken, change nothing; parts of text neither."""
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": SAY}, "More."]}]}
    data = write(tmp_path / "a.jsonl", {"text": SAY * 9}, parts, {"messages": [{"role": "user", "content": SAY}]})
    plain, asked = load(data, omni, takes=False), load(data, omni)
    assert asked.sha256 == plain.sha256 and asked.media == () and asked.origins == plain.origins
    assert plain.sha256 == hashlib.sha256(plain.ids.astype("<i8").tobytes()).hexdigest()
    assert asked.fingerprints.as_bytes() == plain.fingerprints.as_bytes()


def test_a_set_is_known_by_its_media(omni: Path, tmp_path: Path) -> None:
    """The same words on another image are another set; the same image in another file's format is the same."""
    values = pixels(64, 64)
    sets = []
    for name, data in (("a.png", encoded(values)), ("b.bmp", encoded(values, "BMP")), ("c.png", encoded(values[::-1]))):
        (tmp_path / name).write_bytes(data)
        sets.append(load(write(tmp_path / "a.jsonl", ask(image(name), SAY)), omni, tokens=16))
    one, same, other = sets
    assert one.sha256 == same.sha256 != other.sha256 and one.sequence_hashes != other.sequence_hashes
    assert other.fingerprints.words.tolist() == one.fingerprints.words.tolist()
    assert len(one.fingerprints.media) == 1 and one.fingerprints.media == same.fingerprints.media
    back = Fingerprints.from_bytes(one.fingerprints.as_bytes())
    assert back.as_bytes() == one.fingerprints.as_bytes() and back.media == one.fingerprints.media
    words = Fingerprints.of([], [])
    assert one.fingerprints.share_in(Fingerprints(words.words, words.ids, back.media)) == 1
    assert other.fingerprints.share_in(Fingerprints(words.words, words.ids, back.media)) == 0
    assert [origin.split(" sha256:")[0] for origin in one.origins[-2:]] != one.origins[-2:]
    assert any(origin.startswith("images: read by Pillow") for origin in one.origins)


def test_a_folder_of_data_holds_its_images_and_codes(omni: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(encoded(pixels(64, 64)))
    (tmp_path / "one.codes.npy").write_bytes(array(np.ones((8, 20), np.int16)))
    write(tmp_path / "a.jsonl", ask(image("pictures/a.png"), SAY, {"type": "audio", "audio": "one.codes.npy"}))
    assert [placed.tokens for placed in load(tmp_path, omni).media[0]] == [4, 2]
    assert notes([str(tmp_path)]) == [f"{tmp_path}: 2 images and sounds are read where a message names them"]


# --- what cannot be read ----------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    one, *more = (Image.fromarray(pixels(40, 40, seed)) for seed in range(3))
    return encoded(one, kind, save_all=True, append_images=more)


def text_bomb() -> bytes:
    """A small PNG with a compressed remark of 4 MB."""
    remark = PngInfo()
    remark.add_text("Comment", "a" * 4_000_000, zip=True)
    return encoded(pixels(40, 40), pnginfo=remark)


def wide() -> bytes:
    return encoded(Image.new("L", (20_000, 64)))


STRANGE = {
    "bomb": (lambda: bomb(60_000, 60_000), "more than the 67108864 pixels that an image may have"),
    "larger than the limit": (lambda: bomb(20_000, 5_000), r"20000 x 5000 pixels, more than the 67108864"),
    "cut off": (lambda: encoded(pixels(64, 64))[:-2000], "is damaged"),
    "cut off in its head": (lambda: encoded(pixels(64, 64))[:20], "is damaged|or a damaged one"),
    "jpeg cut off": (lambda: encoded(pixels(64, 64), "JPEG")[:-300], "is damaged"),
    "checksum": (lambda: encoded(pixels(64, 64)).replace(b"IDAT", b"IDAX", 1), "or a damaged one"),
    "1 x 1": (lambda: encoded(pixels(1, 1)), r"has 1 x 1 pixels; one token takes 32 x 32"),
    "20,000 wide": (wide, "20000 x 64 pixels; no engine takes sides of more than 200 to 1"),
    "CMYK": (lambda: encoded(Image.new("CMYK", (40, 40)), "JPEG"), "pixels of the kind CMYK"),
    "16 bits": (lambda: encoded(Image.new("I;16", (40, 40))), "pixels of the kind I;16"),
    "animated GIF": (lambda: frames("GIF"), "is animated, with 3 frames; video cannot be read"),
    "animated PNG": (lambda: frames("PNG"), "is animated, with 3 frames; video cannot be read"),
    "animated WebP": (lambda: frames("WEBP"), "is animated, with 3 frames; video cannot be read"),
    "a remark that swells": (text_bomb, "is damaged"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image, or a damaged one"),
    "a web page": (lambda: b"<html><body>404</body></html>", "it begins with b'<html><b'"),
    "nothing": (lambda: b"", "is no image, or a damaged one"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_images_are_refused_in_a_sentence(name: str, omni: Path, tmp_path: Path) -> None:
    make, told = STRANGE[name]
    (tmp_path / "a.png").write_bytes(make())
    with pytest.raises(CheckpointError, match=told) as caught:
        load(write(tmp_path / "a.jsonl", ask(SAY, image("a.png"))), omni)
    assert "a.jsonl: line 1, image a.png" in str(caught.value) and "\n" not in str(caught.value)


def test_the_name_of_a_file_says_nothing(omni: Path, tmp_path: Path) -> None:
    """The content does, as in every engine: a JPEG may be called .png."""
    (tmp_path / "a.png").write_bytes(encoded(pixels(64, 64), "JPEG"))
    assert load(write(tmp_path / "a.jsonl", ask(image("a.png"), SAY)), omni, 16).media[0][0].tokens == 4


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_read_or_told(seed: int, omni: Path) -> None:
    rng, settings = np.random.default_rng(seed), settings_of(omni)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = encoded(pixels(40, 40), kind)
        for _ in range(12):
            broken = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                broken[place] = rng.integers(256)
            with contextlib.suppress(MimoquantError):
                pictures.read_picture(bytes(broken[: rng.integers(1, len(whole) + 1)]), settings, "here")


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("../out.png", "which leads out of the data's folder"),
        ("/etc/hostname", "which leads out of the data's folder"),
        ("file:///etc/hostname", "which leads out of the data's folder"),
        ("link.png", "link.png, which leads out of the data's folder"),
        ("round.png", "which is no path"),
        ("x" * 5000 + ".png", "which is no path"),
        ("a\0b.png", "which is no path"),
        ("", "which is no path"),
        ("none.png", "there is no such file"),
        (".", "there is no such file"),
        ("https://example.com/a.png", "nothing is fetched"),
        ("s3://bucket/a.png", "nothing is fetched"),
        ("data:image/png,abc", "a data URL that is not in base64"),
        ("data:image/png;base64,a*b", "a data URL that is not base64"),
    ],
)
def test_addresses_that_lead_elsewhere(address: str, told: str, omni: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "out.png").write_bytes(encoded(pixels(64, 64)))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    data = write(folder / "a.jsonl", ask(SAY, image(address)))
    with pytest.raises(CheckpointError, match=told) as caught:
        load(data, omni)
    assert "a.jsonl: line 1" in str(caught.value) and len(str(caught.value)) < 600 + 2 * len(str(tmp_path))


def test_a_folder_that_becomes_a_link_is_not_followed(
    omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of where a name leads and its opening."""
    inner, secret = tmp_path / "data" / "images", tmp_path / "secret"
    for folder in (inner, secret):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(encoded(pixels(64, 64)))
    data = write(tmp_path / "data" / "a.jsonl", ask(SAY, image("images/a.png")))

    def exchanged(path: Path, root: Path) -> bool:
        inside = lies_inside(path, root)
        inner.rename(tmp_path / "moved")
        inner.symlink_to(secret)
        return inside

    monkeypatch.setattr(media_files, "lies_inside", exchanged)
    with pytest.raises(CheckpointError, match="was exchanged while it was being opened"):
        load(data, omni)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"RIFF\0\0\0\0WAVEfmt ", "is a WAV file, and sound is read as codes only"),
        (b"fLaC....", "is a FLAC file"),
        (b"plain words", "begins with b'plain wo'"),
        (array(np.ones((4, 19), np.int64)), r"codes \[4, 19\], its model takes \[frames, 20\]"),
        (array(np.ones((4, 20), np.float32)), r"holds float32\[4, 20\]"),
        (array(np.ones(20, np.int64)), r"holds int64\[20\]"),
        (array(np.full((4, 20), 32)), "has code 32 in codebook 0, which has 32"),
        (array(np.full((4, 20), -1)), "has code -1 in codebook 0"),
        (array(np.ones((0, 20), np.int64)), r"codes \[0, 20\]"),
        (array(np.array([[{}] * 20], object)), "holds object"),
        (array(np.ones((4, 20), np.int64))[:-8], "in 632 bytes"),
        (array(np.ones((4, 20), np.int64)).replace(b"(4, 20)", b"(9**9, 20)"), "no plain .npy array"),
        (b"\x93NUMPY\x01\x00", "no plain .npy array"),
    ],
)
def test_strange_sounds_are_refused_in_a_sentence(data: bytes, told: str, omni: Path, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(CheckpointError, match=told) as caught:
        load(write(tmp_path / "a.jsonl", ask(SAY, {"type": "audio", "audio": "a.npy"})), omni)
    assert "a.jsonl: line 1, audio a.npy" in str(caught.value)


def test_what_a_waveform_would_take(omni: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(omni, tmp_path / "model"))
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF0000WAVE").decode(), "format": "wav"}}
    for place in ("the audio_tokenizer of the published checkpoint", str(folder / "audio_tokenizer")):
        with pytest.raises(CheckpointError) as caught:
            load(write(tmp_path / "a.jsonl", ask(SAY, part)), folder)
        assert place in (caught.value.hint or "") and "[frames, 20]" in (caught.value.hint or "")
        (folder / "audio_tokenizer").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (ask(SAY, {"type": "image"}), "a part of type image with nothing for an address"),
        (ask(SAY, {"type": "image", "image": 3}), "with a whole number for an address"),
        (ask(SAY, {"type": "video", "video": "a.mp4"}), "of type video; only text, images and sound can be read"),
        (ask("<|image_pad|>", image("a.png")), "has 1 images and sounds, and its text .* has 2 placeholders"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]},
            "has media in a column of their own, image",
        ),
    ],
)
def test_messages_whose_media_have_no_place(record: Any, told: str, omni: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(pixels(64, 64)))
    with pytest.raises(CheckpointError, match=told):
        load(write(tmp_path / "a.jsonl", record), omni)


def test_a_template_or_a_model_without_a_place_for_images(omni: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(pixels(64, 64)))
    data = write(tmp_path / "a.jsonl", ask(SAY, image("a.png")))
    with pytest.raises(CheckpointError, match="has no vision_config, so this model takes no pictures"):
        load(data, micro_checkpoint())
    folder = Path(shutil.copytree(omni, tmp_path / "model"))
    shutil.copy(micro_checkpoint() / "tokenizer_config.json", folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"has 1 images and sounds, and its text .* has 0 placeholders"):
        load(data, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json, which says how images become"):
        load(data, folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor'"),
        ({"patch_size": 14}, "patch_size is 14, and config.json makes it 16"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1}, "rescale_factor is 1, known is 1/255"),
        ({"image_mean": [123.0, 116.0, 103.0]}, r"image_mean is \[123.0, 116.0, 103.0\], expected three numbers"),
        ({"image_std": [0, 1, 1]}, "image_std is"),
        ({"image_std": None}, "image_std is None"),
    ],
)
def test_a_config_that_asks_for_something_else(change: dict[str, Any], told: str, omni: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(omni, tmp_path / "model"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=told):
        settings_of(folder)


def test_who_walks_text_only_refuses_images(omni: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(pixels(64, 64)))
    with pytest.raises(UsageError, match="line 1 has images or sound, and only text is walked here"):
        load(write(tmp_path / "a.jsonl", ask(SAY, image("a.png"))), omni, takes=False)


def test_without_pillow_images_are_refused_and_text_is_read(omni: Path, tmp_path: Path) -> None:
    """In a process that has neither Pillow nor torchvision: text asks for neither, nor for torch."""
    (tmp_path / "a.png").write_bytes(encoded(pixels(64, 64)))
    text = write(tmp_path / "text.jsonl", {"text": SAY * 9})
    shown = write(tmp_path / "shown.jsonl", ask(SAY, image("a.png")))
    code = (
        "import sys\nsys.modules |= dict.fromkeys(('PIL', 'PIL.Image', 'torchvision'))\n"
        "from pathlib import Path\nfrom mimoquant.calibration.tokens import load_tokens\n"
        f"folder, asked = Path({str(omni)!r}), dict(sequences=1, tokens=16, vocab=1030, takes_media=True)\n"
        "def load(data): load_tokens([data], folder, **asked)\n"
        f"load({str(text)!r})\nprint('torch' in sys.modules)\n"
        f"try: load({str(shown)!r})\nexcept Exception as error: print(type(error).__name__, error, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "False"
    assert second.startswith("UsageError") and "reading images needs the package Pillow" in second
    assert second.endswith("pip install 'mimoquant[omni]'")
