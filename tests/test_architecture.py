"""Who may import whom, read from the source with `ast`; and what starting the program costs.

The one table below is the rule. A new import that it does not allow fails here: change the table only together with
the layout that DESIGN and ARCHITECTURE describe. A package stands for all of its modules; a dotted name for one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "mimoquant"
MAX_LINES = 450
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}

ALLOWED: dict[str, set[str]] = {
    # siblings that do not know each other
    "errors": set(),
    "overlap": set(),
    "team": {"errors"},
    "progress": {"report"},
    "timeline": set(),
    "checkpoint": {"errors"},
    "quant": set(),
    "model": {"errors", "checkpoint.index", "overlap"},
    "report": {"checkpoint.journal"},
    "page_style": set(),
    "report_page": {"describe", "page_style", "report"},
    "server_text": {"describe", "report_page", "report"},
    "coverage_page": {"describe", "page_style", "report_page", "report"},
    "draft_text": {"describe", "report_page", "report"},
    "sensitivity_page": {"describe", "page_style", "report", "report_page"},
    "calibration": {"errors", "model.decoder_layer", "shipped"},
    # what joins two of them
    "container": {"model.layout", "quant.formats"},
    "recipe": {"errors", "container", "quant.formats", "quant.method", "recipe_calibration", "shipped"},
    "recipe_calibration": set(),
    "devices": {"errors", "quant"},
    "model_weights": {"errors", "checkpoint", "layer_weights", "model", "quant"},
    "layer_weights": {"errors", "checkpoint.index", "checkpoint.reader", "container", "model", "quant.formats",
                      "quant.stack"},
    # what joins all of them
    "units": {"errors", "checkpoint", "container", "model", "quant.formats", "reorder"},
    "reorder": {"errors", "checkpoint", "layer_weights", "model", "quant.stack"},
    "plan": {"errors", "checkpoint", "container", "layer_weights", "model", "quant.formats", "recipe", "units"},
    "relayout": {"errors", "checkpoint", "container", "model", "plan", "recipe", "reorder", "units"},
    "deal": {"plan", "units"},
    "needs": {"errors", "model.layout", "plan", "quant.method", "units"},
    "fork_needs": {"errors", "needs", "plan", "report"},
    "rehearsal": {"calibrated", "calibration", "checkpoint", "devices", "layer_weights", "model.layout",
                  "pipeline", "plan", "quant", "units"},
    "portions": {"model", "model_weights", "team"},
    "calibrated": {"errors", "calibration", "checkpoint.reader", "layer_weights", "model", "model_weights", "plan",
                   "portions", "quant", "team", "units"},
    "pipeline": {"errors", "calibrated", "calibration.tokens", "checkpoint", "container", "deal", "devices",
                 "layer_weights", "model", "output_texts", "overlap", "plan", "quant.cast", "quant.stack", "recipe",
                 "reorder", "report", "team", "team_folder", "timeline", "units"},
    "output_texts": {"checkpoint", "container", "model_card", "plan", "relayout", "report", "serving.facts"},
    "model_card": {"container", "errors", "report", "serving"},
    "junit": {"report_page"},
    "changes_page": {"coverage_page", "report", "report_page"},
    "verify": {"errors", "checkpoint", "layer_weights", "model", "output_texts", "pipeline", "plan", "quant", "recipe",
               "relayout", "reorder", "units", "verify_calibrated"},
    "verify_calibrated": {"quant", "recipe"},
    "team_folder": {"checkpoint.journal", "team"},
    "mixture": {"errors", "container", "model.layout", "plan", "quant.formats", "recipe", "recipe_calibration"},
    "evaluation": {"errors", "calibrated", "calibration", "checkpoint", "devices", "fork_needs", "layer_weights",
                   "mixture", "model", "model_weights", "overlap", "pipeline", "plan", "quant", "report", "team",
                   "team_folder", "units"},
    "synth_files": {"checkpoint", "model"},
    "synth_weights": {"errors", "checkpoint", "layer_weights", "model"},
    "synth": {"errors", "checkpoint", "layer_weights", "model", "synth_files", "synth_weights"},
    "serving": {"errors", "checkpoint.index", "container", "model.drafter", "model.geometry", "model.layout",
                "model.qkv", "plan", "quant.formats", "report", "units"},
    "page_files": {"errors"},
    "choices": set(),
    "shipped": set(),
    "options": {"choices", "progress", "shipped"},
    "describe": {"errors", "checkpoint.journal", "fork_needs", "mixture", "model", "needs", "plan", "rehearsal",
                 "relayout", "report", "serving", "units"},
    "cli_eval": {"errors", "calibration", "checkpoint.writer", "devices", "evaluation", "junit", "model_card",
                 "page_files", "progress", "report", "team"},
    "sensitivity_cli": {"errors", "api", "calibration.tokens", "choices", "devices", "evaluation", "fork_needs",
                        "needs", "options", "page_files", "plan", "progress", "recipe", "sensitivity_page",
                        "serving", "shipped", "team"},
    "draft_cli": {"errors", "cli_eval", "devices", "draft_text", "evaluation", "options", "progress", "team"},
    "synth_cli": {"api", "choices", "describe", "options"},
    "versions": set(),
    # the edge, which nothing imports
    "api": {"errors", "calibration", "checkpoint", "container", "describe", "devices", "evaluation", "fork_needs",
            "mixture", "model", "needs", "pipeline", "plan", "recipe", "rehearsal", "relayout", "serving", "synth",
            "team", "verify"},
    "cli": {"errors", "api", "changes_page", "choices", "cli_eval", "coverage_page", "describe", "devices",
            "draft_cli", "needs", "options", "page_files", "pipeline", "progress", "relayout", "report_page",
            "sensitivity_cli", "server_text", "serving", "synth_cli", "team", "versions", "timeline"},
    "__main__": {"cli"},
}  # fmt: skip
# for annotations only, under `if TYPE_CHECKING:`; nothing is loaded
ALLOWED_FOR_TYPES: dict[str, set[str]] = {
    "page_files": {"plan"},
    "progress": {"plan", "timeline", "units"},
    "report": {"plan"},
}


def modules() -> dict[str, Path]:
    """Dotted name below `mimoquant` → file."""
    files = (path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(files)}


def area(module: str) -> str:
    return module.split(".")[0]


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(modules of ours that are imported anywhere in the file, those that only type checkers see), dotted names."""
    known = modules()
    found: tuple[set[str], set[str]] = (set(), set())

    def add(name: str, types_only: bool) -> None:
        if name.startswith("mimoquant."):
            found[types_only].add(name.removeprefix("mimoquant."))

    def visit(node: ast.AST, types_only: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, types_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("mimoquant.") in known
                add(inner if is_module else str(node.module), types_only)
        if isinstance(node, ast.If) and is_type_checking(node):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, types_only)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, types_only)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def allows(allowed: set[str], target: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def forbidden_edges() -> list[str]:
    out = []
    for module, path in modules().items():
        if module == "__init__":
            continue
        source = area(module)
        found, for_types = imports(path)
        allowed = ALLOWED.get(source, set()) | {source}
        out += [f"{module} → {target}" for target in sorted(found) if not allows(allowed, target)]
        allowed |= ALLOWED_FOR_TYPES.get(source, set())
        out += [f"{module} → {target} (types)" for target in sorted(for_types) if not allows(allowed, target)]
    return out


def test_every_module_has_its_row_in_the_table() -> None:
    assert sorted({area(module) for module in modules()} - ALLOWED.keys() - {"__init__"}) == []


def test_imports_are_those_of_the_table() -> None:
    assert forbidden_edges() == []


def test_the_table_itself_keeps_the_rules() -> None:
    """Siblings do not know each other, quant and errors know nobody, and nothing imports the command line."""
    siblings = {"calibration", "checkpoint", "model", "quant", "report"}
    known_between_siblings = {
        f"{a} → {target}" for a in siblings for target in ALLOWED[a] if target.split(".")[0] in siblings - {a}
    }
    assert known_between_siblings == {
        "calibration → model.decoder_layer", "model → checkpoint.index", "report → checkpoint.journal"
    }  # fmt: skip
    assert ALLOWED["quant"] == ALLOWED["errors"] == set()
    assert [source for source, targets in ALLOWED.items() if "cli" in targets] == ["__main__"]


def test_the_table_has_no_cycle() -> None:
    done: set[str] = set()

    def visit(source: str, path: tuple[str, ...]) -> None:
        assert source not in path, " → ".join((*path, source))
        if source not in done:
            for target in ALLOWED[source]:
                visit(area(target), (*path, source))
        done.add(source)

    for source in ALLOWED:
        visit(source, ())


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    """The walker sees imports at the top, in functions, of names and of modules."""
    source = tmp_path / "m.py"
    source.write_text(
        "import mimoquant\nimport mimoquant.plan as p\nfrom mimoquant.quant import formats\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mimoquant.report import size\n"
        "def f():\n    from mimoquant.checkpoint.index import open_index\n"
    )
    assert imports(source) == ({"plan", "quant.formats", "checkpoint.index"}, {"report"})


def test_no_module_is_longer_than_a_reader_can_bear() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_module_is_named_after_nothing() -> None:
    assert [module for module in modules() if set(module.split(".")) & BANNED_NAMES] == []


def test_errors_have_one_tree_and_the_documented_exit_codes() -> None:
    from mimoquant import errors

    codes = {name: kind.exit_code for name, kind in vars(errors).items()
             if isinstance(kind, type) and issubclass(kind, errors.MimoquantError)}  # fmt: skip
    assert codes == {"MimoquantError": 1, "UsageError": 2, "RecipeError": 2, "CheckpointError": 3, "StoppedError": 4,
                     "QualityError": 5}  # fmt: skip


needs_cli = pytest.mark.skipif(not (PACKAGE / "cli" / "app.py").exists(), reason="the command line is not there yet")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)


@needs_cli
def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "numpy",
        "yaml",
        "numba",
        "llvmlite",
        "transformers",
        "compressed_tensors",
        "llmcompressor",
        "matplotlib",
    )
    loaded = python("-c", "import sys, mimoquant.cli; print(*sys.modules)").stdout.split()
    assert [name for name in heavy if name in loaded] == []


@needs_cli
def test_help_is_quick() -> None:
    def elapsed_s() -> float:
        start = time.perf_counter()
        python("-m", "mimoquant", "--help")
        return time.perf_counter() - start

    elapsed_s()  # compiles the bytecode
    assert min(elapsed_s() for _ in range(3)) < 0.5
