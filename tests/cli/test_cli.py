"""The command line as a user meets it: output, exit codes, and one clear sentence for each mistake."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, edit_json
from ranks import forked
from typer.testing import CliRunner

import mimoquant
from mimoquant.checkpoint.index import INDEX_NAME
from mimoquant.cli.app import app, main

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MICRO, tmp_path / "copy"))


def edit_header(folder: Path, tensor: str, change: Callable[[dict[str, Any], str], object]) -> Path:
    """Change the header entry of a tensor, keeping the payload."""
    path = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][tensor]
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header, tensor)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


def test_inspect_and_plan_say_the_same_as_text_and_json() -> None:
    facts = json.loads(call("inspect", MICRO, "--json").stdout)
    assert facts["schema_version"] == 1 and facts["mtp_layers"] == 3 and facts["layers"] == 5
    assert facts["qkv"] == "fused, 2 interleaved ranks" and len(facts["weights_parted_from_their_scale"]) > 0
    assert f"{facts['tensors']} tensors" in call("inspect", MICRO).stdout
    planned = json.loads(call("plan", MICRO, "--recipe", "nvfp4-mse", "--json").stdout)
    assert sum(planned["output_bytes_by_role"].values()) == planned["output_tensor_bytes"]
    assert sum(shard["size_bytes"] for shard in planned["shards"]) == planned["output_bytes"]
    assert f"{planned['output_bytes']} bytes" in call("plan", MICRO, "--recipe", "nvfp4-mse").stdout


def test_plan_tells_what_a_run_needs_of_this_machine(tmp_path: Path) -> None:
    arguments = ("plan", MICRO, "-r", "int4-g32-mse", "--out", tmp_path / "out", "--measure", "--device", "cpu")
    facts = json.loads(call(*arguments, "--json").stdout)
    took = facts["estimate"]
    assert took["bound_by"] in ("reading", "computing", "writing")
    assert took["total_s"] == took[f"{took['bound_by']}_s"] + took["starting_s"] > took["starting_s"] >= 0
    assert 0 < facts["host_memory_bytes"] < facts["machine"]["host_bytes"] and facts["gpu_memory_bytes"] == 0
    assert facts["disk_free_bytes"] > facts["output_bytes"] and facts["experts_at_once"] == 8
    text = call(*arguments).stdout
    assert "bound by" in text and "host memory (here " in text and "free are " in text
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    arguments = (MICRO, "-r", "gptq-int4-g32", "--sequences", "9999999", "--tokens", "4096", "--device", "cpu")
    told = call("plan", *arguments)
    assert told.exit_code == 0 and "note: quantize would refuse: " in told.stdout and "--sequences " in told.stdout
    refused = call("quantize", *arguments, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "GB of memory, here are" in refused.stderr and not list(tmp_path.iterdir())


def test_what_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (("inspect", MICRO), ("verify", MICRO), ("eval-kl", MICRO, "--server", "http://nowhere")):
        result = call(*arguments)
        assert result.exit_code == 2 and "is the work of one process, 2 were started" in result.stderr


def test_quantize_then_verify(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("quantize", MICRO, "-r", "mxfp4-rtn", "--out", out, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["container"] == "native" and facts["elapsed_s"] > 0
    verified = call("verify", out, "--source", MICRO)
    assert verified.exit_code == 0 and verified.stdout.startswith("ok")
    (out / "config.json").write_text("{}")
    failed = call("verify", out, "--source", MICRO)
    assert failed.exit_code == 3 and "config.json: is not what" in failed.stdout and "(problems: 1)" in failed.stderr
    assert json.loads(call("verify", out, "--source", MICRO, "--json").stdout)["ok"] is False


def test_container_option_overrides(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = call("quantize", MICRO, "-r", "mxfp4-rtn", "-o", out, "--container", "compressed-tensors", "--device", "cpu")
    assert made.exit_code == 0, made.output
    assert "become bf16" in made.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mxfp4-pack-quantized"
    assert config["attention_projection_layout"] == "split"
    assert call("verify", out, "--source", MICRO).exit_code == 0


def spoil_no_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()


def spoil_missing_file(folder: Path) -> None:
    (folder / "model_mtp.safetensors").unlink()


def spoil_absolute_path(folder: Path) -> None:
    edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update({"lm_head.weight": "/etc/passwd"}))


def spoil_parent_path(folder: Path) -> None:
    edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"}))


def spoil_long_header(folder: Path) -> None:
    path = folder / "model_mtp.safetensors"
    path.write_bytes(struct.pack("<Q", 10**9) + path.read_bytes()[8:])


def spoil_overlap(folder: Path) -> None:
    def shift(header: dict[str, Any], name: str) -> None:
        header[name]["data_offsets"] = [value - 8 for value in header[name]["data_offsets"]]

    edit_header(folder, EXPERT, shift)


def spoil_dtype(folder: Path) -> None:
    edit_header(folder, EXPERT, lambda header, name: header[name].update(dtype="I8"))


def spoil_unknown_dtype(folder: Path) -> None:
    edit_header(folder, EXPERT, lambda header, name: header[name].update(dtype="FP4"))


def spoil_lost_scale(folder: Path) -> None:
    edit_header(folder, EXPERT + "_scale_inv", lambda header, name: header.update({"other": header.pop(name)}))
    edit_json(
        folder / INDEX_NAME,
        lambda index: index["weight_map"].update({"other": index["weight_map"].pop(EXPERT + "_scale_inv")}),
    )


def spoil_shape(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(moe_intermediate_size=256))


def spoil_model_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="qwen3_moe"))


def spoil_block(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(weight_block_size=[64, 64]))


def spoil_router(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(scoring_func="softmax"))


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_unknown_tensor(folder: Path) -> None:
    edit_header(
        folder, "visual.merger.ln_q.weight", lambda header, name: header.update({"odd.weight": header.pop(name)})
    )
    edit_json(
        folder / INDEX_NAME,
        lambda index: index["weight_map"].update({"odd.weight": index["weight_map"].pop("visual.merger.ln_q.weight")}),
    )


def spoil_truncated(folder: Path) -> None:
    path = folder / "model_mtp.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def spoil_pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def spoil_nan_scale(folder: Path) -> None:
    path = edit_header(folder, EXPERT + "_scale_inv", lambda header, name: None)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    begin = 8 + length + json.loads(raw[8 : 8 + length])[EXPERT + "_scale_inv"]["data_offsets"][0]
    raw[begin : begin + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)


BAD_SOURCES = [
    (spoil_no_index, "safetensors files but no model.safetensors.index.json"),
    (spoil_missing_file, "model_mtp.safetensors is missing"),
    (spoil_absolute_path, "'/etc/passwd' leads out of the checkpoint folder"),
    (spoil_parent_path, "'../x.safetensors' leads out of the checkpoint folder"),
    (spoil_long_header, "the header claims 1000000000 bytes but the file has"),
    (spoil_overlap, "overlaps its predecessor"),
    (spoil_dtype, f"{EXPERT} is I8, expected F8_E4M3 or BF16"),
    (spoil_unknown_dtype, "has the unknown dtype 'FP4'"),
    (spoil_lost_scale, f"{EXPERT} is FP8 but {EXPERT}_scale_inv is missing"),
    (spoil_shape, "config.json makes it [256, 256]"),
    (spoil_model_type, "model_type 'qwen3_moe' is unknown"),
    (spoil_block, "weight_block_size is [64, 64], known is [128, 128]"),
    (spoil_router, "scoring_func is 'softmax', known is 'sigmoid'"),
    (spoil_config, "config.json: is not valid JSON"),
    (spoil_no_config, "config.json is missing"),
    (spoil_unknown_tensor, "1 tensors have no known role, first odd.weight"),
    (spoil_truncated, "the header describes"),
    (spoil_pickle, "holds pickle weights (pytorch_model.bin)"),
    (spoil_nan_scale, f"{EXPERT}: holds NaN or Inf"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_SOURCES, ids=[spoil.__name__[6:] for spoil, _ in BAD_SOURCES])
def test_a_bad_source_is_refused_in_one_sentence(
    spoil: Callable[[Path], None], message: str, copy: Path, tmp_path: Path
) -> None:
    spoil(copy)
    result = call("quantize", copy, "-r", "int4-g128-rtn", "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 3, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir() if path != copy]
    assert left == (["out.partial"] if spoil is spoil_nan_scale else [])  # found midway: what is done can be kept


def test_an_unknown_tensor_can_be_copied(copy: Path, tmp_path: Path) -> None:
    spoil_unknown_tensor(copy)
    result = call("quantize", copy, "-r", "mxfp4-rtn", "-o", tmp_path / "out", "--device", "cpu", "--allow-unknown")
    assert result.exit_code == 0 and "note: 1 unknown tensors are copied" in result.stderr
    assert "odd.weight" in json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    assert call("verify", tmp_path / "out", "--source", copy).exit_code == 0


RECIPE = """
default_stage:
  default_modifiers:
    QuantizationModifier:
      config_groups:
        experts:
          targets: ['re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$']
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 128}
"""

BAD_RECIPES = [
    ("unknown key", RECIPE + "mimoquant: {scale_seach: mse}", "unknown key 'scale_seach' in mimoquant"),
    ("unknown layer", RECIPE + "mimoquant: {carve_outs: {77: bf16}}", "carve_outs names layer 77"),
    ("dense layer", RECIPE + "mimoquant: {carve_outs: {0: bf16}}", "carve_outs names layer 0"),
    ("no match", RECIPE.replace("experts\\.", "expert\\."), "no routed expert of layers 1-4 matches"),
    ("group size", RECIPE.replace("128}", "48}"), "group size 48; int weights take 32, 64, 128"),
    ("not yaml", "default_stage: [", "is not readable YAML"),
    ("native int4", RECIPE + "mimoquant: {container: native}", "the native container holds MXFP4 only"),
    ("attention", RECIPE.replace("mlp\\.experts\\.\\d+\\.(gate|up|down)", "(o|up)"), "only routed experts"),
]


@pytest.mark.parametrize(("text", "message"), [row[1:] for row in BAD_RECIPES], ids=[row[0] for row in BAD_RECIPES])
def test_a_bad_recipe_is_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    result = call("quantize", MICRO, "-r", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_group_size_that_does_not_divide_the_width(tmp_path: Path) -> None:
    """96 = the width inside these experts; 64 divides the hidden size but not that."""
    made = call("synth", tmp_path / "odd", "--layout", "v2.5", "--expert-intermediate", "96")
    assert made.exit_code == 0, made.output
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("128}", "64}"))
    result = call("plan", tmp_path / "odd", "-r", tmp_path / "recipe.yaml")
    assert result.exit_code == 2 and "group size 64 does not divide the width 96" in result.stderr


def test_usage_mistakes(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    cases = [
        (("inspect", tmp_path / "nowhere"), 2, "not a checkpoint folder (does not exist)"),
        (("inspect", MICRO / "config.json"), 2, "not a checkpoint folder (is a file)"),
        (("inspect", tmp_path / "there"), 3, "holds no safetensors file"),
        (("plan", MICRO, "-r", "int4"), 2, "no recipe is named 'int4'"),
        (("plan", MICRO, "-r", tmp_path / "no.yaml"), 2, "there is no such recipe file"),
        (("quantize", MICRO, "-r", "int4-g128-rtn", "-o", tmp_path / "there"), 2, "exists already"),
        (("quantize", MICRO, "-r", "int4-g128-rtn", "-o", MICRO / "sub"), 2, "lies inside the source"),
        (("quantize", MICRO, "-r", "int4-g128-rtn", "-o", tmp_path / "x", "--device", "tpu"), 2, "known are auto, cpu"),
        (("quantize", MICRO, "-r", "awq-int4-layer41-bf16", "-o", tmp_path / "x"), 2, "layer 41"),
        (("synth", tmp_path / "there", "--layout", "pro"), 2, "exist"),
        (
            ("synth", tmp_path / "new", "--layout", "pro", "--from", MICRO, "--layers", "3"),
            2,
            "--layers cannot go with it",
        ),
    ]
    for arguments, code, message in cases:
        result = call(*arguments)
        assert result.exit_code == code and message in result.stderr, (arguments, result.output)
        assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
    assert not (MICRO / "sub.partial").exists()


GPTQ = ("gptq-int4-g128", "--sequences", "8", "--tokens", "64", "--objective", "output")


@pytest.mark.parametrize(
    ("number", "recipe"),
    [(signal.SIGINT, ("int4-g128-rtn",)), *(pytest.param(n, GPTQ, marks=pytest.mark.slow) for n in (2, 15))],
)
def test_an_interrupt_exits_130_and_tells_how_to_resume(number: int, recipe: tuple[str, ...], tmp_path: Path) -> None:
    command = ["quantize", str(MICRO), "--device", "cpu", "--out", str(tmp_path / "out"), "-r", *recipe]
    stopped = forked(1, "rank_driver", "--whole", "--kill-at=1", "--kill-rank=0", f"--signal={number:d}", *command)
    assert stopped.returncode == 130, stopped.stderr
    assert "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "out").exists()
    again = call(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert call("verify", tmp_path / "out", "--source", MICRO).exit_code == 0


def test_progress_is_one_line_a_unit_off_a_terminal(tmp_path: Path) -> None:
    result = call("quantize", MICRO, "-r", "mxfp4-rtn", "-o", tmp_path / "out", "--device", "cpu")
    lines = [line for line in result.stderr.splitlines() if line.startswith("[")]
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert len(lines) == shards and lines[-1].startswith(f"[{shards}/{shards}] ") and lines[-1].endswith("0 s left")


def test_quiet_leaves_errors_and_hints(tmp_path: Path) -> None:
    arguments = ("quantize", MICRO, "-r", "int4-g128-rtn", "-o", tmp_path / "out", "--device", "cpu", "--quiet")
    done = call(*arguments)
    assert done.exit_code == 0 and done.stderr == "" and done.stdout.startswith("wrote "), done.output
    again = call(*arguments)
    assert again.exit_code == 2 and [line.split(":")[0] for line in again.stderr.splitlines()] == ["error", "hint"]
    loud = call("verify", tmp_path / "out", "--source", MICRO)  # the switch is off again
    assert loud.exit_code == 0 and "values of layer 1" in loud.stderr


@pytest.mark.parametrize("columns", [30, 60, 120])
@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_of_any_width_gets_a_bar(columns: int, colour: bool) -> None:
    """In a pseudo-terminal: no line is wider than it, and with NO_COLOR nothing is coloured."""
    code = (
        "import sys, time; from types import SimpleNamespace as N; from mimoquant.cli.terminal import Progress\n"
        "unit = N(name='layer 17'); made = N(recipe=N(calibrated=False), units=[unit], shard_bytes=3 * 10**9)\n"
        "with Progress(made, timeline=N(bound=('computing', 1))) as bar:\n"
        " bar.advance(unit, 10**9, False); time.sleep(.2); bar.advance(unit, 3 * 10**9, True)"
    )
    command = [sys.executable, "-c", code]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    plain = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    environment = plain | {"TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
    subprocess.run(command, stderr=slave, env=environment, check=True)
    os.close(slave)
    seen = os.read(master, 2**16).decode()
    os.close(master)
    assert "layer 17" in seen or columns == 30
    assert (re.search(r"\x1b\[[0-9;]*3\d", seen) is not None) == colour
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    if columns > 30:  # figures are never cut; what bounds the run is told where there is room for it
        last = [line for line in lines if line.strip()][-1]
        assert "3.0/3.0 GB" in last and ("bound by computing" in last) == (columns == 120)


def test_the_list_of_verbs_is_whole_in_80_columns() -> None:
    """click cuts what does not fit, in the middle of a sentence."""
    verbs = CliRunner().invoke(app, ["--help"], terminal_width=80).stdout.partition("Commands:")[2].strip().splitlines()
    assert len(verbs) == 10 and [line for line in verbs if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_that_wait_sleep(
    given: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before torch is loaded (`test_importing_the_command_line_loads_nothing_heavy`), and a user may say else."""
    monkeypatch.setattr(sys, "argv", ["mimoquant", "inspect", str(MICRO)])
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == (given or "passive") and capsys.readouterr().out


