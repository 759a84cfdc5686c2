"""What people read holds: examples run, claims are recorded, tables say what the code says, pages keep their form.

Every shell example runs in the order of its file, on the micro checkpoint. A stranger's folders are a temporary folder
here, and large numbers are small ones; nothing else is changed. What needs a cluster or a server is parsed: the verb
and each of its options must exist. The README's three commands run as they stand, and print what stands there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import published
import pytest
from hub_server import serving
from test_architecture import ALLOWED
from typer.main import get_command
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.cli.app import app
from mimoquant.mixing.kept_findings import findings_path
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.serving import contracts
from mimoquant.shipped import shipped_recipes

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("*.md", "recipes/*.md", "calib/*.md", "mimoquant/*/*.md", "scripts/*.md")
DOCUMENTS = [path.relative_to(REPOSITORY).as_posix() for folder in FOLDERS for path in sorted(REPOSITORY.glob(folder))]
GUIDES = [name for name in DOCUMENTS if name.endswith("/README.md")]
LINES = {"README.md": 150, "ARCHITECTURE.md": 100} | dict.fromkeys(GUIDES, 200)
WHY_WORDS = 100
SMALL = {"--max-kl": "9", "--budget-gib": "0.0078", "--gpus": "1", "--tp": "1"}
FEW = ["--sequences", "8", "--tokens", "32"]
CALIBRATED = ("gptq-", "awq-")
MEASURING = {  # guides whose examples take seconds
    "recipes/README.md",
    *(f"mimoquant/{name}/README.md" for name in ("fisher", "evaluation", "calibration", "mixing", "run")),
}
MEASURES = ("eval-kl", "eval-draft", "sensitivity")
OTHERS = ("srun", "ray", "torchrun", "sha256sum", "curl", "vllm", "apt-get", "grep")  # programs that are not run here
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
    (folder / "made").mkdir()
    released = folder / "MiMo-V2.6-Flash-RL"
    shutil.copytree(folder / "MiMo-V2.5", released, ignore=shutil.ignore_patterns("*.safetensors*"))
    made = published.small_v26(folder / "MiMo-V2.5", folder / "made")
    for path in made.iterdir():
        shutil.copy(path, released)
    shutil.copytree(mimoquant.micro_drafter(), folder / "MiMo-V2.5-DFlash" / "dflash")
    plan = make_plan(folder / "MiMo-V2.5-DFlash", load_recipe("mxfp4-rtn"))
    pipeline.quantize(plan, folder / "MiMo-V2.5-DFlash-MXFP4", device="cpu")
    return folder


def adapted(words: list[str], models: Path) -> list[str]:
    """The words of a `mimoquant` line as they are run here."""
    words = [word.replace("/models", str(models)) for word in words]
    if words[0] == "quantize":  # 128 inner channels are one group of g128, which vLLM reads wrong
        narrower = {"int4-g128-mse": "int4-g32-mse", "gptq-int4-g128": "gptq-int4-g32"}
        words = [narrower.get(word, word) for word in words]
    verb, calibrates = words[0], any(word.startswith(CALIBRATED) for word in words)
    for place, word in enumerate(words[:-1]):
        if word == "--keep-source":
            shutil.rmtree(words[place + 1], ignore_errors=True)
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
        findings_path(out).unlink(missing_ok=True)
    repositories = {word.removeprefix("hf://") for word in words if word.startswith("hf://")}
    with contextlib.ExitStack() as stack:
        for name in repositories:
            stack.enter_context(serving(models / name.rpartition("/")[2], name))
        result = CliRunner().invoke(app, words)
    assert result.exit_code == (3 if is_refused(words) else 0), (words, result.output, result.exception)


def is_refused(words: list[str]) -> bool:
    """The serving guide's example of a refusal."""
    return {"verify", "sglang", "--tp"} <= set(words)


