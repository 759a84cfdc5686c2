"""Checkpoint folders as the Hub makes them, and links that lead elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mimoquant
from mimoquant.checkpoint import folders
from mimoquant.checkpoint.folders import open_inside, resolve_inside
from mimoquant.checkpoint.hf_files import side_files
from mimoquant.checkpoint.index import INDEX_NAME, open_index
from mimoquant.errors import CheckpointError, MimoquantError
from mimoquant.model.drafter import open_drafter
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe

MICRO, DRAFTER = mimoquant.micro_checkpoint(), mimoquant.micro_drafter()
SHARDS = set(json.loads((MICRO / INDEX_NAME).read_text())["weight_map"].values())


def cached(root: Path, blobs: Path | None = None, absolute: bool = False) -> Path:
    """The micro checkpoint with its drafter as the Hub's cache holds it; `blobs`: where they really lie."""
    repo = root / "models--XiaomiMiMo--MiMo-V2.5"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    if blobs is not None:
        blobs.mkdir(parents=True)
        (repo / "blobs").symlink_to(blobs)
    else:
        (repo / "blobs").mkdir()
    for source, target in ((MICRO, snapshot), (DRAFTER, snapshot / "dflash")):
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, repo / "blobs" / digest)
            up = "../" * (len(target.relative_to(repo).parts))
            (target / file.name).symlink_to(repo / "blobs" / digest if absolute else f"{up}blobs/{digest}")
    return snapshot


def linked(root: Path) -> Path:
    (root / "named").symlink_to(cached(root))
    return root / "named"


CACHES: dict[str, Callable[[Path], Path]] = {
    "as the Hub makes it": cached,
    "blobs are a link to another disk": lambda root: cached(root, root / "disk" / "blobs"),
    "absolute links": lambda root: cached(root, absolute=True),
    "absolute links through linked blobs": lambda root: cached(root, root / "disk", absolute=True),
    "named through a link": linked,
}


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())
def test_a_cached_snapshot_is_a_checkpoint_with_its_drafter(make: Callable[[Path], Path], tmp_path: Path) -> None:
    snapshot = make(tmp_path)
    plan = make_plan(snapshot, load_recipe("mxfp4-rtn"))
    assert plan.shard_bytes == make_plan(MICRO, load_recipe("mxfp4-rtn")).shard_bytes
    assert "dflash/config.json" in plan.side_files and "dflash/dflash_draft_model.safetensors" in plan.side_files
    assert open_drafter(snapshot / "dflash")[0].captured == open_drafter(DRAFTER)[0].captured
    for name in SHARDS:
        assert not resolve_inside(snapshot, name).is_symlink()


def test_only_a_caches_own_blobs_are_followed(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (tmp_path / "models--other--one" / "blobs").mkdir(parents=True)
    secret = tmp_path / "models--other--one" / "blobs" / "0"
    secret.write_text("{}")
    (snapshot / "theirs.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder") as caught:
        side_files(snapshot, SHARDS)
    assert caught.value.hint and "cp -rL" in caught.value.hint


@pytest.mark.parametrize("name", ["snapshots/abc", "models--x/snaps/abc", "a/b/c"])
def test_a_folder_that_is_no_cache_has_no_blobs(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir(parents=True)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "0").write_text("{}")
    (folder / "config.json").symlink_to(blobs / "0")
    with pytest.raises(CheckpointError, match="leads out"):
        resolve_inside(folder, "config.json")


def test_a_farm_of_links_is_refused_with_a_way_out(tmp_path: Path) -> None:
    for file in MICRO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match="leads out") as caught:
        open_index(tmp_path)
    assert caught.value.hint and "name the folder that they lie in" in caught.value.hint


def attack(link: Callable[[Path, Path], None]) -> Callable[[Path], Path]:
    """A cached snapshot in which a shard's link is another."""

    def make(root: Path) -> Path:
        snapshot = cached(root)
        victim = snapshot / min(SHARDS)
        victim.unlink()
        link(victim, snapshot)
        return snapshot

    return make


def chain(victim: Path, snapshot: Path) -> None:
    """Into the blobs, and from there out."""
    blob = snapshot.parents[1] / "blobs" / "chain"
    blob.symlink_to("/etc/passwd")
    victim.symlink_to(blob)


