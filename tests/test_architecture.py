"""Who may import whom, read from the source with `ast`; and what starting the program costs.

The one table below is the rule: folders, not files. A new import that it does not allow fails here; change the table
only together with the layout that ARCHITECTURE describes.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from counted import cost_of_code, cost_of_run

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "mimoquant"
MAX_LINES = 460
MAX_PARAMETERS = 8
MAX_BODY_LINES = 45
LONG_FUNCTIONS = {  # a list of config keys; a kernel that says each argument of a call twice
    "model.geometry.read_geometry",
    "quant.kernels.encode_cuda._encode",
}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}

# Each row: a folder, or a module of the root, and what it may import beside `errors`, `wording`, `shipped` and
# `__version__`, which know nobody and which all may know. From the bottom up: a row names rows above it only.
ALLOWED: dict[str, set[str]] = {
    "quant": set(),
    "machine": {"quant"},
    "checkpoint": {"machine"},
    "model": {"checkpoint", "machine", "quant"},
    "weights": {"checkpoint", "machine", "model", "quant"},
    "calibration": {"checkpoint", "machine", "model", "quant"},
    "fisher": {"calibration", "checkpoint", "machine", "model", "weights"},
    "planning": {"checkpoint", "fisher", "machine", "model", "quant", "weights"},
    "serving": {"checkpoint", "model", "planning", "quant", "weights"},
    "run": {"calibration", "checkpoint", "fisher", "machine", "model", "planning", "quant", "weights"},
    "output": {"calibration", "checkpoint", "machine", "model", "planning", "quant", "run", "serving", "weights"},
    "evaluation": {"calibration", "checkpoint", "machine", "model", "planning", "weights"},
    "mixing": {
        "calibration",
        "checkpoint",
        "evaluation",
        "fisher",
        "machine",
        "model",
        "planning",
        "quant",
        "run",
        "weights",
    },
    "synthetic": {"checkpoint", "model", "weights"},
    "pipeline": {"calibration", "checkpoint", "machine", "output", "planning", "quant", "run"},
    "report": {"serving"},
    "assembly": {
        "checkpoint",
        "calibration",
        "evaluation",
        "machine",
        "mixing",
        "model",
        "output",
        "pipeline",
        "planning",
        "run",
        "serving",
        "weights",
    },
    "api": {
        "assembly",
        "checkpoint",
        "evaluation",
        "machine",
        "mixing",
        "model",
        "output",
        "planning",
        "serving",
        "synthetic",
    },
    "cli": {"api", "assembly", "machine", "output", "report"},
    "__main__": {"cli"},
}
FLOOR = {"errors", "wording", "shipped", "__version__"}
# for annotations only, under `if TYPE_CHECKING:`; nothing is loaded
ALLOWED_FOR_TYPES: dict[str, set[str]] = {
    "output": {"evaluation.documents", "evaluation.rounding_documents"},  # a card is told what was measured
    "pipeline": {"fisher.matrices"},
    "report": {
        "calibration.layer_facts",
        "evaluation.documents",
        "evaluation.rounding_documents",
        "mixing.documents",
        "output.documents",
        "planning.documents",
        "serving.documents",
        "synthetic.documents",
    },
    "cli": {"evaluation.documents", "mixing.documents", "planning"},
}
LAYOUT_ROWS = 20  # a table that grows beyond them is no layout any more


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name below `mimoquant` → file."""
    files = (path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(files)}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


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

    visit(parsed(path), False)
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
        allowed = ALLOWED.get(source, set()) | ({source} if source in FLOOR else {source} | FLOOR)
        out += [f"{module} → {target}" for target in sorted(found) if not allows(allowed, target)]
        allowed |= ALLOWED_FOR_TYPES.get(source, set())
        out += [f"{module} → {target} (types)" for target in sorted(for_types) if not allows(allowed, target)]
    return out


def test_every_module_has_its_row_in_the_table() -> None:
    assert sorted({area(module) for module in modules()} - ALLOWED.keys() - FLOOR - {"__init__"}) == []
    assert len(ALLOWED) <= LAYOUT_ROWS


def test_imports_are_those_of_the_table() -> None:
    assert forbidden_edges() == []


def test_the_table_goes_down_one_way() -> None:
    """A row names rows above it only, so there is no circle; and nothing imports the command line."""
    seen: set[str] = set()
    for source, targets in ALLOWED.items():
        assert targets <= seen, f"{source} imports upwards: {sorted(targets - seen)}"
        seen.add(source)
    assert [source for source, targets in ALLOWED.items() if "cli" in targets] == ["__main__"]


