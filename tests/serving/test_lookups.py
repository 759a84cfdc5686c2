"""How engines look modules up in a quantization_config: ours beside what vLLM's and SGLang's own functions say.

Every row is asked twice: of `Declared` here, and, where the engines are installed, of themselves.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_cases import ask_engines
from headers import output

from mimoquant.errors import CheckpointError
from mimoquant.serving import contracts as c
from mimoquant.serving.check import check
from mimoquant.serving.declared import Declared
from mimoquant.serving.served import Served, served

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [128, 128]}
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
QKV, OUT_PROJ = "model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.o_proj"
DENSE, MOE = "model.layers.0.mlp.gate_up_proj", "model.layers.1.mlp.experts"
PARTS = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]


def compressed(targets: list[str], ignore: list[str] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": targets, "weights": INT4, "input_activations": None, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignore or [],
    } | more


def fp8(**lists: list[str] | None) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]} | lists


@dataclass(frozen=True)
class Row:
    """What becomes of a module. `flash`: of V2-Flash, whose q, k, v are three; else of V2.5-Pro's class."""

    what: str
    config: dict[str, Any]
    module: str
    vllm: str
    sglang: str
    flash: bool = True


BOTH_GROUPS = {
    "experts": {"targets": [EXPERTS], "weights": INT4, "input_activations": None},
    "rest": {"targets": ["Linear"], "weights": FP8, "input_activations": None},
}
ROWS = [
    Row("Linear is the class of experts", compressed(["Linear"]), MOE, "int4", "int4"),
    Row("Linear is the class of attention", compressed(["Linear"]), OUT_PROJ, "claimed", "claimed"),
    Row("Linear beside a pattern", compressed([EXPERTS], config_groups=BOTH_GROUPS), MOE, "int4", "int4"),
    Row("Linear behind a pattern", compressed([EXPERTS], config_groups=BOTH_GROUPS), OUT_PROJ, "claimed", "claimed"),
    Row("the engine's own class", compressed(["RoutedExperts"]), MOE, "int4", "ValueError"),
    Row("the other engine's class", compressed(["FusedMoE"]), MOE, "unclaimed", "int4"),
    Row("a part of a class", compressed(["ParallelLinear"]), OUT_PROJ, "claimed", "claimed"),
    Row("a pattern that is for classes", compressed(["re:Routed.*"]), MOE, "int4", "ValueError"),
    Row("no target", compressed([r"re:.*layers\.2\.mlp.*"]), MOE, "unclaimed", "ValueError"),
    Row("no target for attention", compressed([EXPERTS]), OUT_PROJ, "unclaimed", "unclaimed"),
    Row(
        "experts named one by one",
        compressed(["Linear"], [f"{MOE}.0.{p}_proj" for p in ("gate", "up", "down")]),
        MOE,
        "unclaimed",
        "unclaimed",
    ),
    Row("one projection named", compressed(["Linear"], [f"{MOE}.0.gate_proj"]), MOE, "unclaimed", "unclaimed"),
    Row("a parent named", compressed(["Linear"], [MOE]), MOE, "int4", "int4"),
    Row("an ending named", compressed(["Linear"], ["self_attn.o_proj"]), OUT_PROJ, "claimed", "ignored"),
    Row("a name", compressed(["Linear"], [OUT_PROJ]), OUT_PROJ, "ignored", "ignored"),
    Row("q, k, v named", compressed(["Linear"], PARTS), QKV, "ignored", "claimed"),
    Row(
        "q, k, v named, of a model with one qkv", compressed(["Linear"], PARTS), QKV, "claimed", "claimed", flash=False
    ),
    Row("only q named", compressed(["Linear"], ["model.layers.1.self_attn.q_proj"]), QKV, "ValueError", "claimed"),
    Row("qkv named", compressed(["Linear"], [QKV]), QKV, "ignored", "ignored"),
    Row("a pattern for all attention", compressed(["Linear"], ["re:.*self_attn.*"]), QKV, "ignored", "ignored"),
    Row(
        "gate and up named",
        compressed(["Linear"], ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]),
        DENSE,
        "ignored",
        "claimed",
    ),
    Row("ignored_layers", fp8(ignored_layers=[OUT_PROJ]), OUT_PROJ, "ignored", "ignored"),
    Row("modules_to_not_convert", fp8(modules_to_not_convert=[OUT_PROJ]), OUT_PROJ, "ignored", "ignored"),
    Row(
        "an empty list before it",
        fp8(ignored_layers=[], modules_to_not_convert=[OUT_PROJ]),
        OUT_PROJ,
        "ignored",
        "claimed",
    ),
    Row(
        "a null list before it",
        fp8(ignored_layers=None, modules_to_not_convert=[OUT_PROJ]),
        OUT_PROJ,
        "ignored",
        "claimed",
    ),
    Row("two lists", fp8(ignored_layers=[QKV], modules_to_not_convert=[OUT_PROJ]), OUT_PROJ, "claimed", "claimed"),
    Row(
        "fp8: a name without model.",
        fp8(ignored_layers=[OUT_PROJ.removeprefix("model.")]),
        OUT_PROJ,
        "claimed",
        "ignored",
    ),
    Row("fp8: a part of names", fp8(ignored_layers=["self_attn"]), OUT_PROJ, "claimed", "ignored"),
    Row("fp8: a whole layer", fp8(ignored_layers=["model.layers.1"]), MOE, "claimed", "ignored"),
    Row("fp8: another layer", fp8(ignored_layers=["model.layers.11.mlp.experts"]), MOE, "claimed", "claimed"),
    Row("fp8: experts", fp8(ignored_layers=[MOE]), MOE, "ignored", "ignored"),
    Row("fp8: one expert", fp8(modules_to_not_convert=[f"{MOE}.7.up_proj"]), MOE, "ignored", "ignored"),
    Row("fp8: q, k, v", fp8(ignored_layers=PARTS), QKV, "ignored", "ignored"),
    Row("fp8: q, k, v of a model with one qkv", fp8(ignored_layers=PARTS), QKV, "claimed", "ignored", flash=False),
    Row("fp8: qkv", fp8(ignored_layers=[QKV]), QKV, "ignored", "claimed"),
    Row("fp8: only k", fp8(ignored_layers=["model.layers.1.self_attn.k_proj"]), QKV, "ValueError", "ValueError"),
]


