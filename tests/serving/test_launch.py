"""Commands for the three published models in every container, engine and GPU, as golden text; and what is refused.

`MIMOQUANT_GOLDEN=write` writes the golden files anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dflash_reference import changed, write_headers
from headers import V26, VARIANTS, at_scale, published_config, release
from micro import MICRO

from mimoquant.cli.options import Engine, Gpu, Server
from mimoquant.errors import CheckpointError, MimoquantError, UsageError
from mimoquant.quant.formats import Format
from mimoquant.report.verb_text import launch_text
from mimoquant.serving import contracts, gpus, kernels
from mimoquant.serving.check import check
from mimoquant.serving.command import Layout
from mimoquant.serving.documents import LaunchDocument
from mimoquant.serving.launch import launch
from mimoquant.serving.served import Served, read_served
from mimoquant.weights.container import format_inputs

GOLDEN = Path(__file__).parent / "golden"
GPUS = {"a100": 8, "h100": 8, "h200": 4, "b200": 4, "gb10": 2}
CONTAINERS = ("native", "int4-g128", "mxfp4", "nvfp4", "modelopt")
EVERY_KIND = GPUS | {"rtx3090": 16, "rtx4090": 16, "b300": 4, "gb300": 4, "rtx-pro-6000": 2, "rtx5090": 8}
EVERY_KIND |= {"mi300x": 2, "mi325x": 4, "mi355x": 4}
RELEASES = {  # as many GPUs as vLLM's recipes and SGLang's cookbook have
    "v2.5": {"h100": 8, "h200": 8, "b200": 4, "gb300": 4, "mi355x": 4},
    "v2.5-pro": {"h100": 16, "h200": 16, "b200": 8, "gb300": 8, "mi355x": 8},
    "v2.6-flash": EVERY_KIND,
    "v2.6-pro": {"h200": 8, "b200": 8, "b300": 8, "gb300": 8, "rtx-pro-6000": 8, "gb10": 8, "mi355x": 4},
}


def held_to(path: Path, text: str) -> None:
    if os.environ.get("MIMOQUANT_GOLDEN") == "write":
        path.write_text(text)
    assert path.read_text() == text


def told(checkpoint: Served, engine: str, gpu: str, gpus: int) -> str:
    try:
        return launch_text(launch(checkpoint, engine, gpu, gpus, mtp=True))
    except MimoquantError as error:
        return "\n".join([f"error: {error}", *([f"hint: {error.hint}"] if error.hint else [])])


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("form", CONTAINERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_commands_are_the_golden_ones(variant: str, form: str, engine: str) -> None:
    scale = 2 if variant == "v2.5-pro" else 1
    made = {gpu: told(at_scale(variant, form), engine, gpu, n * scale) for gpu, n in GPUS.items()}
    sections = [f"=== {gpu} x {GPUS[gpu] * scale}\n{text}\n" for gpu, text in made.items()]
    held_to(GOLDEN / f"{variant}-{form}-{engine}.txt", "\n".join(sections))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("variant", RELEASES)
def test_commands_of_releases_are_the_golden_ones(variant: str, engine: str) -> None:
    made = {gpu: told(release(variant), engine, gpu, n) for gpu, n in RELEASES[variant].items()}
    sections = [f"=== {gpu} x {RELEASES[variant][gpu]}\n{text}\n" for gpu, text in made.items()]
    held_to(GOLDEN / f"release-{variant}-{engine}.txt", "\n".join(sections))


def without_memory(text: str) -> str:
    """Less weights and context: golden texts are of towers of about their size."""
    return re.sub(r"(?m)^memory .*$|(?<=--max-model-len )\d+|(?<=--context-length )\d+", "", text)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), [("v25", "v2.5"), ("v26-flash", "v2.6-flash"), ("v26-pro", "v2.6-pro")])
def test_a_release_of_full_size_has_the_golden_commands(kind: str, variant: str, shared: Path, tmp_path: Path) -> None:
    """Its own names, sizes and shards, of which there are no bytes; every kind of GPU ends in a command or a sentence,
    and no engine is told anything that is not said at once."""
    tool = shared / "tools" / "make_sparse_checkpoint.py"
    subprocess.run([sys.executable, tool, kind, tmp_path], check=True, capture_output=True)
    if variant in V26:
        (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 2048}')
    found = read_served(tmp_path)
    for engine in ("vllm", "sglang"):
        made = {gpu: told(found, engine, gpu, n) for gpu, n in RELEASES[variant].items()}
        sections = [f"=== {gpu} x {RELEASES[variant][gpu]}\n{text}\n" for gpu, text in made.items()]
        text = "\n".join(sections).replace(str(tmp_path), "/models/RELEASE")
        assert without_memory(text) == without_memory((GOLDEN / f"release-{variant}-{engine}.txt").read_text())
        for gpu in gpus.GPUS:
            for count in (1, 2, 4, 8, 16):
                assert "Traceback" not in told(found, engine, gpu, count)
        assert not [problem for problem in check(found, engine, None, 4) if problem.fails]
    whole = check(found, "transformers")
    assert any(problem.fails for problem in whole) == (variant in V26)


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


def from_release(variant: str, engine: str, gpu: str, gpus: int, **options: Any) -> LaunchDocument:
    return launch(release(variant), engine, gpu, gpus, **options)


@pytest.mark.parametrize(
    ("variant", "gpu", "gpus", "attention_tp", "words"),
    [
        ("v2.5", "h200", 8, 4, {"--attn-dp-size", "--enable-dp-lm-head", "--mm-enable-dp-encoder"}),
        ("v2.5", "b200", 4, 4, {"--mm-attention-backend"}),
        ("v2.5-pro", "h100", 16, 8, {"--attn-dp-size", "--enable-dp-lm-head", "--nnodes"}),
        ("v2.5-pro", "b200", 8, 8, set()),
        ("v2.5-pro", "gb300", 8, 8, {"--nnodes"}),
        ("v2.6-flash", "h200", 4, 4, set()),
        ("v2.6-pro", "b300", 8, 8, {"--mm-attention-backend"}),
    ],
)
def test_releases_are_shared_as_sglangs_cookbook_has_it(
    variant: str, gpu: str, gpus: int, attention_tp: int, words: set[str]
) -> None:
    """Attention TP is the chunks of the fused qkv, 4 or 8; more GPUs than those are groups of attention."""
    made = from_release(variant, "sglang", gpu, gpus)
    assert (made["layout"]["attention_tp"], made["layout"]["dp"]) == (attention_tp, gpus // attention_tp)
    assert option(made["command"], "--tp") == str(gpus)
    told = {"--attn-dp-size", "--enable-dp-lm-head", "--mm-enable-dp-encoder", "--mm-attention-backend", "--nnodes"}
    assert told & set(made["command"]) == words
    between_nodes = {"NCCL_MNNVL_ENABLE": "1", "NCCL_CUMEM_ENABLE": "1"}
    assert made["environment"] == (between_nodes if gpu == "gb300" else {})


@pytest.mark.parametrize(
    ("variant", "gpu", "gpus", "runner", "ep"),
    [
        ("v2.5", "h100", 8, None, 8),
        ("v2.5-pro", "h200", 16, None, 16),
        ("v2.6-flash", "b300", 4, "deep_gemm", 4),
        ("v2.6-pro", "b300", 8, "deep_gemm", 8),
    ],
)
def test_deepep_is_as_sglangs_cookbook_has_it(variant: str, gpu: str, gpus: int, runner: str | None, ep: int) -> None:
    made = from_release(variant, "sglang", gpu, gpus, deepep=True)
    command = made["command"]
    assert option(command, "--moe-a2a-backend") == "deepep" and option(command, "--deepep-mode") == "auto"
    assert option(command, "--moe-dense-tp-size") == "1" and option(command, "--ep") == str(ep)
    assert option(command, "--moe-runner-backend") == runner and "--enable-dp-lm-head" in command
    assert made["environment"]["SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"] == "256"
    assert any("deep_ep" in note for note in made["notes"])
    plain = from_release(variant, "sglang", gpu, gpus)
    assert "--moe-a2a-backend" not in plain["command"] and not plain["layout"]["ep"]


def test_deepep_is_refused_where_the_cookbook_has_none() -> None:
    with pytest.raises(UsageError, match="--deepep: SGLang's cookbook has none for fp8 on B200"):
        from_release("v2.5", "sglang", "b200", 4, deepep=True)
    with pytest.raises(UsageError, match="--deepep: SGLang's cookbook has none for native mxfp4 on H200"):
        from_release("v2.6-flash", "sglang", "h200", 4, deepep=True)
    with pytest.raises(UsageError, match="--deepep: is for --engine sglang"):
        from_release("v2.6-flash", "vllm", "b300", 4, deepep=True)
    with pytest.raises(UsageError, match="256 do not divide over 3"):
        from_release("v2.5", "sglang", "h200", 3, deepep=True)


def test_a_drafter_beside_groups_of_attention_needs_a_newer_sglang(tmp_path: Path) -> None:
    drafter = write_headers(tmp_path / "dflash", changed())
    with pytest.raises(UsageError, match=r"0\.5\.22 takes no drafter beside .* which 8 GPUs at attention TP 4 need"):
        from_release("v2.6-flash", "sglang", "h100", 8, version="0.5.22", dflash=drafter)
    assert "DFLASH" in from_release("v2.6-flash", "sglang", "h200", 4, version="0.5.22", dflash=drafter)["command"]
    newer = from_release("v2.6-flash", "sglang", "h100", 8, dflash=drafter)["command"]
    assert {"DFLASH", "--attn-dp-size", "--enable-dp-lm-head"} <= set(newer)


def test_v26_needs_the_versions_that_its_recipes_name() -> None:
    for variant in ("v2.6-flash", "v2.6-pro"):
        assert from_release(variant, "vllm", "h200", 8)["minimum_version"] == "0.31"
        assert from_release(variant, "vllm", "h200", 8, version="0.31.0")["layout"]["dp"] == 1
        with pytest.raises(CheckpointError, match=r"bf16 chooses experts by logits .* rounded to bf16 \(vLLM 0\.30"):
            from_release(variant, "vllm", "h200", 8, version="0.30")
        assert from_release(variant, "sglang", "h200", 8)["minimum_version"] == "0.5.21"
    for version, named in (("0.5.21", "marlin"), ("0.5.22", "marlin"), ("0.5.23", None)):  # which picks it by itself
        made = from_release("v2.6-flash", "sglang", "h200", 4, version=version)
        assert option(made["command"], "--moe-runner-backend") == named and made["moe_backend"] == "marlin"
        assert made["evidence"].startswith("run" if named is None else "read")
    older = from_release("v2.6-flash", "sglang", "h200", 4, version="0.5.20")
    assert any("not verified in SGLang 0.5.20, known from 0.5.21 on" in note for note in older["notes"])


@pytest.mark.parametrize(
    ("engine", "gpu", "gpus", "name", "value", "environment"),
    [
        (
            "vllm",
            "gb10",
            2,
            "--moe-backend",
            "marlin",
            {"VLLM_USE_DEEP_GEMM": "0", "VLLM_HOST_IP": "<IP of this node>"},
        ),
        ("vllm", "rtx-pro-6000", 4, "--moe-backend", "marlin", {"VLLM_USE_DEEP_GEMM": "0"}),
        ("vllm", "mi300x", 2, "--moe-backend", "aiter_triton_mxfp4_bf16", {"VLLM_ROCM_USE_AITER": "1"}),
        ("vllm", "mi325x", 2, "--moe-backend", "aiter_triton_mxfp4_bf16", {"VLLM_ROCM_USE_AITER": "1"}),
        ("vllm", "mi355x", 2, "--moe-backend", None, {"VLLM_ROCM_USE_AITER": "1"}),
        ("vllm", "b300", 2, "--moe-backend", None, {}),
        ("sglang", "rtx-pro-6000", 4, "--moe-runner-backend", "marlin", {}),
        ("sglang", "rtx5090", 8, "--moe-runner-backend", "marlin", {}),
        ("sglang", "gb10", 2, "--moe-runner-backend", "marlin", {}),
    ],
)
def test_mxfp4_runs_by_kernels_that_have_to_be_named(
    engine: str, gpu: str, gpus: int, name: str, value: str | None, environment: dict[str, str]
) -> None:
    made = from_release("v2.6-flash", engine, gpu, gpus)
    assert option(made["command"], name) == value and made["environment"] == environment
    assert option(made["command"], "--generation-config") == ("vllm" if engine == "vllm" else None)


def test_kinds_that_nobody_tried_say_so() -> None:
    for gpu, count in EVERY_KIND.items():
        notes = from_release("v2.6-flash", "vllm", gpu, count)["notes"]
        assert ("not tried by us: any engine on" in " ".join(notes)) == (gpu not in ("h100", "h200"))
    ran = {gpu.arch for gpu in gpus.GPUS.values() if gpu.tried}
    assert all(set(row.archs) <= ran for row in kernels.KERNELS if row.evidence == contracts.RUN)
    keys = [(row.engine, row.subject, arch, row.ep) for row in kernels.KERNELS for arch in row.archs]
    assert len(keys) == len(set(keys))


def test_packed_mxfp4_is_rounded_twice_on_blackwell_by_vllm() -> None:
    """Issue #56770: W4A4, which nothing in the checkpoint asks for; told with and without a kind of GPU."""
    text = "compressed-tensors mxfp4 is computed on SM100 and newer with activations rounded to MXFP4"
    for gpu, told in (("h100", False), ("a100", False), ("b200", True), ("rtx-pro-6000", True)):
        assert any(text in note for note in made("mxfp4", gpu=gpu)["notes"]) == told
    (problem,) = check(at_scale("v2.5", "mxfp4"), "vllm", tp=4)
    assert text in problem.text and not problem.fails and "#56770" in problem.source


