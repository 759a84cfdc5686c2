"""Acceptance: the numbers against their definitions and against speculative sampling itself, and the verb."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dflash_reference
import numpy as np
import pytest
import torch
import yaml
from dflash_reference import small, write_drafter
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import MICRO, held_out
from mtp_reference import Reference
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation import eval_draft as acceptance
from mimoquant.evaluation.divergence import bootstrap
from mimoquant.evaluation.drafts import BACKBONE, CHAIN, Mtp, choose_draft
from mimoquant.evaluation.eval_draft import DraftScores, compare_drafts, eval_draft, overlap, summarize_drafts
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.model.layer_stream import Stream, walk
from mimoquant.model.served_rounding import FP8, NOTHING, NVFP4, Rounding
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.layer_rounding import layer_roundings


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("draft") / "int4"
    pipeline.quantize(make_plan(MICRO, load_recipe("int4-g128-rtn")), out, device="cpu")
    return out


# --- the numbers ------------------------------------------------------------------------------------------------------

pairs = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.1, 30))


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_acceptance_is_a_share_and_one_minus_the_variation_distance(pair: tuple[int, int, float]) -> None:
    seed, vocab, spread = pair
    z = torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (2, 7, vocab))).float()
    p, q = z.softmax(-1)
    accepted, match = overlap(p, q)
    assert ((accepted >= 0) & (accepted <= 1)).all()
    assert torch.equal(accepted, overlap(q, p)[0])
    distance = (p.double() - q.double()).abs().sum(-1) / 2
    assert (accepted - (1 - distance)).abs().max() < 1e-6
    assert match.tolist() == [
        float(max(range(vocab), key=a.__getitem__) == max(range(vocab), key=b.__getitem__))
        for a, b in zip(p.tolist(), q.tolist(), strict=True)
    ]
    same, matched = overlap(p, p)
    assert (same - 1).abs().max() < 1e-6 and matched.all()


def test_distributions_that_share_nothing_are_never_accepted() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([[0, 0, 0.25, 0.75]])
    assert overlap(p, q)[0].tolist() == overlap(p, q)[1].tolist() == [0]


def test_it_is_what_speculative_sampling_accepts() -> None:
    """A guess x is drawn from q and kept with probability min(1, p(x) / q(x))."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(12)), rng.dirichlet(np.ones(12))
    drawn = rng.choice(12, 200_000, p=q)
    kept = (rng.random(len(drawn)) * q[drawn] < p[drawn]).mean()
    expected = float(overlap(torch.from_numpy(p), torch.from_numpy(q))[0])
    assert 0.2 < expected < 0.9 and abs(kept - expected) < 5 * (0.25 / len(drawn)) ** 0.5


def test_the_accepted_length_counts_a_guess_only_after_all_before_it() -> None:
    rng = np.random.default_rng(1)
    scores = DraftScores(rng.random((3, 4, 3)), rng.integers(0, 2, (3, 4, 3)).astype(float))
    for values, lengths in zip((scores.acceptance, scores.match), scores.lengths(), strict=True):
        for chain, length in zip(values.reshape(-1, 3), lengths.reshape(-1), strict=True):
            a, b, c = chain
            assert length == pytest.approx(a * (1 - b) + 2 * a * b * (1 - c) + 3 * a * b * c)  # E of its distribution


# --- the walk ---------------------------------------------------------------------------------------------------------


