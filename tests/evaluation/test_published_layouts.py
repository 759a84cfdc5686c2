"""4-bit releases as others lay them out are read for what they are, and so is what we write in each container.

The releases are made from the micro checkpoint by `published`, which knows nothing of our code and decodes them by hand
into a bf16 twin. J of a release and of its twin must be the same number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from micro import MICRO
from safetensors.torch import save_file
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.eval_kl import eval_kl, open_layout
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.weights.decoded import CheckpointWeights

WRITERS = {"native": published.native_mxfp4, "modelopt": published.modelopt_nvfp4}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("releases")
    return {name: make(MICRO, folder) for name, make in WRITERS.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we write in ModelOpt's container."""
    out = tmp_path_factory.mktemp("ours") / "out"
    pipeline.quantize(make_plan(MICRO, load_recipe("nvfp4-mse"), container="modelopt"), out, device="cpu")
    return out


def tokens() -> TokenSet:
    ids = np.random.default_rng(3).integers(0, 1024, (2, 64))
    return TokenSet("test", ids, ("a", "b"), "0" * 64, ("0", "1"), ("test",))


def j(candidate: Path) -> float:
    return float(eval_kl(MICRO, candidate, tokens(), noise_floor=False)["j"]["mean"])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight as we read it, in bf16 or F32, q, k, v apart."""
    layout = open_layout(folder)
    out: dict[str, torch.Tensor] = {}
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        for layer in range(weights.layers):
            prefix, held = f"model.layers.{layer}.self_attn.", weights.layer(layer)
            out |= {f"{prefix}{letter}_proj.weight": getattr(held.attention, letter) for letter in "qkv"}
            for chunk in weights.expert_chunks(layer):
                for name in ("gate", "up", "down"):
                    for number, matrix in enumerate(getattr(chunk, name), start=chunk.begin):
                        out[f"model.layers.{layer}.mlp.experts.{number}.{name}_proj.weight"] = matrix
        others = [weight.name for held in layout.units.values() for weight in held if weight.role not in "qkv"]
        out |= {name: weights.tensor(name) for name in others if "qkv_proj" not in name}
    return out


@pytest.mark.parametrize("name", WRITERS)
def test_a_release_has_the_values_of_its_twin(name: str, releases: dict[str, tuple[Path, Path]]) -> None:
    release, twin = releases[name]
    expected, found = published.read(twin)[1], weights_of(release)
    assert len(found) == sum(".mtp." not in n or "self_attn" not in n or n[-13] not in "qkv" for n in expected)
    for key, values in found.items():
        assert torch.equal(values, expected[key]), key


@pytest.mark.parametrize("name", WRITERS)
def test_j_of_a_release_is_that_of_its_twin(name: str, releases: dict[str, tuple[Path, Path]]) -> None:
    release, twin = releases[name]
    assert 0.001 < j(release) == j(twin)
    quantizes = eval_kl(MICRO, release, tokens(), noise_floor=False)["activations_quantized"]
    assert quantizes == (name == "modelopt")  # its NVFP4 and MXFP8 do; the experts of native MXFP4 may not


@pytest.mark.parametrize("name", WRITERS)
def test_inspect_knows_a_release(name: str, releases: dict[str, tuple[Path, Path]]) -> None:
    result = CliRunner().invoke(app, ["inspect", str(releases[name][0]), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["weights"], facts["mtp_layers"], facts["unknown_tensors"]) == ("4-bit experts", 3, [])
    assert facts["qkv"] == {"native": "fused, 2 interleaved ranks", "modelopt": "fused [Q|K|V]"}[name]


def test_our_output_reads_as_the_same_codes_in_the_other_container(ours: Path, tmp_path: Path) -> None:
    """Global scales are powers of two: multiplier or divisor, and whatever is rounded on the way, J is one number."""
    assert 0.001 < j(ours) == j(published.as_compressed_tensors(ours, tmp_path / "other"))
    plain = tmp_path / "plain"
    pipeline.quantize(make_plan(MICRO, load_recipe("nvfp4-mse")), plain, device="cpu")
    assert j(plain) == pytest.approx(j(ours), rel=0.1)  # other codes, of the same quality


def test_products_in_our_output_are_exact_in_any_order(ours: Path) -> None:
    """Engines multiply codes by block scales in bf16, and by the multiplier after the matrix product."""
    tensors = published.read(ours)[1]
    assert (MICRO / "config.json").is_file() and (ours / "hf_quant_config.json").is_file()
    seen = 0
    for name in [name for name in tensors if name.endswith("experts.3.up_proj.weight")]:
        codes, scale = published.unpack(tensors[name]), tensors[f"{name}_scale"].float().repeat_interleave(16, 1)
        multiplier = tensors[f"{name}_scale_2"]
        assert multiplier.shape == () and torch.equal(multiplier, tensors[name.replace("up", "gate") + "_scale_2"])
        late = (published.E2M1[codes.long()] * scale).bfloat16() * multiplier
        early = published.E2M1[codes.long()] * (scale * multiplier)
        assert torch.equal(late, early) and torch.equal(early.bfloat16().float(), early)
        seen += 1
    assert seen == 4


def test_experts_without_their_multiplier_are_refused(releases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(releases["modelopt"][0], tmp_path / "copy"))
    config, tensors = published.read(folder)
    tensors = {name: value for name, value in tensors.items() if not name.endswith("_scale_2")}
    with pytest.raises(CheckpointError, match="need a weight_scale_2, which is missing"):
        j(published.write(tmp_path / "without", config, tensors))


def test_mxfp8_scales_of_another_shape_are_refused(releases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(releases["modelopt"][0], tmp_path / "copy"))
    name = "model.layers.0.self_attn.qkv_proj.weight_scale_inv"
    tensors = published.load_file(folder / "model-2-of-2.safetensors")
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model-2-of-2.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight_scale_inv is U8.*, expected F32.* or U8"):
        open_layout(folder)


def test_a_modelopt_checkpoint_is_no_source(releases: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(CheckpointError, match="the experts are quantized already"):
        make_plan(releases["modelopt"][0], load_recipe("nvfp4-mse"))
