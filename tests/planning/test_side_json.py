"""JSON beside the shards that no parser takes: told, refused, or mended where that is asked for; proven afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import MICRO
from typer.testing import CliRunner

import mimoquant
from mimoquant.cli.app import app
from mimoquant.planning import side_json

QUANTIZE = ("-r", "int4-g128-rtn", "--device", "cpu")


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def early(tmp_path: Path) -> Path:
    """A checkpoint whose drafter's config.json ends as in the first revisions of V2.6-Flash."""
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    config = Path(shutil.copytree(mimoquant.micro_drafter(), source / "dflash")) / "config.json"
    text = config.read_text().rstrip()
    assert text.endswith("\n}")
    config.write_text(text[:-2] + ",\n}\n")
    return source


def test_it_is_told_and_refused_before_anything_is_done(early: Path, tmp_path: Path) -> None:
    said = "dflash/config.json: is not valid JSON, it has 1 comma before a closing bracket, which no parser takes"
    assert said in call("inspect", early).stdout
    planned = call("plan", early, *QUANTIZE)
    assert planned.exit_code == 0 and f"quantize would refuse: {early}/{said}" in planned.stdout
    refused = call("quantize", early, *QUANTIZE, "-o", tmp_path / "out")
    assert refused.exit_code == 3 and said in refused.stderr and "--mend-json" in refused.stderr
    assert not list(tmp_path.glob("out*"))


def test_it_is_mended_where_that_is_asked_for(early: Path, tmp_path: Path) -> None:
    out, drafter = tmp_path / "out", mimoquant.micro_drafter()
    made = call("quantize", early, *QUANTIZE, "-o", out, "--mend-json")
    assert made.exit_code == 0 and "dflash/config.json is written mended" in made.stderr, made.output
    mended = (out / "dflash" / "config.json").read_text()
    assert json.loads(mended) == json.loads((drafter / "config.json").read_text())
    assert mended == (early / "dflash" / "config.json").read_text().replace(",\n}", "\n}")
    assert (out / "dflash" / "mask_embedding.pt").read_bytes() == (drafter / "mask_embedding.pt").read_bytes()
    assert call("verify", out, "--source", early).exit_code == 0
    assert "DFlash, 2 layers" in call("inspect", out).stdout
    shutil.copy(early / "dflash" / "config.json", out / "dflash")
    failed = call("verify", out, "--source", early)
    assert failed.exit_code == 3 and "is not what --mend-json makes of the source's" in failed.output


def test_what_else_is_wrong_is_not_mended(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    (source / "preprocessor_config.json").write_text('{"a": 1, "b": }')
    refused = call("quantize", source, *QUANTIZE, "-o", tmp_path / "out", "--mend-json")
    assert refused.exit_code == 3 and "preprocessor_config.json: is not valid JSON (Expecting value" in refused.stderr
    (source / "preprocessor_config.json").unlink()
    (source / "notes.txt").write_text("{,}")
    assert call("quantize", source, *QUANTIZE, "-o", tmp_path / "out").exit_code == 0


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a",}] \\\n'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='b",}'), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.sampled_from([None, 2]))
def test_nothing_but_last_commas_is_left_out(value: Any, indent: int | None) -> None:
    """Strings keep their commas and brackets; with a comma after each last entry the value is the same."""

    def spoilt(item: Any) -> str:
        if isinstance(item, list) and item:
            return f"[{','.join(map(spoilt, item))} ,\n]"
        if isinstance(item, dict) and item:
            return "{" + ",".join(f"{json.dumps(key)}:{spoilt(inner)}" for key, inner in item.items()) + ",}"
        return json.dumps(item, indent=indent)

    mended = side_json._LAST_COMMA.sub(lambda found: found[1] or "", spoilt(value))
    assert json.loads(mended) == value
    plain = json.dumps(value, indent=indent)
    assert side_json._LAST_COMMA.sub(lambda found: found[1] or "", plain) == plain
