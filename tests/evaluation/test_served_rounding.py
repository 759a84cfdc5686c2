"""J of rounded activations and caches: what they do to a layer, what of J is due to what, and what stays as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from micro import MICRO, edit_json, held_out
from ranks import forked
from safetensors.torch import save_file
from typer.testing import CliRunner

import mimoquant
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation.divergence import head_divergences, token_divergences
from mimoquant.evaluation.eval_kl import CAUSES, AsServed, EvaluationFile, compare, eval_kl, open_layout
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.model import decoder_layer, layer_stream
from mimoquant.model.decoder_layer import (
    DenseWeights,
    ExpertChunk,
    add_experts,
    attention,
    attention_block,
    dense_mlp,
    rms_norm,
    route,
)
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.layer_stream import Stream, walk
from mimoquant.model.served_rounding import FP8, MXFP8, NONE, NVFP4, LayerRounding, Rounding, rounded
from mimoquant.quant.activations import round_kv_fp8
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.layer_rounding import layer_roundings

FEW = held_out(5, 32)
ALL = Rounding(NVFP4, FP8, FP8)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "out"
    mimoquant.quantize(MICRO, "nvfp4-mse", folder, device="cpu")
    return folder


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_inputs_of_products_are_rounded() -> None:
    """A dense MLP and experts, one product at a time, in the plainest form."""
    hidden, (gate, up, down) = random(5, 64), (random(32, 64, seed=1), random(32, 64, seed=2), random(64, 32, seed=3))
    x = rounded(hidden, FP8)
    inner = rounded(F.silu(x @ gate.T) * (x @ up.T), FP8)
    assert torch.equal(dense_mlp(hidden, DenseWeights(gate, up, down), LayerRounding(mlp=FP8)), inner @ down.T)

    rounding = LayerRounding(experts=NVFP4, down_scale=300.0)
    routing = Routing(torch.tensor([[0], [1], [1], [0], [1]]), torch.full((5, 1), 0.5))
    chunk = ExpertChunk(0, torch.stack((gate, -gate)), torch.stack((up, up)), torch.stack((down, down)))
    sums = torch.zeros(5, 64)
    add_experts(sums, hidden, Dispatch.of(routing, 2), chunk, rounding)
    for token, expert in enumerate(routing.experts[:, 0].tolist()):
        inner = F.silu(hidden[token] @ chunk.gate[expert].T) * (hidden[token] @ chunk.up[expert].T)
        told = 0.5 * (rounded(inner[None], NVFP4, 300.0) @ chunk.down[expert].T)
        assert torch.allclose(sums[token], told[0], rtol=2e-5, atol=2e-5)
        assert not torch.allclose(sums[token], 0.5 * (inner @ chunk.down[expert].T), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_operations_are_stored_in_bf16_as_torch_stores_them() -> None:
    """An MLP beside torch's own arithmetic in bf16, on numbers whose sums are exact; experts once their gain is on."""
    shapes = enumerate(((5, 64), (32, 64), (32, 64), (64, 32)))
    hidden, gate, up, down = ((random(*shape, seed=seed) * 3).round() / 4 for seed, shape in shapes)
    x, *weights = (part.bfloat16() for part in (hidden, gate, up, down))
    told = ((F.silu(x @ weights[0].T) * (x @ weights[1].T)) @ weights[2].T).float()
    served = LayerRounding(in_bf16=True)
    assert torch.equal(dense_mlp(hidden, DenseWeights(gate, up, down), served), told)

    chunk = ExpertChunk(0, torch.stack((gate, gate)), torch.stack((up, up)), torch.stack((down, -2 * down)))
    routing = Routing(torch.tensor([[0, 1]] * 5), torch.tensor([[0.625, 0.375]] * 5))
    inner, sums = (F.silu(x @ weights[0].T) * (x @ weights[1].T)).float() @ down.T, torch.zeros(5, 64)
    add_experts(sums, hidden, Dispatch.of(routing, 2), chunk, served)
    assert torch.equal(sums, (0.625 * inner).bfloat16().float() + (-0.75 * inner).bfloat16().float())


