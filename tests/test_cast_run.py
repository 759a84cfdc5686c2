"""`nvfp4-cast` as a run: from both containers of MXFP4 into both of NVFP4, stopped and resumed, verified, refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from micro import MICRO
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.index import TensorInfo, open_index
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, RecipeError
from mimoquant.evaluation.eval_kl import eval_kl
from mimoquant.machine.hashing import HashedStream
from mimoquant.model.layout import PROJECTIONS
from mimoquant.model.releases import stored_as
from mimoquant.output.verify import verify
from mimoquant.planning.needs import needs
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.planning.units import Unit
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.run.deal import deal
from mimoquant.run.loading import load
from mimoquant.run.workshop import Workshop
from mimoquant.serving.check import check
from mimoquant.serving.served import planned, read_served
from mimoquant.shipped import shipped_recipes

EXPERT = "model.layers.2.mlp.experts.3.down_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MXFP4 in the published form, and as we write it in compressed-tensors'."""
    base = tmp_path_factory.mktemp("sources")
    plan = make_plan(MICRO, load_recipe("mxfp4-mse"), container="compressed-tensors")
    pipeline.quantize(plan, base / "ct", device="cpu")
    (base / "later").mkdir()
    v26 = published.small_v26(MICRO, base / "later")
    return {"native": published.native_mxfp4(MICRO, base)[0], "compressed-tensors": base / "ct", "v2.6": v26}


def cast_into(source: Path, out: Path, container: str) -> Path:
    pipeline.quantize(make_plan(source, load_recipe("nvfp4-cast"), container=container), out, device="cpu")
    return out


def tensors_of(folder: Path) -> published.Tensors:
    return published.read(folder)[1]


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(*(value.reshape(-1).view(torch.uint8) for value in (one, other)))


def j(source: Path, candidate: Path) -> float:
    ids = np.random.default_rng(3).integers(0, 1024, (2, 64))
    tokens = TokenSet("test", ids, ("a", "b"), "0" * 64, ("0", "1"), ("test",))
    return float(eval_kl(source, candidate, tokens, noise_floor=False)["j"]["mean"])


