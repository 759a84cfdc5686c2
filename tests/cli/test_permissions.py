"""What may not be read or written is told in a sentence, and nothing that lies in it is left out in silence.

The super user may read and write all, so these run in a process without that right.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from micro import MICRO

PLAIN = ("-r", "mxfp4-rtn", "--device", "cpu", "-q")
FEW = ("--sequences", "4", "--tokens", "16", "--device", "cpu", "-q")
DROP = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
PROGRAM = "import sys; from mimoquant.cli.app import main; sys.argv[0] = 'mimoquant'; main()"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Some folders of which the tests take rights, which are given back."""
    if os.geteuid() == 0 and (
        not shutil.which(DROP[0]) or subprocess.run([*DROP, "true"], capture_output=True).returncode
    ):
        pytest.skip("the super user may read all")
    shutil.copytree(MICRO, tmp_path / "source")
    (tmp_path / "data" / "in").mkdir(parents=True)
    for name in ("data/a.txt", "data/in/b.txt", "data.jsonl", "r.yaml"):
        (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / "closed").mkdir()
    yield tmp_path
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)


CASES = [
    ("source", 0o644, ["inspect", "{}/source"], 3, "{}/source: cannot be read (Permission denied)"),
    ("source/config.json", 0, ["inspect", "{}/source"], 3, "{}/source/config.json: cannot be read (Permission denied)"),
    ("source/tokenizer.json", 0, ["plan", "{}/source", "-r", "mxfp4-rtn"], 3, "tokenizer.json: cannot be read (Permis"),
    (
        "data",
        0,
        ["eval-kl", "{}/source", "{}/source", "--data", "{}/data", *FEW],
        2,
        "{}/data: cannot be read (Permission",
    ),
    (
        "data",
        0o644,
        ["eval-kl", "{}/source", "{}/source", "--data", "{}/data", *FEW],
        2,
        "{}/data: cannot be read (Perm",
    ),
    (
        "data/in",
        0,
        ["eval-kl", "{}/source", "{}/source", "--data", "{}/data", *FEW],
        2,
        "{}/data/in: cannot be read (P",
    ),
    ("data.jsonl", 0, ["eval-kl", "{}/source", "{}/source", "--data", "{}/data.jsonl", *FEW], 2, "{}/data.jsonl: Perm"),
    ("r.yaml", 0, ["plan", "{}/source", "-r", "{}/r.yaml"], 2, "{}/r.yaml: cannot be read (Permission denied)"),
    (
        "closed",
        0o555,
        ["quantize", "{}/source", *PLAIN, "-o", "{}/closed/out"],
        2,
        "out.partial: cannot be written (Perm",
    ),
    (
        "closed",
        0o555,
        ["synth", "--layout", "flash", "{}/closed/out"],
        2,
        "{}/closed/out.partial: cannot be written (P",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "mode", "words", "code", "told"), CASES)
def test_what_may_not_be_read_or_written(
    place: Path, path: str, mode: int, words: list[str], code: int, told: str
) -> None:
    """Slow because each starts a program."""
    (place / path).chmod(mode)
    command = [sys.executable, "-c", PROGRAM, *(word.format(place) for word in words)]
    done = subprocess.run([*(DROP if os.geteuid() == 0 else ()), *command], capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and told.format(place) in done.stderr and not done.stdout
