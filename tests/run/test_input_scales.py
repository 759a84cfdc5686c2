"""Input scales of NVFP4 experts: what the walk sees, what is stored of it in either container, and its proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import generate_gparam
from micro import MICRO, contents, stopped_after
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.calibration import statistics
from mimoquant.calibration.tokens import load_tokens
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.journal import JOURNAL_NAME, read_journal
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import RecipeError
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.model.decoder_layer import DenseWeights, ExpertChunk, add_experts
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.model.layer_stream import Stream, add_blocks, attend_and_route, dense_layer
from mimoquant.model.served_rounding import NONE, NVFP4, Rounding
from mimoquant.output.verify import verify
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.run.input_scales import recorded_amax
from mimoquant.serving.as_served import as_served
from mimoquant.serving.served import read_served
from mimoquant.weights.container import CONTAINERS, input_scales_of
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.layer_rounding import layer_roundings

FEW = {"sequences": 16, "tokens": 32}
FEW_EXPERTS = 2**18  # bytes of a chunk: two or three experts
EXPERT = "model.layers.2.mlp.experts.3.down_proj"
SUFFIX = {"compressed-tensors": "input_global_scale", "modelopt": "input_scale"}


def planned(container: str, settings: dict[str, Any] = FEW) -> Plan:
    recipe = load_recipe("gptq-nvfp4-w4a4").rounded_for("output").calibrated_on(settings)
    return make_plan(MICRO, recipe, container=container, chunk_bytes=FEW_EXPERTS)


@pytest.fixture(scope="module")
def w4a4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("w4a4") / "out"
    pipeline.quantize(planned("compressed-tensors"), out, device="cpu")
    return out


def scales_of(folder: Path, container: str = "compressed-tensors") -> dict[str, np.ndarray[Any, Any]]:
    """Module → its input scale."""
    index, ending = open_index(folder), f".{SUFFIX[container]}"
    with CheckpointReader(index) as reader:
        return {
            name.removesuffix(ending): reader.read(name).view(np.float32)
            for name in index.tensors
            if name.endswith(ending)
        }


@torch.no_grad()
def seen_by(folder: Path) -> dict[str, float]:
    """Module → its largest input, one expert after the other, through a written checkpoint."""
    tokens, layout, found = load_tokens(["mixed-v1"], MICRO, vocab=1024, **FEW), open_layout(folder), {}
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        embedding = weights.tensor("model.embed_tokens.weight")
        stream = Stream(weights, [embedding[torch.from_numpy(tokens.ids)]])
        for number in range(layout.geometry.layers):
            layer = weights.layer(number)
            if isinstance(layer.mlp, DenseWeights):
                dense_layer(stream, layer)
                continue
            [block] = attend_and_route(stream, layer, torch.bfloat16)
            for expert in range(layout.geometry.experts):
                mine = block.tokens[(stream.routing[0].experts == expert).any(-1)].float()
                gate, up, down = (weights.expert(number, expert, p) for p in ("gate", "up", "down"))
                inner = torch.nn.functional.silu(mine @ gate.float().T) * (mine @ up.float().T)
                module = f"model.layers.{number}.mlp.experts.{expert}"
                found |= dict.fromkeys((f"{module}.gate_proj", f"{module}.up_proj"), float(mine.abs().max()))
                found[f"{module}.down_proj"] = float(inner.to(torch.bfloat16).abs().max())
                chunk = ExpertChunk(expert, gate[None], up[None], down[None])
                add_experts(block.out, block.tokens, block.dispatch, chunk)
            add_blocks(stream, [block])
    return found


def test_scales_are_those_of_what_each_expert_sees(w4a4: Path) -> None:
    stored, seen = scales_of(w4a4), seen_by(w4a4)
    assert stored.keys() == seen.keys() and len(stored) == 4 * 8 * 3
    for module, scale in stored.items():
        largest = torch.tensor([seen[module]])
        theirs = generate_gparam(-largest, largest)
        assert scale.shape == theirs.shape == (1,) and scale.dtype == np.float32
        assert float(scale[0]) == pytest.approx(float(theirs), rel=0.02), module  # bf16 may fall otherwise
    same = [module for module, amax in seen.items() if stored[module][0] == np.float32(2688) / np.float32(amax)]
    assert len(same) > 80


def test_an_evaluation_as_served_takes_the_largest_of_a_layer(w4a4: Path) -> None:
    layout, stored = open_layout(w4a4), scales_of(w4a4)
    with CheckpointReader(layout.index) as reader:
        roundings = layer_roundings(reader, layout, Rounding(experts=NVFP4))
    for number in layout.geometry.moe_layers:
        least = {"gate": np.inf, "up": np.inf, "down": np.inf}  # divisors
        for module, scale in stored.items():
            if module.startswith(f"model.layers.{number}."):
                projection = module.rpartition(".")[2].removesuffix("_proj")
                least[projection] = min(least[projection], scale.item())
        assert (roundings[number].gate_up_scale, roundings[number].down_scale) == (least["gate"], least["down"])
        assert least["gate"] == least["up"] != least["down"]
    rounded, _ = as_served(read_served(w4a4), "vllm", "b200", cache=False)
    plain, _ = as_served(read_served(w4a4), "vllm", "h200", cache=False)
    assert (rounded.experts, plain.experts) == (NVFP4, NONE)


def test_the_config_is_compressed_tensors_own_preset(w4a4: Path) -> None:
    config = json.loads((w4a4 / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    preset = preset_name_to_scheme("NVFP4", ["Linear"])
    assert scheme.input_activations == preset.input_activations and scheme.format == "nvfp4-pack-quantized"
    assert scheme.weights is not None and scheme.weights.num_bits == 4


def test_scales_are_counted_and_proven(w4a4: Path) -> None:
    report = verify(w4a4, MICRO)
    assert report.ok and report.checked["input scales"] == 96, report.problems
    facts = json.loads((w4a4 / "report.json").read_text())["calibration"]["layer 2"]
    assert len(facts["input_amax"]) == len(facts["down_input_amax"]) == 8
    told = CliRunner().invoke(app, ["verify", str(w4a4), "--source", str(MICRO)]).stdout
    assert "96 input scales" in told


@pytest.mark.slow
def test_another_scale_is_seen(w4a4: Path, tmp_path: Path) -> None:
    for name, data in contents(w4a4).items():
        (tmp_path / name).write_bytes(data)
    info = open_index(tmp_path).tensors[f"{EXPERT}.input_global_scale"]
    raw = bytearray((tmp_path / info.file).read_bytes())
    raw[info.offset + 1] ^= 0x01
    (tmp_path / info.file).write_bytes(raw)
    assert f"{EXPERT}.input_global_scale: its values are not the journal's" in verify(tmp_path, MICRO).problems
    lines = read_journal(tmp_path / JOURNAL_NAME)
    for line in lines:
        if line.unit == "layer 2" and line.facts:
            line.facts["down_input_amax"][3] = float("nan")
    (tmp_path / JOURNAL_NAME).write_text("".join(json.dumps(line.as_plain()) + "\n" for line in lines))
    told = verify(tmp_path, MICRO).problems
    assert "layer 2: the journal does not tell the largest input of each expert" in told


def test_scales_of_both_containers_are_each_others_reciprocal() -> None:
    """As their own libraries make them; an expert without tokens has its layer's, a layer without any has 1."""
    amax = np.abs(np.random.default_rng(0).normal(size=64)).astype(np.float32) * 100
    theirs = torch.cat([generate_gparam(-value[None], value[None]) for value in torch.from_numpy(amax)])
    ours = input_scales_of("compressed-tensors", amax.tolist())
    assert np.allclose(ours, theirs.numpy(), rtol=2**-23, atol=0)  # which multiplies by a reciprocal
    modelopt = input_scales_of("modelopt", amax.tolist())
    assert np.array_equal(modelopt, (torch.from_numpy(amax) / (6.0 * 448.0)).numpy())  # get_activation_scaling_factor
    assert np.allclose(modelopt * theirs.numpy(), 1, rtol=1e-6)
    for container in ("compressed-tensors", "modelopt"):
        few = input_scales_of(container, [0.0, 26.875, 6.71875])
        assert few[0] == few[1] and {few[1] / few[2], few[2] / few[1]} == {4, 0.25}
        assert input_scales_of(container, [0.0, 0.0]).tolist() == [1, 1]
        edge = input_scales_of(container, [9e-41, 3.39e38])  # the least and the largest of bf16
        assert np.isfinite(edge).all() and (edge > 0).all()


