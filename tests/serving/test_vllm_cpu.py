"""A real vLLM loads every container we write and answers with the numbers of our own forward.

They go (`engine_cases`) through one run of `vllm_judge.py`, which says what of vLLM runs there. `scripts/test_engines`
makes vLLM's environment and runs this; with -s it prints the figures of scripts/RESULTS.md. Left out: TP above 1, the
omni class (see `test_vllm_prompt`), MTP (the main model skips it; see `test_vllm_draft`), a GPU's kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_cases import CASES, DENSE_FP8, PYTHON, Plant, Tensors, damaged, hub_order, slug
from micro import MICRO
from safetensors.torch import load_file

from mimoquant.calibration.tokens import load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.model.decoder_layer import linear
from mimoquant.model.layer_stream import walk
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served
from mimoquant.weights.decoded import CheckpointWeights, packed_format

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
SEQUENCES, TOKENS = 3, 97
NOISE = 1e-4  # float32 on both sides; log-probabilities

Rows = npt.NDArray[np.float64]


# --- errors, planted in a sound output --------------------------------------------------------------------------------


def gate_is_up(config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts." in name and ".gate_proj." in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def reversed_nibbles(config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        packed = tensors[name].contiguous().view(torch.uint8)
        turned = (packed >> 4) | (packed << 4)
        tensors[name] = turned.view(tensors[name].dtype)


def own_global_scales(config: dict[str, Any], tensors: Tensors) -> None:
    """up's global scale twice that of gate, and its block scales too: the same weights, if each has its own."""
    for name in [name for name in tensors if name.endswith("up_proj.weight_global_scale")]:
        tensors[name] = tensors[name] / 2
        scale = name.replace("weight_global_scale", "weight_scale")
        tensors[scale] = (tensors[scale].float() / 2).to(torch.float8_e4m3fn)


def divisors(config: dict[str, Any], tensors: Tensors) -> None:
    """compressed-tensors' global scale under ModelOpt's name."""
    for name in [name for name in tensors if name.endswith("weight_scale_2")]:
        tensors[name] = 1 / tensors[name]


def one_scale_lost(config: dict[str, Any], tensors: Tensors) -> None:
    del tensors["model.layers.3.mlp.experts.5.up_proj.weight_scale"]