@functools.cache
def of(flash: bool, compressed_tensors: bool) -> Served:
    config, tensors = output(
        "v2-flash" if flash else "v2.5-pro", "int4-g128" if compressed_tensors else "native", experts=2
    )
    return served(config, tensors, "OUT", {"tp_size": 8})


def with_config(quantization: dict[str, Any], flash: bool = True) -> Served:
    made = of(flash, quantization["quant_method"] == "compressed-tensors")
    return Served(**{**vars(made), "config": made.config | {"quantization_config": quantization}})


def ours(row: Row, engine: str) -> str:
    declared = Declared(with_config(row.config, row.flash), engine)
    if row.module != MOE:
        return declared.linear(row.module).replace("parted", "ValueError")
    form = declared.expert_form(f"{MOE}.0.gate_proj", MOE)
    if row.config["quant_method"] == "fp8":
        return "ignored" if form is not None and form.subject == c.BF16 else "claimed"
    return "ValueError" if form is None else {c.BF16: "unclaimed", c.INT4: "int4"}[form.subject]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_a_module_is_looked_up_as_the_engine_does(row: Row, engine: str) -> None:
    assert ours(row, engine) == getattr(row, engine)


@pytest.mark.engine
def test_the_engines_themselves_say_so(tmp_path: Path) -> None:
    kinds = [("experts" if row.module == MOE else "modules") for row in ROWS]
    jobs = [
        {"config": row.config, "flash": row.flash, "modules": [], "experts": []} | {kind: [row.module]}
        for row, kind in zip(ROWS, kinds, strict=True)
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    told = json.loads(ask_engines("engine_lookups.py", tmp_path / "jobs.json", cwd=tmp_path).splitlines()[-1])
    for row, said in zip(ROWS, told, strict=True):
        assert (said["vllm"][row.module], said["sglang"][row.module]) == (row.vllm, row.sglang), row.what


# --- what a config is made of -----------------------------------------------------------------------------------------

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("groups are a list", {"config_groups": ["Linear"]}, "config_groups is .* expected an object"),
    ("a preset", {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 is .* an object with targets"),
    (
        "weights by name",
        {"config_groups": {"g": {"targets": ["Linear"], "weights": "W4A16"}}},
        "an object with targets",
    ),
    ("a target is no list", {"config_groups": {"g": {"targets": "Linear", "weights": INT4}}}, "a list of names"),
    ("targets of numbers", {"config_groups": {"g": {"targets": [1], "weights": INT4}}}, "targets is .1., expected"),
    ("ignore is a name", {"ignore": "lm_head"}, "ignore is 'lm_head', expected a list of names"),
    ("a pattern that is none", {"ignore": ["re:("]}, "is no pattern"),
]


@pytest.mark.parametrize(("what", "change", "said"), BROKEN, ids=[row[0] for row in BROKEN])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_a_config_that_is_none_is_refused_in_a_sentence(
    what: str, change: dict[str, Any], said: str, engine: str
) -> None:
    if what == "a pattern that is none" and engine == "transformers":
        change = {"ignore": ["re:("], "config_groups": {"g": {"targets": ["Linear"], "weights": INT4}}}
    with pytest.raises(CheckpointError, match=said):
        check(with_config(compressed([EXPERTS]) | change), engine)
