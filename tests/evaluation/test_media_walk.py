"""Pictures and sounds in the walks of `eval-kl` and `quantize`: their rows stand where they should, and count as said.

What the towers make of a medium is held against vLLM in `tests/model/test_towers.py`, a whole prompt in
`tests/serving/test_vllm_prompt.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from micro import contents, stopped_after
from omni import VOCAB
from ranks import forked
from small_omni import chats, readable_omni

from mimoquant import api, pipeline
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation.divergence import TokenScores
from mimoquant.evaluation.eval_draft import eval_draft
from mimoquant.evaluation.eval_kl import compare, eval_kl, open_layout
from mimoquant.fisher.walk import FisherSettings, predicts, walk_back
from mimoquant.model import layer_stream
from mimoquant.model.media import Picture
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.run.calibrated import HELD_OUT
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.embedding import Embedding
from mimoquant.weights.towers import TowerWeights

LENGTH = 80


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return readable_omni(tmp_path_factory.mktemp("omni") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("data") / "chats", 24)


@pytest.fixture(scope="module")
def tokens(model: Path, data: Path) -> TokenSet:
    held = load_tokens([str(data)], model, sequences=8, tokens=LENGTH, vocab=VOCAB, takes_media=True)
    assert sum(map(bool, held.media)) > 4 and not all(held.media)
    return held


@pytest.fixture
def weights(model: Path) -> Iterator[CheckpointWeights]:
    layout = open_layout(model)
    with CheckpointReader(layout.index) as reader:
        yield CheckpointWeights(reader, layout, torch.device("cpu"))


def scores_of(model: Path, tokens: TokenSet) -> TokenScores:
    """Of a checkpoint against itself."""
    layout = open_layout(model)
    scores = compare(layout, [layout], tokens, noise_floor=False).comparisons[0].scores
    assert scores is not None
    return scores


def shown(tokens: TokenSet) -> np.ndarray:
    """Places [S, T] where media stand."""
    return tokens.walked < 0


# --- rows -------------------------------------------------------------------------------------------------------------


def test_each_row_stands_where_its_medium_does(weights: CheckpointWeights, tokens: TokenSet) -> None:
    walked = torch.from_numpy(tokens.walked)
    made = Embedding(weights, [walked], tokens.media)(walked)
    wanted = weights.tensor("model.embed_tokens.weight").float()[torch.from_numpy(tokens.ids)]
    towers = TowerWeights(weights)
    for sequence, placed in zip(wanted, tokens.media, strict=True):
        for start, count, medium in placed:
            sequence[start : start + count] = towers.rows([medium])[0]
    assert torch.equal(made, wanted)


def test_towers_run_for_the_media_that_batches_name(
    weights: CheckpointWeights, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's, not those of the whole set; and none where a portion is text."""
    asked: list[int] = []
    rows = TowerWeights.rows
    monkeypatch.setattr(TowerWeights, "rows", lambda self, media: asked.append(len(media)) or rows(self, media))
    walked = torch.from_numpy(tokens.walked)
    order = [next(n for n, placed in enumerate(tokens.media) if bool(placed) == some) for some in (True, False)]
    whole = Embedding(weights, [walked], tokens.media)
    for number in order:
        few = Embedding(weights, [walked[number : number + 1]], tokens.media)
        assert torch.equal(few(walked[number : number + 1]), whole(walked[number : number + 1]))
    assert asked == [sum(map(len, tokens.media)), len(tokens.media[order[0]]), 0]


def test_text_is_embedded_as_it_was(weights: CheckpointWeights) -> None:
    ids = torch.arange(12).view(2, 6)
    table = weights.tensor("model.embed_tokens.weight")
    assert torch.equal(Embedding(weights)(ids), table[ids]) and Embedding(weights)(ids).dtype == table.dtype


# --- eval-kl ----------------------------------------------------------------------------------------------------------


def test_what_a_picture_shows_is_seen_by_what_follows_it_alone(model: Path, tokens: TokenSet) -> None:
    number = next(n for n, placed in enumerate(tokens.media) if placed and isinstance(placed[-1].medium, Picture))
    *before, (start, count, medium) = tokens.media[number]
    other = (
        replace(medium, patches=-medium.patches) if type(medium) is Picture else Picture(-medium.patches, medium.grid)
    )
    media = list(tokens.media)
    media[number] = (*before, media[number][-1]._replace(medium=other))
    losses = [
        scores_of(model, t).reference_loss.reshape(len(media), -1)
        for t in (tokens, replace(tokens, media=tuple(media)))
    ]
    changed = losses[0] != losses[1]
    changed &= ~(np.isnan(losses[0]) & np.isnan(losses[1]))
    assert not np.delete(changed, number, axis=0).any() and not changed[number, :start].any()
    assert changed[number, start + count - 1 :].mean() > 0.9


def test_places_before_a_mediums_tokens_are_walked_and_not_counted(model: Path, tokens: TokenSet) -> None:
    scores, follows = scores_of(model, tokens), shown(tokens)[:, 1:].ravel()
    assert (scores.predicts == ~follows).all() and follows.any()
    assert scores.finite.all() and np.isfinite(scores.reference_loss[~follows]).all()
    assert np.isnan(scores.reference_loss[follows]).all()


