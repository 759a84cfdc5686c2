"""The report of `eval-kl`: well-formed, self-contained, safe with any text, and right about zeros and missing parts."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimoquant.report.coverage_page import map_style
from mimoquant.report.drawing import Scale
from mimoquant.report.eval_page import eval_page
from mimoquant.report.eval_text import eval_text
from mimoquant.report.page import render
from mimoquant.wording import number, percent, visible

Facts = dict[str, Any]
ELEMENTS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "main",
    "section",
    "p",
    "strong",
    "svg",
    "g",
    "rect",
    "circle",
    "line",
    "text",
    "dl",
    "div",
    "dt",
    "dd",
    "small",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ol",
    "li",
    "bdi",
    "mark",
    "span",
    "details",
    "summary",
    "pre",
}
HOSTILE = "</title></style><script src='http://x'>alert(1)</script>\"'&\x00\x1b[31m\u202e\u200b\u2028\ud800\x85\n\t"


def facts_of(layers: int = 8) -> Facts:
    """A made-up run with every part present."""
    token = {"sequence": 3, "position": 17, "domain": "code", "j": 4.25, "context": "a = [1, 2", "token": "]"}
    tops = {"reference_top5": [["]", 0.75], [",", 0.125]], "candidate_top5": [[" ]", 0.5], ["]", 0.0625]]}
    return {
        "schema_version": 1,
        "reference": "/m/reference",
        "reference_stored": "MXFP4 experts, FP8 attention, as released",
        "candidate": "/m/candidate",
        "recipe": "int4-g128-gptq",
        "left_out": [],
        "tokens": 1000,
        "sequences": 4,
        "sequence_tokens": 256,
        "data": {
            "name": "heldout-v1",
            "sha256": "ab" * 32,
            "origins": ["prose.jsonl: public domain"],
            "shared_with_calibration": None,
        },
        "j": {
            "mean": 0.01437,
            "low": 0.01391,
            "high": 0.01502,
            "median": 0.00211,
            "p90": 0.0371,
            "p99": 0.1613,
            "p99_9": 0.7129,
            "max": 4.25,
        },
        "kl_forward": 0.01419,
        "kl_reverse": 0.01455,
        "symmetric_sum": 0.02874,
        "top1": {"all": 0.9713, "confident": 0.9987, "confident_share": 0.4128},
        "perplexity": {"reference": 7.431, "candidate": 7.489, "ratio": 1.0078},
        "nonfinite_share": 0.0,
        "by_confidence": [{"low": k / 10, "high": (k + 1) / 10, "tokens": 100, "j": 0.03 - k / 400} for k in range(10)],
        "by_domain": [
            {"domain": name, "tokens": 500, "sequences": 2, "j": j, "low": 0.9 * j, "high": 1.2 * j, "top1": 0.97}
            for name, j in (("prose", 0.0121), ("code", 0.0166))
        ],
        "by_position": [{"begin": 16 * k, "end": 16 * k + 16, "tokens": 60, "j": 0.014} for k in range(16)],
        "layers": [
            {
                "layer": i,
                "kind": "sliding" if i % 6 else "global",
                "quantized": i not in (0, 5),
                "relative_error": 0.002 * i,
                "routing_overlap": 1 - 0.003 * i if i else None,
            }
            for i in range(layers)
        ],
        "noise_floor": {"batch": 2.1e-6, "relative_noise": 6.3e-5},
        "histogram": {"edges": [1e-4, 1e-3, 1e-2, 1e-1, 10.0], "counts": [300, 500, 180, 20]},
        "worst_tokens": [token | tops],
        "baseline": {"candidate": "/m/rtn", "j": 0.0204, "difference": -0.00603, "low": -0.0065, "high": -0.0055},
        "max_kl": 0.02,
        "passed": True,
        "elapsed_s": 81.4,
        "peak_rss_bytes": 3_412_000_000,
        "device": "cpu",
    }


def missing() -> Facts:
    """Everything optional left out."""
    nothing = dict.fromkeys(("recipe", "noise_floor", "baseline", "max_kl", "passed", "peak_rss_bytes"))
    lists: Facts = {key: [] for key in ("by_confidence", "by_domain", "by_position", "layers", "worst_tokens")}
    data = {"name": "mine", "sha256": "", "origins": [], "shared_with_calibration": None}
    return facts_of() | nothing | lists | {"data": data, "histogram": {"edges": [], "counts": []}}


def itself() -> Facts:
    """A model compared with itself: one layer, one domain, one bucket, and everything exactly 0."""
    facts = facts_of(1) | dict.fromkeys(("kl_forward", "kl_reverse", "symmetric_sum"), 0.0)
    facts |= {"max_kl": None, "passed": None, "baseline": None}
    facts["j"] = dict.fromkeys(facts["j"], 0.0)
    facts["noise_floor"] = {"batch": 0.0, "relative_noise": 0.0}
    facts["histogram"]["counts"] = [0, 0, 0, 0]
    facts["worst_tokens"][0]["j"] = 0.0
    facts["by_domain"] = [facts["by_domain"][0] | {"j": 0.0, "low": 0.0, "high": 0.0}]
    facts["by_position"] = [{"begin": 0, "end": 256, "tokens": 1000, "j": 0.0}]
    facts["by_confidence"] = [{"low": 0.0, "high": 1.0, "tokens": 1000, "j": 0.0}]
    facts["layers"] = [facts["layers"][0] | {"relative_error": 0.0, "routing_overlap": 1.0}]
    return facts


def hostile() -> Facts:
    facts = facts_of()
    worst = {
        "domain": HOSTILE,
        "context": HOSTILE * 50,
        "token": HOSTILE,
        "reference_top5": [[HOSTILE, 0.5], ["", 0.1]],
    }
    facts["worst_tokens"] = [facts["worst_tokens"][0] | worst]
    facts["by_domain"][0]["domain"] = HOSTILE
    facts["data"] = {"name": HOSTILE, "sha256": HOSTILE, "origins": [HOSTILE], "shared_with_calibration": None}
    facts["baseline"]["candidate"] = HOSTILE
    return facts | dict.fromkeys(("reference", "candidate", "recipe", "device"), HOSTILE)


def broken() -> Facts:
    """What a candidate full of NaN gives."""
    facts = facts_of() | dict.fromkeys(("kl_forward", "kl_reverse", "symmetric_sum"), math.inf)
    facts["j"] = dict.fromkeys(facts["j"], math.nan)
    facts["layers"][3] |= {"relative_error": math.nan, "routing_overlap": math.nan}
    facts["by_position"][0]["j"] = facts["by_domain"][0]["high"] = math.inf
    return facts | {"nonfinite_share": 0.25, "passed": None, "max_kl": None}


CASES = {
    "full": facts_of(),
    "missing": missing(),
    "itself": itself(),
    "hostile": hostile(),
    "broken": broken(),
    "pro": facts_of(70),
}


class Reader(HTMLParser):
    """Collects elements and complains about a tag that is not closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), "an attribute stands twice"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags: str) -> str:
        return " ".join(data for tag, data in self.texts if not tags or tag in tags)