def test_a_damaged_record_is_none() -> None:
    good: dict[str, Any] = {"input_amax": [1.0, 0.0], "down_input_amax": [2.0, 3.0]}
    assert recorded_amax(good, 2) == ([1.0, 0.0], [2.0, 3.0])
    bad: list[Any] = [[1.0], [1.0, -1.0], [1.0, float("inf")], ["1", "2"], [True, True], None]
    assert [recorded_amax(good | {"down_input_amax": values}, 2) for values in bad] == [None] * len(bad)
    assert recorded_amax(None, 2) is None


def test_the_largest_inputs_are_those_of_routed_tokens() -> None:
    """Two blocks; expert 5 sees nothing; NaN stays NaN."""
    torch.manual_seed(0)
    blocks, whole = [], []
    for _ in range(2):
        tokens = torch.randn(100, 16).to(torch.bfloat16)
        experts = torch.stack([torch.randperm(5)[:2] for _ in range(100)])
        blocks.append((tokens, Dispatch.of(Routing(experts, torch.full((100, 2), 0.5)), 6)))
        whole.append((tokens, experts))
    gate, up = (torch.randn(6, 8, 16).to(torch.bfloat16) for _ in range(2))
    chunk = ExpertChunk(1, gate[1:], up[1:], torch.zeros(5, 16, 8))
    inputs, inner = statistics.input_peaks(blocks), statistics.inner_peaks(blocks, chunk)
    for expert in range(5):
        mine = torch.cat([tokens[(experts == expert).any(-1)] for tokens, experts in whole]).float()
        assert inputs[expert] == mine.abs().max()
        if expert:
            made = torch.nn.functional.silu(mine @ gate[expert].float().T) * (mine @ up[expert].float().T)
            assert inner[expert - 1] == pytest.approx(float(made.to(torch.bfloat16).abs().max()), rel=2**-7)
    assert inputs[5] == inner[4] == 0
    blocks[0][0][0, 0] = torch.nan
    assert statistics.input_peaks(blocks).isnan().sum() == 2


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("container", list(SUFFIX))
def test_a_run_that_goes_on_writes_the_same_bytes(container: str, w4a4: Path, tmp_path: Path) -> None:
    plan = planned(container)
    with stopped_after(4):
        pipeline.quantize(plan, tmp_path / "out", device="cpu")
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    report = verify(tmp_path / "out", MICRO)
    assert report.ok and report.checked["input scales"] == 96, report.problems
    if container == "compressed-tensors":
        assert contents(tmp_path / "out") == contents(w4a4)
        return
    others = scales_of(w4a4)  # of other global scales, so of other codes
    for module, scale in scales_of(tmp_path / "out", container).items():
        assert 1 / scale.item() == pytest.approx(others[module].item(), rel=0.25), module
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {entry["quant_algo"] for entry in config["quantized_layers"].values()} == {"NVFP4"}


