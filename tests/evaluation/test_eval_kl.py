"""The walk and the whole evaluation: against transformers, against itself, and where transformers gives nonsense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from micro import MICRO
from windows import meant_window

from mimoquant import pipeline
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet, load_tokens
from mimoquant.checkpoint.index import TensorInfo, open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.evaluation import eval_kl as evaluate
from mimoquant.evaluation.eval_kl import eval_kl, open_layout
from mimoquant.evaluation.held_out import refuse_shared_data
from mimoquant.model import attention as attention_core
from mimoquant.model.decoder_layer import linear, rms_norm
from mimoquant.model.layer_stream import Stream, walk
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.quant.engine_torch import decode
from mimoquant.synthetic.checkpoint import SynthSizes, synth
from mimoquant.weights.decoded import CheckpointWeights


def token_set(ids: np.ndarray, domains: tuple[str, ...] | None = None) -> TokenSet:
    names = domains or tuple("ab"[i % 2] for i in range(len(ids)))
    return TokenSet(
        name="test",
        ids=ids.astype(np.int64),
        domains=names,
        sha256="0" * 64,
        sequence_hashes=tuple(str(i) for i in range(len(ids))),
        origins=("test",),
    )


def random_tokens(sequences: int, length: int, vocab: int = 1024, seed: int = 0) -> TokenSet:
    return token_set(np.random.default_rng(seed).integers(0, vocab, (sequences, length)))


@torch.no_grad()
def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    layout = open_layout(folder)
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        stream = Stream(weights, [weights.tensor("model.embed_tokens.weight", torch.float32)[ids]])
        walk([stream])
        final = rms_norm(stream.batches[0], weights.tensor("model.norm.weight"), weights.config.eps)
        return linear(final, weights.tensor("lm_head.weight"))


def bf16_twin(folder: Path, twin: Path) -> Path:
    """Any Flash-layout checkpoint as a plain bf16 one, every expert decoded: what transformers can load."""
    from safetensors.torch import save_file

    layout = open_layout(folder)
    tensors: dict[str, torch.Tensor] = {}
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        for held in layout.units.values():
            for weight in held:
                wide = torch.float32 if weight.info.dtype == "F32" else None
                tensors[weight.name] = weights.tensor(weight.name, wide).contiguous()
        for layer in layout.geometry.moe_layers:
            for chunk in weights.expert_chunks(layer):
                for name in ("gate", "up", "down"):
                    for i, matrix in enumerate(getattr(chunk, name)):
                        module = f"model.layers.{layer}.mlp.experts.{chunk.begin + i}.{name}_proj.weight"
                        tensors[module] = matrix.contiguous().clone()
    twin.mkdir()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in layout.config.items() if key != "quantization_config"}
    (twin / "config.json").write_text(json.dumps(config))
    return twin


@torch.no_grad()
def transformers_logits(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the experts each MoE layer chose."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (scripts/setup --dev)")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, sliding_window=meant_window(folder)
    ).eval()
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    return model(input_ids=ids).logits, chosen


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random FP8 weights in Flash's layout; 6 layers, because transformers has Flash's layer pattern wired in."""
    folder = tmp_path_factory.mktemp("flash") / "source"
    synth(folder, "flash", sizes=SynthSizes(layers=6, experts=8, top_k=3), seed=5)
    return folder


@pytest.mark.parametrize("tokens", [5, 64, 200])
def test_the_forward_equals_transformers(flash: Path, tokens: int, tmp_path: Path) -> None:
    """Shorter than, equal to and several times the window of 64."""
    ids = torch.from_numpy(random_tokens(2, tokens).ids)
    theirs, chosen = transformers_logits(bf16_twin(flash, tmp_path / "twin"), ids)
    assert (our_logits(flash, ids) - theirs).abs().max() < 1e-3
    layout = open_layout(flash)
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        stream = Stream(weights, [weights.tensor("model.embed_tokens.weight", torch.float32)[ids]])
        ours: list[torch.Tensor] = []
        walk([stream], lambda number: ours.extend(routing.experts for routing in stream.routing))
    assert len(ours) == len(chosen) == 5
    for a, b in zip(ours, chosen, strict=True):
        assert torch.equal(a.sort(-1).values, b.view(a.shape).sort(-1).values)


