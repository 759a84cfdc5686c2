"""What files say is inert on every page, whichever string it is: it adds no element and no attribute, and it shows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from mimoquant.report.changes_card import changes_part
from mimoquant.report.coverage_page import coverage_page
from mimoquant.report.eval_page import eval_page
from mimoquant.report.page import render
from mimoquant.report.sensitivity_page import sensitivity_page
from mimoquant.wording import visible

Facts = dict[str, Any]
HOSTILE = "{{ 7 * 7 }}{% raw %}</title></style><script>alert(1)</script>\" onload='x'&lt;\u202e\x1b\x00\n"
SHOWN = "{{ 7 * 7 }}{% raw %}</title></style><script>alert(1)</script>\" onload='x'&lt;‹U+202E›‹U+001B›‹U+0000›↵"


def estimate(mean: float) -> Facts:
    return {"mean": mean, "low": 0.5 * mean, "high": 2 * mean}


def eval_facts() -> Facts:
    j = estimate(0.02) | {"median": 0.01, "p90": 0.03, "p99": 0.1, "p99_9": 0.2, "max": 0.5}
    tops = {"reference_top5": [["token", 0.75]], "candidate_top5": [["other", 0.5]]}
    worst = {"sequence": 3, "position": 17, "domain": "code", "j": 0.5, "context": "before", "token": "token"}
    layer = {"layer": 0, "kind": "sliding", "quantized": True, "relative_error": 0.1, "routing_overlap": 0.9}
    return {
        "reference": "/m/reference",
        "reference_stored": "MXFP4 experts, FP8 attention, as released",
        "left_out": [],
        "candidate": "/m/candidate",
        "recipe": "a recipe",
        "tokens": 100,
        "sequences": 4,
        "sequence_tokens": 25,
        "data": {"name": "mine", "sha256": "ab", "origins": ["a file"], "shared_with_calibration": None},
        "j": j,
        "kl_forward": 0.02,
        "kl_reverse": 0.02,
        "symmetric_sum": 0.04,
        "top1": {"all": 0.9, "confident": 0.99, "confident_share": 0.4},
        "perplexity": {"reference": 7.4, "candidate": 7.5, "ratio": 1.01},
        "nonfinite_share": 0.0,
        "by_confidence": [{"low": 0.0, "high": 1.0, "tokens": 100, "j": 0.02}],
        "by_domain": [
            {"domain": "code", "tokens": 100, "sequences": 4, "j": 0.02, "low": 0.01, "high": 0.04, "top1": 1}
        ],
        "by_position": [{"begin": 0, "end": 25, "tokens": 100, "j": 0.02}],
        "layers": [layer],
        "noise_floor": {"batch": 1e-6, "relative_noise": 1e-5},
        "histogram": {"edges": [1e-4, 1e-2, 1.0], "counts": [60, 40]},
        "worst_tokens": [worst | tops],
        "baseline": {"candidate": "/m/rtn", "j": 0.03, "difference": -0.01, "low": -0.02, "high": -0.005},
        "max_kl": 0.05,
        "passed": True,
        "elapsed_s": 1.0,
        "peak_rss_bytes": 1000,
        "device": "cpu",
    }


def coverage_facts() -> Facts:
    errors = {"relmse_plain": [0.02, 0.03], "relmse": [0.01, 0.02], "shrunk": [0.5, 0.4], "effective": [90.0, 300.0]}
    layer = {"tokens": [100, 400], "starved": 1, "damped": 0, "rounded": 0, "shrinkage": 1.0, "held_out": {}} | errors
    return {
        "method": "gptq",
        "scale_search": "gram",
        "container": "native",
        "out": "/m/out",
        "formats": {"int4 g128": [1]},
        "notes": ["a note"],
        "calibration": {"layer 1": layer},
        "carve_outs": {"0": "bf16"},
        "fallbacks": {"gptq_damped_more": 0},
        "source_bytes": 2000,
        "output_bytes": 1000,
    }


def sensitivity_facts() -> Facts:
    options = [
        {"option": "mxfp4", "bytes": 600, "ratio": 1.0, "predicted": 0.01},
        {"option": "bf16", "bytes": 1700, "ratio": 0.0, "predicted": 0.0},
    ]
    experts = {"relmse": [0.01, 0.02], "token_share": [0.1, 0.9], "largest": [3.0, 2.0]}
    layer = {"layer": 1, "kind": "sliding", "options": options, "experts": experts, "median_relmse": 0.01}
    layer |= {"failed_experts": [1], "super_experts": []} | dict.fromkeys(
        ("alone", "gain", "contribution"), estimate(1)
    )
    measured = dict.fromkeys(("predicted", "measured", "difference", "to_all_quantized"), estimate(0.05))
    chosen = {"options": {"1": "mxfp4"}, "bytes": 600, "agrees": False} | measured
    return {
        "source": "/m/source",
        "recipe": "a recipe",
        "method": "rtn",
        "calibration": {"name": "mixed"},
        "costs_by": "forks",
        "container": "native",
        "options": ["mxfp4", "bf16"],
        "data": {
            "name": "mine",
            "sha256": "ab",
            "sequences": 8,
            "sequence_tokens": 32,
            "shared_with_calibration": None,
        },
        "notes": ["a note"],
        "rounding": None,
        "j": estimate(0.05),
        "sum_alone": estimate(0.05),
        "sum_gains": estimate(0.05),
        "layers": [layer],
        "uniform": [{"bytes": 600, "predicted": 0.05, "option": "mxfp4"}],
        "carve_outs": [{"layer": 1, "bytes": 700, "j": estimate(0.04)}],
        "frontier": [{"bytes": 600, "predicted": 0.05}, {"bytes": 700, "predicted": 0.04}],
        "cost": {"walks": [{"forward_passes": 3.8, "bytes_read": 5000}]},
        "chosen": chosen,
        "tried": [chosen],
    }


def changed(facts: Facts, folder: Path) -> str:
    """The evaluation's page with the candidate's own files beside it."""
    recipe = {"provenance": facts["provenance"]}
    (folder / "report.json").write_text(json.dumps(facts["report"]))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"mimoquant": recipe}))
    return eval_page(facts["eval"], changes_part(folder))


def changed_facts() -> Facts:
    calibration = {"name": "mixed", "tokens_sha256": "cd"}
    provenance = {"mimoquant": "1", "release": "a model", "source_headers_sha256": "ab", "calibration": calibration}
    return {"eval": eval_facts(), "report": coverage_facts(), "provenance": provenance}


PAGES: dict[str, tuple[Callable[[Facts, Path], str], Facts, set[str]]] = {
    "eval": (lambda facts, _: eval_page(facts), eval_facts(), set()),
    "coverage": (lambda facts, _: coverage_page(facts), coverage_facts(), {"formats", "calibration"}),
    "sensitivity": (lambda facts, _: sensitivity_page(facts), sensitivity_facts(), {"calibration"}),
    "changes": (changed, changed_facts(), {"formats", "carve_outs", "fallbacks"}),
}


def hostile(facts: Any, names: set[str], name: str = "") -> Any:
    """Every string with hostile text at its end, the keys of the dictionaries of these names included."""
    if isinstance(facts, dict):
        return {key + HOSTILE if name in names else key: hostile(value, names, key) for key, value in facts.items()}
    if isinstance(facts, list):
        return [hostile(value, names) for value in facts]
    return facts + HOSTILE if isinstance(facts, str) else facts


class Reader(HTMLParser):
    """What a browser would build: elements with their attributes' names, and what it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, list[str]]] = []
        self.shown: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attrs]))
        self.shown += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


@pytest.mark.parametrize("name", PAGES)
def test_no_string_of_a_file_acts_on_a_page(name: str, tmp_path: Path) -> None:
    page, facts, keys = PAGES[name]
    plain = Reader(page(copy.deepcopy(facts), tmp_path))
    text = page(hostile(facts, keys), tmp_path)
    found = Reader(text)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
    assert found.elements == plain.elements
    assert visible(text.replace("\n", " ")) == text.replace("\n", " ")
    assert sum(SHOWN in shown for shown in found.shown) >= 5
    assert sum("{{ 7 * 7 }}{% raw %}</title>" in shown for shown in found.shown) >= 10
    assert "49{% raw" not in text


def test_the_card_of_changes_is_on_the_page(tmp_path: Path) -> None:
    page = changed(changed_facts(), tmp_path)
    assert "What was changed and what was not" in page and "Tokens per expert" in page


def test_styles_and_cards_that_are_no_markup_are_written_as_text() -> None:
    assert "<b>" not in eval_page(eval_facts(), ("<b>", "<b>"))


def test_a_value_that_a_template_was_not_given_stops_the_page() -> None:
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render("page.html")
