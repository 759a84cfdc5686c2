"""Checkpoints whose config quantizes activations or the KV cache too: they are read, and it is said wherever J is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO, edit_json, held_out, j_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.eval_kl import eval_kl

Tensors = dict[str, torch.Tensor]
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": "local",
}
FP8_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
ATTENTION = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("left_out") / "out"
    mimoquant.quantize(MICRO, "nvfp4-mse", out, device="cpu")
    return out


def changed(source: Path, out: Path, quantization: Callable[[dict[str, Any]], object], more: Tensors) -> Path:
    """A copy with another quantization_config and more tensors, in a shard of their own."""
    shutil.copytree(source, out)
    edit_json(out / "config.json", lambda config: quantization(config["quantization_config"]))
    if more:
        save_file(more, out / "more.safetensors", metadata={"format": "pt"})
        edit_json(
            out / "model.safetensors.index.json",
            lambda index: index["weight_map"].update(dict.fromkeys(more, "more.safetensors")),
        )
    return out


def of_groups(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(quantization: dict[str, Any]) -> None:
        for group in quantization["config_groups"].values():
            group[key] = value

    return edit


def nothing(quantization: dict[str, Any]) -> None:
    return None


def input_scales(name: str) -> Tensors:
    experts = (
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj"
        for n in range(1, 5)
        for e in range(8)
        for p in ("gate", "up", "down")
    )
    return {f"{module}.{name}": torch.tensor([100.0]) for module in experts}


def cache(*names: str, shape: tuple[int, ...] = (1,)) -> Tensors:
    return {f"{ATTENTION}{name}": torch.ones(shape, dtype=torch.bfloat16) for name in names}


READ: list[tuple[str, Callable[[dict[str, Any]], object], Tensors, list[str]]] = [
    ("W4A16", nothing, {}, []),
    ("W4A4", of_groups("input_activations", NVFP4), input_scales("input_global_scale"), ["activations"]),
    ("W4A4 as ModelOpt names it", of_groups("input_activations", NVFP4), input_scales("input_scale"), ["activations"]),
    ("scales that config.json does not tell of", nothing, input_scales("input_global_scale"), ["activations"]),
    ("dynamic, without scales", of_groups("input_activations", NVFP4 | {"dynamic": True}), {}, ["activations"]),
    ("an FP8 cache", lambda q: q.update(kv_cache_scheme=FP8_CACHE), cache("k_scale", "v_scale"), ["the KV cache"]),
    ("an FP8 cache without scales", lambda q: q.update(kv_cache_scheme=FP8_CACHE), {}, ["the KV cache"]),
    ("its scales alone", nothing, cache("k_proj.k_scale", "v_proj.v_scale", shape=()), ["the KV cache"]),
    ("its scales as once named", nothing, cache("k_proj.output_scale", "v_proj.output_scale"), ["the KV cache"]),
    (
        "both",
        lambda q: (of_groups("input_activations", NVFP4)(q), q.update(kv_cache_scheme=FP8_CACHE)),
        input_scales("input_global_scale") | cache("k_scale", "v_scale"),
        ["activations", "the KV cache"],
    ),
]  # what, config, tensors, what J leaves out


@pytest.mark.slow
@pytest.mark.parametrize(("what", "quantization", "more", "left_out"), READ, ids=[row[0] for row in READ])
def test_it_is_read_and_told(
    what: str, quantization: Any, more: Tensors, left_out: list[str], weights_only: Path, tmp_path: Path
) -> None:
    """J is that of the weights alone, to the bit."""
    out = changed(weights_only, tmp_path / "out", quantization, more)
    facts = mimoquant.inspect(out)
    assert facts["unknown_tensors"] == [] and facts["weights"] == "4-bit experts"
    said = [f"its config quantizes {' and '.join(left_out)} too: J is of its weights alone"] if left_out else []
    assert facts["notes"] == said
    tokens = held_out(1, 48)
    measured = eval_kl(MICRO, out, tokens, noise_floor=False)
    assert measured["left_out"] == left_out and measured["activations_quantized"] == ("activations" in left_out)
    assert measured["j"]["mean"] == j_of(weights_only, tokens) > 0


REFUSED: list[tuple[str, Tensors, str]] = [
    (
        "columns in another order",
        {f"{ATTENTION[:-10]}mlp.experts.0.up_proj.weight_g_idx": torch.zeros(8)},
        "no known role, first .*weight_g_idx",
    ),
    (
        "a scale for each head",
        cache("k_scale", shape=(4,)),
        r"k_scale is BF16\[4\], a scale of the KV cache is one number",
    ),
    ("scales of attention's inputs", cache("q_proj.input_scale"), "no known role, first .*q_proj.input_scale"),
    ("a scale of no layer", {"model.layers.9.self_attn.k_scale": torch.ones(1)}, "no known role, first model.layers.9"),
    (
        "whole numbers",
        {f"{ATTENTION}k_scale": torch.ones(1, dtype=torch.int32)},
        r"k_scale is I32\[1\], .* BF16 or F32",
    ),
]  # what, tensors, what is said


@pytest.mark.parametrize(("what", "more", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_not_known_stays_refused(
    what: str, more: Tensors, said: str, weights_only: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        mimoquant.inspect(changed(weights_only, tmp_path / "out", nothing, more))


def test_it_is_said_wherever_j_is(weights_only: Path, tmp_path: Path) -> None:
    """In the terminal, on the page, in JUnit's file, on the model card, in JSON."""
    out = changed(
        weights_only, tmp_path / "out", of_groups("input_activations", NVFP4), input_scales("input_global_scale")
    )
    files = {name: tmp_path / f"result.{name}" for name in ("html", "xml", "json")}
    words = ["eval-kl", MICRO, out, "--sequences", 1, "--tokens", 32, "--no-noise-floor", "--max-kl", 100, "--card"]
    words += ["--html", files["html"], "--junit", files["xml"], "-o", files["json"]]
    made = CliRunner().invoke(app, [str(word) for word in words])
    assert made.exit_code == 0, made.stderr
    note = "its config quantizes activations too: J is of its weights alone"
    assert (
        note in made.stderr
        and note in " ".join(made.stdout.split())
        and "J of the weights alone ." in made.stdout.replace("0.", ".")
    )
    assert note in files["html"].read_text() and note in (out / "README.md").read_text()
    assert "J of the weights alone" in files["xml"].read_text()
    assert json.loads(files["json"].read_text())["left_out"] == ["activations"]


def test_relayout_keeps_the_scales(weights_only: Path, tmp_path: Path) -> None:
    source = changed(
        weights_only, tmp_path / "source", nothing, cache("k_scale", "v_scale") | input_scales("input_global_scale")
    )
    mimoquant.relayout(source, tmp_path / "out", qkv="canonical")
    kept = {name: value for path in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(path).items()}
    assert len([name for name in kept if name.endswith(".input_global_scale")]) == 96
    assert torch.equal(kept[f"{ATTENTION}k_scale"], torch.ones(1, dtype=torch.bfloat16))
    assert mimoquant.inspect(tmp_path / "out")["notes"] == mimoquant.inspect(source)["notes"] != []
