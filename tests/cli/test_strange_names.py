"""Names that a terminal, a shell or a file system has trouble with, and addresses that hold a password: any name can be
printed, `~` is a home folder or refused, and what was computed is not lost to how it is told."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from micro import MICRO, edit_json
from typer.testing import CliRunner

import mimoquant
from mimoquant.assembly.files import at_home
from mimoquant.cli.app import app, main
from mimoquant.cli.terminal import printed_last
from mimoquant.errors import UsageError, without_secrets

NAMES = ["\u6a21\u578b", "\u00fc", "\u202e\u2713", os.fsdecode(b"\xff\xfe"), "\x1b[31m"]
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
TERMINALS: dict[str, dict[str, str]] = {
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252:strict"},
    "LANG=C": {"LC_ALL": "C"},
    "plain C": ASCII,
}


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def environment(**more: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))} | more


def process(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mimoquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env=environment(**more), timeout=120)


SEVERAL = """
import itertools, runpy, sys
lines = itertools.groupby(sys.argv[1:], lambda word: word == ";")
for words in [list(words) for ends, words in lines if not ends]:
    sys.argv = ["mimoquant", *words]
    try:
        runpy.run_module("mimoquant", run_name="__main__")
    except SystemExit as end:
        print(chr(0), int(end.code or 0), sep="", end=chr(0), file=sys.stderr, flush=True)
    print(end=chr(0), flush=True)
"""


def one_by_one(*lines: tuple[str | Path, ...], **more: str) -> list[subprocess.CompletedProcess[bytes]]:
    """Command lines as `process` runs them, but all in one, since it takes longer to start than to end."""
    words = [str(word) for line in lines for word in (*line, ";")]
    command = [sys.executable, "-c", SEVERAL, *words]
    done = subprocess.run(command, capture_output=True, env=environment(**more), timeout=120, check=True)
    said = done.stderr.split(b"\0")
    return [
        subprocess.CompletedProcess(line, int(code), out, errors)
        for line, out, errors, code in zip(lines, done.stdout.split(b"\0"), said[::2], said[1::2], strict=False)
    ]


@pytest.mark.parametrize("terminal", list(TERMINALS))
def test_any_name_can_be_printed_in_any_encoding(terminal: str, tmp_path: Path) -> None:
    """All names at once: each path has every one of them in it."""
    source = Path(shutil.copytree(MICRO, tmp_path / "_".join(NAMES)))
    lines = (("inspect", source), ("inspect", source, "--json"), ("inspect", f"{source}-no"))
    done, told, wrong = one_by_one(*lines, **TERMINALS[terminal])
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    json.loads(told.stdout.decode("ascii"))
    assert wrong.returncode == 2 and b"Traceback" not in wrong.stderr and b"does not exist" in wrong.stderr
    done.stdout.decode("utf-8" if terminal in ("utf-8", "LANG=C") else "ascii" if "C" in terminal else "latin-1")


@pytest.mark.slow
def test_a_run_whose_every_path_is_strange_writes_and_tells_its_result(tmp_path: Path) -> None:
    strange = tmp_path / "_".join(NAMES)
    source = Path(shutil.copytree(MICRO, f"{strange}-source"))
    recipe = Path(shutil.copy(mimoquant.shipped.recipes_folder() / "gptq-int4-g128.yaml", f"{strange}.yaml"))
    data = Path(f"{strange}.txt")
    data.write_text("".join(f"{n} men walked over {n * n} hills to the sea. " for n in range(400)))
    out, page, profile = Path(f"{strange}-out"), Path(f"{strange}.html"), Path(f"{strange}.json")
    size = ("--data", data, "--sequences", "4", "--tokens", "64", "--device", "cpu")
    done = process(
        "quantize", source, "-r", recipe, "-o", out, *size, "--html", page, "--profile", profile, **TERMINALS["ascii"]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"wrote ") and page.is_file() and json.loads(profile.read_text())
    proven = call("verify", out, "--source", source)
    assert proven.exit_code == 0, ascii(proven.output[-900:])


def test_a_name_that_the_file_system_encoding_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    shard = next(source.glob("*.safetensors"))
    shard.rename(source / "\u6a21.safetensors")
    weights = "model.safetensors.index.json"
    renamed = lambda file: "\u6a21.safetensors" if file == shard.name else file  # noqa: E731
    edit_json(
        source / weights, lambda index: index.update(weight_map={k: renamed(v) for k, v in index["weight_map"].items()})
    )
    assert process("inspect", source).returncode == 0
    done = process("inspect", source, **ASCII)
    assert done.returncode in (2, 3) and b"Traceback" not in done.stderr and done.stderr.startswith(b"error: ")


@pytest.mark.parametrize("closed", [">&- 2>&-", pytest.param("2>&-", marks=pytest.mark.slow)])
def test_a_closed_stdout_or_stderr_loses_nothing(closed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f"{sys.executable} -m mimoquant quantize {MICRO} -r mxfp4-rtn -o '{out}' --device cpu {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and (out / "config.json").is_file(), done
    assert done.stdout.startswith(b"wrote ") == (closed == "2>&-") and done.stdout.count(b"note: ") == 0


class Full(io.StringIO):
    """A disk under stdout that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("words", ["--help", "--version", "inspect {}", "inspect {} --json"])
