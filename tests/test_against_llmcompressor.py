"""Plain rounding against llm-compressor's `model_free_ptq` with its FP8 dequantizer chained, tensor by tensor.

They may differ in a few ways only, all but the last from its bf16 arithmetic where ours is float32; each is checked and
counted: codes whose w / scale it rounds to bf16 before rounding to the grid; asymmetric scales from a bf16 range; NVFP4
global scales and amax / 6 in bf16; and NVFP4 global scales that gate and up do not share. All else is equal to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import mimoquant
from mimoquant import pipeline
from mimoquant.checkpoint.index import open_index
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.output import small_files
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import parse_recipe
from mimoquant.quant.engine_torch import decode, unpack_nibbles
from mimoquant.quant.formats import Format
from mimoquant.synthetic.checkpoint import SynthSizes, synth

pytestmark = pytest.mark.skipif(
    find_spec("llmcompressor") is None, reason="llm-compressor is not installed (scripts/setup --dev)"
)  # importing it here would cost every worker seconds

EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 with q, k, v split and whole blocks: the peer reads neither a fused qkv nor rank-padded or partial blocks."""
    folder = tmp_path_factory.mktemp("peer") / "source"
    sizes = SynthSizes(layers=3, experts=4, head_dim=128, v_head_dim=128)
    synth(folder, "flash", sizes=sizes, seed=7)
    return folder


def load(folder: Path) -> Tensors:
    kinds = {
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "I32": torch.int32,
        "I64": torch.int64,
        "U8": torch.uint8,
        "F8_E4M3": torch.float8_e4m3fn,
    }
    index = open_index(folder)
    with CheckpointReader(index) as reader:
        return {
            name: torch.from_numpy(reader.read(name)).view(kinds[info.dtype]).reshape(info.shape)
            for name, info in index.tensors.items()
        }


def both(source: Path, scheme: str, out: Path) -> tuple[Tensors, Tensors]:
    """Our output and the peer's for a preset scheme, experts only."""
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
    from llmcompressor import model_free_ptq

    modifier = f"QuantizationModifier: {{targets: ['{EXPERTS}'], scheme: {scheme}}}"
    recipe = f"default_stage: {{default_modifiers: {{{modifier}}}}}\nmimoquant: {{container: compressed-tensors}}"
    pipeline.quantize(make_plan(source, parse_recipe(recipe, scheme)), out / "ours", device="cpu")
    fp8 = [EXPERTS, r"re:.*self_attn\.[qkv]_proj$", r"re:.*mlp\.(gate|up|down)_proj$"]
    others = [r"re:(?!.*mlp\.experts\.).*"]
    model_free_ptq(
        source, out / "peer", scheme=scheme, ignore=others, device="cpu", converter=FP8BlockDequantizer(targets=fp8)
    )
    return load(out / "ours"), load(out / "peer")


def differing(ours: Tensors, peer: Tensors, suffix: str) -> tuple[list[str], int]:
    """Names that end in `suffix` and differ, and how many have it."""
    names = [name for name in ours if name.endswith(suffix)]
    return [n for n in names if not torch.equal(ours[n].view(torch.uint8), peer[n].view(torch.uint8))], len(names)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "MXFP4A16"])
def test_plain_rounding_equals_the_peers(source: Path, scheme: str, tmp_path: Path) -> None:
    ours, peer = both(source, scheme, tmp_path)
    assert ours.keys() == peer.keys()
    others = [name for name in ours if ".experts." not in name]
    assert len(others) > 50
    for name in others:
        assert torch.equal(ours[name], peer[name]), name
    assert differing(ours, peer, "weight_shape")[0] == []
    if scheme == "MXFP4A16":  # powers of two: bf16 arithmetic is exact
        for suffix in ("weight_packed", "weight_scale"):
            assert differing(ours, peer, suffix) == ([], 2 * 4 * 3)
        return
    if scheme == "W4A16":
        assert differing(ours, peer, "weight_scale") == ([], 2 * 4 * 3)
    modules = [name.removesuffix(".weight_packed") for name in ours if name.endswith(".weight_packed")]
    count_differences(ours, peer, modules, source, symmetric=scheme == "W4A16")


def count_differences(ours: Tensors, peer: Tensors, modules: list[str], source: Path, *, symmetric: bool) -> None:
    """Codes differ rarely and by one; and where they do, ours is the nearer to the source."""
    reference, fmt = load(source), Format("int4", 128, symmetric)
    differ = total = 0
    error = {"ours": 0.0, "peer": 0.0}
    for module in modules:
        codes = [unpack_nibbles(side[f"{module}.weight_packed"].view(torch.uint8)).to(int) for side in (ours, peer)]
        scales = [side[f"{module}.weight_scale"] for side in (ours, peer)]
        same = (scales[0] == scales[1]).repeat_interleave(128, dim=1)
        step = (codes[0] - codes[1]).abs()
        if symmetric:
            assert step.max() <= 1
        differ, total = differ + int(step.ne(0).logical_and(same).sum()), total + int(same.sum())
        weight = dequantized(reference, module)
        for side, tensors in (("ours", ours), ("peer", peer)):
            parts = {
                "codes": tensors[f"{module}.weight_packed"].view(torch.uint8),
                "scale": tensors[f"{module}.weight_scale"],
            }
            if not symmetric:
                parts["zero_point"] = tensors[f"{module}.weight_zero_point"]
            values = decode({key: value[None] for key, value in parts.items()}, fmt)[0]
            error[side] += float((values - weight).square().sum())
    assert differ / total < 0.05
    assert error["ours"] < error["peer"] * (1.0 if symmetric else 1.01)