@pytest.mark.parametrize(
    "document",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MEASURING)) for name in DOCUMENTS if commands(name)],
)
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
            if document != "README.md" or "hf://" in line:  # whose other commands run as they stand, below
                run(words[1:], models)
        elif "mimoquant" in words:  # under a launcher of processes
            parse(words[words.index("mimoquant") + 1 :])
        else:
            known = program in OTHERS or (REPOSITORY / program).is_file() or program.startswith((".venv/", "python"))
            assert known, line
            scripts = [word for word in words if word.startswith("scripts/")]
            assert all(os.access(REPOSITORY / script, os.R_OK) for script in scripts), line


def test_the_first_example_of_the_readme_needs_no_checkpoint() -> None:
    first = next(line for line in commands("README.md") if line.startswith("mimoquant"))
    assert first == "mimoquant plan hf://XiaomiMiMo/MiMo-V2.6-Flash-RL -r nvfp4-cast"


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def test_the_readme_prints_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that stands below a command there is among what it prints, in that order; `...` stands for others."""
    monkeypatch.chdir(REPOSITORY)
    (console,) = (text for language, text in blocks("README.md") if language == "console")
    shown = [part.splitlines() for part in re.split(r"^\$ ", console, flags=re.M) if part]
    assert len(shown) == 3
    for command, *lines in shown:
        words = shlex.split(command.replace("/tmp/", f"{tmp_path}/"))
        result = CliRunner().invoke(
            app, [*words[1:], "--quiet", *(["--device", "cpu"] if words[1] != "verify" else [])]
        )
        assert result.exit_code == 0, result.output
        printed = iter(result.stdout.replace(f"{tmp_path}/", "/tmp/").splitlines())
        for line in lines:
            assert line == "..." or line in printed, line


def test_the_recipe_of_the_guide_is_one() -> None:
    (text,) = (text for language, text in blocks("recipes/README.md") if language == "yaml")
    assert parse_recipe(text, "recipes/README.md").method


def test_the_python_of_the_guide_runs(models: Path) -> None:
    (text,) = (text for language, text in blocks("mimoquant/report/README.md") if language == "python")
    shutil.rmtree(models / "MiMo-V2.5-MXFP4", ignore_errors=True)
    small = text.replace("/models", str(models)).replace('MXFP4")["j"]', 'MXFP4", sequences=7, tokens=32)["j"]')
    assert small.count("tokens=32") == 1
    exec(compile(small, "mimoquant/report/README.md", "exec"), {})


@pytest.mark.parametrize("document", DOCUMENTS)
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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_are_there(document: str) -> None:
    """Paths from the root; in ARCHITECTURE also those below `mimoquant/`."""
    text = text_of(document)
    named = re.findall(r"\b(?:mimoquant|tests|scripts|calib|recipes)/[\w./-]+\.(?:py|md|txt|json|svg|yaml)\b", text)
    named += re.findall(r"`(scripts/[\w/]+)(?=[` ])", text)
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    if document == "ARCHITECTURE.md":
        below = re.findall(r"`([a-z_]+/[\w/]+\.py)`", text)
        missing += [
            name for name in below if not any((REPOSITORY / root / name).exists() for root in ("mimoquant", "."))
        ]
    assert not missing


@pytest.mark.parametrize("document", LINES)
def test_pages_keep_their_length_and_guides_begin_with_a_question(document: str) -> None:
    lines = text_of(document).splitlines()
    assert len(lines) <= LINES[document]
    if document in GUIDES:
        assert re.fullmatch(r"# .*\?", lines[0]), lines[0]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_decisions_tell_their_alternative_and_their_price(document: str) -> None:
    for title, body in re.findall(r"^### (Why .*)\n((?:(?!#).*\n?)*)", text_of(document), re.M):
        assert len(body.split()) <= WHY_WORDS, (title, len(body.split()))
        assert "Alternative:" in " ".join(body.split()) and "Price:" in body, title


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.-])\d*\.?\d+(?![\w.]*\d)", text)


def test_the_verbs_and_the_recipes_are_all_told() -> None:
    told = re.findall(r"^\| `([\w-]+) ", text_of("mimoquant/cli/README.md").partition("\n## ")[0], re.M)
    assert set(told) == set(VERBS)
    shipped = text_of("recipes/README.md").partition("## What ships")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([\w-]+)` \|", shipped, re.M)
    assert sorted(listed) == shipped_recipes()


def test_the_figures_of_the_recipes_are_recorded() -> None:
    """J of each, in the section that compares methods one by one or in that of codes for the loss."""
    results, heads = text_of("scripts/RESULTS.md"), ("### Calibrated methods one by one", "### J by GPTQ beside")
    section = " ".join(results.partition(head)[2].partition("\n### ")[0] for head in heads)
    recorded = {f"{float(one):.4f}".lstrip("0") for one in numbers(section) if "." in one}
    told = re.findall(r"^\| `[\w-]+` \| .* \| (\.\d{4}) \|$", text_of("recipes/README.md"), re.M)
    assert len(told) == 10 and set(told) <= recorded


def test_the_folders_stand_above_what_they_import() -> None:
    """ARCHITECTURE's table has every folder and root module of the table of imports, in an order that it allows."""
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text_of("ARCHITECTURE.md"), re.M)
    assert set(rows) == set(ALLOWED) - {"__main__"}
    for place, row in enumerate(rows):
        assert ALLOWED[row] <= set(rows[place + 1 :]), row


