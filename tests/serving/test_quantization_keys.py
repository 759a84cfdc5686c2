"""What engines make of every other key that a compressed-tensors config has in the wild: ours beside theirs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from engine_cases import PYTHON
from headers import Header, output

from mimoquant.serving.check import check
from mimoquant.serving.served import Served, served

HERE = Path(__file__).parent
INT4, MXFP4, NVFP4 = "int4-g128", "mxfp4", "nvfp4"
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
A4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": "local",
}
BOTH, REFUSED, WARNED = ("vllm", "sglang"), "refused", "warning"
STOPS = (REFUSED,) * 3


@dataclass(frozen=True)
class Row:
    """A key and each engine's worst verdict; "" is none. `group`, `weights`, `top`: keys that are set there."""

    what: str
    form: str
    vllm: str
    sglang: str
    transformers: str = ""
    said: str = ""
    group: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    input_scales: bool = False


ROWS = [
    Row("format dense", INT4, "", REFUSED, said="'dense' of the whole", top={"format": "dense"}),
    Row("format dense of the group", INT4, REFUSED, "", REFUSED, "'dense' of", group={"format": "dense"}),
    Row(
        "format dense, the group's null",
        INT4,
        REFUSED,
        REFUSED,
        said="'dense'",
        group={"format": None},
        top={"format": "dense"},
    ),
    Row("format of the group null", INT4, "", "", group={"format": None}),
    Row("no format", INT4, REFUSED, REFUSED, said="format None", group={"format": None}, top={"format": None}),
    Row(
        "another packing",
        INT4,
        REFUSED,
        REFUSED,
        REFUSED,
        "marlin-24",
        group={"format": "marlin-24"},
        top={"format": "marlin-24"},
    ),
    Row(
        "NVFP4 as dense", NVFP4, "", WARNED, said="leaves activations", group={"format": None}, top={"format": "dense"}
    ),
    Row("MXFP4 as dense", MXFP4, "", "", group={"format": None}, top={"format": "dense"}),
    Row("W4A4", NVFP4, WARNED, WARNED, said="no part of J", group={"input_activations": A4}, input_scales=True),
    Row(
        "W4A4 without scales",
        NVFP4,
        WARNED,
        WARNED,
        said="no input_global_scale is there",
        group={"input_activations": A4},
    ),
    Row(
        "NVFP4 with FP8 activations",
        NVFP4,
        REFUSED,
        REFUSED,
        said="beside compressed-tensors nvfp4",
        group={"input_activations": FP8_TOKEN},
    ),
    Row(
        "MXFP4 with FP8 activations", MXFP4, WARNED, WARNED, said="no part of J", group={"input_activations": FP8_TOKEN}
    ),
    Row("int4 with FP8 activations", INT4, WARNED, REFUSED, said="(float", group={"input_activations": FP8_TOKEN}),
    Row(
        "int4 with FP8 activations, Linear",
        INT4,
        WARNED,
        WARNED,
        said="no part of J",
        group={"input_activations": FP8_TOKEN, "targets": ["Linear"]},
    ),
    Row(
        "int4 with int8 activations",
        INT4,
        "corrupted",
        REFUSED,
        said="input_activations (int of 8 bits, token)",
        group={"input_activations": FP8_TOKEN | {"type": "int"}},
    ),
    Row(
        "int4 with static activations",
        INT4,
        REFUSED,
        REFUSED,
        said="input_activations",
        group={"input_activations": FP8_TENSOR},
    ),
    Row(
        "int4 with 4-bit activations", INT4, REFUSED, REFUSED, said="input_activations", group={"input_activations": A4}
    ),
    Row(
        "output activations", INT4, WARNED, WARNED, said="output_activations", group={"output_activations": FP8_TENSOR}
    ),
    Row("actorder group", INT4, REFUSED, "corrupted", REFUSED, "actorder", weights={"actorder": "group"}),
    Row("actorder true", INT4, REFUSED, "corrupted", REFUSED, "actorder", weights={"actorder": True}),
    Row("actorder dynamic", INT4, REFUSED, WARNED, REFUSED, "actorder", weights={"actorder": "dynamic"}),
    Row("actorder weight", INT4, "", WARNED, said="actorder 'weight'", weights={"actorder": "weight"}),
    Row("actorder static", INT4, "", "", weights={"actorder": "static"}),
    Row("actorder of no kind", INT4, REFUSED, REFUSED, REFUSED, "actorder is 'odd'", weights={"actorder": "odd"}),
    Row("actorder Weight", INT4, "", WARNED, REFUSED, said="actorder", weights={"actorder": "Weight"}),
    Row("actorder GROUP", INT4, REFUSED, "corrupted", REFUSED, "actorder", weights={"actorder": "GROUP"}),
    Row(
        "a group size of no group",
        INT4,
        *STOPS,
        "group_size 128, and its strategy is tensor",
        weights={"strategy": "tensor"},
    ),
    Row("a group size as text", INT4, *STOPS, "group_size is '128', text", weights={"group_size": "128"}),
    Row("a group size that is a float", INT4, "", "", weights={"group_size": 128.0}),
    Row("dynamic null", INT4, *STOPS, "dynamic is None", weights={"dynamic": None}),
    Row("dynamic local", INT4, *STOPS, "dynamic (local)", weights={"dynamic": "local"}),
    Row("symmetric null", INT4, *STOPS, "symmetric is None", weights={"symmetric": None}),
    Row("a dtype of nobody", INT4, *STOPS, "'bfloat17', no dtype", weights={"scale_dtype": "bfloat17"}),
    Row("dtypes as presets have them", NVFP4, "", "", weights={"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": None}),
    Row("int4 by tensor_group", INT4, *STOPS, "int of 4 bits, tensor_group", weights={"strategy": "tensor_group"}),
    Row(
        "zero points that are not there",
        INT4,
        *("corrupted",) * 3,
        "int4 asymmetric g128",
        weights={"symmetric": False},
    ),
    Row("targets null", INT4, *STOPS, "has no targets", group={"targets": None}),
    Row("a key of the group", INT4, "", "", REFUSED, "has scheme", group={"scheme": "W4A16"}),
    Row("ignore null", INT4, REFUSED, REFUSED, said="ignore is null", top={"ignore": None}),
    Row("groups null", INT4, REFUSED, REFUSED, "corrupted", top={"config_groups": None}),
    Row("an unknown status", INT4, "", "", REFUSED, "quantization_status", top={"quantization_status": "done"}),
    Row(
        "a cache with an odd key",
        INT4,
        WARNED,
        WARNED,
        REFUSED,
        "kv_cache_scheme",
        top={"kv_cache_scheme": FP8_TENSOR | {"odd": 1}},
    ),
    Row("an observer of their own", INT4, "", "", weights={"observer": "mine", "observer_kwargs": {"a": 1}}),
    Row("numbers as text", INT4, "", "", weights={"num_bits": "4", "type": "INT"}),
    Row("an argument that is none", INT4, REFUSED, REFUSED, REFUSED, "has rotate", weights={"rotate": True}),
    Row(
        "a block of a group", INT4, REFUSED, REFUSED, REFUSED, "block_structure", weights={"block_structure": [1, 128]}
    ),
    Row("dynamic weights", INT4, REFUSED, REFUSED, said="are dynamic", weights={"dynamic": True}),
    Row("FP8 cache", INT4, WARNED, WARNED, "corrupted", "kv_cache_scheme", top={"kv_cache_scheme": FP8_TENSOR}),
    Row(
        "int8 cache",
        INT4,
        REFUSED,
        WARNED,
        "corrupted",
        "kv_cache_scheme",
        top={"kv_cache_scheme": FP8_TENSOR | {"type": "int"}},
    ),
    Row(
        "asymmetric cache",
        INT4,
        REFUSED,
        WARNED,
        "corrupted",
        "kv_cache_scheme",
        top={"kv_cache_scheme": FP8_TENSOR | {"symmetric": False}},
    ),
    Row("a cache that is empty", INT4, REFUSED, WARNED, "corrupted", "kv_cache_scheme", top={"kv_cache_scheme": {}}),
    Row("no sparsity", INT4, "", "", top={"sparsity_config": {}}),
    Row("dense sparsity", INT4, "", "", top={"sparsity_config": {"format": "dense", "targets": [], "ignore": []}}),
    Row(
        "dense sparsity with targets",
        INT4,
        REFUSED,
        WARNED,
        WARNED,
        "sparsity_config",
        top={"sparsity_config": {"format": "dense", "targets": ["Linear"]}},
    ),
    Row(
        "sparsity without a format",
        INT4,
        REFUSED,
        REFUSED,
        REFUSED,
        "sparsity_config",
        top={"sparsity_config": {"targets": ["Linear"]}},
    ),
    Row(
        "FP8 for all else",
        INT4,
        "",
        "corrupted",
        said="linear_fp8_config",
        top={"linear_fp8_config": {"quant_method": "fp8"}},
    ),
    Row("a key of nobody", INT4, WARNED, WARNED, WARNED, "whatever: not known here", top={"whatever": 3}),
    Row(
        "another status",
        INT4,
        "",
        "",
        top={"quantization_status": "frozen", "version": "99", "global_compression_ratio": 3.5},
    ),
]