def dequantized(reference: Tensors, module: str) -> torch.Tensor:
    weight, scale = reference[f"{module}.weight"].float(), reference[f"{module}.weight_scale_inv"]
    blocks = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight * blocks).to(torch.bfloat16).float()


def test_nvfp4_differs_from_the_peers_in_the_known_ways_only(source: Path, tmp_path: Path) -> None:
    """Its global scale is a bf16 number, and gate and up have one each, where engines use one; ours is shared."""
    ours, peer = both(source, "NVFP4A16", tmp_path)
    assert ours.keys() == peer.keys()
    modules = [name.removesuffix(".weight_packed") for name in ours if name.endswith(".weight_packed")]
    unshared = 0
    for gate in (module for module in modules if module.endswith("gate_proj")):
        up = gate.replace("gate_proj", "up_proj")
        assert torch.equal(ours[f"{gate}.weight_global_scale"], ours[f"{up}.weight_global_scale"])
        unshared += not torch.equal(peer[f"{gate}.weight_global_scale"], peer[f"{up}.weight_global_scale"])
    assert unshared > 0
    down = [module for module in modules if module.endswith("down_proj")]
    for module in down:
        ratio = ours[f"{module}.weight_global_scale"] / peer[f"{module}.weight_global_scale"]
        assert abs(float(ratio) - 1) <= 2**-8
    for suffix, limit in (("weight_scale", 0.03), ("weight_packed", 0.05)):
        pairs = [(ours[f"{m}.{suffix}"].view(torch.uint8), peer[f"{m}.{suffix}"].view(torch.uint8)) for m in down]
        differ = sum(int(a.ne(b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
        assert 0 < differ < limit, (suffix, differ)


def test_the_written_recipe_loads_in_llmcompressor(tmp_path: Path) -> None:
    from llmcompressor.recipe import Recipe

    from mimoquant.planning.recipe import load_recipe

    for name in ("int4-g32-mse", "mxfp4-rtn", "nvfp4-mse"):
        plan = make_plan(mimoquant.micro_checkpoint(), load_recipe(name))
        path = tmp_path / f"{name}.yaml"
        path.write_text(small_files.resolved_recipe(plan, {}, None))
        modifiers = Recipe.create_instance(str(path)).modifiers
        assert [type(modifier).__name__ for modifier in modifiers] == ["QuantizationModifier"]
        (scheme,) = modifiers[0].resolved_config.config_groups.values()
        fmt = next(iter(plan.formats.values()))
        assert (scheme.weights.num_bits, scheme.weights.group_size) == (4, fmt.group_size)
        assert np.all([target in scheme.targets for target in [EXPERTS]])


def test_a_chosen_mixture_loads_in_llmcompressor(tmp_path: Path) -> None:
    from llmcompressor.recipe import Recipe

    from mimoquant.mixing.mixtures import Mixtures
    from mimoquant.planning.recipe import load_recipe

    plan = Mixtures(make_plan(mimoquant.micro_checkpoint(), load_recipe("int4-g128-mse"))).planned([1, 3, 0, 2])
    evidence = {"sensitivity": {"bytes": 1, "layers": {1: {"option": "int4 g64", "alone": [0.1, 0.0, 0.2]}}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(
        small_files.resolved_recipe(replace(plan, recipe=replace(plan.recipe, provenance=evidence)), {}, None)
    )
    assert "alone" in path.read_text()
    (modifier,) = Recipe.create_instance(str(path)).modifiers
    groups = modifier.resolved_config.config_groups
    assert {name: scheme.weights.group_size for name, scheme in groups.items()} == {
        "int4_g64": 64,
        "int4_g128": 128,
        "int4_g32": 32,
    }
    assert modifier.ignore == [r"re:.*layers\.2\.mlp\.experts\..*"]


def test_eval_kl_reads_the_peers_output(source: Path, tmp_path: Path) -> None:
    """Whatever its sharding and ignore list. Equal weights (MXFP4) give an equal J, few other codes a near one."""
    from mimoquant.calibration.tokens import load_tokens
    from mimoquant.evaluation.eval_kl import eval_kl

    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 1024, (4, 48)))
    tokens = load_tokens([str(ids)], source, sequences=None, tokens=48, vocab=1024)
    for scheme, tolerance in (("MXFP4A16", 0.0), ("W4A16", 0.1)):
        both(source, scheme, tmp_path / scheme)
        ours, peer = (
            eval_kl(source, tmp_path / scheme / side, tokens, noise_floor=False)["j"]["mean"]
            for side in ("ours", "peer")
        )
        assert 0 < peer == pytest.approx(ours, rel=tolerance)
