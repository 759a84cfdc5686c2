"""Every shell example of the documentation, in the order of its file, on the micro checkpoint.

A stranger's folders are a temporary folder here, and large numbers are small ones; nothing else is changed. What needs
a cluster or a server is parsed: the verb and each of its options must exist. Links must lead somewhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("*.md", "recipes/*.md", "calib/*.md", "mimoquant/*/*.md")
DOCUMENTS = [path.relative_to(REPOSITORY).as_posix() for folder in FOLDERS for path in sorted(REPOSITORY.glob(folder))]
SMALL = {"--max-kl": "9", "--budget-gib": "0.0078", "--gpus": "1", "--tp": "1"}
FEW = ["--sequences", "8", "--tokens", "32"]
CALIBRATED = ("gptq-", "awq-")
MEASURES = ("eval-kl", "eval-draft", "sensitivity")
OTHERS = ("srun", "ray", "torchrun", "sha256sum", "curl", "vllm", "apt-get")  # programs that are not run here
VERBS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def blocks(document: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (REPOSITORY / document).read_text(encoding="utf-8"), re.M | re.S)


def commands(document: str) -> list[str]:
    """Command lines: all of a bash block, those after a prompt in a console block, steps of a workflow."""
    found = []
    for language, text in blocks(document):
        joined = text.replace("\\\n", " ")
        if language == "console":
            found += re.findall(r"^\$ (.*)$", joined, re.M)
        elif language == "bash":
            found += [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
        elif language == "yaml":
            found += re.findall(r"- run: (.*)$", joined, re.M)
    return found


def words_of(line: str) -> list[str]:
    """A command line as words, without what follows a comment sign and what a shell would fill in."""
    return shlex.split(re.sub(r"\$\([^)]*\)", "X", line), comments=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies in a stranger's /models: releases, here the micro checkpoint with the code that names its class, and
    the one that comes with a drafter, which has been quantized."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("MiMo-V2.5", "MiMo-V2.5-Pro", "MiMo-V2.5-DFlash"):
        shutil.copytree(mimoquant.micro_checkpoint(), folder / name)
        code = REPOSITORY / "tests/serving/configuration_mimo_v2.py"
        shutil.copy(code, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_mimo_v2.MiMoV2Config"}
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(mimoquant.micro_drafter(), folder / "MiMo-V2.5-DFlash" / "dflash")
    plan = make_plan(folder / "MiMo-V2.5-DFlash", load_recipe("mxfp4-rtn"))
    pipeline.quantize(plan, folder / "MiMo-V2.5-DFlash-MXFP4", device="cpu")
    return folder


def adapted(words: list[str], models: Path) -> list[str]:
    """The words of a `mimoquant` line as they are run here."""
    words = [word.replace("/models", str(models)) for word in words]
    verb, calibrates = words[0], any(word.startswith(CALIBRATED) for word in words)
    for place, word in enumerate(words[:-1]):
        if word in SMALL and not is_refused(words):
            words[place + 1] = SMALL[word]
        if verb == "sensitivity" and word == "--recipe":
            words[place + 1] = "int4-g128-mse"  # its calibration would take minutes
    if verb in MEASURES or (verb == "quantize" and calibrates):
        words = [*(words[: words.index("--sequences")] if "--sequences" in words else words), *FEW]
    return [*words, "--device", "cpu"] if verb in (*MEASURES, "quantize") else words


def parse(words: list[str]) -> None:
    """The verb exists, and so do its options."""
    known = {option for one in VERBS[words[0]].params for option in (*one.opts, *one.secondary_opts)}
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, words


def run(words: list[str], models: Path) -> None:
    parse(words)
    if "--server" in words:
        return
    words = adapted(words, models)
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if out is not None and words[0] in ("quantize", "relayout", "sensitivity") and out.exists():
        shutil.rmtree(out) if out.is_dir() else out.unlink()  # another example has written there
    result = CliRunner().invoke(app, words)
    assert result.exit_code == (3 if is_refused(words) else 0), (words, result.output, result.exception)


def is_refused(words: list[str]) -> bool:
    """The README's example of a refusal."""
    return {"verify", "sglang", "--tp"} <= set(words)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith(".md") and commands(name)])
def test_every_example_does_what_it_says(
    document: str, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-chats.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{n} plus {n} is {2 * n}. " * 20}) for n in range(60))
    )
    for line in dict.fromkeys(commands(document)):
        words = words_of(line)
        program = words[0]
        if program == "mimoquant":
            run(words[1:], models)
        elif "mimoquant" in words:  # under a launcher of processes
            parse(words[words.index("mimoquant") + 1 :])
        else:
            known = program in OTHERS or (REPOSITORY / program).is_file() or program.startswith((".venv/", "python"))
            assert known, line
            scripts = [word for word in words if word.startswith("scripts/")]
            assert all(os.access(REPOSITORY / script, os.R_OK) for script in scripts), line


def test_the_recipe_of_the_readme_is_one() -> None:
    (text,) = (text for language, text in blocks("README.md") if language == "yaml")
    assert parse_recipe(text, "README.md").method


def test_the_python_of_the_readme_runs(models: Path) -> None:
    (text,) = (text for language, text in blocks("README.md") if language == "python")
    shutil.rmtree(models / "MiMo-V2.5-MXFP4", ignore_errors=True)
    small = text.replace("/models", str(models)).replace('MXFP4")["j"]', 'MXFP4", sequences=7, tokens=32)["j"]')
    assert small.count("tokens=32") == 1
    exec(compile(small, "README.md", "exec"), {})


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith(".md")])
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", (REPOSITORY / document).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (REPOSITORY / document).parent / name if name else REPOSITORY / document
        assert file.exists(), f"{document}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], target


def test_figures_of_the_first_screen_are_recorded() -> None:
    """Each number in bold there stands in RESULTS.md, whose sections it names."""
    screen = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("## What it can do now")[0]
    results = (REPOSITORY / "scripts/RESULTS.md").read_text(encoding="utf-8")
    recorded = [float(one) for one in re.findall(r"(?<![\w.])\d*\.?\d+(?![\w])", results)]
    for figure in re.findall(r"\*\*(\d*\.?\d+)", screen):
        digits = len(figure.partition(".")[2])
        assert any(round(one, digits) == float(figure) for one in recorded), figure
    for section in re.findall(r"\[\d\] ([A-Z][^,\[(:.]*)", screen.partition("Sections of")[2]):
        assert f"## {section.strip()}" in results, section