@pytest.mark.parametrize("form", ["modelopt", "nvfp4"])
def test_input_scales_ask_for_activations_in_four_bits(form: str) -> None:
    asked = replace(four_bits(at_scale("v2.5", form)), input_scales=True)
    for engine, gpu, backend, rounds in (
        ("vllm", "h100", "MARLIN", False),
        ("vllm", "b200", "FLASHINFER_TRTLLM", True),
        ("vllm", "rtx-pro-6000", "FLASHINFER_CUTLASS", True),
        ("sglang", "h100", "marlin", False),
        ("sglang", "b200", "flashinfer_trtllm", True),
    ):
        facts = launch(asked, engine, gpu, 8)
        assert facts["moe_backend"] == backend
        notes = " ".join(facts["notes"])
        assert ("rounds activations to NVFP4, which a plain J does not know of" in notes) == rounds
        assert ("scales the activations of a layer's experts by their largest input scale" in notes) == rounds
        assert ("it is served W4A16" in notes) != rounds
        named = option(facts["command"], "--moe-runner-backend")
        assert engine == "vllm" or named == ("flashinfer_trtllm" if rounds else None)
        assert launch(at_scale("v2.5", "modelopt"), "vllm", gpu, 8)["moe_backend"] == "MARLIN"


@pytest.mark.parametrize("form", ["modelopt", "nvfp4"])
def test_activations_in_four_bits_without_scales_are_refused_where_they_are_rounded(form: str) -> None:
    asked = four_bits(at_scale("v2.5", form))
    assert not any("input" in note for note in launch(asked, "vllm", "h100", 8)["notes"])
    with pytest.raises(CheckpointError, match="they are scaled by memory not written to where kernels round them"):
        launch(asked, "vllm", "b200", 8)
    (told,) = [problem for problem in check(asked, "vllm", tp=8) if "4 bits" in problem.text]
    assert not told.fails and "FLASHINFER_TRTLLM on SM100, SM103; FLASHINFER_CUTLASS on SM120, SM121" in told.text


