"""Both towers against vectors that vLLM 0.32's own modules gave, and what must stop a run with media.

`tests/serving/test_vllm_towers.py` asks a real vLLM, and writes the vectors anew (`MIMOQUANT_GOLDEN=write`). They
are of its modules with the published code's LayerNorm before the merger.
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import edit_json
from small_omni import omni_checkpoint, pictures, sounds

import mimoquant.model.audio as audio
import mimoquant.model.vision as vision
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.model.decoder_layer import rms_norm
from mimoquant.model.layout import TOWER_PREFIXES, ModelLayout, Weight
from mimoquant.model.media import Medium, Picture, Sound
from mimoquant.model.tower_config import read_tower_config
from mimoquant.model.tower_layout import audio_rows, check_towers, vision_rows
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.towers import TowerWeights

GOLDEN = Path(__file__).with_name("tower_golden.json")
RELATIVE = 1e-4  # of a medium's rows, as a norm; float32 on both sides, six digits in the file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return omni_checkpoint(tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture
def towers(checkpoint: Path) -> Iterator[TowerWeights]:
    layout = open_layout(checkpoint)
    with CheckpointReader(layout.index) as reader:
        yield TowerWeights(CheckpointWeights(reader, layout, torch.device("cpu")))


@pytest.fixture(scope="module")
def golden() -> dict[str, list[np.ndarray]]:
    held = json.loads(GOLDEN.read_text())
    return {kind: [np.array(rows, np.float32) for rows in of_kind] for kind, of_kind in held.items()}


def distance(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours.numpy() - theirs) / np.linalg.norm(theirs))


def distances(towers: TowerWeights, golden: dict[str, list[np.ndarray]], media: list[Medium]) -> list[float]:
    pairs = zip(towers.rows(media), golden["pictures"] + golden["sounds"], strict=True)
    return [distance(*pair) for pair in pairs]


def every() -> list[Medium]:
    return [*pictures(), *sounds()]


def test_rows_are_those_of_vllm(towers: TowerWeights, golden: dict[str, list[np.ndarray]]) -> None:
    assert max(distances(towers, golden, every())) < RELATIVE


def test_order_and_company_of_media_do_not_matter(towers: TowerWeights) -> None:
    media = every()
    there, back = towers.rows(media), towers.rows(media[::-1])[::-1]
    assert all(torch.equal(*pair) for pair in zip(there, back, strict=True))
    assert torch.equal(towers.rows([media[2]])[0], there[2])


def test_a_long_picture_in_parts_is_the_same(towers: TowerWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    media = pictures()[2:3]
    whole = towers.rows(media)
    monkeypatch.setattr(vision, "MLP_PATCHES", 16)
    monkeypatch.setattr(vision, "QUERY_RUN", 1)  # twice a window, the least
    for ours, theirs in zip(towers.rows(media), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """Of one frame, head by head, as defined."""
    count, heads, width = query.shape
    places = torch.arange(count)
    out = torch.empty(count, heads, width, dtype=query.dtype)
    for head in range(heads):
        of_key = head * key.shape[1] // heads
        scores = query[:, head] @ key[:, of_key].T * width**-0.5
        if sinks is not None:
            scores[:, 0] += sinks[head]
        if window is not None:
            scores[(places[:, None] - places).abs() > window] = float("-inf")
        out[:, head] = scores.softmax(-1) @ value[:, of_key]
    return out.flatten(1)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("side", [2, 16, 18])  # 4 patches; whole runs of 128; 68 in the last one
def test_runs_of_queries_attend_as_defined(side: int, with_sinks: bool, towers: TowerWeights) -> None:
    config = replace(towers.config.need_vision(), heads=4, kv_heads=2, head_dim=16, window=9)
    generator = torch.Generator().manual_seed(side)
    query, key, value = (torch.randn(side * side, heads, 16, generator=generator).double() for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator).double() if with_sinks else None
    places = vision.Places((1, side, side), config, torch.device("cpu"))
    heads = torch.cat((query, key, value), dim=1).float()
    windowed = vision._window_attention(heads, None if sinks is None else sinks.float(), places)
    torch.testing.assert_close(windowed.double(), plain_attention(query, key, value, sinks, 9), rtol=1e-5, atol=1e-6)
    if not with_sinks:
        every = vision._full_attention(heads, config)
        torch.testing.assert_close(every.double(), plain_attention(query, key, value, None, None), rtol=1e-5, atol=1e-6)


Change = Callable[[TowerWeights, pytest.MonkeyPatch], None]


def vision_with(**changes: Any) -> Change:
    def change(towers: TowerWeights, monkeypatch: pytest.MonkeyPatch) -> None:
        towers.config = replace(towers.config, vision=replace(towers.config.need_vision(), **changes))

    return change


def audio_with(**changes: Any) -> Change:
    def change(towers: TowerWeights, monkeypatch: pytest.MonkeyPatch) -> None:
        towers.config = replace(towers.config, audio=replace(towers.config.need_audio(), **changes))

    return change


def without_sinks(towers: TowerWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    made = towers.vision_block
    monkeypatch.setattr(towers, "vision_block", lambda number: replace(made(number), sinks=None))


def rms_norm_before_the_merger(towers: TowerWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM 0.32 has it."""
    monkeypatch.setattr(
        vision.F, "layer_norm", lambda hidden, shape, weight, bias, eps: rms_norm(hidden, weight, eps), raising=True
    )


