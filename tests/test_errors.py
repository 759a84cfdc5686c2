"""All sentences that a user can be told, in `tests/errors.txt`: a new or changed one is seen in review.

Collected from the source, wherever an error of `mimoquant.errors` is made. `MIMOQUANT_GOLDEN=write` writes it anew.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mimoquant import errors

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("errors.txt")
KINDS = {
    name: kind.exit_code
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MimoquantError)
} | {"Refusal": 3}
HEAD = """Every sentence that an error can say, by module. The number is the exit code, {...} is filled in.
2: usage or recipe wrong, nothing done. 3: checkpoint or data wrong. 4: stopped, resumable. 5: quality gate.
"""


def sentence(node: ast.expr | None, said: dict[str, ast.expr]) -> str:
    """A message as a reader of the source sees it: text as it is, expressions in braces. `said`: texts in variables."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(sentence(part, said) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return sentence(node.value, said)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return sentence(node.left, said) + sentence(node.right, said)
    if isinstance(node, ast.IfExp):
        return f"{sentence(node.body, said)} | {sentence(node.orelse, said)}"
    if isinstance(node, ast.Name) and isinstance(said.get(node.id), ast.JoinedStr):
        return sentence(said[node.id], {})
    return f"{{{ast.unparse(node)}}}"


@functools.cache
def raised(path: Path) -> list[tuple[int, str, str]]:
    """(exit code, sentence, hint) of each error that a module makes."""
    return list(_raised(path))


def _raised(path: Path) -> Iterator[tuple[int, str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        said = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            if isinstance(node.func, ast.Name) and node.func.id in KINDS:
                hint = next((keyword.value for keyword in node.keywords if keyword.arg == "hint"), None)
                yield KINDS[node.func.id], sentence(node.args[0], said), sentence(hint, said)
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "fail":  # `recipe._Parser`
                hint = node.args[1] if len(node.args) > 1 else None
                yield 2, "recipe {self.name}: " + sentence(node.args[0], said), sentence(hint, said)


@functools.cache
def collected() -> str:
    lines = [HEAD]
    for path in sorted((REPOSITORY / "mimoquant").rglob("*.py")):
        found = sorted({*raised(path)})
        lines += [f"{path.relative_to(REPOSITORY)}"] if found else []
        for code, said, hint in found:
            lines += [f"  {code} {said}", *([f"      hint: {hint}"] if hint else [])]
        lines += [""] if found else []
    return "\n".join(lines)


def test_every_sentence_is_in_the_golden_file() -> None:
    if os.environ.get("MIMOQUANT_GOLDEN") == "write":
        GOLDEN.write_text(collected(), encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == collected()


def test_sentences_keep_the_form() -> None:
    """One line without a full stop, which begins with what it is about."""
    for path in sorted((REPOSITORY / "mimoquant").rglob("*.py")):
        for _, said, hint in raised(path):
            assert "\n" not in said + hint and (said.endswith("...") or not said.endswith((".", "!"))), (
                path.name,
                said,
            )
            assert said[:1] in "{-" or said[:1].islower() or said[:2] in ("J ", "NV"), (path.name, said)


def test_errors_of_the_guide_are_real() -> None:
    """What its table quotes is a part of a sentence, with an ellipsis for what is filled in."""
    said = re.sub(r"\{[^}]*\}", "…", collected())
    table = (REPOSITORY / "mimoquant/cli/README.md").read_text(encoding="utf-8").partition("## What an error means")[2]
    for row in re.findall(r"^\| (`.*?`) \|", table, re.M):
        for quoted in re.findall(r"`([^`]+)`", row):
            pieces = [piece.strip() for piece in quoted.split("…")]
            assert all(piece in said for piece in pieces), quoted