def test_without_a_kind_of_gpu_all_are_told() -> None:
    asked = replace(four_bits(at_scale("v2.5", "nvfp4")), input_scales=True)
    (told,) = [problem for problem in check(asked, "vllm", tp=8) if "4 bits" in problem.text]
    assert "rounded too by FLASHINFER_TRTLLM on SM100, SM103" in told.text
    assert "MARLIN on SM80, SM86, SM89, SM90 computes weights alone, W4A16" in told.text


def four_bits(checkpoint: Served) -> Served:
    """The same, with experts' activations in NVFP4 in config.json."""
    checkpoint = with_algo(checkpoint, "NVFP4")
    config = json.loads(json.dumps(checkpoint.config))
    for group in config["quantization_config"].get("config_groups", {}).values():
        group["input_activations"] = format_inputs(Format("nvfp4", 16))
    return replace(checkpoint, config=config)


def with_algo(checkpoint: Served, algo: str) -> Served:
    """The same, with another word for its experts in config.json."""
    config = json.loads(json.dumps(checkpoint.config).replace('"W4A16_NVFP4"', f'"{algo}"'))
    return replace(checkpoint, config=config)


def test_v2_flash_itself_is_read_wrong() -> None:
    for engine in ("vllm", "sglang"):
        with pytest.raises(CheckpointError, match="gets scales of other rows") as wrong:
            from_release("v2-flash", engine, "h200", 8)
        assert wrong.value.hint == "mimoquant relayout --qkv split --dtype bf16"


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
    assert [gpu.value for gpu in Gpu] == list(gpus.GPUS) == sorted(EVERY_KIND, key=list(gpus.GPUS).index)
    assert [engine.value for engine in Engine] == list(contracts.ENGINES)
    assert [server.value for server in Server] == [contracts.VLLM, contracts.SGLANG]
    assert {gpu.arch for gpu in gpus.GPUS.values()} == {arch for row in kernels.KERNELS for arch in row.archs}


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