@torch.no_grad()
@pytest.mark.parametrize("asked", [Rounding(NONE, FP8), Rounding(NVFP4, NONE, FP8)])
def test_a_model_is_stored_in_bf16_where_an_fp8_layer_is_rounded_and_only_there(asked: Rounding) -> None:
    layout, ids, seen = open_layout(MICRO), torch.from_numpy(FEW.ids[:1]), set()
    with CheckpointReader(layout.index) as reader:
        source = CheckpointWeights(reader, layout, torch.device("cpu"))
        norm, head = source.tensor("model.norm.weight"), source.tensor("lm_head.weight")
        [stream] = streams_of(source, [[ids]])
        stream.roundings = layer_roundings(reader, layout, asked)
        walk([stream], lambda _: seen.add(torch.equal(stream.batches[0], stream.batches[0].bfloat16().float())))
    in_bf16 = asked.dense == FP8
    assert seen == {layer.in_bf16 for layer in stream.roundings} == {in_bf16}
    final = final_hidden(stream, norm)
    assert final.dtype == (torch.bfloat16 if in_bf16 else torch.float32)
    wide, labels = final.float() @ head.float().T, ids[0, 1:]
    logits = wide.to(final.dtype).float()
    [ours] = head_divergences((final.float(), head), [(final, head)], labels)
    [told] = token_divergences(lambda *at: wide[:, slice(*at)], [lambda *at: logits[:, slice(*at)]], len(head), labels)
    assert ours.j == pytest.approx(told.j, rel=1e-3, abs=1e-9) and bool((ours.j > 0).any()) == in_bf16


@torch.no_grad()
def test_attention_is_rounded_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = open_layout(MICRO)
    with CheckpointReader(layout.index) as reader:
        source = CheckpointWeights(reader, layout, torch.device("cpu"))
        weights, config = source.layer(1), source.config
    hidden = random(2, 24, layout.geometry.hidden)
    plain = attention(hidden, weights.attention, config)
    told = attention(rounded(hidden, MXFP8), weights.attention, config)
    assert torch.equal(attention(hidden, weights.attention, config, LayerRounding(qkv=MXFP8)), told)
    assert not torch.equal(attention(hidden, weights.attention, config, LayerRounding(o=FP8)), plain)

    cached = attention(hidden, weights.attention, config, LayerRounding(cache=(0.5, 2.0)))
    heads_of = decoder_layer.attention_heads

    def heads(*given: object) -> decoder_layer.Heads:
        made = heads_of(*given)  # type: ignore[arg-type]
        key, value = round_kv_fp8(made.key, 0.5), round_kv_fp8(made.value, 2.0)
        return decoder_layer.Heads(made.query, key, value, made.cos, made.sin, made.window)

    monkeypatch.setattr(decoder_layer, "attention_heads", heads)
    assert torch.equal(attention(hidden, weights.attention, config), cached)


@torch.no_grad()
def test_a_walk_rounds_what_experts_see_and_not_what_the_router_sees() -> None:
    layout = open_layout(MICRO)
    rounding = LayerRounding(experts=NVFP4, gate_up_scale=40.0, down_scale=900.0)
    with CheckpointReader(layout.index) as reader:
        source = CheckpointWeights(reader, layout, torch.device("cpu"))
        number = layout.geometry.moe.index(True)
        weights, chunks = source.layer(number), list(source.expert_chunks(number))
        source.layers = number + 1
        hidden = random(1, 20, layout.geometry.hidden)
        stream = Stream(source, [hidden], roundings=[rounding] * (number + 1))
        walk([stream], first=number)
    state, normed = attention_block(hidden, weights, source.config)
    assert torch.equal(normed, rms_norm(state, weights.post_norm, source.config.eps))
    assert isinstance(weights.mlp, decoder_layer.Router)
    routing = route(normed[0], weights.mlp, source.config.top_k)
    sums, inputs = torch.zeros_like(normed[0]), rounded(normed[0], NVFP4, 40.0)
    for chunk in chunks:
        add_experts(sums, inputs, Dispatch.of(routing, layout.geometry.experts), chunk, rounding)
    assert torch.equal(stream.batches[0], state + sums)


def test_none_changes_nothing(out: Path) -> None:
    """J itself is held by golden_j.json; nothing is walked twice, no row is told."""
    plain = eval_kl(MICRO, out, FEW, noise_floor=False)
    assert eval_kl(AsServed(MICRO), AsServed(out, Rounding(NONE, NONE, NONE)), FEW, noise_floor=False) == plain
    assert plain["rounding"] is None


