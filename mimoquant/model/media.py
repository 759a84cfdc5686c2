"""Pictures and sounds as the towers take them, and where they stand among a sequence's tokens.

Key idea: media change nothing but rows of the embedding. A sequence keeps a placeholder id at each place that a tower's
output goes to, in a run of exactly as many as the tower gives; ids, positions and everything after the embedding are
those of text. So whoever packs sequences needs only `tokens_of`, and whoever walks them only `walked_ids`.

Video is left out. Reference: the published `processor_config`; vLLM 0.32's and SGLang 0.5.23's processors count alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mimoquant.errors import CheckpointError
from mimoquant.model.tower_config import TowerConfig


@dataclass(frozen=True, eq=False)
class Picture:
    """An image cut up as transformers' Qwen2-VL image processor does it.

    patches: float32 [t * h * w, C * T * P * P], normalised, in the processor's order (2 x 2 patches that are merged lie
    together; inside a patch channel, time, row, column). grid: (t, h, w) in patches; t is 1 for an image.
    """

    patches: npt.NDArray[np.float32]
    grid: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Sound:
    """Codes of a speech tokenizer, int64 [frames, codebooks]."""

    codes: npt.NDArray[np.int64]


Medium = Picture | Sound
# What goes through a tower together, and rests between two blocks: 32,768 tokens, in V2.5 .7 and .5 GB. Pictures rest
# on the device, sounds on the host.
PORTION_PATCHES, PORTION_GROUPS = 2**17, 2**15
MLP_PATCHES = 2**13  # of a picture that go through a block's MLP together
QUERY_RUN = 128  # patches that share a stretch of keys in a block with a window, or twice the window where that is more
_M = TypeVar("_M", Picture, Sound)


class Placed(NamedTuple):
    """What stands at `tokens` tokens of a sequence from `start` on, whose ids are placeholders."""

    start: int
    tokens: int
    medium: Medium


def tokens_of(medium: Medium, config: TowerConfig) -> int:
    """How many tokens a picture or a sound takes.

    Raises CheckpointError where the model has no such tower, or the medium is not of its grids or codebooks.
    """
    return picture_tokens(medium, config) if isinstance(medium, Picture) else sound_tokens(medium, config)


def picture_tokens(picture: Picture, config: TowerConfig) -> int:
    """One for each `merge` x `merge` patches, by the grid alone. Raises CheckpointError, see `tokens_of`."""
    merge, (t, h, w) = config.need_vision().merge, picture.grid
    if t < 1 or h < merge or w < merge or h % merge or w % merge:
        raise CheckpointError(f"a picture of {t} x {h} x {w} patches does not split into {merge} x {merge}")
    return t * h * w // merge**2


def sound_tokens(sound: Sound, config: TowerConfig) -> int:
    """One for each `group` frames, the last group filled up. Raises CheckpointError, see `tokens_of`."""
    audio = config.need_audio()
    codes = sound.codes
    if codes.ndim != 2 or codes.shape[1] != audio.codebooks or not len(codes):
        raise CheckpointError(f"a sound has codes {list(codes.shape)}, its model takes [frames, {audio.codebooks}]")
    low, high = codes.min(0), codes.max(0)
    for book, size in enumerate(audio.code_counts):
        if low[book] < 0 or high[book] >= size:
            bad = low[book] if low[book] < 0 else high[book]
            raise CheckpointError(f"a sound has code {bad} in codebook {book}, which has {size}")
    return -(-len(codes) // audio.group)


def in_portions(media: Sequence[_M], sizes: Sequence[int], most: int) -> Iterator[list[_M]]:
    """Media in their order, as many together as have sizes of at most `most` in all; a larger one alone."""
    portion: list[_M] = []
    held = 0
    for medium, size in zip(media, sizes, strict=True):
        if portion and held + size > most:
            yield portion
            portion, held = [], 0
        portion.append(medium)
        held += size
    if portion:
        yield portion


def placeholder(medium: Medium, config: TowerConfig) -> int:
    """The id that stands where a medium does. Raises CheckpointError where config.json does not tell."""
    return config.need_id("image" if isinstance(medium, Picture) else "audio")


def check_sequence(ids: npt.NDArray[np.int64], media: Sequence[Placed], config: TowerConfig, where: str) -> None:
    """Hold a sequence's ids against its media. Raises CheckpointError: other counts or ids than the media need, two
    that overlap, or placeholders without a medium."""
    owned = np.zeros(len(ids), bool)
    for number, (start, count, medium) in enumerate(media):
        wanted, id_ = tokens_of(medium, config), placeholder(medium, config)
        if count != wanted or start < 0 or start + count > len(ids) or owned[start : start + count].any():
            raise CheckpointError(
                f"{where}: medium {number} takes {wanted} tokens and is placed at {start} to {start + count - 1} "
                f"of {len(ids)}, or over another"
            )
        if (ids[start : start + count] != id_).any():
            raise CheckpointError(f"{where}: medium {number} is placed on ids that are not its placeholder {id_}")
        owned[start : start + count] = True
    told = [id_ for id_ in (config.ids.image, config.ids.audio) if id_ is not None]
    stray = np.isin(ids, told) & ~owned
    if media and stray.any():
        place = int(np.argmax(stray))
        raise CheckpointError(f"{where}: token {place} is the placeholder {ids[place]}, and no medium stands there")


def walked_ids(ids: npt.NDArray[np.int64], media: Sequence[Sequence[Placed]]) -> npt.NDArray[np.int64]:
    """Ids [sequences, tokens] as a walk takes them: where media stand, numbers below 0.

    -1 is the first row of the set's first medium, -2 the next, and so on through all media in order. So ids may be cut
    into batches, and each place still says which row of what the towers make belongs there; and no place is taken for
    a token that the model predicts.
    """
    if not any(media):
        return ids
    out, done = ids.copy(), 0
    for row, placed in zip(out, media, strict=True):
        for start, count, _ in placed:
            row[start : start + count] = np.arange(-1 - done, -1 - done - count, -1)
            done += count
    return out