ATTACKS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "to a file of the system": (lambda victim, snapshot: victim.symlink_to("/etc/passwd"), "leads out"),
    "by a relative path": (lambda victim, snapshot: victim.symlink_to("../" * 20 + "etc/passwd"), "leads out"),
    "a chain through the blobs": (chain, "leads out"),
    "a loop": (lambda victim, snapshot: victim.symlink_to(victim.name), "there is no file"),
    "to nothing": (lambda victim, snapshot: victim.symlink_to("../../blobs/gone"), "there is no file"),
    "to the blobs themselves": (lambda victim, snapshot: victim.symlink_to("../../blobs"), "not a regular file"),
    "to a device": (lambda victim, snapshot: victim.symlink_to("/dev/zero"), "leads out"),
    "to refs beside the blobs": (lambda victim, snapshot: victim.symlink_to("../../refs-main"), "there is no file"),
}


@pytest.mark.parametrize(("link", "said"), ATTACKS.values(), ids=ATTACKS.keys())
def test_links_that_lead_elsewhere_are_refused(link: Callable[[Path, Path], None], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_index(attack(link)(tmp_path))
    assert said in str(caught.value) and "root:" not in str(caught.value)


def test_a_folder_that_becomes_a_link_between_check_and_open_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "checkpoint", tmp_path / "outside"
    for place, text in ((folder / "sub", "{}"), (outside, '{"secret": 1}')):
        place.mkdir(parents=True)
        (place / "config.json").write_text(text)
    really = folders.resolve_inside

    def swapped(where: Path, name: str) -> Path:
        found = really(where, name)
        shutil.rmtree(folder / "sub")
        (folder / "sub").symlink_to(outside)
        return found

    monkeypatch.setattr(folders, "resolve_inside", swapped)
    with pytest.raises(CheckpointError, match="exchanged"):
        open_inside(folder, "sub/config.json")


def test_a_file_that_becomes_a_link_between_check_and_open_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    really = folders.resolve_inside

    def swapped(where: Path, name: str) -> Path:
        found = really(where, name)
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").symlink_to("/etc/passwd")
        return found

    monkeypatch.setattr(folders, "resolve_inside", swapped)
    with pytest.raises(OSError, match="symbolic links"):
        open_inside(tmp_path, "config.json")
    with pytest.raises(MimoquantError):
        open_index(tmp_path)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 7)


def test_what_is_no_part_of_a_checkpoint_is_not_carried(tmp_path: Path) -> None:
    """A `--local-dir` download with all that the Hub and its tools leave, and other forms of the weights."""
    put(tmp_path, "tokenizer.json", "dflash/model.safetensors", "audio_tokenizer/model.safetensors", "docs/a.png")
    carried = sorted(side_files(tmp_path, ()).sizes)
    put(
        tmp_path,
        ".gitattributes",
        ".cache/huggingface/download/config.json.metadata",
        ".git/HEAD",
        ".gitignore",
        "original/consolidated.00.pth",
        "original/params.json",
        "onnx/model.onnx_data",
        "openvino/m.xml",
        "model-00001-of-00002.safetensors.incomplete",
        "dflash/model.safetensors.incomplete",
        "a.aria2",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "model.fp16.safetensors.index.json",
        "shards/model-1.safetensors",
        "__pycache__/modeling.cpython-311.pyc",
        "README.md",
        "recipe.yaml",
    )
    found = side_files(tmp_path, {"shards/model-1.safetensors"})
    assert sorted(found.sizes) == carried
    assert found.left_out == [
        "__pycache__/",
        "a.aria2",
        "dflash/model.safetensors.incomplete",
        "model-00001-of-00002.safetensors.incomplete",
        "model.fp16.safetensors.index.json",
        "onnx/",
        "openvino/",
        "original/",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
    ]


LEFT_OUT = [
    "MLX/weights.npz",
    "checkpoint-500/model.safetensors",
    "consolidated.00.pth",
    "coreml/m.mlpackage/Data",
    "global_step100/mp_rank_00_model_states.pt",
    "metal/model.bin",
    "model-00001-of-00002.safetensors",
    "model-00001-of-00002.safetensors.1",
    "model.SAFETENSORS",
    "model.onnx_data",
    "runs/events.out.tfevents.1",
    "rust_model.ot",
    "dflash/model.safetensors.2",
    "wandb/run.log",
]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_more_that_is_no_part_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    put(tmp_path, "tokenizer.json", "dflash/model.safetensors", "evals/checkpoint-500/a.json", name)
    found = side_files(tmp_path, ())
    assert sorted(found.sizes) == ["dflash/model.safetensors", "evals/checkpoint-500/a.json", "tokenizer.json"]
    assert len(found.left_out) == 1 and name.startswith(found.left_out[0].rstrip("/"))