@pytest.mark.slow
def test_weights_are_those_of_a_run_without_input_scales(w4a4: Path, tmp_path: Path) -> None:
    """With the option for none, nothing but the scales and what tells of them is missing."""
    recipe = load_recipe("gptq-nvfp4-w4a4").rounded_for("output").calibrated_on(FEW).stored_as({"input_scales": "none"})
    pipeline.quantize(make_plan(MICRO, recipe, chunk_bytes=FEW_EXPERTS), tmp_path / "out", device="cpu")
    with CheckpointReader(open_index(tmp_path / "out")) as ours, CheckpointReader(open_index(w4a4)) as theirs:
        rest = [name for name in theirs.index.tensors if not name.endswith(".input_global_scale")]
        assert rest == list(ours.index.tensors)
        assert all(np.array_equal(ours.read(name), theirs.read(name)) for name in rest)
    assert "input_activations" not in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_kept_layer_and_other_formats_have_none(tmp_path: Path) -> None:
    target = r"re:.*layers\.(%s)\.mlp\.experts\.\d+\.(gate|up|down)_proj$"
    nvfp4 = "{num_bits: 4, type: float, strategy: tensor_group, group_size: 16%s}"
    text = f"""
default_stage: {{default_modifiers: {{QuantizationModifier: {{config_groups: {{
  a: {{targets: ['{target % "1|4"}'], weights: {nvfp4 % ""}, input_activations: {nvfp4 % ", dynamic: local"}}},
  b: {{targets: ['{target % "2"}'], weights: {{num_bits: 4, type: int, strategy: group, group_size: 32}}}}}}}}}}}}
mimoquant: {{scale_search: gram, carve_outs: {{3: fp8}}}}
"""
    recipe = parse_recipe(text, "mixed").calibrated_on(FEW)
    assert recipe.output.input_scales == "calibrated"
    pipeline.quantize(make_plan(MICRO, recipe), tmp_path / "out", device="cpu")
    layers = {module.split(".")[2] for module in scales_of(tmp_path / "out")}
    report = verify(tmp_path / "out", MICRO)
    assert layers == {"1", "4"} and report.ok and report.checked["input scales"] == 48, report.problems


