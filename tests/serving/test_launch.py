"""Commands for the three published models in every container, engine and GPU, as golden text; and what is refused.

`MIMOQUANT_GOLDEN=write` writes the golden files anew.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dflash_reference import changed, write_headers
from headers import VARIANTS, at_scale, published_config
from micro import MICRO

from mimoquant.cli.options import Engine, Gpu, Server
from mimoquant.errors import CheckpointError, MimoquantError, UsageError
from mimoquant.report.verb_text import launch_text
from mimoquant.serving import contracts
from mimoquant.serving.documents import LaunchDocument
from mimoquant.serving.launch import Layout, launch
from mimoquant.serving.served import read_served

GOLDEN = Path(__file__).parent / "golden"
GPUS = {"a100": 8, "h100": 8, "h200": 4, "b200": 4, "gb10": 2}
CONTAINERS = ("native", "int4-g128", "mxfp4", "nvfp4", "modelopt")


def held_to(path: Path, text: str) -> None:
    if os.environ.get("MIMOQUANT_GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


def told(variant: str, form: str, engine: str, gpu: str, gpus: int) -> str:
    try:
        return launch_text(launch(at_scale(variant, form), engine, gpu, gpus, mtp=True))
    except MimoquantError as error:
        return "\n".join([f"error: {error}", *([f"hint: {error.hint}"] if error.hint else [])])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_commands_are_the_golden_ones(variant: str, form: str, engine: str) -> None:
    scale = 2 if variant == "v2.5-pro" else 1
    sections = [f"=== {gpu} x {n * scale}\n{told(variant, form, engine, gpu, n * scale)}\n" for gpu, n in GPUS.items()]
    held_to(GOLDEN / f"{variant}-{form}-{engine}.txt", "\n".join(sections))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_json_is_the_golden_one(engine: str) -> None:
    made = launch(at_scale("v2.5", "native"), engine, "h100", 8, mtp=True)
    held_to(GOLDEN / f"v2.5-native-{engine}-h100.json", json.dumps(made, indent=2) + "\n")


def made(
    form: str = "int4-g128", engine: str = "vllm", gpu: str = "h100", gpus: int = 8, **options: Any
) -> LaunchDocument:
    return launch(at_scale("v2.5", form), engine, gpu, gpus, **options)


def test_the_text_holds_the_command_word_for_word() -> None:
    facts = made(mtp=True)
    lines = launch_text(facts).splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("vllm serve"))
    command = lines[begin : lines.index("", begin)]
    assert shlex.split(" ".join(line.removesuffix("\\") for line in command)) == facts["command"]


def test_sglang_keeps_attention_tp_at_the_chunks() -> None:
    """As its documentation does for V2.5 on eight GPUs: TP 8 with two groups of attention."""
    fused = made("native", "sglang")
    assert (fused["layout"]["attention_tp"], fused["layout"]["dp"]) == (4, 2)
    assert {"--attn-dp-size", "--enable-dp-lm-head", "--mm-enable-dp-encoder"} <= set(fused["command"])
    older = made("native", "sglang", version="0.5.20")
    assert "--enable-dp-attention" in older["command"] and "--attn-dp-size" not in older["command"]
    split = made("int4-g128", "sglang")
    assert (split["layout"]["attention_tp"], split["layout"]["dp"]) == (8, 1)


def test_sglang_keeps_activations_of_modelopts_container_in_bf16() -> None:
    """By Marlin, which it does not pick by itself on Blackwell; there its default rounds activations to 4 bits."""
    for gpu, told in (("h100", False), ("b200", True), ("gb10", True)):
        command = made("modelopt", "sglang", gpu)["command"]
        assert ("--moe-runner-backend" in command) == told
        assert not told or command[command.index("--moe-runner-backend") + 1] == "marlin"


def test_vllm_takes_v2_flash_native_at_tp_4_at_most() -> None:
    layout = launch(at_scale("v2-flash", "native"), "vllm", "h100", 8)["layout"]
    assert (layout["attention_tp"], layout["dp"], layout["ep"]) == (4, 2, True)


def test_answers_do_not_end_where_generation_config_says(tmp_path: Path) -> None:
    """V2.6 is published with max_new_tokens 2048, which vLLM takes for a limit of every answer."""
    capped = replace(at_scale("v2.5", "native"), answer_tokens=2048)
    made = launch(capped, "vllm", "h100", 8)
    place = made["command"].index("--generation-config")
    assert made["command"][place + 1] == "vllm" and any("after 2048 tokens" in note for note in made["notes"])
    assert "--generation-config" not in launch(capped, "sglang", "h100", 8)["command"]
    assert "--generation-config" not in launch(at_scale("v2.5", "native"), "vllm", "h100", 8)["command"]
    folder = Path(shutil.copytree(MICRO, tmp_path / "copy"))
    for text, tokens in (
        ('{"max_new_tokens": 2048}', 2048),
        ("{}", None),
        ("{,", None),
        ('{"max_new_tokens": "x"}', None),
    ):
        (folder / "generation_config.json").write_text(text)
        assert read_served(folder).answer_tokens == tokens


def test_groups_that_tensor_parallelism_would_cut_ask_for_expert_parallelism() -> None:
    layout = launch(at_scale("v2.5", "int4-g128"), "vllm", "h100", 32)["layout"]
    assert layout["ep"] and Layout(**layout).expert_tp == 1


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def test_speculation_has_the_drafters_own_numbers(tmp_path: Path) -> None:
    for block in (8, 4):
        drafter = write_headers(tmp_path / str(block), changed({"block_size": block}, block_size=block))
        draft = json.loads(option(made(dflash=drafter)["command"], "--speculative-config") or "")
        assert draft == {"method": "dflash", "model": str(drafter), "num_speculative_tokens": block - 1}
        launched = made(engine="sglang", dflash=drafter)
        assert option(launched["command"], "--speculative-algorithm") == "DFLASH"
        assert option(launched["command"], "--speculative-draft-model-path") == str(drafter)
        assert option(launched["command"], "--speculative-num-draft-tokens") == str(block)
        assert any("after layers 0, 11, 23, 35, 47" in note for note in launched["notes"])
    plain = made()["command"], made(engine="sglang")["command"]
    assert not any(word.startswith("--speculative") for command in plain for word in command)


def test_sglang_is_told_a_window_that_it_would_not_find(tmp_path: Path) -> None:
    old = write_headers(tmp_path / "old", changed())
    types = {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": True, "is_causal": False}
    new = write_headers(tmp_path / "new", changed({"use_swa": None}, **types))
    name = "--speculative-draft-window-size"
    assert option(made(engine="sglang", dflash=old)["command"], name) == "1024"
    assert option(made(engine="sglang", dflash=new)["command"], name) is None
    assert option(made(dflash=old)["command"], name) is None


def test_a_drafter_of_another_model_has_no_command(tmp_path: Path) -> None:
    pro = {"target_layer_ids": [0, 15, 31, 47, 69]}
    cases = [
        (changed(hidden_size=6144), "its hidden_size is 6144, the backbone's is 4096"),
        (changed(pro, num_target_layers=70), "its num_target_layers is 70, the backbone's is 48"),
        (changed(pro, num_target_layers=None), "it captures layer 69, the backbone's 48 end at 47"),
        (changed(vocab_size=200_000), "its vocab_size is 200000, the backbone's is 152576"),
    ]
    for number, (config, told) in enumerate(cases):
        with pytest.raises(CheckpointError, match=told):
            made(dflash=write_headers(tmp_path / str(number), config))


def test_options_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mtp cannot go with --dflash"):
        made(mtp=True, dflash=tmp_path)
    with pytest.raises(UsageError, match=r"has no config\.json"):
        made(dflash=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no MTP layers"):
        launch(replace(at_scale("v2.5", "native"), mtp_layers=0), "vllm", "h100", 8, mtp=True)
    with pytest.raises(UsageError, match=r"needs .* on each of 2 H100, .* can be used"):
        made(gpus=2)
    with pytest.raises(UsageError, match="is no version"):
        made(version="newest")


def test_what_an_engine_refuses_has_no_command() -> None:
    with pytest.raises(CheckpointError, match="stop with KeyError"):
        made("mxfp4", "sglang")
    with pytest.raises(CheckpointError, match="store_dtype is not known"):
        made("native", version="0.23")


def test_kv_cache_is_counted_as_others_count_it() -> None:
    """23040 bytes a token in the 9 global layers of V2.5: 5760 MiB at 262144 tokens, as llama.cpp reports."""
    whole, sliding = at_scale("v2.5", "native").kv_bytes(1)
    assert (whole * 262144, sliding) == (5760 * 2**20, 39 * 8 * (192 + 128) * 2)
    assert at_scale("v2.5", "native").kv_bytes(8)[0] == 9 * 320 * 2  # 4 KV heads over 8 ranks: one each


def test_the_choices_are_those_of_the_tables() -> None:
    assert [gpu.value for gpu in Gpu] == list(contracts.GPUS)
    assert [engine.value for engine in Engine] == list(contracts.ENGINES)
    assert [server.value for server in Server] == [contracts.VLLM, contracts.SGLANG]
    assert {gpu.sm for gpu in contracts.GPUS.values()} >= {sm for _, _, sm in contracts.MOE_BACKENDS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_configs_are_the_published_ones(variant: str, shared: Path) -> None:
    folder = {
        "v2-flash": "MiMo-V2-Flash/config.assembled.json",
        "v2.5": "MiMo-V2.5/config.json",
        "v2.5-pro": "MiMo-V2.5-Pro/config.json",
    }[variant]
    theirs, ours = json.loads((shared / "mimo" / folder).read_text()), published_config(variant)
    left_out = {"_note", "audio_config", "vision_config", "processor_config", "quantization_config"}
    assert {key: value for key, value in theirs.items() if key not in left_out} == {
        key: value for key, value in ours.items() if key != "quantization_config"
    }
    if variant != "v2-flash":
        assert sorted(theirs["quantization_config"].pop("ignored_layers")) == sorted(
            ours["quantization_config"].pop("ignored_layers")
        )
        assert theirs["quantization_config"] == ours["quantization_config"]


def test_sizes_are_those_of_the_plan() -> None:
    """173031087136 bytes with headers is what `plan` says of V2.5 in native MXFP4; the towers here are rounded."""
    total = sum(at_scale("v2.5", "native").bytes_by_kind.values())
    assert abs(total - 173_031_087_136) / total < 2e-4