@functools.cache
def headers(form: str) -> tuple[dict[str, Any], dict[str, Header]]:
    return output("v2-flash", form, experts=2)


def of(row: Row) -> Served:
    config, tensors = headers(row.form)
    config = json.loads(json.dumps(config))
    quantization = config["quantization_config"]
    for group in quantization["config_groups"].values():
        group |= row.group
        group["weights"] |= row.weights
    quantization |= row.top
    if row.input_scales:
        more = {
            name.replace("weight_global", "input_global"): header
            for name, header in tensors.items()
            if name.endswith("weight_global_scale")
        }
        tensors = tensors | more
    return served(config, tensors, "OUT", {})


@functools.cache
def sound(form: str, engine: str) -> set[str]:
    """What is said of an output of ours."""
    return {problem.text for problem in check(of(Row("", form, "", "")), engine, None, 4)}


@pytest.mark.parametrize("engine", [*BOTH, "transformers"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_every_key_is_understood_or_named(row: Row, engine: str) -> None:
    """And an output of ours has none of them: what is told here is told of the key alone."""
    found = [problem for problem in check(of(row), engine, None, 4) if problem.text not in sound(row.form, engine)]
    verdict = getattr(row, engine)
    assert [problem.verdict for problem in found][:1] == ([verdict] if verdict else []), found
    assert not verdict or row.said in found[0].text


def by_channel(tensors: dict[str, Header]) -> dict[str, Header]:
    """The experts' scales one a row."""
    scales = [name for name in tensors if name.endswith("_proj.weight_scale")]
    return tensors | {name: Header("BF16", (tensors[name].shape[0], 1)) for name in scales}


@pytest.mark.parametrize("engine", [*BOTH, "transformers"])
def test_one_scale_a_row_is_int4_like_another(engine: str) -> None:
    """As channel and as group -1; where files and config differ in it, engines stop."""
    config, tensors = headers(INT4)
    for weights in ({"strategy": "channel", "group_size": None}, {"strategy": None, "group_size": -1}):
        made = of(Row("", INT4, "", "", weights=weights)).config
        problems = check(served(made, by_channel(tensors), "OUT", {}), engine, None, 4)
        assert not any(problem.fails for problem in problems), problems
        assert any("one scale a row is not verified" in problem.text for problem in problems)
        (wrong,) = (problem for problem in check(served(made, tensors, "OUT", {}), engine, None, 4) if problem.fails)
        assert "int4 g128, quantization_config makes them compressed-tensors int4 by channel" in wrong.text
    (wrong,) = (p for p in check(served(config, by_channel(tensors), "OUT", {}), engine, None, 4) if p.fails)
    assert "int4 by channel, quantization_config makes them compressed-tensors int4 g128" in wrong.text


@pytest.mark.parametrize("engine", [*BOTH, "transformers"])
@pytest.mark.parametrize("left", [None, {}])
def test_packed_experts_that_no_config_tells_of_load_nowhere(left: dict[str, Any] | None, engine: str) -> None:
    config, tensors = headers(INT4)
    found = check(served(config | {"quantization_config": left}, tensors, "OUT", {}), engine, None, 4)
    assert [problem.verdict for problem in found][:1] == [REFUSED if engine == "sglang" else "corrupted"]
    assert "int4 g128, quantization_config makes them bf16" in found[0].text


@pytest.mark.engine
def test_the_engines_stop_or_build_as_we_say(tmp_path: Path) -> None:
    """Whether they stop; of what they build, whether it has a place for scales of activations."""
    (tmp_path / "configs.json").write_text(json.dumps([of(row).config["quantization_config"] for row in ROWS]))
    done = subprocess.run(
        [PYTHON, HERE / "engine_lookups.py", "--moe", tmp_path / "configs.json"],
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1] / ".sglang-cpu"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = {row.what: told for row, told in zip(ROWS, json.loads(done.stdout.splitlines()[-1]), strict=True)}
    wrong = [
        (row.what, engine, said[row.what][engine])
        for row in ROWS
        for engine in BOTH
        if (row.form, engine) != (MXFP4, "sglang")  # refused whatever its config says
        if said[row.what][engine].endswith(("Error", "Warning")) != (getattr(row, engine) == REFUSED)
    ]
    assert wrong == []
    assert said["W4A4"]["sglang"].endswith("True") and said["NVFP4 as dense"]["sglang"].endswith("False")
    assert said["int4 with int8 activations"]["vllm"] == "CompressedTensorsW4A8Int8MoEMethod"