@pytest.mark.parametrize(
    "wrong",
    [
        without_sinks,
        rms_norm_before_the_merger,
        vision_with(window=1000),
        pytest.param(vision_with(window=5), marks=pytest.mark.slow),
        vision_with(kinds=(-1, 0, 0, 0, 0, -1)),
        audio_with(rope_theta=100.0),
        pytest.param(audio_with(last_norm=False), marks=pytest.mark.slow),
        pytest.param(audio_with(layers=1), marks=pytest.mark.slow),
    ],
)
def test_a_wrong_forward_would_be_found(
    wrong: Change, towers: TowerWeights, golden: dict[str, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(towers, monkeypatch)
    assert max(distances(towers, golden, every())) > 10 * RELATIVE


def test_weights_are_read_once(towers: TowerWeights) -> None:
    reader, media = towers.weights.reader, every()
    towers.rows(media)
    whole = sum(weight.size_bytes for weight in towers.weights.layout.units["towers"])
    assert reader.bytes_read == whole
    towers.rows(media[:1])
    speech = sum(w.size_bytes for w in towers.weights.layout.units["towers"] if not w.name.startswith("visual."))
    assert reader.bytes_read == 2 * whole - speech


def test_a_mergers_biases_are_used_where_they_are(towers: TowerWeights) -> None:
    """Published files have none; against torch's own modules."""
    config, merger = towers.config.need_vision(), towers.merger()
    generator = torch.Generator().manual_seed(0)
    norm, first, second = (
        torch.randn(n, generator=generator) for n in (config.hidden, config.merged, config.out_hidden)
    )
    with_bias = replace(
        merger, norm_bias=norm, first=replace(merger.first, bias=first), second=replace(merger.second, bias=second)
    )
    modules = torch.nn.LayerNorm(config.hidden, 1e-6), *(torch.nn.Linear(1, 1) for _ in range(2))
    weights = merger.norm, merger.first.weight, merger.second.weight
    for module, weight, bias in zip(modules, weights, (norm, first, second), strict=True):
        module.weight, module.bias = torch.nn.Parameter(weight.float()), torch.nn.Parameter(bias)
    hidden = torch.randn(8, config.hidden, generator=generator)
    wide = modules[1](modules[0](hidden).view(2, -1))
    torch.testing.assert_close(
        vision.merged(hidden, with_bias, config), modules[2](torch.nn.functional.gelu(wide)).detach()
    )


@pytest.mark.parametrize(
    ("medium", "words"),
    [
        (Picture(np.zeros((4, 95), np.float32), (1, 2, 2)), "has values [4, 95], its model takes [4, 96]"),
        (Picture(np.zeros((4, 96), np.float32), (1, 2, 4)), "has values [4, 96], its model takes [8, 96]"),
        (Sound(np.array([[0, 0, 0, 16]])), "code 16 in codebook 3, which has 16"),
    ],
)
def test_media_that_are_not_the_models(medium: Medium, words: str, towers: TowerWeights) -> None:
    with pytest.raises(CheckpointError) as error:
        towers.rows([medium])
    assert words in str(error.value)


# --- what stops a run with media --------------------------------------------------------------------------------------


def changed(layout: ModelLayout, change: Callable[[dict[str, Weight]], object]) -> ModelLayout:
    held = {weight.name: weight for weight in layout.units["towers"]}
    change(held)
    return replace(layout, units=layout.units | {"towers": list(held.values())})


def reshaped(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Weight]], object]:
    return lambda held: held.update({name: replace(held[name], info=replace(held[name].info, shape=shape))})