@pytest.mark.slow
def test_one_for_each_where_nothing_is_known(tmp_path: Path) -> None:
    """And a layout of qkv later they are still there."""
    pipeline.quantize(make_plan(MICRO, load_recipe("nvfp4-w4a4")), tmp_path / "out", device="cpu")
    scales = scales_of(tmp_path / "out")
    assert len(scales) == 96 and {float(scale[0]) for scale in scales.values()} == {1.0}
    asked = ["relayout", str(tmp_path / "out"), "--qkv", "canonical", "-o", str(tmp_path / "again"), "-q"]
    made = CliRunner().invoke(app, asked)
    assert made.exit_code == 0, made.output
    assert scales_of(tmp_path / "again") == scales


# --- recipes ----------------------------------------------------------------------------------------------------------


def w4a4_recipe(inputs: str, block: str = "", weights: str = "strategy: tensor_group, group_size: 16") -> str:
    return f"""
default_stage: {{default_modifiers: {{QuantizationModifier: {{config_groups: {{experts: {{
  targets: ['re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$'],
  weights: {{num_bits: 4, type: float, {weights}}}, input_activations: {inputs}}}}}}}}}}}
mimoquant: {{version: 1{block}}}
"""


GOOD = "{num_bits: 4, type: float, strategy: tensor_group, group_size: 16, dynamic: local}"


def test_activations_in_a_recipe_ask_for_input_scales() -> None:
    assert parse_recipe(w4a4_recipe(GOOD), "test").output.input_scales == "unit"
    assert parse_recipe(w4a4_recipe(GOOD, ", scale_search: gram"), "test").output.input_scales == "calibrated"
    chosen = parse_recipe(w4a4_recipe(GOOD, ", scale_search: gram, input_scales: unit"), "test")
    assert chosen.output.input_scales == "unit"
    scheme = "default_stage: {default_modifiers: {QuantizationModifier: {scheme: NVFP4, targets: ['re:.*experts.*']}}}"
    assert parse_recipe(scheme, "test").output.input_scales == "unit"
    assert parse_recipe(scheme.replace("NVFP4", "NVFP4A16"), "test").output.input_scales == "none"


@pytest.mark.parametrize(
    ("inputs", "block", "said"),
    [
        (GOOD.replace("local", "true"), "", "input_activations.dynamic is True"),
        (GOOD.replace("16", "32"), "", "input_activations.group_size is 32"),
        (GOOD.replace(", dynamic: local", ""), "", "input_activations has no dynamic"),
        (GOOD.replace("}", ", observer: minmax}"), "", "input_activations.observer is 'minmax'"),
        (GOOD.replace("}", ", unheard: 1}"), "", "input_activations.unheard is 1"),
        (GOOD, ", input_scales: none", "input_scales is none, and its groups have input_activations"),
        (GOOD, ", input_scales: some", "input_scales 'some' is unknown"),
    ],
)
def test_other_activations_are_refused(inputs: str, block: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(w4a4_recipe(inputs, block), "test")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "scales", "said"),
    [
        ("nvfp4-mse", "calibrated", "input scales are to be calibrated, and it needs no tokens"),
        ("int4-g128-mse", "unit", r"input scales \(unit\) are for NVFP4 experts, and its own are int4 g128"),
        ("gptq-mxfp4", "calibrated", r"input scales \(calibrated\) are for NVFP4 experts, and its own are mxfp4"),
    ],
)
@pytest.mark.parametrize("container", [None, *CONTAINERS[:1]])
def test_scales_that_nothing_gives_are_refused(recipe: str, scales: str, said: str, container: str | None) -> None:
    with pytest.raises(RecipeError, match=said):
        make_plan(MICRO, load_recipe(recipe).stored_as({"input_scales": scales}), container=container)