def brute_force(
    folder: Path, tokens: TokenSet, depth: int, *, chained: bool, rounding: Rounding = NOTHING
) -> tuple[np.ndarray, np.ndarray]:
    """Both scores from whole logits in float64, a start at a time; the MTP layers are those of `mtp_reference`."""
    judge, layout = Reference(folder), open_layout(folder)
    embedding = judge.read("model.embed_tokens.weight").double().numpy()
    head = judge.read("lm_head.weight").double().numpy()

    def stored(made: np.ndarray) -> np.ndarray:
        return torch.from_numpy(made).bfloat16().double().numpy() if stream.rounding(layers - 1).in_bf16 else made

    with CheckpointReader(layout.index) as reader:
        layers = layout.geometry.layers
        stream = Stream(
            CheckpointWeights(reader, layout, torch.device("cpu")),
            [torch.from_numpy(embedding[tokens.ids]).float()],
            roundings=layer_roundings(reader, layout, rounding),
        )
        walk([stream])
    accepted, match = [], []
    for ids, hidden in zip(tokens.ids, stream.batches[0].double().numpy(), strict=True):
        final = stored(judge.norm(hidden, "model.norm.weight"))
        drafted = judge.drafted(final, embedding[ids], depth, chained=chained)
        for t in range(len(ids) - depth):
            for d in range(1, depth + 1):
                z = stored(np.stack([head @ final[t + d], head @ drafted[d - 1][t]]))
                p, q = np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(
                    -1, keepdims=True
                )
                accepted.append(np.minimum(p, q).sum())
                match.append(p.argmax() == q.argmax())
    shape = (len(tokens.ids), -1, depth)
    return np.reshape(accepted, shape), np.reshape(match, shape)


@pytest.mark.parametrize("draft", [CHAIN, BACKBONE])
def test_scores_equal_brute_force_in_float64(draft: str, int4: Path) -> None:
    tokens = held_out(2, 70)
    ours, theirs = compare_drafts(open_layout(MICRO), open_layout(int4), tokens, Mtp(3, draft))
    for scores, folder in ((ours, MICRO), (theirs, int4)):
        accepted, match = brute_force(folder, tokens, 3, chained=draft == CHAIN)
        assert scores.acceptance.shape == (2, 67, 3)
        assert np.abs(scores.acceptance - accepted).max() < 1e-4
        assert (scores.match == match).mean() > 0.995  # ties within rounding
    assert np.abs(ours.acceptance - theirs.acceptance).max() > 0.01


def test_a_backbone_is_scored_as_it_is_served(int4: Path) -> None:
    """The candidate's inputs and cache are rounded, its MTP layers' are not; the reference stays as it is."""
    tokens, layouts = held_out(2, 40), (open_layout(MICRO), open_layout(int4))
    asked = Rounding(NVFP4, FP8, FP8)
    plain = compare_drafts(*layouts, tokens, Mtp(2))
    told = compare_drafts(*layouts, tokens, Mtp(2), roundings=(NOTHING, asked))
    accepted, match = brute_force(int4, tokens, 2, chained=True, rounding=asked)
    assert np.abs(told[1].acceptance - accepted).max() < 1e-4 and (told[1].match == match).mean() > 0.99
    assert np.abs(told[1].acceptance - plain[1].acceptance).max() > 0.01
    assert np.array_equal(told[0].acceptance, plain[0].acceptance)
    ours, theirs = compare_drafts(layouts[0], layouts[0], tokens, Mtp(2), roundings=(asked, asked))
    assert np.array_equal(ours.acceptance, theirs.acceptance)
    accepted, _ = brute_force(MICRO, tokens, 2, chained=True, rounding=asked)  # FP8 layers: stored in bf16, logits too
    off = np.abs(ours.acceptance - accepted)
    assert np.median(off) < 1e-6 and off.max() < 0.02  # a logit between two bf16 values falls to either


def test_blocks_and_depth_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, tokens = open_layout(MICRO), held_out(4, 40)
    whole = compare_drafts(layout, layout, tokens, Mtp(3))[0]
    monkeypatch.setattr(acceptance, "_LOGITS", 4 * 1024 * 5)  # five starts at a time
    cut = compare_drafts(layout, layout, tokens, Mtp(3))[0]
    assert np.abs(cut.acceptance - whole.acceptance).max() < 1e-5
    shallow = compare_drafts(layout, layout, tokens, Mtp(1))[0]
    assert np.abs(shallow.acceptance[:, :37, 0] - whole.acceptance[..., 0]).max() < 1e-5


