"""The documents of the verbs: every field is described, and a change of any shows in `tests/schema/`.

The schemas are made from the TypedDicts by pydantic, which we did not write, with each field's docstring as its
description; `MIMOQUANT_GOLDEN=write` writes them anew. Real documents are held against the same types: what a document
has must be described, and what is described must be there, of the right type.
"""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, is_typeddict

import pytest
import typing_extensions
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typer.testing import CliRunner

import mimoquant
from mimoquant.calibration.layer_facts import LayerRecord
from mimoquant.cli.app import app
from mimoquant.evaluation import documents as evaluation
from mimoquant.mixing.documents import KeptFindings, SensitivityDocument
from mimoquant.output.documents import QuantizeDocument, QuantizeReport, VerifyDocument
from mimoquant.planning.documents import InspectDocument, PlanDocument, RelayoutDocument
from mimoquant.serving.documents import LaunchDocument
from mimoquant.synthetic.documents import SynthDocument

MICRO = mimoquant.micro_checkpoint()
SCHEMAS = Path(__file__).with_name("schema")
PACKAGE = Path(mimoquant.__file__).parent
DOCUMENTS: dict[str, Any] = {
    "inspect": InspectDocument,
    "plan": PlanDocument,
    "quantize": QuantizeDocument,
    "report": QuantizeReport,
    "relayout": RelayoutDocument,
    "verify": VerifyDocument,
    "launch": LaunchDocument,
    "eval-kl": evaluation.EvalFolderDocument,
    "eval-kl-server": evaluation.EvalServerDocument,
    "eval-kl-out": evaluation.KeptEvaluation,
    "eval-draft": evaluation.EvalDraftDocument,
    "sensitivity": SensitivityDocument,
    "sensitivity-findings": KeptFindings,
    "synth": SynthDocument,
}
STRICT = ConfigDict(extra="forbid", strict=True)


# --- from TypedDict to schema -----------------------------------------------------------------------------------------


@functools.cache
def classes(module: str) -> dict[str, ast.ClassDef]:
    source = Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def described(kind: Any, field: str) -> str | None:
    """The docstring below a field, in the class or in one that it is made from."""
    node = classes(kind.__module__)[kind.__name__]
    for said, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(said, ast.AnnAssign) and ast.unparse(said.target) == field and isinstance(below, ast.Expr):
            return re.sub(r"\s+", " ", str(ast.literal_eval(below.value))).strip()
    module = importlib.import_module(kind.__module__)
    bases = (getattr(module, ast.unparse(base)) for base in node.bases)
    return next(filter(None, (described(base, field) for base in bases if is_typeddict(base))), None)


@functools.cache
def told(kind: Any) -> Any:
    """The type for pydantic, which wants a TypedDict of its own before Python 3.12, with descriptions."""
    if is_typeddict(kind):
        fields: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            optional = get_origin(hint) is NotRequired
            inner = told(get_args(hint)[0] if optional else hint)
            inner = Annotated[inner, Field(description=described(kind, name))]
            fields[name] = NotRequired[inner] if optional else inner
        return with_config(STRICT)(typing_extensions.TypedDict(kind.__name__, fields))  # type: ignore[operator]
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(map(told, get_args(kind)))]  # noqa: UP007
    if get_args(kind):
        return get_origin(kind)[tuple(map(told, get_args(kind)))]
    return kind


@functools.cache
def adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(told(DOCUMENTS[name]))


def reached(kind: Any) -> Iterator[Any]:
    """The TypedDicts that a document is made of."""
    if is_typeddict(kind):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from reached(hint)
    for inner in get_args(kind):
        yield from reached(inner)


# --- the types --------------------------------------------------------------------------------------------------------


def test_every_field_of_every_document_is_described() -> None:
    kinds = {kind for document in (*DOCUMENTS.values(), LayerRecord) for kind in reached(document)}
    assert len(kinds) > 50
    silent = [
        f"{kind.__module__}.{kind.__name__}.{field}"
        for kind in kinds
        for field in kind.__annotations__
        if not described(kind, field)
    ]
    assert sorted(silent) == []


