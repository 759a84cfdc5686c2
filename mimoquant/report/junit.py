"""A gate's outcome as JUnit XML, which CI systems show beside the tests of a build.

Key idea: one test case for each thing that `eval-kl --max-kl` asks of a candidate; a failure says it in a sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from mimoquant.report.eval_text import verdict
from mimoquant.wording import visible

if TYPE_CHECKING:
    from mimoquant.evaluation.documents import EvalKlDocument


def junit_text(facts: EvalKlDocument) -> str:
    """`facts` of an `eval-kl` with a limit: whether J keeps it, and whether every row is finite."""
    limit = facts["max_kl"]
    assert limit is not None
    over, broken = facts["j"]["mean"] > limit, facts["nonfinite_share"] > 0
    cases = {"symmetric KL keeps the limit": over, "every row is finite": broken}
    suite = ElementTree.Element(
        "testsuite",
        name="mimoquant eval-kl",
        tests=str(len(cases)),
        errors="0",
        skipped="0",
        failures=str(over + broken),
        time=f"{facts['elapsed_s']:.3f}",
    )
    sentence = visible(verdict(facts)[2])
    for name, failed in cases.items():
        case = ElementTree.SubElement(suite, "testcase", classname=visible(facts["candidate"]), name=name)
        if failed:
            ElementTree.SubElement(case, "failure", message=sentence)
    ElementTree.SubElement(suite, "system-out").text = sentence
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