def test_a_checkpoint_beside_itself_differs_by_nothing() -> None:
    facts = eval_draft(MICRO, MICRO, held_out(7, 48))
    rows = [
        pair
        for part in (facts, *facts["by_domain"])
        for pair in (
            *(row[key] for row in part["depths"] for key in ("acceptance", "greedy_match")),
            *part["accepted_length"].values(),
        )
    ]
    assert len(rows) == 8 * 8
    for number, pair in enumerate(rows):
        assert pair["reference"] == pair["candidate"] and pair["difference"]["mean"] == 0
        if number < 8:  # of all sequences; a domain has one, and no interval
            assert set(pair["difference"].values()) == {0.0}
    assert facts["depth"] == 3 and facts["starts"] == 7 * 45 and facts["nonfinite_share"] == 0
    assert facts["depths"][0]["acceptance"]["reference"]["mean"] > 0.5  # the layers are trained: by chance it is 1/1024


# --- blocks of a DFlash drafter ---------------------------------------------------------------------------------------

DRAFTER = mimoquant.micro_drafter()


def brute_force_blocks(folder: Path, drafter: Path, tokens: TokenSet) -> tuple[np.ndarray, np.ndarray]:
    """As `brute_force`, by the drafter of `dflash_reference` on hidden states that were kept layer by layer."""
    judge, layout, apart = Reference(folder), open_layout(folder), dflash_reference.Reference(drafter)
    embedding = judge.read("model.embed_tokens.weight").double().numpy()
    head = judge.read("lm_head.weight").double().numpy()
    kept: list[np.ndarray] = []
    with CheckpointReader(layout.index) as reader:
        stream = Stream(
            CheckpointWeights(reader, layout, torch.device("cpu")), [torch.from_numpy(embedding[tokens.ids]).float()]
        )
        walk([stream], lambda number: kept.append(stream.batches[0].double().numpy().copy()))
    depth, accepted, match = apart.special["block_size"] - 1, [], []
    mask = embedding[apart.special["mask_token_id"]] if apart.mask is None else apart.mask
    for at, ids in enumerate(tokens.ids):
        final = judge.norm(kept[-1][at], "model.norm.weight")
        captured = [kept[number][at] for number in apart.special["target_layer_ids"]]
        for t in range(len(ids) - depth):
            drafted = apart.draft(captured, embedding[ids[t + 1]], mask, t)
            p, q = (
                np.exp(z - z.max(-1, keepdims=True)) for z in (final[t + 1 : t + 1 + depth] @ head.T, drafted @ head.T)
            )
            p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
            accepted.append(np.minimum(p, q).sum(-1))
            match.append(p.argmax(-1) == q.argmax(-1))
    shape = (len(tokens.ids), -1, depth)
    return np.reshape(accepted, shape), np.reshape(match, shape)


def blocks_of(folder: Path, tokens: TokenSet, backbone: Path = MICRO) -> DraftScores:
    layout = open_layout(backbone)
    return compare_drafts(layout, layout, tokens, choose_draft([layout], str(folder), None, tokens.ids.shape[1]))[0]


@pytest.mark.slow
def test_blocks_equal_brute_force_in_float64(int4: Path, tmp_path: Path) -> None:
    """Of the trained drafter on both backbones, and of one that has no mask embedding of its own."""
    tokens = held_out(2, 18)
    layouts = open_layout(MICRO), open_layout(int4)
    both = compare_drafts(*layouts, tokens, choose_draft(layouts, str(DRAFTER), None, 18))
    other = write_drafter(tmp_path / "other", small(), mask=False)
    cases = [(both[0], MICRO, DRAFTER), (both[1], int4, DRAFTER), (blocks_of(other, tokens), MICRO, other)]
    for scores, backbone, drafter in cases:
        accepted, match = brute_force_blocks(backbone, drafter, tokens)
        assert scores.acceptance.shape == accepted.shape
        assert np.abs(scores.acceptance - accepted).max() < 1e-4
        assert (scores.match == match).mean() > 0.98
    assert np.abs(both[0].acceptance - both[1].acceptance).max() > 0.01


