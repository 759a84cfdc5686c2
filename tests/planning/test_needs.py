"""What a run needs: sums hold under a hard limit, chunks follow the GPU, what cannot fit is refused with a way out."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, edit_json, plain_gptq

from mimoquant.machine.memory import Machine, machine
from mimoquant.planning import needs as planning_needs
from mimoquant.planning.needs import fitting_plan, largest_chunk, needs, refusal, tower_bytes
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.synthetic.checkpoint import SynthSizes, synth
from mimoquant.synthetic.files import ShardFiles

GB = 10**9
V25_TOWER = {"hidden_size": 1280, "intermediate_size": 4608, "num_heads": 32, "num_key_value_heads": 8} | {
    "num_query_groups": 4,
    "kv_channels": 64,
    "qk_channels": 64,
    "patch_size": 16,
    "spatial_patch_size": 16,
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 1.1 GB in real shapes whose payload is holes: zeros, which cost no disk."""
    folder = tmp_path_factory.mktemp("sparse") / "source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[synth.__module__], "_put", _leave_holes)
        synth(folder, "v2.5", sizes=SynthSizes(layers=8, experts=16, hidden=2048, expert_intermediate=1408))
    return folder


def _leave_holes(files: ShardFiles, stored: Any, origin: Any) -> None:
    for entry in stored.entries:
        files._ranges.pop(entry.name)


def planned(source: Path, recipe: str, **changes: Any) -> Plan:
    return make_plan(source, load_recipe(recipe).calibrated_on(changes))