SUBJECTS = {
    "int4, symmetric": contracts.INT4,
    "int4, asymmetric": contracts.INT4_ASYMMETRIC,
    "MXFP4, native container": contracts.NATIVE_MXFP4,
    "MXFP4, compressed-tensors": contracts.CT_MXFP4,
    "NVFP4, compressed-tensors": contracts.CT_NVFP4,
    "NVFP4, ModelOpt's container": contracts.MO_NVFP4,
    "int4 beside FP8, MXFP4 or NVFP4, by layers": contracts.MIXED,
}
WORDS = {contracts.RIGHT: "reads", contracts.REFUSED: "refuses", contracts.CORRUPTED: "wrong"}


@pytest.mark.parametrize(("document", "rows"), [("README.md", 6), ("mimoquant/serving/README.md", 7)])
def test_the_table_of_engines_says_what_the_contracts_say(document: str, rows: int) -> None:
    engines = list(contracts.ENGINES.values())
    head = " | ".join(f"{engine.label} {engine.read.removesuffix('.0')}" for engine in engines)
    table = text_of(document).partition(f"| output | {head} |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(table) == rows
    for line in table:
        subject, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for engine, cell in zip(contracts.ENGINES, cells, strict=True):
            version = contracts.parse_version(contracts.ENGINES[engine].read)
            found = SUBJECTS[subject]
            if (engine, found) == (contracts.TRANSFORMERS, contracts.MIXED):
                found = contracts.UNLIKE  # what it stops at is not int4 beside others, but several of any
            row = contracts.rows_for(contracts.FORMATS, engine, found, version)
            assert row is not None
            expected = "not tried" if row.evidence == contracts.UNVERIFIED else WORDS[row.verdict]
            assert cell.startswith(expected), (line, row)
            since = ".".join(map(str, row.since))
            assert ("from " not in cell) or f"from {since} on" in cell, (line, row)


def test_figures_of_the_readme_are_recorded() -> None:
    """Each figure of a row of its table stands, to as many digits, in the section of RESULTS that the row names."""
    screen, results = text_of("README.md").partition("## How good, how fast")[2], text_of("scripts/RESULTS.md")
    sections = dict(re.findall(r"\[(\d)\] ([^,.\[]*)", screen.partition("Sections of")[2]))
    rows = [line for line in screen.partition("\n\n## ")[0].splitlines() if re.search(r"\[\d\] \|$", line)]
    assert len(rows) == 5
    for line in rows:
        _, _, ours, peer, ratio, measured, _ = line.split("|")
        title = " ".join(sections[re.findall(r"\[(\d)\]", measured)[0]].split())
        (section,) = (part for part in re.split(r"^##+ ", results, flags=re.M) if part.startswith(title))
        recorded = [float(one) for one in numbers(section)]
        for figure in numbers(f"{ours} {peer} {ratio}"):
            digits = len(figure.partition(".")[2])
            assert any(abs(one - float(figure)) <= 0.5 * 10**-digits + 1e-12 for one in recorded), (line, figure)