@pytest.mark.slow
def test_training_is_what_makes_the_drafter_accepted(tmp_path: Path) -> None:
    tokens = held_out(7, 96)
    trained = blocks_of(DRAFTER, tokens)
    config = json.loads((DRAFTER / "config.json").read_text())
    untrained = blocks_of(write_drafter(tmp_path / "untrained", config), tokens)
    lengths = [scores.lengths()[0].mean() for scores in (trained, untrained)]
    assert lengths[0] > 0.4 and lengths[0] > 5 * lengths[1]
    assert trained.acceptance[..., 0].mean() > 2 * untrained.acceptance[..., 0].mean()


def test_the_anchors_embedding_is_the_masks_where_it_is_that_token(tmp_path: Path) -> None:
    """As engines have it, which embed by id."""
    tokens = held_out(1, 16)
    tokens = replace(tokens, ids=np.full_like(tokens.ids, 211))
    drafter = write_drafter(tmp_path / "drafter", small())
    before = blocks_of(drafter, tokens).acceptance
    held = torch.load(drafter / "mask_embedding.pt")
    layout = open_layout(MICRO)
    with CheckpointReader(layout.index) as reader:
        own = CheckpointWeights(reader, layout, torch.device("cpu")).tensor("model.embed_tokens.weight")[211]
    torch.save(held | {"embedding": own.clone()}, drafter / "mask_embedding.pt")
    same = blocks_of(drafter, tokens).acceptance
    (drafter / "mask_embedding.pt").unlink()
    assert np.array_equal(blocks_of(drafter, tokens).acceptance, same) and not np.allclose(before, same)


# --- the summary ------------------------------------------------------------------------------------------------------


def test_intervals_are_paired_and_domains_apart() -> None:
    rng, tokens = np.random.default_rng(2), held_out(14, 16)
    ours = DraftScores(rng.random((14, 13, 3)), rng.integers(0, 2, (14, 13, 3)).astype(float))
    theirs = replace(ours, acceptance=ours.acceptance - 0.125)
    facts = summarize_drafts(ours, theirs, tokens)
    difference = facts["depths"][1]["acceptance"]["difference"]
    assert difference == pytest.approx({"mean": -0.125, "low": -0.125, "high": -0.125})  # a constant has no spread
    side = facts["depths"][1]["acceptance"]["reference"]
    sequence = np.repeat(np.arange(14), 13)
    assert (side["low"], side["high"]) == bootstrap(ours.acceptance[..., 1].reshape(-1), sequence)
    for part in facts["by_domain"]:
        mine = np.array(tokens.domains) == part["domain"]
        assert part["starts"] == 13 * mine.sum()
        assert part["depths"][0]["acceptance"]["reference"]["mean"] == pytest.approx(ours.acceptance[mine, :, 0].mean())


def test_what_is_not_finite_is_counted_and_left_out_on_both_sides() -> None:
    tokens = held_out(7, 16)
    ours = DraftScores(np.full((7, 13, 3), 0.5), np.ones((7, 13, 3)))
    broken = DraftScores(ours.acceptance.copy(), ours.match.copy())
    broken.acceptance[0, :, 2] = np.nan
    facts = summarize_drafts(ours, broken, tokens)
    assert facts["nonfinite_share"] == pytest.approx(1 / 7) and facts["starts"] == 6 * 13
    assert facts["accepted_length"]["sampling"]["candidate"]["mean"] == 0.875
    broken.acceptance[:] = np.nan
    with pytest.raises(CheckpointError, match="no position has finite logits"):
        summarize_drafts(ours, broken, tokens)
    accepted, match = overlap(torch.full((1, 4), torch.nan), torch.full((1, 4), 0.25))
    assert accepted.isnan().all() and match.isnan().all()


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_verb_prints_one_document_or_text(int4: Path) -> None:
    arguments = ["eval-draft", MICRO, int4, "--sequences", "7", "--tokens", "48", "--device", "cpu"]
    told = call(*arguments, "--json", "--depth", "2")
    facts = json.loads(told.stdout)
    assert told.exit_code == 0 and facts["schema_version"] == 1 and facts["draft"] == "mtp"
    assert [row["depth"] for row in facts["depths"]] == [1, 2] and len(facts["by_domain"]) == 7
    assert "layer 4" in told.stderr
    assert facts["rounding"] is None
    text = call(*arguments, "--activations", "fp8", "--reference-as-served").stdout
    rows = [line.split("  ")[0] for line in text.splitlines()]
    assert "rounded      inputs of experts fp8, of FP8 beside them none, KV cache none; the reference: experts" in text
    assert rows.count("acceptance, sampling") == 3 and rows.count("accepted length, greedy") == 1
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_a_drafter_is_reported_like_mtp_layers(int4: Path) -> None:
    arguments = ["eval-draft", MICRO, int4, "--draft", DRAFTER, "--sequences", "7", "--tokens", "48", "--device", "cpu"]
    facts = json.loads(call(*arguments, "--json").stdout)
    assert facts["draft"] == str(DRAFTER) and facts["depth"] == 7 and facts["starts"] == 7 * 41
    assert [row["depth"] for row in facts["depths"]] == list(range(1, 8)) and len(facts["by_domain"]) == 7
    text = call(*arguments).stdout
    assert (
        "of 7 drafted tokens" in text and f"DRAFTER      {DRAFTER}" in text and text.count("acceptance, sampling") == 7
    )
    assert max(map(len, text.splitlines())) <= 100
    same = eval_draft(MICRO, MICRO, held_out(7, 48), draft=str(DRAFTER))
    assert set(same["accepted_length"]["sampling"]["difference"].values()) == {0.0}


