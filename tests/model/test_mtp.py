"""MTP layers against a float64 forward of the tests' own, and their inner layer against transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from micro import MICRO
from mtp_reference import Floats, Reference

from mimoquant import pipeline
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.drafts import draft_tokens
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.model.mtp import MtpWeights
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.weights.decoded import CheckpointWeights

TOKENS, DEPTHS = 150, 3  # more than twice the window of 64


def inputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states and embedded tokens, both [1, T, H] float32. States of any kind will do."""
    rng = np.random.default_rng(3)
    embedding = Reference(folder).read("model.embed_tokens.weight").float()
    final = torch.from_numpy(rng.normal(0, 1, (1, TOKENS, embedding.shape[1]))).float()
    return final, embedding[torch.from_numpy(rng.integers(0, len(embedding), (1, TOKENS)))]


NOT_OF_A_LAYER = (
    "model_type",
    "architectures",
    "quantization_config",
    "num_hidden_layers",
    "hybrid_layer_pattern",
    "moe_layer_freq",
    "layer_types",
    "mlp_layer_types",
    "auto_map",
    "sliding_window_size",  # tests/windows.py; it reads `sliding_window`
)
NAMES = {
    "layers.0.input_layernorm.weight": "input_layernorm.weight",
    "layers.0.post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "layers.0.self_attn.o_proj.weight": "self_attn.o_proj.weight",
    "layers.0.self_attn.sinks": "self_attn.attention_sink_bias",
    "layers.0.mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "layers.0.mlp.up_proj.weight": "mlp.up_proj.weight",
    "layers.0.mlp.down_proj.weight": "mlp.down_proj.weight",
    "norm.weight": "final_layernorm.weight",
}  # transformers' name → that in the MTP layer
Change = Callable[[MtpWeights], MtpWeights]


def ours(folder: Path, change: Change = lambda weights: weights) -> list[torch.Tensor]:
    layout = open_layout(folder)
    with CheckpointReader(layout.index) as reader:
        source = CheckpointWeights(reader, layout, torch.device("cpu"))
        layers = [change(source.mtp_layer(number)) for number in range(DEPTHS)]
        return draft_tokens(*inputs(folder), layers, source.config, chained=True)


def error(folder: Path, drafted: list[torch.Tensor], expected: list[Floats]) -> list[float]:
    return [float(np.abs(h[0].double().numpy() - e).max()) for h, e in zip(drafted, expected, strict=True)]


def expected_chain(folder: Path) -> list[Floats]:
    final, embedded = (x[0].double().numpy() for x in inputs(folder))
    return Reference(folder).drafted(final, embedded, DEPTHS)


@pytest.fixture(scope="module")
def micro_chain() -> list[Floats]:
    return expected_chain(MICRO)


def test_the_chain_equals_the_reference_on_fp8_with_a_fused_qkv(micro_chain: list[Floats]) -> None:
    assert max(np.abs(hidden).max() for hidden in micro_chain) > 1
    assert max(error(MICRO, ours(MICRO), micro_chain)) < 1e-4


def test_the_chain_equals_the_reference_on_bf16_with_split_projections(shared: Path) -> None:
    folder = shared / "models" / "mimo-tiny"
    assert max(error(folder, ours(folder), expected_chain(folder))) < 1e-4


def swapped(weights: MtpWeights) -> MtpWeights:
    embedding, hidden = weights.projection.chunk(2, dim=-1)
    return replace(weights, projection=torch.cat([hidden, embedding], -1))


def without_sinks(weights: MtpWeights) -> MtpWeights:
    return replace(weights, layer=replace(weights.layer, attention=replace(weights.layer.attention, sink=None)))


def at_any_distance(weights: MtpWeights) -> MtpWeights:
    return replace(weights, layer=replace(weights.layer, attention=replace(weights.layer.attention, sliding=False)))


def norms_swapped(weights: MtpWeights) -> MtpWeights:
    return replace(weights, embedding_norm=weights.hidden_norm, hidden_norm=weights.embedding_norm)


@pytest.mark.parametrize("change", [swapped, without_sinks, at_any_distance, norms_swapped])
def test_the_reference_sees_a_wrong_reading(change: Change, micro_chain: list[Floats]) -> None:
    assert min(error(MICRO, ours(MICRO, change), micro_chain)) > 1e-2


def test_containers_hold_the_same_layers(tmp_path: Path) -> None:
    """FP8 with a fused qkv in the source and in the native container, bf16 and split under compressed-tensors."""
    for recipe in ("int4-g128-rtn", "mxfp4-rtn"):
        out = tmp_path / recipe
        pipeline.quantize(make_plan(MICRO, load_recipe(recipe)), out, device="cpu")
        for drafted, again in zip(ours(MICRO), ours(out), strict=True):
            assert torch.equal(drafted, again)


@torch.no_grad()
def test_what_follows_the_projection_is_a_whole_model_of_transformers() -> None:
    """One sliding dense layer and a last norm, given x as its embeddings."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (scripts/setup --dev)")
    judge, prefix = Reference(MICRO), "model.mtp.layers.0."
    config = {key: value for key, value in judge.config.items() if key not in NOT_OF_A_LAYER}
    one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["dense"]}
    model = transformers.MiMoV2FlashModel(transformers.MiMoV2FlashConfig(**config | one)).eval()
    held = {
        f"layers.0.self_attn.{letter}_proj.weight": matrix
        for letter, matrix in zip("qkv", judge.qkv(f"{prefix}self_attn."), strict=True)
    }
    for name, mine in NAMES.items():
        held[name] = judge.matrix(f"{prefix}{mine}")
    held["embed_tokens.weight"] = judge.matrix("model.embed_tokens.weight")
    loaded = model.load_state_dict(
        {name: torch.from_numpy(values).float() for name, values in held.items()}, strict=False
    )
    assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "inv_freq" not in name]
    final, embedded = inputs(MICRO)
    hidden, embedded = final[:, :-DEPTHS], embedded[:, 1 : 1 + TOKENS - DEPTHS]
    both = [judge.norm(x.numpy(), f"{prefix}{name}.weight") for x, name in ((embedded, "enorm"), (hidden, "hnorm"))]
    x = torch.from_numpy(np.concatenate(both, -1) @ judge.matrix(f"{prefix}eh_proj.weight").T).float()
    theirs = model(inputs_embeds=x).last_hidden_state
    assert (ours(MICRO)[0] - theirs).abs().max() < 1e-4