def test_nothing_is_allowed_that_is_not_used() -> None:
    used: dict[str, set[str]] = {}
    for module, path in modules().items():
        if module != "__init__":
            found, _ = imports(path)
            used.setdefault(area(module), set()).update(map(area, found))
    assert {
        source: sorted(targets - used[source]) for source, targets in ALLOWED.items() if targets - used[source]
    } == {}


def test_the_hall_is_small_and_each_folder_says_what_lives_there() -> None:
    roots = [path.name for path in PACKAGE.glob("*.py")]
    assert len(roots) <= 8, sorted(roots)
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}):
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert 1 <= len(said.splitlines()) <= 5, folder.name


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    """The walker sees imports at the top, in functions, of names and of modules."""
    source = tmp_path / "m.py"
    source.write_text(
        "import mimoquant\nimport mimoquant.planning.plan as p\nfrom mimoquant.quant import formats\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mimoquant.wording import size\n"
        "def f():\n    from mimoquant.checkpoint.index import open_index\n"
    )
    assert imports(source) == ({"planning.plan", "quant.formats", "checkpoint.index"}, {"wording"})


def test_no_module_is_longer_than_a_reader_can_bear() -> None:
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_LINES} == {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement to the end, without the docstring; a signature is a list, not a thought."""
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_fit_on_a_screen() -> None:
    long = {}
    for module, path in modules().items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MAX_BODY_LINES:
                long[f"{module}.{node.name}"] = body_lines(node)
    assert long.keys() == LONG_FUNCTIONS, long


def test_no_private_name_is_imported() -> None:
    """A name with an underscore in front stays in its module, in the tests too."""
    taken = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(REPOSITORY / "tests").rglob("*.py")]):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mimoquant"):
                taken += [f"{path.name}: {alias.name}" for alias in node.names if is_private(alias.name)]
    assert taken == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def crowded(path: Path) -> Iterator[str]:
    """Functions with more parameters than a reader can hold; one that is called on an object has that besides."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            count = sum(one.arg not in ("self", "cls") for one in given)
            if count > MAX_PARAMETERS:
                yield f"{node.name} has {count}"


def test_what_goes_together_is_one_parameter() -> None:
    """The public functions and typer's callbacks have one parameter an option, kernels one an array."""
    verbs = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    found = {
        module: names
        for module, path in modules().items()
        if module != "api" and not module.startswith(("cli.", "quant."))
        if (names := list(crowded(path)))
    }
    assert found == {}
    from mimoquant.cli.app import app

    callbacks = {command.callback.__name__ for command in app.registered_commands if command.callback}
    of_cli = {name.split()[0] for stem in verbs for name in crowded(PACKAGE / "cli" / f"{stem}.py")}
    assert of_cli <= callbacks


def test_no_module_is_named_after_nothing() -> None:
    assert [module for module in modules() if set(module.split(".")) & BANNED_NAMES] == []


def test_errors_have_one_tree_and_the_documented_exit_codes() -> None:
    from mimoquant import errors

    codes = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.MimoquantError)
    }
    assert codes == {
        "MimoquantError": 1,
        "UsageError": 2,
        "RecipeError": 2,
        "CheckpointError": 3,
        "StoppedError": 4,
        "QualityError": 5,
    }


needs_cli = pytest.mark.skipif(not (PACKAGE / "cli" / "app.py").exists(), reason="the command line is not there yet")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)


@needs_cli
def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "numpy",
        "yaml",
        "jinja2",
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
def test_what_needs_no_torch_does_not_load_it(tmp_path: Path) -> None:
    """It takes as long to load as all else that these verbs do on a small checkpoint."""
    verbs = [
        ["plan", "mimoquant/micro", "-r", "mxfp4-rtn"],
        ["quantize", "mimoquant/micro", "-r", "mxfp4-rtn", "--device", "cpu", "-q", "-o", str(tmp_path / "out")],
    ]
    code = (
        "import sys\nfrom mimoquant.cli.app import app\n"
        f"for verb in {verbs!r}: app(verb, standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "False"


@needs_cli
def test_starting_is_quick() -> None:
    """146,000 and 15,000 calls today, which are .2 and .06 s on two quiet cores."""
    assert cost_of_run("--help")[0] < 175_000
    assert cost_of_code("import mimoquant")[0] < 22_000
