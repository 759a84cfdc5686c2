"""SGLang's own loader puts every tensor of our outputs where it belongs, at TP 1 and 2, or stops as we say it does.

What each rank's parameters must be is written out here from the files; the interpretation of their bits is the kernels'
business and not seen. `sglang_loader.py` says what of SGLang 0.5.23 runs. `scripts/test_engines` makes its environment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import CASES, Tensors, ask_engines, damaged, hub_order, slug, with_remote_code
from safetensors.torch import load_file

from mimoquant import pipeline
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served
from mimoquant.synthetic.checkpoint import SynthSizes, synth

pytestmark = pytest.mark.engine
HUB = "bf16 qkv in the hub's order"
LOADED = [name for name, case in CASES.items() if case.source == "fused"]
NOT_LOADED = {
    "w13_weight_shape",
    "w2_weight_shape",
    "w13_weight_g_idx",
    "w2_weight_g_idx",
    "k_scale",
    "v_scale",
    "w13_g_idx_sort_indices",
    "w2_g_idx_sort_indices",
    "w13_input_scale",
    "w2_input_scale",
    "w13_blockscale_swizzled",
    "w2_blockscale_swizzled",
}
RANKS = 2  # of the fused source
STOPS = {
    "MXFP4": "KeyError: 'model.layers.1.mlp.experts.w13_weight_packed'",
    "int4 g32 asymmetric": "RuntimeError: The size of tensor a",
    "int4 g64, FP8, MXFP4, NVFP4 by layers": "ValueError: ('For Fused MoE layers, only ', 'pack-quantized '",
}
CUT = "native MXFP4, experts cut"
JOBS = [*((name, tp) for name in [*LOADED, HUB] for tp in (1, 2)), (CUT, 2)]


def ep_of(name: str, tp: int) -> int:
    """Experts stay whole where half of one would be half a group, or half an FP8 block."""
    return tp if name != CUT and ("g128" in name or "native" in name or "FP8" in name) else 1


@dataclass(frozen=True)
class Loads:
    folders: dict[str, Path]
    out: Path

    def rank(self, name: str, tp: int, rank: int) -> Tensors | None:
        """A rank's parameters; None where SGLang stopped."""
        path = self.out / f"{slug(name)}-{tp}" / f"rank{rank}.safetensors"
        return load_file(path) if path.exists() else None

    def log(self, name: str, tp: int) -> str:
        return (self.out / f"{slug(name)}-{tp}" / "rank0.log").read_text(errors="replace")

    def files(self, name: str) -> Tensors:
        return {
            key: value for path in self.folders[name].glob("*.safetensors") for key, value in load_file(path).items()
        }

    def verdicts(self, name: str, tp: int) -> set[str]:
        """What we say that SGLang does."""
        problems = check(read_served(self.folders[name]), "sglang", None, tp, tp // ep_of(name, tp))
        return {problem.verdict for problem in problems}


@pytest.fixture(scope="module")
def loads(engine_outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Loads:
    base, folders = tmp_path_factory.mktemp("sglang"), dict(engine_outputs)
    folders[CUT] = folders["native MXFP4"]
    folders[HUB] = damaged(folders["int4 g32"], base / "hub-order", hub_order)
    jobs = [
        {
            "checkpoint": str(folders[name]),
            "tp": tp,
            "ep": ep_of(name, tp),
            "out": str(base / f"{slug(name)}-{tp}"),
            "backend": "marlin" if "ModelOpt" in name else "auto",
        }
        for name, tp in JOBS
    ]
    run_loader(jobs, base)
    return Loads(folders, base)


def run_loader(jobs: list[dict[str, Any]], base: Path) -> None:
    (base / "jobs.json").write_text(json.dumps(jobs))
    ask_engines("sglang_loader.py", base / "jobs.json", cwd=base)


# --- what a rank must hold --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One rank's part of the files' tensors, under the names of SGLang's parameters."""

    files: Tensors
    tp: int
    ep: int
    rank: int

    def rows(self, name: str) -> torch.Tensor:
        return self.files[name] if self.whole(name) else self.files[name].chunk(self.tp, 0)[self.rank]

    def columns(self, name: str) -> torch.Tensor:
        return self.files[name] if self.whole(name) else self.files[name].chunk(self.tp, 1)[self.rank]

    def whole(self, name: str) -> bool:
        return ".experts." in name and self.ep > 1

    def all(self) -> Iterator[tuple[str, torch.Tensor]]:
        names = [name for name in self.files if not name.startswith("model.mtp.")]
        for name in names:
            head, _, last = name.rpartition(".")
            if name.endswith("experts.0.gate_proj." + last):
                yield from self.experts(head.removesuffix(".0.gate_proj"), last)
            elif ".experts." in name or head.endswith(("k_proj", "v_proj", "up_proj", "qkv_proj")):
                continue  # part of another, or told by `fused`
            elif head.endswith("q_proj"):
                parts = [self.rows(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
                yield name.replace("q_proj", "qkv_proj"), torch.cat(parts)
            elif head.endswith("gate_proj"):
                both = [self.rows(name), self.rows(name.replace("gate_proj", "up_proj"))]
                yield name.replace("gate_proj", "gate_up_proj"), torch.cat(both)
            elif head.endswith(("o_proj", "down_proj")):
                yield name, self.columns(name)
            elif head.endswith(("embed_tokens", "lm_head")) or last == "attention_sink_bias":
                yield name, self.rows(name)
            else:
                yield name, self.files[name]

    def experts(self, module: str, suffix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if suffix == "weight_shape":
            return
        count = sum(name.startswith(f"{module}.") and name.endswith(f".gate_proj.{suffix}") for name in self.files)
        whole = self.ep == 1 or suffix == "input_scale"  # ModelOpt's; those of all experts are on each rank
        mine = range(count) if whole else range(count)[count // self.ep * self.rank :][: count // self.ep]
        named = [[f"{module}.{e}.{part}_proj.{suffix}" for part in ("gate", "up", "down")] for e in mine]
        if self.files[named[0][0]].numel() == 1:
            yield (
                f"{module}.w13_{suffix}",
                torch.stack([torch.cat([self.files[n].flatten() for n in names[:2]]) for names in named]),
            )
            yield f"{module}.w2_{suffix}", torch.cat([self.files[names[2]].flatten() for names in named])
            return
        w13 = torch.stack([torch.cat([self.rows(gate), self.rows(up)]) for gate, up, _ in named])
        w2 = torch.stack([self.columns(down) for _, _, down in named])
        int4 = f"{module}.0.gate_proj.weight_shape" in self.files
        native = w13.dtype == torch.uint8 and f"{module}.0.gate_proj.weight_scale_2" not in self.files
        for name, values in ((f"{module}.w13_{suffix}", w13), (f"{module}.w2_{suffix}", w2)):
            if native and suffix == "weight_scale":
                yield f"{name}_inv", torch.exp2(values.float() - 127)
            else:
                yield name, values.view(torch.int8) if native else values.transpose(1, 2) if int4 else values


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)


def fused(loads: Loads, name: str, tp: int, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A rank's rows of each qkv that is fused on disk, [Q|K|V], in bf16 values."""
    config = json.loads((loads.folders[name] / "config.json").read_text())
    files = loads.files(name)
    for key in [key for key in files if key.endswith("qkv_proj.weight") and not key.startswith("model.mtp.")]:
        weight = files[key]
        if weight.dtype == torch.float8_e4m3fn:
            weight = dequantized(weight, files[f"{key}_scale_inv"])
        layer = int(key.split(".")[2])
        kind = "swa_" if config["hybrid_layer_pattern"][layer] else ""
        heads, kv = config[f"{kind}num_attention_heads"], config[f"{kind}num_key_value_heads"]
        sizes = [count // RANKS * config["head_dim"] for count in (heads, kv, kv)]
        parts = zip(*(chunk.split(sizes) for chunk in weight.chunk(RANKS)), strict=True)
        yield key, torch.cat([torch.cat(part).chunk(tp)[rank] for part in parts])


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tp"), [(name, tp) for name in LOADED for tp in (1, 2)])
def test_every_tensor_is_where_it_belongs_or_sglang_stops(name: str, tp: int, loads: Loads) -> None:
    if "refused" in loads.verdicts(name, tp):
        assert loads.rank(name, tp, 0) is None, "it loads, and check says that it is refused"
        assert STOPS[name] in loads.log(name, tp)
        return
    for rank in range(tp):
        have = loads.rank(name, tp, rank)
        assert have is not None, loads.log(name, tp)[-3000:]
        told = dict(Shard(loads.files(name), tp, ep_of(name, tp), rank).all())
        for key, values in told.items():
            assert key in have, key
            assert torch.equal(have[key].contiguous().view(torch.uint8), values.contiguous().view(torch.uint8)), key
        for key, values in fused(loads, name, tp, rank):
            theirs, told[key], told[f"{key}_scale_inv"] = have[key], values, values
            made = dequantized(theirs, have[f"{key}_scale_inv"])
            assert torch.allclose(made, values, rtol=0 if tp == RANKS else 2**-8, atol=0), key
        rest = {key.rpartition(".")[2] for key in have.keys() - told.keys()}
        assert rest <= NOT_LOADED, rest


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_in_the_hubs_order_is_right_at_its_own_tp_only(tp: int, loads: Loads) -> None:
    have = loads.rank(HUB, tp, 0)
    assert have is not None, loads.log(HUB, tp)[-3000:]
    same = [torch.equal(have[key], values) for key, values in fused(loads, HUB, tp, 0)]
    assert same and all(same) == (tp == RANKS)
    assert ("corrupted" in loads.verdicts(HUB, tp)) == (tp != RANKS)


def test_native_experts_are_cut_in_whole_fp8_blocks_only(loads: Loads) -> None:
    assert loads.rank(CUT, 2, 0) is None and "not divisible by weight quantization block_n = 128" in loads.log(CUT, 2)
    assert "refused" in loads.verdicts(CUT, 2)


def as_mimo_v2(folder: Path) -> Path:
    """V2-Flash's layout under the model type whose config this SGLang takes beside newer transformers."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mimo_v2", "architectures": ["MiMoV2ForCausalLM"], "attention_projection_layout": "split"}
    for key in ("rope_parameters", "layer_types", "mlp_layer_types"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    return with_remote_code(folder)


def test_scales_of_v2_flashs_global_k_and_v_land_on_other_rows(tmp_path: Path) -> None:
    """Each head of a published global k has scale rows of its own. Read in blocks of 128 rows, as kernels do, what
    SGLang lays out is another k, or v at as many ranks as heads; what `quantize` writes is right."""
    source, out = tmp_path / "source", tmp_path / "native"
    synth(
        source,
        "flash",
        sizes=SynthSizes(
            layers=3,
            heads=4,
            kv_heads=2,
            swa_kv_heads=4,
            head_dim=192,
            v_head_dim=128,
            expert_intermediate=256,
            mtp_layers=0,
        ),
    )
    pipeline.quantize(make_plan(source, load_recipe("mxfp4-rtn")), out, device="cpu")
    meant = {name: values for path in out.glob("*.safetensors") for name, values in load_file(path).items()}
    jobs = [
        {
            "checkpoint": str(as_mimo_v2(folder)),
            "tp": tp,
            "ep": tp,
            "backend": "auto",
            "out": str(tmp_path / f"{folder.name}-{tp}"),
        }
        for folder in (source, out)
        for tp in (1, 2)
    ]
    run_loader(jobs, tmp_path)
    for job in jobs:
        have = load_file(Path(job["out"]) / "rank0.safetensors")
        rows = have["model.layers.0.self_attn.qkv_proj.weight"].float()
        scale = have.get("model.layers.0.self_attn.qkv_proj.weight_scale_inv")
        if scale is not None:
            rows = rows * scale.repeat_interleave(128, 0)[: len(rows)].repeat_interleave(128, 1)
        parts = [meant[f"model.layers.0.self_attn.{part}_proj.weight"].chunk(job["tp"])[0].float() for part in "qkv"]
        for part, found, values in zip("qkv", rows.split([len(part) for part in parts]), parts, strict=True):
            wrong = scale is not None and part == {1: "k", 2: "v"}[job["tp"]]
            off = float((found - values).norm() / values.norm())
            assert off > 0.02 if wrong else off < 0.005, (job["out"], part, off)