def gptq_names(config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        tensors[name.replace("weight_packed", "qweight")] = tensors.pop(name)


def byte_scales_off(config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if ".experts." in name and name.endswith("weight_scale")]:
        tensors[name] = tensors[name] + 1


def layer_not_ignored(config: dict[str, Any], tensors: Tensors) -> None:
    config["quantization_config"]["ignore"].pop()


WRONG: dict[str, tuple[str, Plant]] = {  # loads, and answers with other numbers
    "bf16 qkv in the hub's order": ("int4 g128, fused source", hub_order),
    "gate and up swapped": ("int4 g32", gate_is_up),
    "nibbles reversed, int4": ("int4 g128, split source", reversed_nibbles),
    "nibbles reversed, MXFP4": ("MXFP4", reversed_nibbles),
    "global scales not shared": ("NVFP4", own_global_scales),
    "divisors for multipliers": ("ModelOpt NVFP4", divisors),
    "exponents one too large": ("native MXFP4", byte_scales_off),
}
NEVER = "Following weights were not initialized from checkpoint: .*"  # vLLM's own check, off unless asked for
MISSED: dict[str, tuple[str, Plant, str]] = {  # nothing that vLLM checks by default
    "a scale lost": ("int4 g32", one_scale_lost, r"1 of the experts' tensors never came, \S*layers\.3\S* expert 5 w13"),
    "names of GPTQ": ("int4 g32", gptq_names, rf"{NEVER}layers\.3\.mlp\.experts\S*w2_weight_packed"),
    "a kept layer not ignored": ("int4 g128, a layer bf16", layer_not_ignored, rf"{NEVER}layers\.2\.mlp\.experts"),
}


# --- one run of everything --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Checkpoints by case (or source, or planted error), and what vLLM answered: log-probabilities, or its log."""

    folders: dict[str, Path]
    ids: torch.Tensor
    out: Path

    def rows(self, name: str) -> Rows:
        path = self.out / f"{slug(name)}.npy"
        assert path.exists(), f"vLLM gave no answer:\n{self.log(name)[-3000:]}"
        rows = np.load(path).astype(np.float64)
        return rows.reshape(-1, rows.shape[-1])

    def log(self, name: str) -> str:
        return (self.out / f"{slug(name)}.log").read_text(errors="replace")

    def differences(self, name: str, meant: str) -> tuple[float, float, float]:
        """vLLM's answer to one checkpoint against ours to another: max |Δ log p|, KL mean and max over positions."""
        theirs, own = self.rows(name), ours(self.folders[meant], self.ids)
        kl = (np.exp(own) * (own - theirs)).sum(-1)
        found = float(np.abs(own - theirs).max()), float(kl.mean()), float(kl.max())
        print(f"\n{name}: max |dlogp| {found[0]:.1e}, KL mean {found[1]:.1e}, max {found[2]:.1e}")
        return found


class Unrounded(CheckpointWeights):
    """What vLLM scales in another order than we do, in float32: a rounding to bf16 could then fall either way.

    That is NVFP4 (1 / global scale comes first), and FP8 matrices: at any other TP than the fused qkv has ranks, vLLM
    encodes it again. All of their FP8 blocks are whole.
    """

    def _stack(self, number: int, begin: int, end: int, projection: str) -> torch.Tensor:
        weights = [self.layout.expert(number, expert, projection) for expert in range(begin, end)]
        if weights[0].packed and packed_format(weights[0]).name == "nvfp4":
            return self._unpack(weights)
        return super()._stack(number, begin, end, projection)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = self._units[name]
        if weight.scale is None:
            return super().tensor(name, dtype)
        values, scale = (
            torch.from_numpy(self.reader.read(info.name)).view(kind).reshape(info.shape).float()
            for info, kind in ((weight.info, torch.float8_e4m3fn), (weight.scale, torch.float32))
        )
        return values * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


@torch.no_grad()
def ours(folder: Path, ids: torch.Tensor) -> Rows:
    """Log-probabilities by our own forward, [positions, vocabulary]."""
    layout = open_layout(folder)
    with CheckpointReader(layout.index) as reader:
        weights = Unrounded(reader, layout, torch.device("cpu"))
        [stream] = streams_of(weights, [[ids]])
        walk([stream])
        logits = linear(final_hidden(stream, weights.tensor("model.norm.weight")), weights.tensor("lm_head.weight"))
        return logits.log_softmax(-1).numpy().astype(np.float64)


@pytest.fixture(scope="module")
def answers(engine_outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    base, folders = tmp_path_factory.mktemp("vllm"), dict(engine_outputs)
    for name, (case_name, plant, *_) in (WRONG | MISSED).items():
        folders[name] = damaged(folders[case_name], base / slug(name), plant)
    ids = torch.from_numpy(load_tokens(["heldout-v1"], MICRO, sequences=SEQUENCES, tokens=TOKENS, vocab=1024).ids)
    asked = ["split", *CASES, *WRONG, *MISSED]
    out = base / "answers"
    out.mkdir()
    jobs = {"ids": ids.tolist(), "out": str(out), "checkpoints": {slug(name): str(folders[name]) for name in asked}}
    (base / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [PYTHON, HERE / "vllm_judge.py", base / "jobs.json"],
        cwd=base,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Answers(folders, ids, out)


def test_bf16_is_the_noise_of_float32(answers: Answers) -> None:
    assert answers.differences("split", "split")[0] < NOISE


def test_fp8_beside_modelopts_experts_stops_vllm_as_we_say(answers: Answers) -> None:
    """No linear method has this name, so its layers have no `weight_scale_inv`."""
    (problem,) = [p for p in check(read_served(answers.folders[DENSE_FP8]), "vllm", "0.32.0", 1) if p.fails]
    assert problem.verdict == "refused" and "weight_scale_inv" in problem.text
    log = (answers.out / f"{slug(DENSE_FP8)}.log").read_text(errors="replace")
    assert re.search(r"KeyError: '.*\.weight_scale_inv'", log), log[-3000:]
    assert not (answers.out / f"{slug(DENSE_FP8)}.npy").exists()


@pytest.mark.parametrize("name", [name for name in CASES if name != DENSE_FP8])
def test_a_container_answers_with_our_numbers(name: str, answers: Answers) -> None:
    most, mean, _ = answers.differences(name, name)
    assert most < NOISE
    own, source = ours(answers.folders[name], answers.ids), ours(answers.folders[CASES[name].source], answers.ids)
    quantization = (np.exp(source) * (source - own)).sum(-1).mean()
    assert quantization > 100 * abs(mean)  # the 4-bit weights do say something else than the source's


@pytest.mark.parametrize("name", [name for name in CASES if "W4A4" in name])
def test_input_scales_are_read_as_the_largest_of_a_layers_experts(name: str, answers: Answers) -> None:
    """By vLLM's own reduction; experts differ, so that another one would show."""
    held: dict[tuple[str, bool], list[float]] = {}
    for path in answers.folders[name].glob("*.safetensors"):
        for key, value in load_file(path).items():
            if key.endswith((".input_scale", ".input_global_scale")):
                scale = value.item() if key.endswith("input_scale") else 1 / value.item()
                held.setdefault((key.partition(".mlp.")[0], ".down_proj." in key), []).append(scale)
    told = re.findall(r"input scales \S*?(model\.layers\.\d+)\.mlp\S* (\S+) (\S+)", answers.log(name))
    assert len(told) == 4 and all(len(set(scales)) > 4 for scales in held.values())
    for layer, *found in told:
        for down, scale in enumerate(found):
            assert float(scale) == pytest.approx(max(held[layer, bool(down)]), rel=1e-6), (layer, down)


def test_gptq_did_write_negative_scales(answers: Answers) -> None:
    folder = answers.folders["int4 g128 GPTQ, negative scales"]
    tensors = [tensors for path in folder.glob("*.safetensors") for tensors in load_file(path).items()]
    assert any(bool((values < 0).any()) for name, values in tensors if name.endswith(".weight_scale"))


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_error_is_seen(name: str, answers: Answers) -> None:
    most, mean, _ = answers.differences(name, WRONG[name][0])
    assert most > 1000 * NOISE and mean > 1e-3


@pytest.mark.parametrize("name", MISSED)
def test_what_never_came_is_told(name: str, answers: Answers) -> None:
    assert not (answers.out / f"{slug(name)}.npy").exists()
    assert re.search(MISSED[name][2], answers.log(name)), answers.log(name)[-3000:]