def test_query_chunks_do_not_change_the_forward(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    ids = torch.from_numpy(random_tokens(1, 300).ids)
    whole = our_logits(flash, ids)
    monkeypatch.setattr(attention_core, "_QUERY_CHUNK_BYTES", 1)
    assert (our_logits(flash, ids) - whole).abs().max() < 1e-4


def test_fused_and_split_attention_are_the_same_weights(tmp_path: Path) -> None:
    """The FP8 source holds q, k, v fused and interleaved, the compressed-tensors output apart and in bf16."""
    pipeline.quantize(make_plan(MICRO, load_recipe("int4-g128-rtn")), tmp_path / "out", device="cpu")
    source, out = open_layout(MICRO), open_layout(tmp_path / "out")
    assert source.geometry.fused_qkv and not out.geometry.fused_qkv
    with CheckpointReader(source.index) as first, CheckpointReader(out.index) as second:
        weights = [
            CheckpointWeights(reader, layout, torch.device("cpu"))
            for reader, layout in ((first, source), (second, out))
        ]
        for number in range(source.geometry.layers):
            ours, theirs = (one.layer(number).attention for one in weights)
            for name in "qkvo":
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), (number, name)


def test_a_checkpoint_against_itself_is_zero_to_the_bit() -> None:
    facts = eval_kl(MICRO, MICRO, random_tokens(4, 65), noise_floor=False)
    assert facts["j"]["mean"] == facts["j"]["max"] == facts["kl_forward"] == facts["kl_reverse"] == 0.0
    assert facts["top1"]["all"] == 1.0 and facts["perplexity"]["ratio"] == 1.0
    assert all(layer["relative_error"] == 0 for layer in facts["layers"])
    assert all(layer["routing_overlap"] in (None, 1.0) for layer in facts["layers"])


CARVED = r"""
default_stage: {default_modifiers: {QuantizationModifier: {scheme: SCHEME,
  targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}}}
mimoquant: {container: compressed-tensors, carve_outs: {CARVE}}
"""


@pytest.mark.parametrize(
    ("scheme", "carve"),
    [("W4A16", ""), ("W4A16_ASYM", ""), ("MXFP4A16", "2: bf16"), ("NVFP4A16", ""), ("W4A16", "1: bf16, 3: fp8")],
)
def test_j_equals_that_of_transformers_on_the_decoded_weights(
    flash: Path, scheme: str, carve: str, tmp_path: Path
) -> None:
    """Also where transformers' own loader goes wrong: carve-outs, asymmetric int4, NVFP4."""
    recipe = parse_recipe(CARVED.replace("SCHEME", scheme).replace("CARVE", carve), "test")
    pipeline.quantize(make_plan(flash, recipe), tmp_path / "out", device="cpu")
    tokens = random_tokens(3, 80)
    facts = eval_kl(flash, tmp_path / "out", tokens, noise_floor=False)
    ids = torch.from_numpy(tokens.ids)
    p, q = (
        transformers_logits(bf16_twin(folder, tmp_path / name), ids)[0][:, :-1].log_softmax(-1)
        for folder, name in ((flash, "p"), (tmp_path / "out", "q"))
    )
    j = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    assert facts["j"]["mean"] == pytest.approx(float(j), rel=0.01)
    kept = {int(part.split(":")[0]) for part in carve.split(",") if part}
    assert {row["layer"] for row in facts["layers"] if row["quantized"]} == set(range(1, 6)) - kept


def test_the_experts_that_are_evaluated_are_those_on_disk(tmp_path: Path) -> None:
    """One expert's matrix as the walker sees it, against a decode of the very tensors."""
    pipeline.quantize(make_plan(MICRO, load_recipe("nvfp4-mse")), tmp_path / "out", device="cpu")
    layout = open_layout(tmp_path / "out")
    weight = layout.expert(2, 5, "up")
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        seen = next(iter(weights.expert_chunks(2))).up[5]
        parts = {
            "codes": torch.from_numpy(reader.read(weight.info.name)).view(1, *weight.info.shape),
            "scale": torch.from_numpy(reader.read("model.layers.2.mlp.experts.5.up_proj.weight_scale"))
            .view(torch.float8_e4m3fn)
            .view(1, 128, 16),
            "global_scale": torch.from_numpy(
                reader.read("model.layers.2.mlp.experts.5.up_proj.weight_global_scale")
            ).view(torch.float32),
        }
    fmt = next(iter(make_plan(MICRO, load_recipe("nvfp4-mse")).formats.values()))
    assert torch.equal(seen, decode(parts, fmt)[0].to(torch.bfloat16).float())


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.quantize(make_plan(MICRO, load_recipe("mxfp4-rtn")), tmp_path / "out", device="cpu")
    readers: list[Any] = []

    class Counting(CheckpointReader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.names: list[str] = []
            readers.append(self)

        def read_range(self, info: TensorInfo, start: int, out: Any) -> None:
            self.names.append(info.name)
            super().read_range(info, start, out)

    monkeypatch.setattr(evaluate, "CheckpointReader", Counting)
    eval_kl(MICRO, tmp_path / "out", random_tokens(2, 40))
    for reader, folder in zip(readers, (MICRO, tmp_path / "out"), strict=True):
        names = list(reader.names)
        assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})[:3]
        used = [n for n in open_index(folder).tensors if ".mtp." not in n and n.startswith(("model.", "lm_head."))]
        assert set(names) == {n for n in used if not n.endswith("weight_shape")}