def test_mistakes_end_in_one_sentence(int4: Path, tiny_checkpoint: Any, tmp_path: Path) -> None:
    none, one = tiny_checkpoint(name="none"), tiny_checkpoint(name="one", mtp=1)
    other = write_drafter(tmp_path / "other", small(num_target_layers=48))
    cases = [
        (
            ("eval-draft", MICRO, int4, "--draft", "eagle"),
            2,
            "--draft eagle: is neither mtp nor mtp-backbone nor the folder of a drafter",
        ),
        (("eval-draft", MICRO, int4, "--draft", int4.parent), 2, "has no config.json"),
        (("eval-draft", MICRO, int4, "--draft", MICRO), 3, "has no dflash_config, so it is no DFlash drafter"),
        (("eval-draft", MICRO, int4, "--draft", other), 3, "its num_target_layers is 48, the backbone's is 5"),
        (("eval-draft", MICRO, int4, "--draft", DRAFTER, "--depth", "2"), 2, "drafts blocks of 8, so 7 tokens at once"),
        (("eval-draft", MICRO, int4, "--draft", DRAFTER, "--tokens", "7"), 2, "a block of 8 needs at least 8"),
        (("eval-draft", MICRO, int4, "--depth", "4"), 2, "--depth"),
        (("eval-draft", MICRO, int4, "--tokens", "3"), 2, "needs at least 4"),
        (("eval-draft", MICRO, none), 3, "none: has no MTP layers"),
        (("eval-draft", MICRO, one, "--depth", "2"), 2, "one has 1 MTP layers"),
        (("eval-draft", MICRO, one), 3, "is another model than"),
        (("eval-draft", MICRO, int4 / "no"), 2, "not a checkpoint folder"),
        (("eval-draft", MICRO, int4, "--as-served", "vllm:h100", "--kv", "fp8"), 2, "--kv cannot go with it"),
        (("eval-draft", MICRO, int4, "--as-served", "sglang:rtx4090"), 2, "int4 experts is not known here"),
    ]
    for arguments, code, message in cases:
        result = call(*arguments)
        assert (result.exit_code, message in result.output.replace("\n", " ")) == (code, True), result.output
        assert "Traceback" not in result.output and not result.stdout.strip()


def test_calibration_data_is_refused(tmp_path: Path) -> None:
    tokens, out = held_out(7, 64), shutil.copytree(MICRO, tmp_path / "out")
    record = {"mimoquant": {"provenance": {"calibration": CalibrationRecord.of(tokens).as_plain()}}}
    (out / "recipe.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(UsageError, match="shares 7 of 7 sequences"):
        eval_draft(MICRO, out, tokens)