@pytest.fixture(params=CASES, scope="module")
def facts(request: pytest.FixtureRequest) -> Facts:
    return copy.deepcopy(CASES[request.param])


def test_the_page_is_well_formed_and_uses_the_expected_elements_only(facts: Facts) -> None:
    page = eval_page(facts)
    assert page.startswith("<!DOCTYPE html>")
    assert {tag for tag, _ in Reader(page).elements} <= ELEMENTS


def test_the_page_fetches_and_runs_nothing(facts: Facts) -> None:
    page = eval_page(facts)
    reader = Reader(page)
    attributes = {name for _, found in reader.elements for name in found}
    assert not attributes & {"src", "href", "srcset", "action", "style", "id"}
    assert not [name for name in attributes if name.startswith(("on", "xlink"))]
    style = reader.text("style")
    assert style and not re.search(r"url\(|@import|@font-face|//", style)


def test_paper_is_white_and_upright_and_keeps_the_colours_that_mean_something() -> None:
    """What a browser would leave out or turn on paper. How pages break was looked at in Chromium; no test sees that."""
    maps = map_style({"layer 1": {"tokens": [3, 4]}})
    style = Reader(eval_page(facts_of(), (maps, ""))).text("style") + render("sensitivity.css")
    dark = re.findall(r"@media([^{]*)prefers-color-scheme:dark", style)
    assert dark and all("screen and" in condition for condition in dark)
    assert "landscape" not in style
    for mark in ("mark", r"\.key", r"\.map i,\.legend i"):  # backgrounds, which browsers do not print unasked
        assert re.search(rf"{mark}\{{[^}}]*print-color-adjust:exact", style), mark


def test_every_character_is_one_that_shows(facts: Facts) -> None:
    for text in (eval_page(facts), eval_text(facts)):
        assert visible(text.replace("\n", " ")) == text.replace("\n", " ")
        text.encode("utf-8")


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    page = eval_page(hostile())
    assert "&lt;script src=" in page
    shown = Reader(page).text("bdi", "mark", "dd", "td")
    assert "</title></style><script src='http://x'>alert(1)</script>\"'&‹U+0000›‹U+001B›[31m‹U+202E›‹U+200B›" in shown
    assert "‹U+2028›‹U+D800›‹U+0085›↵⇥" in shown
    assert "(empty)" in shown