def test_the_noise_floor_is_small_and_there() -> None:
    facts = eval_kl(MICRO, MICRO, random_tokens(4, 65))
    assert 0 <= facts["noise_floor"]["batch"] < 1e-6 < facts["noise_floor"]["relative_noise"] < 0.05


def test_a_baseline_is_compared_on_the_same_tokens(tmp_path: Path) -> None:
    for recipe in ("int4-g32-mse", "mxfp4-rtn"):
        pipeline.quantize(make_plan(MICRO, load_recipe(recipe)), tmp_path / recipe, device="cpu")
    tokens = random_tokens(8, 65)
    facts = eval_kl(MICRO, tmp_path / "mxfp4-rtn", tokens, baseline=tmp_path / "int4-g32-mse", noise_floor=False)
    alone = eval_kl(MICRO, tmp_path / "int4-g32-mse", tokens, noise_floor=False)
    assert facts["baseline"]["j"] == pytest.approx(alone["j"]["mean"])
    assert facts["baseline"]["difference"] == pytest.approx(facts["j"]["mean"] - alone["j"]["mean"])
    assert facts["baseline"]["low"] < facts["baseline"]["difference"] < facts["baseline"]["high"]


def test_another_model_is_refused(flash: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is another model than .*: layers is 6 against 5"):
        eval_kl(MICRO, flash, random_tokens(1, 10))


@pytest.mark.slow
def test_the_published_figures_on_the_shared_trained_model(shared: Path, tmp_path: Path) -> None:
    """48 x 512 held-out tokens of the shared model: int4 g128 plain rounding was measured at J = .0204 elsewhere."""
    source = shared / "models" / "mimo-tiny"
    ids = np.load(shared / "bench" / "tiny_eval_ids.npy")
    pipeline.quantize(make_plan(source, load_recipe("int4-g128-rtn")), tmp_path / "out", device="cpu")
    facts = eval_kl(source, tmp_path / "out", token_set(ids), noise_floor=False)
    assert facts["tokens"] == 48 * 511
    assert facts["j"]["mean"] == pytest.approx(0.0204, abs=0.0008)


@pytest.mark.parametrize("kind", ["sequence", "file"])
def test_data_that_the_candidate_was_calibrated_on_is_refused(kind: str, tmp_path: Path) -> None:
    pipeline.quantize(make_plan(MICRO, load_recipe("int4-g128-rtn")), tmp_path / "out", device="cpu")
    tokens = load_tokens(["heldout-v1"], MICRO, sequences=8, tokens=16, vocab=1024)
    used = tokens if kind == "file" else replace(tokens, origins=(), sequence_hashes=tokens.sequence_hashes[5:6])
    other = replace(tokens, sequence_hashes=("0" * 64,) * 8) if kind == "file" else tokens
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    refuse_shared_data(tmp_path / "out", tokens)
    recipe["mimoquant"]["provenance"]["calibration"] = CalibrationRecord.of(used).as_plain()
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match="1 of 8 sequences" if kind == "sequence" else "the file heldout-v1/"):
        eval_kl(MICRO, tmp_path / "out", other)
    unlike = replace(other, sequence_hashes=("0" * 64,) * 8, origins=())
    refuse_shared_data(tmp_path / "out", unlike)


@pytest.mark.parametrize("damage", ["", "{", "mimoquant: 3", "mimoquant: {provenance: {calibration: [1]}}", "\x00"])
def test_a_recipe_of_another_tool_refuses_nothing(damage: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(damage)
    refuse_shared_data(tmp_path, random_tokens(2, 8))