def linked_within(folder: Path) -> None:
    (folder / "store").mkdir()
    for shard in SHARDS:
        os.rename(folder / shard, folder / "store" / f"{shard}.blob")
        (folder / shard).symlink_to(f"store/{shard}.blob")


def with_dots(folder: Path) -> None:
    (folder / "a").mkdir()
    for shard in SHARDS:
        os.rename(folder / shard, folder / "a" / shard)
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] = {key: f"./a//{file}" for key, file in index["weight_map"].items()}
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("move", [linked_within, with_dots])
def test_source_weights_are_no_side_files_whatever_they_are_called(
    move: Callable[[Path], None], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    move(source)
    plan, usual = (make_plan(folder, load_recipe("mxfp4-rtn")) for folder in (source, MICRO))
    assert plan.side_files == usual.side_files and plan.shard_bytes == usual.shard_bytes
    assert not any("not copied" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "places tensors in pytorch_model.bin, and pickles are never opened"),
        ("../model.safetensors", "leads out of the checkpoint folder"),
        ("/etc/passwd", "leads out of the checkpoint folder"),
        ("./../x", "leads out of the checkpoint folder"),
        (".", "is not a regular file"),
        ("", "leads out of the checkpoint folder"),
    ],
)
def test_where_an_index_may_not_place_a_tensor(file: str, said: str, tmp_path: Path) -> None:
    shutil.copytree(MICRO, tmp_path / "source")
    index = json.loads((tmp_path / "source" / INDEX_NAME).read_text())
    index["weight_map"]["more"] = file
    (tmp_path / "source" / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        open_index(tmp_path / "source")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name", [min(SHARDS), max(SHARDS), "tokenizer.json", "modeling.py", "dflash/model.safetensors"]
)
def test_a_clone_without_lfs_is_refused(name: str, tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of git-lfs") as caught:
        make_plan(source, load_recipe("mxfp4-rtn"))
    assert caught.value.hint and "git lfs pull" in caught.value.hint


def test_shards_in_subfolders_are_read_and_not_copied(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(MICRO, source)
    index = json.loads((source / INDEX_NAME).read_text())
    for place, name in zip(("a", "a/b", "c", "c", ""), sorted(SHARDS), strict=False):
        (source / place).mkdir(parents=True, exist_ok=True)
        os.rename(source / name, source / place / name)
        moved = f"{place}/{name}" if place else name
        index["weight_map"] = {key: moved if file == name else file for key, file in index["weight_map"].items()}
    (source / INDEX_NAME).write_text(json.dumps(index))
    mimoquant.quantize(source, "mxfp4-rtn", out, device="cpu")
    assert not [path for path in out.rglob("*.safetensors") if path.parent != out]
    assert mimoquant.verify(out, source)["ok"]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(MICRO, source)
    put(source, "original/consolidated.pth", "x.incomplete")
    notes = make_plan(source, load_recipe("mxfp4-rtn")).notes
    assert "not copied: original/, x.incomplete" in notes


def test_a_link_to_a_folder_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "dflash").symlink_to(DRAFTER)
    with pytest.raises(CheckpointError, match="link to a folder"):
        side_files(tmp_path, ())


def test_a_lora_adapter_is_no_checkpoint_and_none_beside_it_is_carried(tmp_path: Path) -> None:
    """With its config in the folder libraries would load the base that it names, and not what lies there."""
    lone, beside = tmp_path / "lone", Path(shutil.copytree(MICRO, tmp_path / "beside"))
    lone.mkdir()
    for folder in (lone, beside):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
        shutil.copy(MICRO / "model_mtp.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lone: holds a LoRA adapter, no model$") as caught:
        open_index(lone)
    assert "merge_and_unload" in str(caught.value.hint)
    found = side_files(beside, open_index(beside).file_sizes)
    assert found.left_out == ["adapter_config.json", "adapter_model.safetensors"]
    assert "adapter_config.json" not in found.sizes