def test_causes_are_evaluations_of_their_own(out: Path) -> None:
    facts = eval_kl(MICRO, AsServed(out, ALL), FEW, noise_floor=False)
    assert facts["rounding"] is not None
    causes = {part["cause"]: part["j"] for part in facts["rounding"]["causes"]}
    assert causes["weights"] == eval_kl(MICRO, out, FEW, noise_floor=False)["j"]["mean"]
    assert causes["both"] == facts["j"]["mean"] > causes["weights"]
    inputs = Rounding(NVFP4, NONE, FP8)  # FP8 beside the experts is bf16 in this output, so nothing is rounded there
    assert causes["activations"] == eval_kl(MICRO, AsServed(MICRO, inputs), FEW, noise_floor=False)["j"]["mean"]
    assert facts["rounding"]["input_scales"] == "unit" and facts["rounding"]["sequences"] == 5


@pytest.mark.slow
def test_a_rounded_reference_is_compared_with(out: Path) -> None:
    both = eval_kl(AsServed(MICRO, ALL), AsServed(out, ALL), FEW, noise_floor=False)
    alone = eval_kl(MICRO, AsServed(out, ALL), FEW, noise_floor=False)
    assert both["rounding"] is not None and alone["rounding"] is not None
    assert both["j"]["mean"] != alone["j"]["mean"] and both["rounding"]["reference"] == ALL.told
    assert both["rounding"]["causes"][:2] == alone["rounding"]["causes"][:2]
    same = eval_kl(AsServed(MICRO, ALL), AsServed(MICRO, ALL), FEW, noise_floor=False)
    assert same["j"]["mean"] == 0 and same["rounding"] is not None and same["rounding"]["causes"][2]["j"] == 0