def test_marks_stay_inside_their_plots(facts: Facts) -> None:
    for tag, attributes in Reader(eval_page(facts)).elements:
        lengths = {name: value for name, value in attributes.items() if value and value.endswith("%")}
        shares = {name: float(value[:-1]) for name, value in lengths.items() if value}
        assert all(0 <= share <= 100 for share in shares.values()), (tag, attributes)
        assert shares.get("x", 0) + shares.get("width", 0) <= 100.01
        assert float(attributes.get("height") or 0) >= 0
        numbers = [attributes.get(name) or "0" for name in ("x", "y", "y1", "y2", "cy", "r", "height")]
        assert all(math.isfinite(float(value.rstrip("%"))) for value in numbers)


def test_equal_facts_give_equal_bytes_and_stay_as_they_were(facts: Facts) -> None:
    before = repr(facts)
    again = json.loads(json.dumps(facts))
    assert eval_page(facts) == eval_page(again)
    assert eval_text(facts) == eval_text(again)
    assert repr(facts) == before


def test_the_headline_is_complete() -> None:
    facts = facts_of()
    figures = [
        "0.01437",
        "0.01391",
        "0.01502",
        "0.01419",
        "0.01455",
        "0.02874",
        "97.13 %",
        "99.87 %",
        "41.28 %",
        "1.0078",
        "7.431",
        "7.489",
        "0.00 %",
        "2.1e-6",
        "6.3e-5",
        "0.0204",
        "-0.00603",
    ]
    quantiles = ["0.00211", "0.0371", "0.1613", "0.7129", "4.25"]
    page, text = Reader(eval_page(facts)), eval_text(facts)
    outside_the_text_copy = page.text(*(ELEMENTS - {"pre", "style"}))
    assert [n for n in figures + quantiles if n not in outside_the_text_copy] == []
    assert [n for n in figures + quantiles if n not in text] == []
    assert text in page.text("pre")
    for said in ("/m/reference", "/m/candidate", "int4-g128-gptq", "heldout-v1", "ab" * 32, "81.4 s", "3.41 GB"):
        assert said in outside_the_text_copy
        assert said in text
    assert "prose.jsonl: public domain" in outside_the_text_copy


@pytest.mark.parametrize(
    ("change", "word", "tone", "said"),
    [
        ({}, "PASSED", "good", "keeps the limit 0.02, 28 % to spare"),
        ({"max_kl": 0.01, "passed": False}, "FAILED", "bad", "exceeds the limit 0.01 by 0.00437 (43.7 %)"),
        ({"max_kl": 0.0, "passed": False}, "FAILED", "bad", "exceeds the limit 0 by 0.01437"),
        ({"nonfinite_share": 1e-6}, "NOT FINITE", "bad", "0.0001 % of the rows are not finite"),
        ({"nonfinite_share": 0.5, "passed": False}, "FAILED", "bad", "50.00 % of the rows are not finite"),
        ({"max_kl": None, "passed": None}, "MEASURED", "plain", "0.01391 to 0.01502"),
        (
            {"max_kl": None, "passed": None, "noise_floor": {"batch": 0.0, "relative_noise": 0.0151}},
            "WITHIN NOISE",
            "good",
            "0.01437",
        ),
    ],
)
def test_the_verdict(change: Facts, word: str, tone: str, said: str) -> None:
    facts = facts_of() | change
    text, reader = eval_text(facts), Reader(eval_page(facts))
    assert text.startswith(word)
    assert said in re.sub(r"\s+", " ", text)
    assert word in reader.text("strong")
    assert ("section", {"class": f"card verdict {tone}"}) in reader.elements


def test_a_model_compared_with_itself() -> None:
    page, text = eval_page(itself()), eval_text(itself())
    assert text.startswith("IDENTICAL    J 0 nats per token")
    assert "Worst tokens" not in page
    assert page.count("nothing above 0") == 4  # histogram, position, confidence, layers
    assert page.count('class="hollow"') == 3 + 6 + 1  # candidate and two noises, quantiles, one domain
    assert 'class="dot"' in page  # the routing overlap, which is 1
    for word in ("nan", "inf"):
        assert not re.search(rf"\b{word}\b", page + text)