@pytest.mark.parametrize("container", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("kind", ["native", "compressed-tensors"])
def test_a_cast_has_the_values_of_its_source(
    sources: dict[str, Path], kind: str, container: str, tmp_path: Path
) -> None:
    out = cast_into(sources[kind], tmp_path / "out", container)
    before, after = published.expert_values(sources[kind]), published.expert_values(out)
    assert len(before) == len(after) == 4 * 8 * 3
    for module, values in before.items():
        assert torch.equal(values.view(torch.int16), after[module].view(torch.int16)), module
    report = verify(out, sources[kind])
    assert report.ok and report.checked["quantized tensors"] == 96, report.problems


@pytest.mark.parametrize("lanes", [1, 4])
def test_an_interrupted_cast_goes_on(
    sources: dict[str, Path], lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes, however many shards are filled at once, on a disk that has room for the output and no more."""
    whole = cast_into(sources["native"], tmp_path / "whole", "modelopt")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(lanes))
    plan = make_plan(sources["native"], load_recipe("nvfp4-cast"), container="modelopt")

    def stop(unit: Unit, done: int, finished: bool) -> None:
        if unit.name == "layer 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(plan, tmp_path / "out", device="cpu", progress=stop)
    assert not (tmp_path / "out").exists()
    used = sum(path.stat().st_size for path in (tmp_path / "out.partial").rglob("*") if path.is_file())
    room = plan.shard_bytes + plan.side_bytes + pipeline.DISK_SLACK + 10**5  # for the journal
    monkeypatch.setattr(pipeline, "free_bytes", lambda folder: room - used)
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    files = {path.name: file_sha256(path) for path in whole.iterdir()}
    assert files == {path.name: file_sha256(path) for path in (tmp_path / "out").iterdir()}


def test_shards_of_a_cast_are_filled_in_turn(sources: dict[str, Path]) -> None:
    """A piece of each, as many as are written at once; the pieces of each in its own order."""
    plan = make_plan(sources["native"], load_recipe("nvfp4-cast"), chunk_bytes=1)
    tasks = deal(plan, (), 0, 1)
    with CheckpointReader(plan.layout.index) as reader, contextlib.closing(CpuEngine(1)) as engine:
        shop = Workshop(plan, reader, engine)
        one_by_one = [(piece.task.unit.name, piece.steps) for piece in load(shop, tasks)]
        in_turn = [(piece.task.unit.name, piece.steps) for piece in load(shop, tasks, 3)]
    names = [name for name, _ in in_turn]
    assert [name for name, _ in one_by_one] == sorted(names, key=[*plan.layout.units].index)
    for name in plan.layout.units:
        assert [piece for piece in in_turn if piece[0] == name] == [piece for piece in one_by_one if piece[0] == name]
    open_at = [{n for n in names[: at + 1] if n in names[at:]} for at in range(len(names))]
    assert max(map(len, open_at)) == 3
    assert all(len(set(names[at : at + 3])) == 3 for at in range(len(names) - 3) if len(open_at[at + 2]) == 3)


def test_a_cast_reads_hashes_and_writes_each_byte_once(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[str, int]] = []  # by several threads
    read_range, put, write = CheckpointReader.read_range, HashedStream.put, os.write

    def hashed(self: HashedStream, view: memoryview) -> None:
        passes.append(("hashed", len(view)))
        put(self, view)

    def counted(self: CheckpointReader, info: TensorInfo, start: int, out: np.ndarray) -> None:
        passes.append(("read", out.nbytes))
        read_range(self, info, start, out)

    def shard(descriptor: int, data: memoryview) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            passes.append(("written", len(data)))
        return write(descriptor, data)

    plan = make_plan(sources["v2.6"], load_recipe("nvfp4-cast").stored_as({"dense": "fp8"}), container="modelopt")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointReader, "read_range", counted)
        patch.setattr(HashedStream, "put", hashed)
        patch.setattr(os, "write", shard)
        pipeline.quantize(plan, tmp_path / "out", device="cpu")
    bytes_of = {kind: sum(size for what, size in passes if what == kind) for kind, _ in passes}
    assert bytes_of == {"read": plan.source_bytes, "hashed": plan.shard_bytes, "written": plan.shard_bytes}


def test_a_cast_takes_no_gpu(sources: dict[str, Path]) -> None:
    """It moves bytes, so its engine is the CPU's whatever the device, and it needs no memory of a GPU."""
    cast, quantized = (make_plan(sources["v2.6"], load_recipe(name)) for name in ("nvfp4-cast", "nvfp4-mse"))
    assert (cast.engine_device("cuda:1"), quantized.engine_device("cuda:1")) == ("cpu", "cuda:1")
    assert needs(cast, "cuda") == needs(cast, "cpu") and needs(quantized, "cuda").gpu_bytes > 0


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_2"])
def test_damage_to_a_cast_is_seen(sources: dict[str, Path], suffix: str, tmp_path: Path) -> None:
    """One bit of a code, of a block scale, of a global scale's exponent."""
    out = cast_into(sources["native"], tmp_path / "out", "modelopt")
    info = open_index(out).tensors[f"{EXPERT}.{suffix}"]
    raw = bytearray((out / info.file).read_bytes())
    raw[info.offset + (3 if suffix == "weight_scale_2" else 0)] ^= 0x01
    (out / info.file).write_bytes(raw)
    found = verify(out, sources["native"]).problems
    assert any(EXPERT in problem and "blocks of 16 do not have the source's values" in problem for problem in found)


def test_exponents_that_lie_too_far_apart_stop_the_run(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["native"], tmp_path / "source"))
    tensors = published.load_file(folder / "model-1-of-2.safetensors")
    scale = tensors[f"{EXPERT}.weight_scale"]
    scale[:2] = scale.max() - 18
    published.save_file(tensors, folder / "model-1-of-2.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["quantize", str(folder), "-r", "nvfp4-cast", "-o", str(tmp_path / "out")])
    assert result.exit_code == 3 and "Traceback" not in result.output, result.output
    assert (
        f"{EXPERT}.weight: NVFP4 cannot hold it exactly, 8 of its blocks of 32 have an exponent more than 17 below"
        in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_what_is_not_mxfp4_is_not_cast(sources: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-cast")
    with pytest.raises(RecipeError, match=r"casts MXFP4 experts and NVFP4 of them, model\.layers\.1.* is fp8"):
        make_plan(MICRO, recipe)
    for container in ("modelopt", "compressed-tensors"):
        nvfp4 = cast_into(sources["native"], tmp_path / container, container)
        with pytest.raises(RecipeError, match=f"the experts are NVFP4 in the {container} container already"):
            make_plan(nvfp4, recipe, container=container)
    with pytest.raises(CheckpointError, match="quantized already") as caught:
        make_plan(sources["compressed-tensors"], load_recipe("nvfp4-mse"))
    assert "mxfp4-cast" in str(caught.value.hint)


def test_a_cast_is_of_4_bit_floats_alone() -> None:
    text = (
        (Path(MICRO).parent.parent / "recipes" / "int4-g32-mse.yaml")
        .read_text()
        .replace("scale_search: mse", "scale_search: cast")
    )
    with pytest.raises(RecipeError, match="int4 holds no value of theirs exactly"):
        parse_recipe(text, "int4-cast")


# --- FP8 beside the experts in ModelOpt's container -------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V2.6 as NVFP4 with its FP8 and input scales, by the command line."""
    out = tmp_path_factory.mktemp("dense") / "out"
    options = ["-r", "nvfp4-cast", "--container", "modelopt", "--dense", "fp8", "--input-scales", "unit", "-q"]
    made = CliRunner().invoke(app, ["quantize", str(sources["v2.6"]), "-o", str(out), *options])
    assert made.exit_code == 0, made.output
    return out


def test_everything_but_experts_is_the_sources_bytes(sources: dict[str, Path], dense: Path) -> None:
    before, after = tensors_of(sources["v2.6"]), tensors_of(dense)
    rest = [name for name in before if ".experts." not in name]
    assert rest == [name for name in before if name in after and ".experts." not in name]
    assert all(same_bytes(before[name], after[name]) for name in rest)
    assert len(after) == len(before) + 2 * 96
    scales = [value for name, value in after.items() if name.endswith(".input_scale")]
    assert len(scales) == 96 and all(same_bytes(scale, torch.ones(())) for scale in scales)
    values = published.expert_values(dense)
    for module, expected in published.expert_values(sources["v2.6"]).items():
        assert torch.equal(expected.view(torch.int16), values[module].view(torch.int16)), module
    metadata = json.loads((dense / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["tp_size"] == 2 and "save_format" not in metadata


def test_the_config_names_what_is_fp8_and_in_4_bits(sources: dict[str, Path], dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    layers = config["quantization_config"]["quantized_layers"]
    fp8 = {
        name[: -len(".weight")]
        for name, value in tensors_of(dense).items()
        if value.dtype == torch.float8_e4m3fn and "weight_scale" not in name
    }
    blocks = {name for name, entry in layers.items() if entry["quant_algo"] == "FP8_BLOCK_SCALES"}
    assert fp8 <= blocks and all(layers[name]["group_size"] == 128 for name in blocks)
    engines = {"model.layers.0.mlp.gate_up_proj", *(f"model.mtp.layers.{n}.mlp.gate_up_proj" for n in range(3))}
    draft = {
        f"model.decoder.{part}"
        for part in ("self_attn.qkv_proj", *(f"mlp.{p}_proj" for p in (*PROJECTIONS, "gate_up")))
    }
    assert blocks - fp8 == engines | draft
    assert {entry["quant_algo"] for name, entry in layers.items() if name not in blocks} == {"NVFP4"}
    assert config["attention_projection_layout"] == "fused_qkv"
    beside = json.loads((dense / "hf_quant_config.json").read_text())["quantization"]
    assert beside["quantized_layers"] == layers


def test_input_scales_do_not_go_along(dense: Path) -> None:
    for scales, becomes in (("none", "left out"), ("unit", "replaced")):
        recipe = load_recipe("nvfp4-cast").stored_as({"input_scales": scales})
        told = make_plan(dense, recipe, container="compressed-tensors").notes
        assert any(f"are {becomes}: a cast keeps weights" in note for note in told)


def test_its_values_are_the_sources_to_the_bit(sources: dict[str, Path], dense: Path) -> None:
    report = verify(dense, sources["v2.6"])
    assert report.ok and report.checked["quantized tensors"] == 96, report.problems
    assert j(sources["v2.6"], dense) == 0


def test_another_input_scale_is_seen(sources: dict[str, Path], dense: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(dense, tmp_path / "out"))
    info = open_index(out).tensors[f"{EXPERT}.input_scale"]
    raw = bytearray((out / info.file).read_bytes())
    raw[info.offset + 3] ^= 0x01
    (out / info.file).write_bytes(raw)
    assert f"{EXPERT}.input_scale: its values are not the source's" in verify(out, sources["v2.6"]).problems


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dense", "fp8"], "is for the modelopt container"),
        (["--input-scales", "calibrated"], "needs no tokens to calibrate them on"),
    ],
)
def test_what_nothing_gives_is_refused(sources: dict[str, Path], options: list[str], said: str, tmp_path: Path) -> None:
    asked = ["quantize", str(sources["v2.6"]), "-r", "nvfp4-cast", "-o", str(tmp_path / "out"), *options]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2 and said in refused.stderr, refused.output


def test_a_source_without_fp8_has_none_to_keep(sources: dict[str, Path]) -> None:
    recipe = load_recipe("nvfp4-cast").stored_as({"dense": "fp8"})
    with pytest.raises(RecipeError, match="has no FP8 blocks beside its experts"):
        make_plan(sources["compressed-tensors"], recipe, container="modelopt")


@pytest.mark.slow
def test_flash_is_planned_at_the_size_of_the_public_casts(shared: Path, tmp_path: Path) -> None:
    """145,273 tensors of 182,386,002,688 bytes, as three releases have them; nothing is written."""
    tool, folder = shared / "tools" / "make_sparse_checkpoint.py", tmp_path / "flash"
    if not tool.is_file():
        pytest.skip(f"{tool} is not there")
    subprocess.run([sys.executable, tool, "v26-flash", folder], check=True, capture_output=True)
    recipe = load_recipe("nvfp4-cast").stored_as({"dense": "fp8", "input_scales": "unit"})
    plan = make_plan(folder, recipe, container="modelopt")
    assert sum(len(unit.entries) for unit in plan.units) == 145_273 and plan.tensor_bytes == 182_386_002_688
    found = {engine: check(planned(plan), engine) for engine in ("vllm", "sglang")}
    assert stored_as(plan.layout) == "MXFP4 experts, FP8 attention, as released"
    assert [p.verdict for p in found["vllm"] if p.fails] == ["refused"] and "#55496" in found["vllm"][0].source
    assert not any(problem.fails for problem in found["sglang"])


def test_its_qkv_is_not_relaid(dense: Path, tmp_path: Path) -> None:
    asked = ["relayout", str(dense), "--qkv", "split", "--dtype", "bf16", "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 2 and "its qkv is FP8 in ModelOpt's container" in refused.stderr


# --- into MXFP4, and back to it ---------------------------------------------------------------------------------------

WAYS: dict[str, tuple[str, str, dict[str, str]]] = {  # recipe, container, settings: from native to another container
    "MXFP4, compressed-tensors": ("mxfp4-cast", "compressed-tensors", {}),
    "NVFP4, compressed-tensors": ("nvfp4-cast", "compressed-tensors", {}),
    "NVFP4, ModelOpt": ("nvfp4-cast", "modelopt", {}),
    "NVFP4, ModelOpt, input scales": ("nvfp4-cast", "modelopt", {"input_scales": "unit"}),
    "NVFP4, ModelOpt, FP8": ("nvfp4-cast", "modelopt", {"dense": "fp8"}),
}


@pytest.fixture(scope="module")
def casts(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Way → what it makes of V2.6, and that cast back to the native container."""
    base, made = tmp_path_factory.mktemp("ways"), {}
    for number, (way, (recipe, container, settings)) in enumerate(WAYS.items()):
        there, back = base / f"there{number}", base / f"back{number}"
        plan = make_plan(sources["v2.6"], load_recipe(recipe).stored_as(settings), container=container)
        pipeline.quantize(plan, there, device="cpu")
        pipeline.quantize(make_plan(there, load_recipe("mxfp4-cast")), back, device="cpu")
        made[way] = there, back
    return made


@pytest.mark.parametrize("way", WAYS)
def test_sizes_are_as_planned_to_the_byte(
    sources: dict[str, Path], casts: dict[str, tuple[Path, Path]], way: str
) -> None:
    """Every shard and every file beside them, of the way there and of the way back, and tensors as in the headers."""
    recipe, container, settings = WAYS[way]
    there = make_plan(sources["v2.6"], load_recipe(recipe).stored_as(settings), container=container)
    back = make_plan(casts[way][0], load_recipe("mxfp4-cast"))
    for plan, out in zip((there, back), casts[way], strict=True):
        sizes = {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*") if path.is_file()}
        assert {unit.file: unit.size_bytes for unit in plan.units}.items() <= sizes.items()
        assert plan.side_files.items() <= sizes.items()
        assert sum(size for name, size in sizes.items() if name.endswith(".safetensors")) == plan.shard_bytes
        tensors = open_index(out).tensors
        planned_tensors = {entry.name: entry.size_bytes for unit in plan.units for entry in unit.entries}
        assert {name: info.size_bytes for name, info in tensors.items()} == planned_tensors
        assert sum(planned_tensors.values()) == plan.tensor_bytes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name.endswith(("-rtn", "-mse"))])
def test_what_is_quantized_of_it_has_the_planned_sizes_too(
    sources: dict[str, Path], recipe: str, tmp_path: Path
) -> None:
    plan = make_plan(sources["v2.6"], load_recipe(recipe))
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {unit.file: unit.size_bytes for unit in plan.units}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_no_value_changes(
    sources: dict[str, Path], casts: dict[str, tuple[Path, Path]], way: str
) -> None:
    before = published.expert_values(sources["v2.6"])
    for source, out in ((sources["v2.6"], casts[way][0]), casts[way]):
        after = published.expert_values(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[m].view(torch.int16), after[m].view(torch.int16)) for m in before)
        report = verify(out, source)
        assert report.ok and report.checked["quantized tensors"] == 96, report.problems
        assert j(sources["v2.6"], out) == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_back_is_what_the_release_had(
    sources: dict[str, Path], casts: dict[str, tuple[Path, Path]], way: str
) -> None:
    """Codes always, exponents but for blocks of zeros; all else where its FP8 was kept, else what is bf16 in both."""
    back, before, after = casts[way][1], tensors_of(sources["v2.6"]), tensors_of(casts[way][1])
    config = json.loads((back / "config.json").read_text())
    source = json.loads((sources["v2.6"] / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["store_dtype"]) == ("fp8", "mxfp4")
    for name in [name for name in before if ".experts." in name]:
        live = torch.ones(before[name].shape, dtype=torch.bool)
        if name.endswith("_scale"):
            live = (published.unpack(before[name.removesuffix("_scale")]) & 7).unflatten(1, (-1, 32)).amax(-1) > 0
        assert torch.equal(before[name][live], after[name][live]), name
    if "FP8" in way:
        assert before.keys() == after.keys()
        assert all(same_bytes(before[name], after[name]) for name in before if ".experts." not in name)
        assert {*source["quantization_config"]["ignored_layers"]} <= {*quantization["ignored_layers"]}
        assert all("o_proj" in name for name in quantization["ignored_layers"])
    else:
        held = [n for n in after if after[n].dtype == torch.bfloat16 and n.endswith("_proj.weight") and "eh" not in n]
        assert {name.removesuffix(".weight") for name in held if name.startswith("model.")} <= {
            *quantization["ignored_layers"]
        }
        assert not [name for name in after if after[name].dtype == torch.float8_e4m3fn]


@pytest.mark.parametrize("way", WAYS)
def test_engines_take_what_came_back(casts: dict[str, tuple[Path, Path]], way: str) -> None:
    served = read_served(casts[way][1])
    for engine in ("vllm", "sglang"):
        problems = [p for p in check(served, engine, tp=1) if p.fails and "auto_map" not in p.text]
        assert not problems, problems


def test_nvfp4_that_was_not_cast_cannot_go_back(tmp_path: Path) -> None:
    folder = published.modelopt_nvfp4(MICRO, tmp_path)[0]
    config, tensors = published.read(folder)
    blocks = [name for name in tensors if name.endswith("weight_scale_inv")]
    with pytest.raises(RecipeError, match="has MXFP8 beside its experts"):
        make_plan(folder, load_recipe("mxfp4-cast"))
    plain, plain_values = tmp_path / "plain", published.read(tmp_path / "modelopt-twin")[1]
    stored = {name: value for name, value in tensors.items() if ".experts." in name}
    stored |= {name: value for name, value in plain_values.items() if ".experts." not in name}
    assert blocks and published.write(plain, config | {"attention_projection_layout": "split"}, stored)
    with pytest.raises(CheckpointError, match=r"MXFP4 cannot hold it exactly, .* of its blocks of 32 have two scales"):
        pipeline.quantize(make_plan(plain, load_recipe("mxfp4-cast")), tmp_path / "out", device="cpu")


@pytest.mark.parametrize("kind", ["v2.6", "compressed-tensors"])
def test_a_cast_that_would_change_nothing_is_refused(sources: dict[str, Path], kind: str) -> None:
    container = "native" if kind == "v2.6" else "compressed-tensors"
    with pytest.raises(RecipeError, match=f"are MXFP4 in the {container} container already"):
        make_plan(sources[kind], load_recipe("mxfp4-cast"), container=container)


def test_damage_to_what_came_back_is_seen(casts: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, back = casts["NVFP4, compressed-tensors"]
    out = Path(shutil.copytree(back, tmp_path / "out"))
    info = open_index(out).tensors[f"{EXPERT}.weight_scale"]
    raw = bytearray((out / info.file).read_bytes())
    raw[info.offset] ^= 0x01
    (out / info.file).write_bytes(raw)
    found = verify(out, source).problems
    assert any(f"{EXPERT}.weight: 2 blocks of 16 do not have the source's values" in problem for problem in found)
