"""The coverage of a calibrated run: the page says what the facts say, at any size, and the command line leads to it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from micro import MICRO
from typer.testing import CliRunner

from mimoquant.cli.app import app
from mimoquant.report.coverage_page import STEPS, Shades, coverage_page
from mimoquant.report.coverage_text import coverage
from mimoquant.report.eval_page import number
from mimoquant.report.verb_text import quantize_text
from mimoquant.run.calibrated import LayerFacts, starved
from mimoquant.wording import percent, visible

HOSTILE = "</title></style><script src='http://x'>alert(1)</script>\"'&\x00\u202e\n"
WIDTH = 256


def layer_of(tokens: list[int], *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Facts as a run tells them, with made-up errors."""
    rng = np.random.default_rng(seed)
    facts = LayerFacts(0, tokens, starved=starved(tokens, WIDTH), shrinkage=1.0)
    facts.effective = [0.875 * count for count in tokens]
    facts.shrunk = [WIDTH / (count + WIDTH) for count in tokens]
    facts.relmse_plain = [float(value) for value in rng.lognormal(-4.6, 0.2, len(tokens))]
    facts.relmse = [float(value) for value in rng.lognormal(-5.6, 0.3, len(tokens))]
    facts.held_out = {"predicted_0": 0.002723, "measured_0": 0.003271, "predicted_1": 0.002868, "measured_1": 0.003256}
    return facts.as_plain() | changes


def report_of(layers: dict[str, dict[str, Any]] | None, **changes: Any) -> dict[str, Any]:
    return {
        "method": "gptq",
        "scale_search": "gram",
        "container": "compressed-tensors",
        "out": "/m/out",
        "formats": {"int4 g128": list(range(len(layers or {})))},
        "notes": ["calibrates on mixed-v1"],
        "calibration": layers,
        "shards": [{}],
        "source_bytes": 2000,
        "output_bytes": 1000,
        "elapsed_s": 1.0,
        "bound_by": {"what": "computing", "share": 0.9},
        "found_finished": False,
        "engines": [],
    } | changes


def some() -> dict[str, Any]:
    layers = {
        "layer 1": layer_of([300, 128, 127, 4000, 0, 512, 2048, 999], damped=3, rounded=1),
        "layer 3": layer_of([260, 261, 270, 300, 310, 350, 401, 402], seed=1, shrinkage=4.0, held_out={}),
    }
    return report_of(layers)


def pro(width: float = 10.0) -> dict[str, Any]:
    """As many experts as the largest model has, with numbers as long as they get."""
    rng = np.random.default_rng(2)
    layers = {}
    for layer in range(1, 70):
        tokens = [int(count) for count in rng.lognormal(width, 1.0, 384).clip(1, 999_999)]
        layers[f"layer {layer}"] = layer_of(tokens, seed=layer)
    return report_of(layers)


CASES = {
    "some": some(),
    "one expert": report_of({"layer 1": layer_of([77])}),
    "one expert without tokens": report_of({"layer 1": layer_of([0], relmse=[0.0], relmse_plain=[0.0], shrunk=[1.0])}),
    "no tokens at all": report_of({"layer 1": layer_of([0] * 8)}),
    "extremes": report_of({"layer 1": layer_of([1, 10**9], relmse=[5e-324, 1.7e308], relmse_plain=[0.0, 1e300])}),
    "all equal": report_of({"layer 1": layer_of([500] * 4, relmse=[0.001] * 4)}),
    "uneven": report_of({"layer 1": layer_of([1, 2, 3]), "layer 2": layer_of([500])}),
    "folded norms": report_of(
        {
            "layer 1": layer_of([300, 400], topk_changed=0.0034),
            "layer 2": layer_of([300, 400]),
            "layer 3": layer_of([300, 400], topk_changed=0.0),
        }
    ),
    "nothing": report_of(None),
    "hostile": some() | {"out": HOSTILE, "notes": [HOSTILE], "method": HOSTILE, "formats": {HOSTILE: [1]}},
}


