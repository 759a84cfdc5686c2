"""How the pages are written: templates beside this module, in an environment that trusts no text.

Key idea: every value that a template writes passes `visible` and is escaped, wherever it came from; only what a
template or `drawing` made is markup. A template that names a value it was not given stops the run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from mimoquant.report.drawing import escaped
from mimoquant.wording import interval, number, percent

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """Loaded when the first page is written: a run without one needs no template engine."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"interval": interval, "lines": lines, "number": number, "percent": percent}
    return made


def lines(text: str) -> Markup:
    """Text whose line breaks are meant, as in `pre`."""
    return Markup("\n").join(map(escaped, text.split("\n")))


def render(template: str, **values: object) -> Markup:
    """What the named template makes of the values."""
    return Markup(environment().get_template(template).render(**values))