def test_batches_do_not_matter(model: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scores_of(model, tokens)
    monkeypatch.setattr(layer_stream, "BATCH_TOKENS", LENGTH)
    monkeypatch.setattr(layer_stream, "PORTION_TOKENS", 3 * LENGTH)
    cut = scores_of(model, tokens)
    np.testing.assert_allclose(cut.reference_loss, whole.reference_loss, atol=1e-5)


def test_a_set_that_does_not_hold_what_its_media_take_is_refused(model: Path, tokens: TokenSet) -> None:
    wrong = replace(tokens, ids=tokens.ids.copy())
    wrong.ids[shown(tokens)] = 5
    with pytest.raises(CheckpointError, match="sequence 0: medium 0 is placed on ids that are not its placeholder"):
        eval_kl(model, model, wrong, noise_floor=False)


def test_who_walks_text_only_says_so(model: Path, tokens: TokenSet, data: Path) -> None:
    with pytest.raises(UsageError, match=r"chats\.jsonl has images or sound, and eval-draft walks text only"):
        eval_draft(model, model, tokens)
    with pytest.raises(UsageError, match="has images or sound, and only text is walked here"):
        api.sensitivity(model, "int4-g32-mse", out=data.with_name("out.yaml"), data=[str(data)], tokens=LENGTH)


# --- quantize ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on pictures and sounds, for the loss."""
    made = tmp_path_factory.mktemp("out") / "out"
    api.quantize(model, "gptq-int4-g32", made, device="cpu", data=[str(data)], sequences=16, tokens=LENGTH)
    return made


def test_a_run_calibrates_on_pictures_and_is_measured_on_them(
    model: Path, out: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    held = chats(tmp_path_factory.mktemp("held") / "chats", 12, seed=1)
    told = api.eval_kl(model, out, data=[str(held)], tokens=LENGTH, device="cpu")
    tokens = load_tokens([str(held)], model, sequences=None, tokens=LENGTH, vocab=VOCAB, takes_media=True)
    assert told["tokens"] == int((~shown(tokens)[:, 1:]).sum()) < tokens.ids[:, 1:].size
    assert told["nonfinite_share"] == 0.0 and 0 < told["j"]["mean"] < 0.1
    assert told["noise_floor"] is not None and told["noise_floor"]["relative_noise"] < told["j"]["mean"]
    assert np.isfinite(told["perplexity"]["ratio"])
    contexts = told["by_context"]
    assert sum(part["tokens"] for part in contexts) == told["tokens"] and {"right after an image"} <= {
        part["context"] for part in contexts
    }
    assert sum(part["j"] * part["tokens"] for part in contexts) == pytest.approx(told["j"]["mean"] * told["tokens"])


def test_experts_tokens_are_told_by_what_they_stand_for(model: Path, out: Path, data: Path) -> None:
    """Two experts a token, in every layer; the held-out sequences that choose the shrinkage are not among them."""
    tokens = load_tokens([str(data)], model, sequences=16, tokens=LENGTH, vocab=VOCAB, takes_media=True)
    trains = np.arange(len(tokens.ids)) % HELD_OUT != HELD_OUT - 1
    assert tokens.kinds is not None
    images, sounds = (int((tokens.kinds[trains] == kind).sum()) for kind in (1, 2))
    layers = json.loads((out / "report.json").read_text())["calibration"].values()
    assert images and sounds and layers
    for layer in layers:
        assert (sum(layer["image_tokens"]), sum(layer["sound_tokens"])) == (2 * images, 2 * sounds)
        assert sum(layer["tokens"]) == 2 * int(trains.sum()) * LENGTH


def test_labels_are_drawn_where_the_model_predicts(
    weights: CheckpointWeights, tokens: TokenSet, tmp_path: Path
) -> None:
    fisher = walk_back(weights, tokens, FisherSettings(), tmp_path / "fisher")
    last, first = (fisher.gradients(layer).float() for layer in (3, 1))
    follows = ~predicts(torch.from_numpy(tokens.walked))
    assert (follows.numpy()[:, :-1] == shown(tokens)[:, 1:]).all()
    assert (last[:, follows] == 0).all() and (last[:, ~follows] != 0).any(-1).all()
    assert (first[:, follows] != 0).any()  # later labels say what a picture's tokens should have been


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["output", "kl"])
def test_two_ranks_write_the_bytes_of_one(objective: str, model: Path, data: Path, tmp_path: Path) -> None:
    verb = ("quantize", model, "--recipe", "gptq-int4-g32", "--data", data, "--sequences", "24", "--tokens", LENGTH)
    for ranks in (1, 2):
        asked = (*map(str, verb), "--objective", objective, "--device", "cpu", "--out", str(tmp_path / str(ranks)))
        done = forked(ranks, "rank_driver", *asked)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_bytes(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = load_recipe("gptq-int4-g32").rounded_for("output")
    calibration = recipe.calibration
    assert calibration is not None
    recipe = replace(recipe, calibration=replace(calibration, data=(str(data),), sequences=16, tokens=LENGTH))
    plan = make_plan(model, recipe)
    pipeline.quantize(plan, tmp_path / "whole", device="cpu")
    with stopped_after(4):
        pipeline.quantize(plan, tmp_path / "out", device="cpu")
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")