def test_a_nan_is_said_aloud() -> None:
    assert "NOT FINITE" in eval_page(broken())
    assert Reader(eval_page(broken())).text("text").split().count("nan") == 1 + 6 + 1  # candidate, quantiles, a layer
    assert eval_text(broken()).startswith("NOT FINITE   J nan")
    assert 'class="hollow"' not in eval_page(broken())  # which would say 0
    assert "25.00 % of the rows are not finite" in eval_text(broken())
    assert re.search(r"relative error\n3 .* nan\n7 ", eval_text(broken()))  # NaN is the worst of all


def test_missing_parts_leave_no_trace() -> None:
    page, text = eval_page(missing()), eval_text(missing())
    assert "not measured" in text and "none given" in text
    for absent in ("Error by layer", "Worst token", "dashed line", "Baseline", "None"):
        assert absent not in page
    for absent in ("worst layers", "domain ", "baseline", "host memory", "None"):
        assert absent not in text


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.2, -0.1, "better"), (0.1, 0.2, "worse"), (-0.1, 0.1, "not told apart")]
)
def test_a_baseline_is_better_or_worse_only_if_the_interval_says_so(low: float, high: float, word: str) -> None:
    facts = facts_of()
    facts["baseline"] |= {"low": low, "high": high}
    assert re.sub(r"\s+", " ", eval_text(facts)).count(f"{number(high)}): {word}") == 1


def test_the_worst_tokens_show_their_context_and_both_opinions() -> None:
    facts = facts_of()
    facts["worst_tokens"][0]["context"] = "y" + "x" * 999 + "z"
    reader = Reader(eval_page(facts))
    assert [data for tag, data in reader.texts if tag == "mark"] == ["]"]
    assert "…" + "x" * 299 + "z" in reader.text("bdi")
    assert "x" * 300 not in reader.text("bdi")
    assert sum(found.get("class") == "actual" for _, found in reader.elements) == 2
    assert "␣]" in reader.text("bdi")
    assert "code, sequence 3, position 17" in reader.text("p")


def test_a_piece_of_a_character_is_not_taken_for_another() -> None:
    facts = facts_of()
    facts["worst_tokens"][0] |= {"token": "\ufffd", "reference_top5": [["\ufffd", 0.5], ["\ufffd", 0.25]]}
    assert "actual" not in [found.get("class") for _, found in Reader(eval_page(facts)).elements]


def test_layers_differ_in_more_than_colour() -> None:
    elements = Reader(eval_page(facts_of(13))).elements
    styles = [found.get("class") for tag, found in elements if tag == "rect"]
    assert (
        styles.count("kept sliding") == 1 and styles.count("bar global") == 2
    )  # layer 0 is global, kept and exactly 0
    assert sum(found.get("class") == "below" for _, found in elements) == 3
    legend = Reader(eval_page(facts_of())).text("p")
    assert "Dashed outline: experts kept" in legend and "Dot below" in legend


def test_the_text_fits_a_terminal() -> None:
    for facts in CASES.values():
        long = facts | {"reference": "/long" * 60, "candidate": "x" * 300, "recipe": "word " * 60}
        assert max(map(len, eval_text(long).splitlines())) <= 100


def test_the_text_names_the_worst_layers() -> None:
    lines = eval_text(facts_of()).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("worst layers"))
    assert [line.split()[0] for line in lines[start + 1 :]] == ["7", "6", "5", "4", "3"]


def test_rounding_hides_no_exception() -> None:
    assert [percent(x) for x in (0.0, 1e-6, 0.5, 0.99996, 1.0, None)] == [
        "0.00 %",
        "0.0001 %",
        "50.00 %",
        "> 99.99 %",
        "100.00 %",
        "n/a",
    ]
    assert [number(x) for x in (0.0, 1e-7, 2.5e-11, 1234567.0, 10.0, None)] == [
        "0",
        "1e-7",
        "2.5e-11",
        "1.235e6",
        "10",
        "n/a",
    ]


values = st.lists(st.floats(0, 1e12) | st.none() | st.just(math.nan) | st.just(math.inf), max_size=5)


@given(values, st.booleans())
@example([5e-324], False)
@example([1e-300, 1e-31], True)
def test_scales_hold_their_values_and_have_a_few_ticks(values: list[float | None], log: bool) -> None:
    scale = Scale.decades(values) if log else Scale.linear(values)
    finite = sorted(v for v in values if v is not None and math.isfinite(v))
    places = [scale.at(v) for v in finite]
    assert places == sorted(places)
    assert all(0 <= place <= 1 for place in places)
    _, ticks = scale.axis("")
    assert 2 <= len(ticks) <= 7
    assert [place for place, _ in ticks] == sorted({place for place, _ in ticks})


@given(st.text())
def test_visible_text_stays_visible(text: str) -> None:
    assert visible(visible(text)) == visible(text)
    assert visible(text).replace(" ", "").isprintable()
