"""How many tokens a picture and a sound take, and what a sequence with media must hold."""

from __future__ import annotations

import numpy as np
import pytest

from mimoquant.calibration.tokens import TokenSet, set_digest
from mimoquant.errors import CheckpointError
from mimoquant.model.media import Medium, Picture, Placed, Sound, check_sequence, tokens_of, walked_ids
from mimoquant.model.tower_config import AudioConfig, MediaIds, TowerConfig, VisionConfig

VISION = VisionConfig(32, 64, 4, 1, 16, 3, 4, 2, 2, 48, (-1,), 3, True)
AUDIO = AudioConfig((16, 4), 4, 2, 32, 4, 64, 48, 640000.0, True)
CONFIG = TowerConfig(VISION, AUDIO, MediaIds(9, 8, None, None, None, None), "config.json")
IMAGE, AUDIO_ID = 9, 8


def picture(t: int, h: int, w: int) -> Picture:
    return Picture(np.zeros((t * h * w, 96), np.float32), (t, h, w))


def sound(frames: int, books: int = 2) -> Sound:
    return Sound(np.zeros((frames, books), np.int64))


@pytest.mark.parametrize(
    ("medium", "tokens"),
    [(picture(1, 2, 2), 1), (picture(1, 4, 6), 6), (picture(3, 4, 2), 6), (sound(1), 1), (sound(4), 1), (sound(9), 3)],
)
def test_tokens_of(medium: Medium, tokens: int) -> None:
    assert tokens_of(medium, CONFIG) == tokens


@pytest.mark.parametrize(
    ("medium", "words"),
    [
        (picture(1, 3, 2), "1 x 3 x 2 patches does not split into 2 x 2"),
        (sound(4, 3), "codes [4, 3], its model takes [frames, 2]"),
        (sound(0), "codes [0, 2]"),
        (Sound(np.array([[0, 3], [15, 4]])), "code 4 in codebook 1, which has 4"),
        (Sound(np.array([[-1, 3]])), "code -1 in codebook 0, which has 16"),
    ],
)
def test_what_a_tower_cannot_take(medium: Medium, words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        tokens_of(medium, CONFIG)
    assert words in str(error.value)


IDS = np.array([1, IMAGE, IMAGE, 2, AUDIO_ID, 3])
PICTURE = picture(1, 2, 4)
MEDIA = (Placed(1, 2, PICTURE), Placed(4, 1, sound(3)))


def test_a_sequence_that_is_right() -> None:
    check_sequence(IDS, MEDIA, CONFIG, "sequence 1")
    check_sequence(IDS, (), CONFIG, "sequence 1")  # of a text-only set: ids are ids


@pytest.mark.parametrize(
    ("ids", "media", "words"),
    [
        (IDS, (Placed(1, 1, picture(1, 2, 4)), MEDIA[1]), "medium 0 takes 2 tokens and is placed at 1 to 1 of 6"),
        (IDS, (MEDIA[0], Placed(5, 2, sound(8))), "medium 1 takes 2 tokens and is placed at 5 to 6 of 6"),
        (IDS, (MEDIA[0], MEDIA[0]), "or over another"),
        (IDS, (Placed(0, 2, picture(1, 2, 4)), MEDIA[1]), "medium 0 is placed on ids that are not its placeholder 9"),
        (IDS, MEDIA[:1], "token 4 is the placeholder 8, and no medium stands there"),
    ],
)
def test_a_sequence_that_is_wrong(ids: np.ndarray, media: tuple[Placed, ...], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        check_sequence(ids, media, CONFIG, "sequence 1")
    assert words in str(error.value)
    assert str(error.value).startswith("sequence 1: ")


def test_a_sets_hash_tells_media_apart_and_text_keeps_its_own() -> None:
    ids = IDS[None]
    plain = set_digest(ids)
    assert plain == set_digest(ids, ((),)) != set_digest(ids, (MEDIA,))
    brighter = (Placed(1, 2, Picture(PICTURE.patches + 1, (1, 2, 4))), MEDIA[1])
    turned = (Placed(1, 2, Picture(PICTURE.patches, (1, 4, 2))), MEDIA[1])
    assert len({set_digest(ids, (media,)) for media in (MEDIA, brighter, turned, MEDIA[:1])}) == 4


def test_the_first_sequences_keep_their_media() -> None:
    ids = np.stack([IDS, IDS, np.arange(10, 16)])
    media = ((), MEDIA, ())
    tokens = TokenSet("test", ids, ("a",) * 3, set_digest(ids, media), ("0", "1", "2"), ("test",), media=media)
    assert tokens.first(2).media == ((), MEDIA)
    assert tokens.first(2).sha256 == set_digest(ids[:2], media[:2])
    assert (tokens.first(1).media, tokens.first(1).sha256) == ((), set_digest(ids[:1]))


def test_a_walk_is_told_which_row_stands_where() -> None:
    ids = np.stack([IDS, np.arange(10, 16), IDS])
    assert walked_ids(ids, ()) is ids
    walked = walked_ids(ids, (MEDIA, (), MEDIA[::-1]))
    assert walked.tolist() == [[1, -1, -2, 2, -3, 3], [10, 11, 12, 13, 14, 15], [1, -5, -6, 2, -4, 3]]
    assert ids[0, 1] == IMAGE
