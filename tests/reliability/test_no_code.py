"""A checkpoint with code of its own: nothing of it runs, nothing is unpickled, no socket opens, no file strays."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mimoquant
from mimoquant.checkpoint.journal import RunFolder
from mimoquant.errors import UsageError

HERE = Path(__file__).resolve().parent
FOREIGN = "raise SystemExit('mark_of_foreign_code ran')\n"
FEW = ("--sequences", "8", "--tokens", "32", "--device", "cpu")


def state(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time of change and hash of every file."""
    return {
        str(path): (path.stat().st_mode, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The micro checkpoint with everything that asks for trust."""
    folder = Path(shutil.copytree(mimoquant.micro_checkpoint(), tmp_path / "source"))
    for name in ("modeling_mimo.py", "configuration_mimo.py", "tokenization_mimo.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(FOREIGN)
    (folder / "sub").mkdir()
    (folder / "sub" / "__init__.py").write_text(FOREIGN)
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "sub" / "state.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for name, key, target in (
        ("config.json", "AutoModelForCausalLM", "modeling_mimo.Model"),
        ("tokenizer_config.json", "AutoTokenizer", "tokenization_mimo.Tokenizer"),
    ):
        held = json.loads((folder / name).read_text())
        held["auto_map"] = {key: target, "AutoConfig": "configuration_mimo.Config"}
        (folder / name).write_text(json.dumps(held))
    (folder / "tokenizer.json").chmod(0o777)
    return folder


@pytest.mark.slow
def test_the_whole_pipeline_runs_no_code_of_a_checkpoint(source: Path, tmp_path: Path) -> None:
    work, before = tmp_path / "work", state(source)
    work.mkdir()
    out, other, page = str(work / "out"), str(work / "other"), str(work / "page.html")
    verbs = [
        ["inspect", str(source)],
        ["plan", str(source), "-r", "gptq-int4-g128", *FEW],
        ["quantize", str(source), "-r", "gptq-int4-g128", "--out", out, *FEW],
        ["verify", out, "--source", str(source)],
        ["eval-kl", str(source), out, "--html", page, *FEW],
        ["relayout", str(source), "--qkv", "split", "--dtype", "bf16", "--out", other],
        ["launch", out, "--engine", "vllm", "--gpu", "h100", "--gpus", "1"],
    ]
    arguments = [word for verb in verbs for word in ("--", *verb)][1:]
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(work)}
    done = subprocess.run(
        [sys.executable, str(HERE / "audited_run.py"), str(source), str(work), *arguments],
        capture_output=True,
        text=True,
        env=env,
        cwd=work,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    strays = done.stdout.partition("\nTOLD\n")[2].split("\n")
    assert [line for line in strays if line] == []
    assert state(source) == before
    assert sorted(path.name for path in work.iterdir()) == ["other", "out", "page.html"]
    for path in (work / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.stat().st_mode & 0o7777 == (0o755 if path.is_dir() else 0o644), path
    assert (work / "out" / "modeling_mimo.py").read_text() == FOREIGN, "code is carried over as bytes"
    assert not (work / "out" / "training_args.bin").exists()


def test_the_hook_sees_what_it_should(source: Path, tmp_path: Path) -> None:
    """The guard of the test above, on a program that does all of it."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import runpy, socket, pickle, sys\nsys.argv[3:] = []\n"
        f"run = runpy.run_path({str(HERE / 'audited_run.py')!r})\n"
        "globals_ = run['hook'].__globals__\nsys.addaudithook(run['hook'])\nglobals_['watching'] = True\n"
        f"compile({FOREIGN!r}, {str(source / 'modeling_mimo.py')!r}, 'exec')\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n    pass\n"
        "pickle.loads(b'cbuiltins\\nlen\\n.')\n"
        f"open({str(tmp_path / 'stray')!r}, 'w')\nglobals_['watching'] = False\nprint(globals_['told'])\n"
    )
    done = subprocess.run(
        [sys.executable, str(probe), str(source), str(tmp_path / "work")], capture_output=True, text=True
    )
    for event in ("compile", "socket.", "pickle.find_class", "open for writing"):
        assert event in done.stdout, done.stdout + done.stderr


def test_a_second_run_is_refused_and_a_crash_leaves_no_lock(tmp_path: Path) -> None:
    """The lock belongs to the open file: another process does not get it, and it is gone with its owner."""
    out, child = tmp_path / "out", tmp_path / "holder.py"
    child.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom mimoquant.checkpoint.journal import RunFolder\n"
        "with RunFolder(Path(sys.argv[1]), {'version': '1'}, resume=False):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    with subprocess.Popen([sys.executable, str(child), str(out)], stdout=subprocess.PIPE, text=True, env=env) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with (
                pytest.raises(UsageError, match="another run is writing there"),
                RunFolder(out, {"version": "1"}, resume=resume),
            ):
                pass
        holder.kill()
        holder.wait()
    with RunFolder(out, {"version": "1"}, resume=True) as run:
        assert not run.finished


def test_a_link_in_the_way_of_a_file_is_not_followed(tmp_path: Path) -> None:
    from mimoquant.checkpoint.writer import ShardWriter, write_file_durably
    from mimoquant.errors import StoppedError

    (tmp_path / "precious").write_text("mine")
    for name in ("a.safetensors", "b.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(StoppedError):
        ShardWriter(tmp_path / "a.safetensors", [])
    with pytest.raises(StoppedError):
        write_file_durably(tmp_path / "b.json", b"other")
    assert (tmp_path / "precious").read_text() == "mine"