class Reader(HTMLParser):
    """Collects elements and the text under them; complains about a tag that is not closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.maps: list[list[tuple[str, str]]] = []  # (class, title) of the cells
        self.table: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), "an attribute stands twice"
        self.elements.append((tag, found))
        if found.get("class") == "map":
            self.maps.append([])
        if tag == "i" and "title" in found:
            self.maps[-1].append((str(found["class"]), str(found["title"])))
        if tag == "tr":
            self.table.append([])
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.table[-1].append(data)
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


@pytest.fixture(params=CASES)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return copy.deepcopy(CASES[request.param])


def test_the_page_is_well_formed_and_fetches_and_runs_nothing(report: dict[str, Any]) -> None:
    page = coverage_page(report)
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in reader.elements}
    attributes = {name for _, found in reader.elements for name in found}
    assert not attributes & {"src", "href", "srcset", "action", "style", "id"}
    assert not [name for name in attributes if name.startswith("on")]
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|//", style)
    assert "size:landscape" in style  # or the table of layers would not fit on paper
    assert visible(page.replace("\n", " ").replace("\xa0", " ")) == page.replace("\n", " ").replace("\xa0", " ")
    page.encode()


def test_equal_reports_give_equal_bytes_and_stay_as_they_were(report: dict[str, Any]) -> None:
    before = repr(report)
    assert coverage_page(report) == coverage_page(json.loads(json.dumps(report)))
    assert repr(report) == before


def test_every_cell_says_its_numbers(report: dict[str, Any]) -> None:
    layers = report["calibration"] or {}
    tokens, errors = Reader(coverage_page(report)).maps or ([], [])
    places = [
        (name.split()[1], expert, facts) for name, facts in layers.items() for expert in range(len(facts["tokens"]))
    ]
    assert [title for _, title in tokens] == [f"L{n} E{e}: {facts['tokens'][e]} tokens" for n, e, facts in places]
    assert [title for _, title in errors] == [
        f"L{n} E{e}: {number(facts['relmse_plain'][e])} → {number(facts['relmse'][e])}" for n, e, facts in places
    ]
    for (style, _), (_, expert, facts) in zip(tokens, places, strict=True):
        count = facts["tokens"][expert]
        assert (style == "z") == (count == 0)
        assert (style in "z" or style.endswith(" s")) == (count < WIDTH / 2)


def test_colours_follow_the_numbers() -> None:
    facts = layer_of([1, 10, 100, 1000], relmse=[0.001, 0.002, 0.004, 0.016])
    tokens, errors = Reader(coverage_page(report_of({"layer 1": facts}))).maps
    ranks = [STEPS.index(style[0]) for style, _ in tokens]
    assert ranks == sorted(ranks, reverse=True) and {ranks[0], ranks[-1]} == {0, len(STEPS) - 1}  # few is bright
    ranks = [STEPS.index(style[0]) for style, _ in errors]
    assert ranks == [0, 3, 6, len(STEPS) - 1]  # much is bright


def test_a_layer_without_a_starved_expert_has_no_mark() -> None:
    assert not [style for style, _ in Reader(coverage_page(some())).maps[0][8:] if " s" in style or style == "z"]


def test_the_table_equals_the_facts() -> None:
    report = some()
    first, second = Reader(coverage_page(report)).table[2:]
    facts = report["calibration"]["layer 1"]
    before, after = facts["relmse_plain"], facts["relmse"]
    worst = int(np.argmax(after))
    assert first == [
        "1",
        "0",
        f"{np.quantile(facts['tokens'], 0.05):.1f}",
        "406",
        "0",
        number(0.875 * 406),
        "2",
        "1",
        "1",
        f"{256 / 4256:.3g} to 1",
        number(np.mean(before)),
        number(max(before)),
        number(np.mean(after)),
        number(after[worst]),
        str(worst),
        "0.002868",
        "0.003256",
        "3",
        "1",
    ]
    assert second[:3] == ["3", "260", "260.4"] and second[6:9] == ["0", "0", "4"]
    assert second[-4:] == ["n/a", "n/a", "0", "0"]


def test_what_folded_norms_do_to_routing_is_told_where_there_are_any() -> None:
    reader = Reader(coverage_page(CASES["folded norms"]))
    assert [row[-1] for row in reader.table[1:]] == ["changed", "0.34 %", "n/a", "0.00 %"]
    assert "of tokens, by folded norms; worst layer 0.34 %" in reader.text
    assert "Top-k" not in coverage_page(some()) and "top-k" not in coverage_page(some())
    line = next(line for line in quantize_text(CASES["folded norms"]).splitlines() if line.startswith("coverage"))
    assert line.endswith("; top-k changed for 0.17 % of tokens")
    exact = report_of({"layer 1": layer_of([300, 400], topk_changed=0.0)})
    assert "top-k" not in quantize_text(exact) and "0.00 %" in Reader(coverage_page(exact)).table[-1]


def test_the_headline_is_over_all_experts() -> None:
    report = some()
    every = [count for facts in report["calibration"].values() for count in facts["tokens"]]
    text = Reader(coverage_page(report)).text
    assert "median; min 0, p5 " + f"{np.quantile(every, 0.05):.1f}" in text
    assert "of 16 experts, 12.50 %" in text
    assert "3 damped more, 1 rounded plainly" in text
    assert "/m/out" in text and "calibrates on mixed-v1" in text and "int4 g128 in 2 layers" in text


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    page = coverage_page(CASES["hostile"] | {"calibration": {f"layer {HOSTILE}": layer_of([3, 400])}})
    reader = Reader(page)
    assert "<script" not in page and "alert(1)</script>\"'&‹U+0000›‹U+202E›↵" in reader.text
    assert reader.maps[0][1][1].startswith("L</title>")


def test_a_run_without_calibrated_layers_says_so() -> None:
    text = Reader(coverage_page(report_of(None))).text
    assert "no layer was calibrated" in text and "relMSE" not in text


@pytest.mark.slow
def test_the_largest_model_makes_a_page_that_can_be_mailed() -> None:
    page = coverage_page(pro())
    assert len(page.encode()) < 3_000_000
    assert len(coverage_page(pro(4.0)).encode()) < 3_000_000  # nearly all starved
    tokens, errors = Reader(page).maps
    assert len(tokens) == len(errors) == 69 * 384


def test_a_value_that_is_not_finite_has_its_own_colour() -> None:
    page = coverage_page(report_of({"layer 1": layer_of([300, 400], relmse=[math.inf, 0.001])}))
    assert Reader(page).maps[1][0] == ("x", f"L1 E0: {number(layer_of([300, 400])['relmse_plain'][0])} → inf")
    assert "not finite" in page and "not finite" not in coverage_page(some())


@given(st.lists(st.floats(0, 1e308), max_size=6))
def test_shades_hold_their_values_in_order(values: list[float]) -> None:
    shades, ordered = Shades(values), sorted(values)
    steps = [shades.step(value) for value in ordered]
    assert steps == sorted(steps) and all(0 <= step < len(STEPS) for step in steps)
    bounds = shades.bounds()
    assert len(bounds) == len(STEPS) + 1 and all(a < b for a, b in itertools.pairwise(bounds))


def test_facts_count_the_starved() -> None:
    assert starved([0, 127, 128, 129], WIDTH) == 2
    assert LayerFacts(0, [0], starved=1).as_plain()["starved"] == 1


# --- the terminal -----------------------------------------------------------------------------------------------------


def test_the_terminal_line() -> None:
    report = some()
    line = next(line for line in quantize_text(report).splitlines() if line.startswith("coverage"))
    c = coverage(report["calibration"].values())
    every = list(report["calibration"].values())
    before, after = (
        np.mean([value for facts in every for value in facts[name]]) for name in ("relmse_plain", "relmse")
    )
    assert line == (
        f"coverage   tokens per expert 0 min, {c['tokens'][1]:.1f} p5, 305 median; 2 of 16 starved, 1 without; "
        f"lambda 0.0602 to 1; relMSE {before:.3g} -> {after:.3g}"
    )
    assert "coverage" not in quantize_text(report_of(None))


# --- the command line -------------------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_quantize_writes_the_page(tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    page.write_text("of an earlier run")
    made = call(
        "quantize",
        MICRO,
        "-r",
        "gptq-int4-g128",
        "--objective",
        "output",
        "--sequences",
        "16",
        "--tokens",
        "32",
        "--device",
        "cpu",
        "--out",
        out,
        "--html",
        page,
    )
    assert made.exit_code == 0, made.output
    report = json.loads((out / "report.json").read_text())
    assert page.read_text() == coverage_page(report | {"out": str(out)})
    for facts in report["calibration"].values():
        assert facts["starved"] == starved(facts["tokens"], 256)
    line = next(line for line in made.stdout.splitlines() if line.startswith("coverage"))
    assert f"{sum(facts['starved'] for facts in report['calibration'].values())} of 32 starved" in line


@pytest.mark.parametrize(
    ("recipe", "page", "said"),
    [
        ("mxfp4-rtn", "a.html", "does not calibrate"),
        ("gptq-int4-g128", "none/a.html", "cannot be written (No such file or directory)"),
        ("gptq-int4-g128", ".", "cannot be written (Is a directory)"),
        ("gptq-int4-g128", "file/a.html", "cannot be written (Not a directory)"),
        ("gptq-int4-g128", "out", "which holds a checkpoint"),
        ("gptq-int4-g128", "out/a.html", "which holds a checkpoint"),
        ("gptq-int4-g128", "out.partial/a.html", "which holds a checkpoint"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_the_run(tmp_path: Path, recipe: str, page: str, said: str) -> None:
    (tmp_path / "file").touch()
    refused = call("quantize", MICRO, "-r", recipe, "--out", tmp_path / "out", "--html", tmp_path / page)
    assert refused.exit_code == 2 and said in refused.stderr, refused.output
    assert refused.stderr.startswith("error: --html ") and "Traceback" not in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_trying_the_path_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "out").mkdir()  # so that the run is refused after the page was tried
    arguments = ("quantize", MICRO, "-r", "gptq-int4-g128", "--sequences", "8", "--tokens", "32", "--html")
    for name in ("old.html", "new.html"):
        assert call(*arguments, tmp_path / name, "--out", tmp_path / "out").exit_code == 2
    assert (tmp_path / "old.html").read_text() == "old" and not (tmp_path / "new.html").exists()
    inside = call(*arguments, MICRO / "a.html", "--out", tmp_path / "o")
    assert inside.exit_code == 2 and "which holds a checkpoint" in inside.stderr


def test_what_the_loss_feels_is_told() -> None:
    fisher = {"trace": 0.5, "effective_rank": 40.0, "share": 0.25}
    felt = {"felt_plain": [0.02, 0.04], "felt": [0.01, 0.015], "fisher": fisher}
    report = report_of({"layer 1": layer_of([9, 90], **felt), "layer 2": layer_of([9, 90], seed=1, **felt)})
    page = coverage_page(report)
    assert "Felt by the loss" in page and "Fisher matrix" in page and percent(0.25) in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert cells[-4:] == [number(value) for value in (0.03, 0.04, 0.0125, 0.015)], "before and after, mean and worst"
    assert "felt by the loss 0.03 -> 0.0125" in quantize_text(report)
    without = coverage_page(report_of({"layer 1": layer_of([9, 90])}))
    assert "elt " not in without and "Fisher" not in without
