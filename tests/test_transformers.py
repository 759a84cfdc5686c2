"""transformers loads the outputs of a Flash-layout checkpoint, and computes with the very weights we mean.

The twin is a plain bf16 checkpoint of the dequantized weights, written here; equal logits prove names, packing, scales
and config at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from windows import meant_window

from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.quant.engine_torch import decode
from mimoquant.quant.formats import Format
from mimoquant.serving import contracts as c
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served
from mimoquant.synthetic.checkpoint import SynthSizes, synth

transformers = pytest.importorskip("transformers", reason="transformers is not installed (scripts/setup --dev)")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (scripts/setup --dev)")


def write_twin(out: Path, twin: Path, fmt: Format) -> None:
    """The output's weights in bf16, experts decoded by us, as a plain checkpoint."""
    index = open_index(out)
    tensors: dict[str, torch.Tensor] = {}
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    with CheckpointReader(index) as reader:

        def read(name: str, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(reader.read(name)).view(dtype).reshape(index.tensors[name].shape)

        for name, info in index.tensors.items():
            if ".experts." not in name:
                tensors[name] = read(name, kinds[info.dtype])
            elif name.endswith(".weight_packed"):
                module = name.removesuffix(".weight_packed")
                scale = read(
                    f"{module}.weight_scale", kinds.get(index.tensors[f"{module}.weight_scale"].dtype, torch.uint8)
                )
                codes = torch.from_numpy(reader.read(name)).reshape(info.shape[0], -1)
                values = decode({"codes": codes[None], "scale": scale[None]}, fmt)[0]
                tensors[f"{module}.weight"] = values.to(torch.bfloat16)
    twin.mkdir()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(".mtp." in key for key in info["unexpected_keys"]), info["unexpected_keys"]
    torch.nn.Module.float(model)  # transformers forbids .float() on a quantized model, but keeps experts in bf16
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("recipe", ["int4-g128-mse", "int4-g32-mse", "mxfp4-mse"])
def test_logits_equal_those_of_the_dequantized_weights(recipe: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    synth(source, "flash", sizes=SynthSizes(layers=6, experts=4), seed=3)
    plan = make_plan(source, load_recipe(recipe), container="compressed-tensors")
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    write_twin(tmp_path / "out", tmp_path / "twin", next(iter(plan.formats.values())))
    ids = torch.randint(0, plan.layout.geometry.vocab, (2, 48), generator=torch.Generator().manual_seed(0))
    ours, twin = logits(tmp_path / "out", ids), logits(tmp_path / "twin", ids)
    assert torch.equal(ours, twin)
    assert ours.std() > 0.1


STOPS = "RuntimeError"
Wrong = tuple[str, str, str, str, str, str]
NEW = c.parse_version(transformers.__version__) >= (5, 24)
WRONG: list[Wrong] = [  # recipe, its scheme, what else it says, container, verdict, what transformers tells
    ("NVFP4", "NVFP4A16", "", "compressed-tensors", "corrupted", "" if NEW else "unexpected weight_global_scale"),
    ("native", "MXFP4A16", "", "native", *(("refused", STOPS) if NEW else ("corrupted", "unexpected weight_scale"))),
    ("asymmetric", "W4A16_ASYM", "", "compressed-tensors", "refused", STOPS),
    (
        *("kept bf16", "W4A16", "carve_outs: {2: bf16}, ", "compressed-tensors"),
        *(("refused", STOPS) if NEW else ("corrupted", "missing")),
    ),
    ("kept fp8", "W4A16", "carve_outs: {2: fp8}, ", "compressed-tensors", "refused", STOPS),
]


@pytest.mark.parametrize("second", ["W4A16", "MXFP4A16"])
def test_experts_in_several_formats_make_it_stop(second: str, tmp_path: Path) -> None:
    synth(tmp_path / "source", "flash", sizes=SynthSizes(layers=3, experts=2, top_k=2))
    group = "{{targets: ['re:.*layers\\.{}\\.mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$'], weights: {{{}}}}}"
    int4 = "num_bits: 4, type: int, symmetric: true, strategy: group, group_size: {}"
    mxfp4 = "num_bits: 4, type: float, symmetric: true, strategy: group, group_size: 32, scale_dtype: torch.uint8"
    groups = group.format(1, int4.format(32)), group.format(2, int4.format(128) if second == "W4A16" else mxfp4)
    written = "{{a: {}, b: {}}}".format(*groups)
    recipe = f"default_stage: {{default_modifiers: {{QuantizationModifier: {{config_groups: {written}}}}}}}"
    plan = make_plan(tmp_path / "source", parse_recipe(recipe, "two"), container="compressed-tensors")
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    verdicts = check(read_served(tmp_path / "out"), "transformers", transformers.__version__)
    assert {problem.verdict for problem in verdicts} >= {"refused"}
    with pytest.raises(RuntimeError, match="conversion"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("name", "scheme", "settings", "container", "verdict", "told"), WRONG)
def test_what_we_say_it_loads_wrongly_it_does(
    name: str, scheme: str, settings: str, container: str, verdict: str, told: str, tmp_path: Path
) -> None:
    """`verify --engine transformers` fails on these; here transformers itself loads them, or stops."""
    synth(tmp_path / "source", "flash", sizes=SynthSizes(layers=3, experts=2, top_k=2))
    recipe = parse_recipe(
        f"""
default_stage: {{default_modifiers: {{QuantizationModifier: {{scheme: {scheme},
  targets: ['re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$']}}}}}}
mimoquant: {{{settings}version: 1}}
""",
        name,
    )
    plan = make_plan(tmp_path / "source", recipe, container=container)
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    assert verdict in {
        problem.verdict for problem in check(read_served(tmp_path / "out"), "transformers", transformers.__version__)
    }

    def load() -> tuple[set[str], set[str]]:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        if not told:  # nothing is reported of experts that are far too large
            assert max(float(held.abs().max()) for name, held in model.named_parameters() if "experts" in name) > 10
        return set(info["missing_keys"]), {key for key in info["unexpected_keys"] if ".mtp." not in key}

    if told == STOPS:
        with pytest.raises(RuntimeError):
            load()
        return
    missing, unexpected = load()
    if told == "missing":  # they have random values then
        assert {key for key in missing if "layers.2.mlp.experts" in key} == missing and missing
    elif not told:
        assert not missing and not unexpected
    else:
        suffix = told.removeprefix("unexpected ")
        lost = {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{suffix}"
            for layer in (1, 2)
            for expert in (0, 1)
            for part in ("gate", "up", "down")
        }
        assert lost <= unexpected


def test_a_window_is_as_wide_there_as_verify_says(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(sliding_window=64, sliding_window_size=64)
    assert transformers.AutoConfig.from_pretrained(folder).sliding_window == (65 if NEW else 64)
    problems = check(read_served(folder), "transformers", transformers.__version__)
    assert any("sliding_window_size 64" in found.text and "65 keys" in found.text for found in problems) == NEW
    held = transformers.AutoConfig.from_pretrained(folder, sliding_window=meant_window(folder))
    assert held.sliding_window == 64


def retarget(folder: Path, ignore: list[str]) -> None:
    """As llm-compressor writes it by default: the class Linear, and the names of what is not quantized."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = ["Linear"]
    config["quantization_config"]["ignore"] = ignore
    path.write_text(json.dumps(config))


def test_linear_as_a_target_is_right_where_all_else_is_ignored(tmp_path: Path) -> None:
    """Experts are no Linear there; it takes the first group of classes for them, and ours is what we mean."""
    synth(tmp_path / "source", "flash", sizes=SynthSizes(layers=3, experts=2, top_k=2))
    plan = make_plan(tmp_path / "source", load_recipe("int4-g32-mse"))
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    ids = torch.randint(0, plan.layout.geometry.vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    before = logits(tmp_path / "out", ids)
    names = [name.removesuffix(".weight") for name in open_index(tmp_path / "out").tensors if "_proj.weight" in name]
    retarget(tmp_path / "out", ["lm_head", *(name for name in names if ".experts." not in name)])
    assert torch.equal(logits(tmp_path / "out", ids), before)
    assert not [problem for problem in check(read_served(tmp_path / "out"), "transformers") if problem.fails]

    retarget(tmp_path / "out", ["lm_head"])
    found = check(read_served(tmp_path / "out"), "transformers")
    assert [problem.verdict for problem in found if "draws random weights" in problem.text] == ["corrupted"]
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert any("self_attn.q_proj" in key for key in info["missing_keys"])


@pytest.mark.slow
def test_a_trained_bf16_checkpoint_keeps_its_predictions(tmp_path: Path, shared: Path) -> None:
    """On the shared trained model: int4 must stay close to bf16, which random weights cannot show."""
    source = shared / "models" / "mimo-tiny"
    pipeline.quantize(make_plan(source, load_recipe("int4-g32-mse")), tmp_path / "out", device="cpu")
    shutil.copy(source / "generation_config.json", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    text = "It was the best of times, it was the worst of times; the old man walked slowly to the sea and said nothing."
    ids = tokenizer(text, return_tensors="pt").input_ids
    before, after = (logits(folder, ids).log_softmax(-1) for folder in (source, tmp_path / "out"))
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < kl < 0.1