def test_a_full_disk_under_stdout_is_an_error_in_a_sentence(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mimoquant", *words.format(MICRO).split()])
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 4
    assert capsys.readouterr().err.startswith("error: stdout: cannot be written (No space left on device)")


def test_a_result_is_printed_also_where_what_is_written_beside_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError), printed_last({"j": 1}, str, True):
        assert capsys.readouterr().out == ""
        raise UsageError("--junit x: cannot be written")
    assert json.loads(capsys.readouterr().out) == {"j": 1}


# --- home folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a checkpoint in it, while the working folder is another."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(MICRO, tmp_path / "home" / "micro")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


def test_every_path_of_every_verb_may_begin_at_home(home: Path) -> None:
    shutil.copy(mimoquant.shipped.recipes_folder() / "mxfp4-rtn.yaml", home / "r.yaml")
    (home / "text.txt").write_text("".join(f"{n} men walked over {n * n} hills to the sea. " for n in range(400)))
    held_out = ("--data=~/text.txt", "--sequences", "4", "--tokens", "32", "--device", "cpu")
    for arguments in (
        ("inspect", "~/micro"),
        ("plan", "~/micro", "--recipe=~/r.yaml", "--out=~/x"),
        ("quantize", "~/micro", "--recipe=~/r.yaml", "--out=~/out", "--profile=~/p.json", "--device", "cpu"),
        ("relayout", "~/micro", "--qkv", "canonical", "--dtype", "bf16", "--out=~/canonical"),
        ("verify", "~/out", "--source=~/micro"),
        ("launch", "~/out", "--engine", "vllm", "--gpu", "h100", "--gpus", "1"),
        ("eval-kl", "~/micro", "~/out", "--baseline=~/micro", "--out=~/e.json", "--html=~/e.html", *held_out),
        ("synth", "~/synth", "--layout", "pro", "--layers", "3"),
    ):
        result = call(*arguments)
        assert result.exit_code in ((0, 3) if arguments[0] == "launch" else (0,)), (arguments, result.output)
        assert "not a checkpoint folder" not in result.output
    made = {path.name for path in home.iterdir()}
    assert {"out", "p.json", "canonical", "e.json", "e.html", "synth"} <= made
    assert not list(Path.cwd().iterdir())


def test_the_functions_find_home_too(home: Path) -> None:
    mimoquant.quantize("~/micro", "mxfp4-rtn", out=Path("~/out"), device="cpu")
    assert mimoquant.verify("~/out", source="~/micro")["ok"] and not list(Path.cwd().iterdir())


@pytest.mark.parametrize("path", ["~", "~/", "~nobody-of-this-name", "~nobody-of-this-name/out"])
def test_a_home_that_is_not_there_or_is_no_new_folder_is_refused(path: str, home: Path) -> None:
    result = call("quantize", MICRO, "-r", "mxfp4-rtn", f"--out={path}", "--device", "cpu")
    assert result.exit_code == 2 and "error: " in result.stderr, result.output
    assert not list(Path.cwd().iterdir()) and [one.name for one in home.iterdir()] == ["micro"]


def test_what_is_no_path_keeps_its_tilde_and_a_list_loses_each() -> None:
    @at_home
    def given(*values: Any, **named: Any) -> Any:
        return values, named

    user = os.path.expanduser("~")
    assert given("~/a", ["~/b", "c"], 3, None) == ((f"{user}/a", [f"{user}/b", "c"], 3, None), {})
    assert given(model="~m", data=("~/d",), out=Path("~")) == (
        (),
        {"model": "~m", "data": (f"{user}/d",), "out": Path(user)},
    )
    assert given("./~", "a/~/b", Path("x~")) == (("./~", "a/~/b", Path("x~")), {})


# --- secrets ----------------------------------------------------------------------------------------------------------


ADDRESSES = [
    "https://user:s3cret@huggingface.co/XiaomiMiMo/MiMo-V2-Flash",
    "postgres://a:s3cret@h and http://b:s3cret@h",
    "https:/user:s3cret@huggingface.co/x",
    "https://s3cret@github.com/x",
    "https://u:p@s3/cret@h: no such folder",
    "s3://b/x?X-Amz-Signature=s3cret&y=1",
    "https://h/x?a=1&api_key=s3cret",
    "https://h/x#access_token=s3cret",
]


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_errors_address_has_no_password(text: str) -> None:
    assert "s3cret" not in without_secrets(text) and "cret@" not in without_secrets(text)
    assert "s3cret" not in str(UsageError(text)) + str(UsageError("x", hint=text).hint)


@pytest.mark.parametrize(
    "text", [*ADDRESSES[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in ADDRESSES[2:])]
)
def test_no_address_is_told_with_its_password(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("inspect", text),
        ("quantize", text, "-r", "mxfp4-rtn", "-o", "out"),
        ("plan", MICRO, "-r", f"{text}.yaml"),
        ("eval-kl", MICRO, text),
        ("eval-kl", MICRO, MICRO, "--data", f"{text}.jsonl"),
    ):
        result = call(*arguments)
        assert result.exit_code in (2, 3) and "s3cret" not in result.output, result.output


@pytest.mark.parametrize("text", ["https://huggingface.co/a/b@main", "layer 3: a@b", "http://h:8000/v1", "re:.*@x"])
def test_what_is_no_secret_is_told(text: str) -> None:
    assert without_secrets(text) == text
