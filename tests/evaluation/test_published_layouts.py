"""4-bit releases as others lay them out are read for what they are, and so is what we write in each container.

The releases are made from the micro checkpoint by `published`, which knows nothing of our code and decodes them by hand
into a bf16 twin. J of a release and of its twin must be the same number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch
from micro import MICRO, edit_json
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
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served
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


# --- V2.6, cast by others without loss --------------------------------------------------------------------------------

STYLES = ("fp8", "float32", "beside")


@pytest.fixture(scope="module")
def v26(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source and its casts."""
    base = tmp_path_factory.mktemp("v26")
    source = published.small_v26(MICRO, base)
    return {"source": source} | {style: published.lossless_cast(source, base, style) for style in STYLES}


@pytest.mark.parametrize("style", STYLES)
def test_a_cast_by_others_is_its_source_to_the_bit(style: str, v26: dict[str, Path]) -> None:
    before, after = weights_of(v26["source"]), weights_of(v26[style])
    same = [
        name for name in before if torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
    ]
    assert len(same) == len(before)
    told = eval_kl(v26["source"], v26[style], tokens(), noise_floor=False)
    assert told["reference_stored"] == "MXFP4 experts, FP8 attention"
    assert told["j"]["mean"] == 0 and told["top1"]["all"] == 1


@pytest.mark.parametrize("style", STYLES)
def test_inspect_and_the_engine_checks_read_it(style: str, v26: dict[str, Path]) -> None:
    result = CliRunner().invoke(app, ["inspect", str(v26[style]), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["weights"], facts["mtp_layers"], facts["unknown_tensors"]) == ("4-bit experts", 3, [])
    assert facts["qkv"] == ("fused, 2 interleaved ranks" if style == "fp8" else "fused [Q|K|V]")
    for engine in ("vllm", "sglang"):
        checked = CliRunner().invoke(app, ["verify", str(v26[style]), "--engine", engine, "--tp", "1"])
        assert checked.exit_code in (0, 3) and "Traceback" not in checked.output, checked.output
        assert ("weight_scale_inv" in checked.output) == (style == "fp8" and engine == "vllm"), checked.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conversion_metadata": {"qkv_layout": "by_head"}}, "conversion_metadata.qkv_layout is 'by_head', known is"),
        ({"conversion_metadata": ["q"]}, "conversion_metadata is list, expected an object"),
    ],
)
def test_an_order_of_rows_that_is_not_known_is_refused(
    change: dict[str, object], said: str, v26: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(v26["float32"], tmp_path / "copy"))
    edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=said.replace(".", "[.]")):
        open_layout(folder)


def test_settings_beside_that_say_nothing_are_refused(v26: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(v26["beside"], tmp_path / "copy"))
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no quantization with a quant_algo"):
        open_layout(folder)


def test_a_kv_scale_that_is_no_number_is_refused(v26: dict[str, Path], tmp_path: Path) -> None:
    config, tensors = published.read(v26["beside"])
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(2)
    folder = published.write(tmp_path / "copy", config, tensors)
    shutil.copy(v26["beside"] / "hf_quant_config.json", folder)
    with pytest.raises(CheckpointError, match="a scale of the KV cache is one number"):
        open_layout(folder)


@pytest.mark.parametrize("style", STYLES)
def test_launch_takes_it_where_the_engine_does(style: str, v26: dict[str, Path]) -> None:
    options = ["--engine", "sglang", "--gpu", "h100", "--gpus", "1"]
    made = CliRunner().invoke(app, ["launch", str(v26[style]), *options])
    assert made.exit_code == 0 and "MoE marlin" in made.stdout, made.output


# --- the file beside config.json; its contradictions are in tests/planning/test_settings_beside.py --------------------


def said(folder: Path, *verb: str) -> str:
    made = CliRunner().invoke(app, [*verb, str(folder), "--json"])
    assert made.exit_code in (0, 3), made.output
    return made.stdout


def test_verbs_tell_what_contradicts(releases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    release, text = (
        releases["modelopt"][0],
        "the KV cache is in 16 bits in quantization_config of config.json, in FP8 in ",
    )
    folder = Path(shutil.copytree(release, tmp_path / "kv"))
    edit_json(folder / "hf_quant_config.json", lambda held: held["quantization"].update(kv_cache_quant_algo="FP8"))
    text += "hf_quant_config.json: "
    assert f"{text}vLLM reads the first, SGLang the second" in said(folder, "inspect")
    vllm, sglang = (said(folder, "verify", "--engine", engine) for engine in ("vllm", "sglang"))
    assert f"{text}vLLM 0.3" in vllm and "reads the first" in vllm and "kv_cache_quant_algo" not in vllm
    assert f"{text}SGLang 0.5" in sglang and "reads the second" in sglang and "kv_cache_quant_algo 'FP8'" in sglang
    assert "hf_quant_config" not in said(release, "inspect")


def test_layers_are_those_of_the_file_that_the_engine_reads(
    releases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """SGLang reads the second; there layer 2's experts are in nothing, and layer 99's in NVFP4."""
    folder = Path(shutil.copytree(releases["modelopt"][0], tmp_path / "layers"))

    def change(held: dict[str, Any]) -> None:
        layers = held["quantization"]["quantized_layers"]
        entry = next(iter(layers.values()))
        for name in [name for name in layers if name.startswith("model.layers.2.mlp.experts")]:
            del layers[name]
        layers["model.layers.99.mlp.experts.0.up_proj"] = entry

    edit_json(folder / "hf_quant_config.json", change)
    vllm, sglang = (said(folder, "verify", "--engine", engine) for engine in ("vllm", "sglang"))
    for told in ("layer 2: experts are modelopt nvfp4 g16, quantization_config makes them bf16", "names 1 module not"):
        assert told in sglang and told not in vllm


def test_the_file_beside_completes_mixed_precision(releases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    release = releases["modelopt"][0]
    folder = Path(shutil.copytree(release, tmp_path / "older"))
    edit_json(folder / "config.json", lambda config: config["quantization_config"].pop("quantized_layers"))
    for engine in ("vllm", "sglang"):
        assert check(read_served(folder), engine) == check(read_served(release), engine)


@pytest.mark.parametrize("content", ["{}", "{", '{"quantization": []}', '{"quantization": {"quant_algo": null}}'])
def test_a_file_beside_that_is_not_needed_may_say_nothing(
    content: str, releases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(releases["modelopt"][0], tmp_path / "odd"))
    (folder / "hf_quant_config.json").write_text(content)
    assert "in hf_quant_config" not in said(folder, "inspect")