def quantize(source: Path, out: Path, limit_bytes: int, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process that may not have more than `limit_bytes` of private memory."""
    command = [sys.executable, "-m", "mimoquant", "quantize", str(source), "--out", str(out), "--device", "cpu"]
    limits = (limit_bytes, limit_bytes)
    return subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limits),
    )


@pytest.mark.slow
def test_a_run_keeps_to_its_sum_under_a_hard_limit_below_the_size_of_its_source(sparse: Path, tmp_path: Path) -> None:
    plan = planned(sparse, "mxfp4-rtn")
    wants, layer = needs(plan).host_bytes, max(unit.size_bytes for unit in plan.units)
    assert wants < 2 * layer + 2 * GB and wants < plan.source_bytes
    done = quantize(sparse, tmp_path / "out", wants, "-r", "mxfp4-rtn")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_calibrated_run_keeps_to_its_sum_too(tmp_path: Path) -> None:
    changes = {"sequences": 16, "tokens": 64}
    plan = planned(MICRO, "gptq-int4-g32", **changes)
    wants = needs(plan).host_bytes
    assert wants < 4 * 16 * 64 * plan.layout.geometry.hidden + 3 * GB  # 1 GB of them for the walk back
    options = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    done = quantize(MICRO, tmp_path / "out", wants, "-r", "gptq-int4-g32", *options)
    assert done.returncode == 0, done.stderr


def test_needs_grow_with_tokens_and_shrink_with_ranks() -> None:
    few, many = (planned(MICRO, "gptq-int4-g32", sequences=n, tokens=512) for n in (16, 1600))
    for device in ("cpu", "cuda"):
        assert needs(few, device).host_bytes < needs(many, device).host_bytes
        assert needs(many, device, ranks=4).host_bytes < needs(many, device).host_bytes
    assert needs(few).gpu_bytes == 0 < needs(few, "cuda").gpu_bytes < needs(many, "cuda").gpu_bytes
    plain = planned(MICRO, "mxfp4-rtn")
    assert needs(plain).host_bytes < needs(few).host_bytes


def test_towers_are_counted_by_a_portion_however_many_tokens(tmp_path: Path) -> None:
    """V2.5's sizes: .67 GB of states rest. They run before the layers do, so what takes more is what counts."""
    synth(tmp_path / "source", "v2.5", sizes=SynthSizes(layers=3, experts=8, hidden=128))
    edit_json(tmp_path / "source" / "config.json", lambda held: held["vision_config"].update(V25_TOWER))
    held = {"tokens": 512, "objective": "output"}
    few, many = (planned(tmp_path / "source", "gptq-int4-g128", sequences=n, **held) for n in (4, 4000))
    values = 1280 + 4 * 64 + 4 * (128 + 2 * 6)  # states, rotations, keys seen in windows of 6
    assert tower_bytes(few)[0] == 4 * values * 4 * 4 * 512 < tower_bytes(many)[0] == 4 * values * 2**17
    assert tower_bytes(few)[1] == tower_bytes(many)[1] < 2 * GB
    assert (
        tower_bytes(planned(tmp_path / "source", "mxfp4-rtn"))
        == tower_bytes(planned(MICRO, "gptq-int4-g128"))
        == (0, 0)
    )
    edit_json(tmp_path / "source" / "config.json", lambda held: held.pop("vision_config"))
    plain = planned(tmp_path / "source", "gptq-int4-g128", sequences=4, **held)
    assert needs(plain).host_bytes < needs(few).host_bytes
    assert needs(few, "cuda").gpu_bytes >= max(needs(plain, "cuda").gpu_bytes, tower_bytes(few)[1])
    assert needs(many).host_bytes - needs(few).host_bytes > 4 * 128 * 512 * 3996  # hidden states, as ever


def test_what_data_with_images_take_is_said_where_they_may_have_some(tmp_path: Path) -> None:
    synth(tmp_path / "source", "v2.5", sizes=SynthSizes(layers=3, experts=8, hidden=128))
    said = "should the data have images or sounds, each of their tokens takes 0.5 kB of host memory more"
    for data, told in (((), False), (("mixed-v1", "omni-v1"), True)):
        notes = planned(tmp_path / "source", "gptq-int4-g128", **({"data": data} if data else {})).notes
        assert any(note.startswith(said) for note in notes) is told


@pytest.mark.slow
def test_a_joint_refinement_is_reckoned_and_keeps_to_its_sum(tmp_path: Path) -> None:
    changes = {"sequences": 32, "tokens": 64}
    plain, refined = (
        planned(MICRO, "gptq-mxfp4", reconstruct=rounds, objective="output", **changes) for rounds in (0, 1)
    )
    on_gpu = [
        needs(replace(plan, recipe=plan.recipe.calibrated_on({"sequences": 4096, "tokens": 512})), "cuda")
        for plan in (plain, refined)
    ]
    assert on_gpu[0].gpu_bytes < on_gpu[1].gpu_bytes
    options = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    options += ["--objective", "output"]
    done = quantize(MICRO, tmp_path / "out", needs(refined).host_bytes, "-r", "gptq-mxfp4", "--refine", "1", *options)
    assert done.returncode == 0, done.stderr


def test_chunks_for_the_loss_are_halved_where_that_keeps_them_small(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(size: int) -> Plan:
        return make_plan(sparse, load_recipe("gptq-int4-g128").calibrated_on({"tokens": 64}), chunk_bytes=size)

    monkeypatch.setattr(planning_needs, "CUDA_CHUNK_BYTES", size := 140 * 2**20)
    whole, half = (needs(make(of), "cuda").gpu_bytes for of in (size, size // 2))
    assert half < whole
    sizes = []
    for most in (whole, half, half - 1):
        monkeypatch.setattr(planning_needs, "_LOSS_BYTES", most)
        plan = fitting_plan(make, "cuda", Machine(100 * GB, 90 * GB, 100 * GB))
        sizes.append(needs(plan, "cuda").gpu_bytes)
    assert sizes == [whole, half, whole]  # what is too much in any case is done as fast as can be


def test_chunks_are_the_largest_that_fit_the_gpu(sparse: Path) -> None:
    recipe = plain_gptq("int4-g128").calibrated_on({"sequences": 16, "tokens": 512})

    def make(size: int) -> Plan:
        return make_plan(sparse, recipe, chunk_bytes=size)

    roomy, tight = (fitting_plan(make, "cuda", Machine(100 * GB, 90 * GB, gpu)) for gpu in (80 * GB, 4 * GB))
    assert (roomy.gpu_bytes, tight.gpu_bytes) == (80 * GB, 4 * GB)  # what states may rest in, too
    assert largest_chunk(roomy) == 16 > largest_chunk(tight) > 1
    assert needs(tight, "cuda").gpu_bytes <= 4 * GB < needs(roomy, "cuda").gpu_bytes
    assert refusal(roomy, "cuda", Machine(100 * GB, 90 * GB, 80 * GB)) is None
    assert largest_chunk(fitting_plan(make, "cpu", Machine(100 * GB, 90 * GB))) == largest_chunk(
        make_plan(sparse, recipe)
    )


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    plan = planned(MICRO, "gptq-int4-g32", sequences=40_000, tokens=2048)
    has = Machine(8 * GB, 7 * GB)
    refused = refusal(plan, "cpu", has)
    assert refused is not None and refused.exit_code == 2 and "of memory, here are 8.00 GB" in str(refused)
    assert refused.hint is not None and refused.hint.startswith("--sequences ")
    fits = int(refused.hint.split()[1])
    assert refusal(planned(MICRO, "gptq-int4-g32", sequences=fits, tokens=2048), "cpu", has) is None
    on_gpu = refusal(plan, "cuda", Machine(10**15, 10**15, GB))
    assert on_gpu is not None and "GPU memory" in str(on_gpu)
    never = refusal(planned(MICRO, "mxfp4-rtn"), "cpu", Machine(10**8, 10**8))
    assert never is not None and never.hint == "a machine with more memory would fit"
    long = refusal(planned(MICRO, "gptq-int4-g32", sequences=2, tokens=10**9), "cpu", has)
    assert long is not None and long.hint is not None and long.hint.startswith("take fewer --tokens")


def test_the_machine_is_what_the_control_group_leaves_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine("cpu")
    assert 0 < whole.host_free_bytes <= whole.host_bytes
    (tmp_path / "memory.max").write_text(f"{10**8}\n")
    (tmp_path / "memory.current").write_text(f"{4 * 10**7}\n")
    monkeypatch.setattr("mimoquant.machine.memory._CONTROL_GROUP", tmp_path)
    assert machine("cpu") == Machine(10**8, 6 * 10**7)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine("cpu").host_bytes == whole.host_bytes
