"""The wheel, alone: without the repository and without what only development needs, every verb runs.

The environment is made of links to the installed distributions that the wheel's metadata asks for, and to nothing else,
so no network is needed. `scripts/test_wheel` does the same in a new environment that pip fills.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="building a wheel takes hatchling (scripts/setup --dev)")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    return folder / done.stdout.decode().split()[-1]


def needed(names: list[str]) -> dict[str, Distribution]:
    """The distributions behind requirement lines, and behind those; extras and other platforms aside."""
    found: dict[str, Distribution] = {}
    while names:
        line = names.pop()
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if name in found or "extra ==" in line:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        names += found[name].requires or []
    return found


def link_distribution(of: Distribution, site: Path) -> None:
    for top in {file.parts[0] for file in of.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(of.locate_file(top))))


def test_the_wheel_holds_the_data_that_verbs_read(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("recipes", "calib"):
        files = (path.relative_to(REPOSITORY) for path in (REPOSITORY / folder).rglob("*") if path.is_file())
        assert {f"mimoquant/{path.as_posix()}" for path in files} <= set(names)
    assert "mimoquant/py.typed" in names and "mimoquant/micro/config.json" in names
    templates = {path.name for path in (REPOSITORY / "mimoquant/report/templates").iterdir()}
    assert templates and {f"mimoquant/report/templates/{name}" for name in templates} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


@pytest.mark.slow
def test_every_verb_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "fresh", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as held:
        held.extractall(site)
        (metadata,) = (name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        lines = held.read(metadata).decode().splitlines()
    wanted = needed([line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")])
    assert {"torch", "numba", "typer"} <= wanted.keys()
    for of in wanted.values():
        link_distribution(of, site)
    (tmp_path / "work").mkdir()
    command = [
        str(tmp_path / "fresh/bin/python"),
        "-I",
        str(REPOSITORY / "tests/wheel_smoke.py"),
        str(tmp_path / "work"),
    ]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("10 verbs run\n")