def renamed(name: str, other: str) -> Callable[[dict[str, Weight]], object]:
    return lambda held: held.update({other: replace(held.pop(name), name=other)})


QKV, SINKS = "visual.blocks.1.attn.qkv.weight", "visual.blocks.1.attn.sinks"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop(SINKS), f"{SINKS} is missing, which config.json calls for"),
        (lambda held: held.pop("speech_embeddings.3.weight"), "speech_embeddings.3.weight is missing"),
        (reshaped(QKV, (96, 32)), f"{QKV} is BF16[96, 32], config.json makes it BF16[128, 32]"),
        (reshaped("visual.merger.mlp.0.weight", (64, 128)), "config.json makes it BF16[128, 128]"),
        (renamed(SINKS, "visual.blocks.0.attn.sinks"), f"{SINKS} is missing"),
        (
            lambda held: held.update({"visual.pos": replace(held[QKV], name="visual.pos")}),
            "visual.pos [128, 32] belongs",
        ),
    ],
)
def test_tensors_that_config_does_not_make(checkpoint: Path, change: Any, words: str) -> None:
    layout = open_layout(checkpoint)
    config = read_tower_config(layout.config, "config.json")
    check_towers(layout, config)
    with pytest.raises(CheckpointError) as error:
        check_towers(changed(layout, change), config)
    assert words in str(error.value)


def test_a_tower_of_another_width_is_refused(checkpoint: Path) -> None:
    layout = open_layout(checkpoint)
    config = read_tower_config(layout.config, "config.json")
    wide = replace(config, audio=replace(config.need_audio(), out_hidden=64))
    with pytest.raises(CheckpointError, match=r"audio_config\.out_hidden_size is 64, hidden_size is 32"):
        check_towers(layout, wide)


def test_published_towers_are_what_config_makes(shared: Path) -> None:
    """V2.5's index names the tensors that config.json calls for, all of them and no other."""
    folder = shared / "mimo" / "MiMo-V2.5"
    config = read_tower_config(json.loads((folder / "config.json").read_text()), "config.json")
    names = json.loads(lzma.decompress((folder / "model.safetensors.index.json.xz").read_bytes()))["weight_map"]
    made = [name for name, _ in (*vision_rows(config.need_vision()), *audio_rows(config.need_audio()))]
    assert sorted(made) == sorted(name for name in names if name.startswith(TOWER_PREFIXES))


def test_text_alone_does_not_ask_for_towers(checkpoint: Path, tmp_path: Path) -> None:
    """A tower that nobody can compute is copied all the same."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config["vision_config"].update(hidden_act="gelu"))
    layout = open_layout(folder)
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        with pytest.raises(CheckpointError, match="hidden_act is 'gelu', known is 'silu'"):
            TowerWeights(weights)


def test_media_in_portions_are_the_same(towers: TowerWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rests on the host is bounded; each portion reads the weights once."""
    media, made, blocks = every(), towers.vision_block, list[int]()
    whole = towers.rows(media)
    monkeypatch.setattr(towers, "vision_block", lambda number: blocks.append(number) or made(number))
    monkeypatch.setattr(vision, "PORTION_PATCHES", 100)  # of 4, 24, 60, 88 and 64: the first three, then each alone
    monkeypatch.setattr(audio, "PORTION_GROUPS", 2)
    assert all(torch.equal(*pair) for pair in zip(towers.rows(media), whole, strict=True))
    assert blocks == 3 * list(range(len(towers.config.need_vision().kinds)))