def test_no_result_is_a_dict_of_anything() -> None:
    """`Facts = dict[str, Any]` is what these types have replaced."""
    found = [
        path.name for path in PACKAGE.rglob("*.py") if re.search(r"^\w+ = dict\[str, Any\]", path.read_text(), re.M)
    ]
    assert found == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_schema_is_the_written_one(name: str) -> None:
    schema = adapter(name).json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    text, file = json.dumps(schema, indent=1, ensure_ascii=False, sort_keys=True) + "\n", SCHEMAS / f"{name}.json"
    if os.environ.get("MIMOQUANT_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text


def test_nothing_else_is_written_there() -> None:
    assert sorted(path.stem for path in SCHEMAS.iterdir()) == sorted(DOCUMENTS)


# --- real documents ---------------------------------------------------------------------------------------------------

FEW = ("--sequences", "8", "--tokens", "32", "--device", "cpu", "-q")


def printed(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One without calibration; one with it, a folded norm and a kept layer."""
    folder = tmp_path_factory.mktemp("documents")
    recipe = folder / "awq.yaml"
    shipped = (PACKAGE.parent / "recipes" / "awq-int4-layer41-bf16.yaml").read_text()
    shipped = shipped.replace("n_grid: 20", "n_grid: 2").replace("duo_scaling: true", "duo_scaling: false")
    recipe.write_text(shipped.replace(r"layers\.41\.", r"layers\.4\.").replace("{41: bf16}", "{4: bf16}"))
    mimoquant.quantize(MICRO, "mxfp4-rtn", folder / "plain", device="cpu")
    mimoquant.quantize(MICRO, str(recipe), folder / "calibrated", sequences=16, tokens=64, device="cpu")
    return {"plain": folder / "plain", "calibrated": folder / "calibrated"}


def valid(name: str, text: str) -> dict[str, Any]:
    document: dict[str, Any] = adapter(name).validate_json(text)
    return document


def test_what_is_read_from_headers(outs: dict[str, Path], tmp_path: Path) -> None:
    valid("inspect", printed("inspect", MICRO))
    drafted = shutil.copytree(MICRO, tmp_path / "drafted")
    shutil.copytree(mimoquant.micro_drafter(), drafted / "dflash")
    assert valid("inspect", printed("inspect", drafted))["drafter"]["layers"]
    valid("plan", printed("plan", MICRO, "-r", "nvfp4-mse", "--device", "cpu", "-o", tmp_path))
    assert valid("plan", printed("plan", MICRO, "-r", "mxfp4-rtn", "--measure", "--device", "cpu"))["estimate"]
    valid("launch", printed("launch", outs["plain"], "--engine", "sglang", "--gpu", "h100", "--gpus", "1"))


def test_what_is_written(outs: dict[str, Path], tmp_path: Path) -> None:
    options = ("--device", "cpu", "--sequences", "4", "--tokens", "32", "--refine", 1, "--refine-layer", 2, "-q")
    options += ("--objective", "output")
    text = printed("quantize", MICRO, "-r", "gptq-int4-g128", "-o", tmp_path / "out", *options)
    records = valid("quantize", text)["calibration"]
    assert "answer" in records["layer 2"] and "answer" not in records["layer 1"]
    assert valid("report", (outs["plain"] / "report.json").read_text())["calibration"] is None
    records = valid("report", (outs["calibrated"] / "report.json").read_text())["calibration"]
    assert "topk_changed" in records["layer 1"]
    valid("relayout", printed("relayout", MICRO, "-o", tmp_path / "split", "--qkv", "split", "--dtype", "bf16", "-q"))
    valid("synth", printed("synth", tmp_path / "new", "--layout", "v2.5", "--layers", "3"))


def test_what_is_proven(outs: dict[str, Path], tmp_path: Path) -> None:
    for out in outs.values():
        valid("verify", printed("verify", out, "--source", MICRO, "-q"))
    valid("verify", printed("verify", outs["plain"], "--source", MICRO, "--engine", "transformers", "-q", code=3))
    assert "checked" not in valid("verify", printed("verify", outs["plain"], "--engine", "vllm", "-q", code=3))


def test_what_is_evaluated(outs: dict[str, Path], tmp_path: Path) -> None:
    file, both = tmp_path / "kl.json", (MICRO, outs["plain"])
    valid("eval-kl", printed("eval-kl", *both, *FEW))
    valid("eval-kl", printed("eval-kl", *both, *FEW, "--max-kl", 9, "--baseline", MICRO, "--out", file))
    valid("eval-kl-out", file.read_text())
    valid("eval-draft", printed("eval-draft", *both, *FEW))
    valid("sensitivity", printed("sensitivity", MICRO, "-r", "int4-g128-mse", "-o", tmp_path / "r.yaml", *FEW))


def test_what_is_not_described_is_found() -> None:
    document = json.loads(printed("inspect", MICRO))
    for broken in (
        document | {"new": 1},
        {key: value for key, value in document.items() if key != "tensors"},
        document | {"tensors": "343"},
        document | {"attention": {"global": {}}},
    ):
        with pytest.raises(ValidationError):
            valid("inspect", json.dumps(broken))