def test_causes_are_of_one_batch_in_four(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions of two batches, so that every second portion has none of them."""
    monkeypatch.setattr(layer_stream, "BATCH_TOKENS", 32)
    monkeypatch.setattr(layer_stream, "PORTION_TOKENS", 64)
    layouts = open_layout(MICRO), [open_layout(out)]
    plain = compare(*layouts, FEW, noise_floor=False)
    told = compare(*layouts, FEW, roundings=[Rounding(), ALL], noise_floor=False)
    for sequence, place in ((0, 0), (4, 1)):
        here, there = slice(31 * sequence, 31 * sequence + 31), slice(31 * place, 31 * place + 31)
        for name, compared in (("weights", plain), ("both", told)):
            whole = compared.comparisons[0].scores
            assert whole is not None
            assert told.causes[name].j[there] == pytest.approx(whole.j[here], rel=1e-3, abs=1e-7)
    assert {len(scores.j) for scores in told.causes.values()} == {2 * 31}


def test_what_causes_share_is_computed_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of one checkpoint are one until experts' inputs are rounded: attention of the first such layer too."""
    plain, calls = layer_stream.attention_block, []
    monkeypatch.setattr(layer_stream, "attention_block", lambda *given: calls.append(1) or plain(*given))
    layout = open_layout(MICRO)
    asked = [Rounding(), Rounding(MXFP8)]
    told = compare(layout, [open_layout(out)], FEW, roundings=asked, noise_floor=False)
    layers, shared = layout.geometry.layers, layout.geometry.moe.index(True) + 1
    assert len(calls) == 2 * layers + 2 * (layers - shared)  # the candidate and the reference, and each once more
    assert set(told.causes) == set(CAUSES)


def with_tensors(source: Path, out: Path, more: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, out)
    save_file(more, out / "more.safetensors", metadata={"format": "pt"})
    edit_json(
        out / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(dict.fromkeys(more, "more.safetensors")),
    )
    return out


def test_stored_scales_are_read_as_engines_read_them(out: Path, tmp_path: Path) -> None:
    """The largest activation of all experts decides, gate and up together; keys and values have scales of their own."""
    layout = open_layout(out)
    more = {}
    for (layer, expert, projection), _ in layout.experts.items():
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.input_global_scale"
        more[name] = torch.tensor([100.0 + layer + expert + {"gate": 0.5, "up": 0.25, "down": 50.0}[projection]])
    more["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5])
    scaled = open_layout(with_tensors(out, tmp_path / "scaled", more))
    with CheckpointReader(scaled.index) as reader:
        told = layer_roundings(reader, scaled, ALL)
        bare = layer_roundings(reader, scaled, Rounding(MXFP8))
    for number, moe in enumerate(layout.geometry.moe):
        expected = (NVFP4, 100.25 + number, 150.0 + number) if moe else (NONE, 1.0, 1.0)
        assert (told[number].experts, told[number].gate_up_scale, told[number].down_scale) == expected
        assert told[number].cache == ((0.5, 1.0) if number == 0 else (1.0, 1.0))
        assert bare[number] == LayerRounding(experts=MXFP8 if moe else NONE)
    unit, stored = (
        eval_kl(MICRO, AsServed(folder, Rounding(NVFP4)), FEW, noise_floor=False)
        for folder in (out, scaled.index.folder)
    )
    assert stored["rounding"] is not None and stored["rounding"]["input_scales"] == "stored"
    assert stored["j"]["mean"] != unit["j"]["mean"] and stored["left_out"] == ["the KV cache"]

    name = next(iter(more))
    broken = open_layout(with_tensors(out, tmp_path / "broken", more | {name: torch.tensor([0.0])}))
    with (
        CheckpointReader(broken.index) as reader,
        pytest.raises(CheckpointError, match=r"is 0\.0, a scale is a positive"),
    ):
        layer_roundings(reader, broken, ALL)


def test_only_what_is_stored_in_fp8_is_rounded_beside_the_experts() -> None:
    layout = open_layout(MICRO)
    with CheckpointReader(layout.index) as reader:
        told = layer_roundings(reader, layout, Rounding(dense=FP8))
    for number, moe in enumerate(layout.geometry.moe):
        attention_o = layout.index.tensors[f"model.layers.{number}.self_attn.o_proj.weight"].dtype
        assert told[number].qkv == FP8 and told[number].o == (FP8 if attention_o == "F8_E4M3" else NONE)
        assert told[number].mlp == (NONE if moe else FP8) and told[number].experts == NONE


def test_an_evaluation_is_not_taken_for_one_of_another_rounding(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "told.json"
    whole = eval_kl(MICRO, AsServed(out, ALL), FEW, noise_floor=False, file=EvaluationFile(file))
    again = EvaluationFile(file, resume=True)
    assert eval_kl(MICRO, AsServed(out, ALL), FEW, noise_floor=False, file=again)["j"] == whole["j"]
    with pytest.raises(UsageError, match=r"its rounding was .*candidate experts nvfp4.*, is now .*experts mxfp8"):
        eval_kl(MICRO, AsServed(out, Rounding(MXFP8)), FEW, noise_floor=False, file=again)


def test_the_table_is_printed_and_drawn(out: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ["eval-kl", MICRO, out, "--sequences", 5, "--tokens", 32, "--no-noise-floor", "--html", page]
    told = CliRunner().invoke(app, [*map(str, arguments), "--activations", "nvfp4", "--kv", "fp8"])
    assert told.exit_code == 0, told.output
    assert "J of weights, activations and KV cache" in told.output
    assert "inputs of experts nvfp4 (unit input scales), of FP8 beside them none" in told.output.replace(
        "\n" + 13 * " ", " "
    )
    for row in ("weights alone", "activations alone", "both, as served"):
        assert row in told.output and row in page.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--as-served", "vllm:b200", "--kv", "fp8"],
            "--as-served vllm:b200 says what is rounded: --kv cannot go with",
        ),
        (["--as-served", "b200"], "--as-served b200: expected is ENGINE:GPU, such as vllm:b200"),
        (["--reference-as-served"], "--reference-as-served: nothing is said to be rounded"),
    ],
)
def test_options_that_contradict_each_other(out: Path, options: list[str], said: str) -> None:
    told = CliRunner().invoke(app, ["eval-kl", str(MICRO), str(out), *options])
    assert told.exit_code == 2 and said in told.output


@pytest.mark.slow
def test_two_ranks_tell_what_one_process_tells(out: Path, tmp_path: Path) -> None:
    """With a baseline that is rounded too, and what causes what."""
    mimoquant.quantize(MICRO, "mxfp4-mse", tmp_path / "other", device="cpu")
    told = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        verb = ("eval-kl", MICRO, out, "--baseline", tmp_path / "other", "--data", "heldout-v1", "--sequences", "24")
        rounding = ("--tokens", "64", "--activations", "nvfp4", "--kv", "fp8", "--no-noise-floor")
        done = forked(ranks, "rank_driver", *verb, *rounding, "--device", "cpu", "--out", file)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(file.read_text()))
    assert told[0] == told[1]
    causes = {cause["cause"]: cause["j"] for cause in told[0]["rounding"]["causes"]}
    assert set(causes) == set(CAUSES) and told[0]["baseline"]["j"] > 0