def test_version_names_what_numbers_depend_on() -> None:
    import torch

    said = dict(line.split() for line in call("--version").stdout.splitlines())
    assert said["mimoquant"] == mimoquant.__version__ and said["torch"] in (
        torch.__version__,
        torch.__version__.partition("+")[0],
    )
    assert {"python", "numba", "numpy", "safetensors", "tokenizers"} <= said.keys()


@pytest.mark.parametrize("out", [".", "/", "", "x" * 300, "loop/out"])
def test_an_out_that_cannot_be_is_refused(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    result = call("quantize", MICRO, "-r", "mxfp4-rtn", "--out", out, "--device", "cpu")
    assert result.exit_code == 2 and "\nerror: " in f"\n{result.stderr}", result.output
    assert "Traceback" not in result.output and [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_paths_too_long_and_a_full_stdout_end_in_a_sentence() -> None:
    for arguments in (("inspect", "x" * 5000), ("plan", MICRO, "-r", "x" * 5000 + "/r.yaml")):
        result = call(*arguments)
        assert result.exit_code == 2 and "too long" in result.stderr, result.output
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mimoquant", "inspect", str(MICRO)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_source_that_contradicts_itself_about_its_ranks(copy: Path) -> None:
    edit_json(copy / INDEX_NAME, lambda index: index["metadata"].update(tp_size=1))
    result = call("plan", copy, "-r", "mxfp4-rtn")
    assert result.exit_code == 3 and "tp_size 1" in result.stderr and "over 2" in result.stderr


def test_readers_that_leave_do_not_stop_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = (
        f"{sys.executable} -m mimoquant quantize {MICRO} -r mxfp4-rtn -o {out} --device cpu 2>&1 >/dev/null | head -1"
    )
    subprocess.run(["bash", "-c", command], check=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert out.is_dir()


class OutOfMemoryError(RuntimeError):
    """What torch calls a full GPU."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.00 GiB for an array"),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."),
    ],
    ids=["numpy", "cuda", "cpu"],
)
def test_no_memory_is_one_sentence(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("mimoquant.pipeline.quantize", fail)
    source = str(mimoquant.micro_checkpoint())
    result = CliRunner().invoke(app, ["quantize", source, "-r", "int4-g128-rtn", "--out", str(tmp_path / "out")])
    assert result.exit_code == 4, result.output
    first, hint = result.stderr.splitlines()[-2:]
    assert first.startswith("error: out of memory (") and first.endswith(")") and "more" not in first
    assert hint.startswith("hint: ") and "--resume" in hint
