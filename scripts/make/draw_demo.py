"""The picture in the README: what `scripts/demo` prints, as an SVG without fonts or links of others.

usage: scripts/make/draw_demo.py [--out scripts/demo.svg]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

import mimoquant

COLUMNS = 112
THEME = TerminalTheme((27, 31, 36), (225, 228, 232), [(27, 31, 36)] * 8, [(225, 228, 232)] * 8)
FRAME = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img"
aria-label="quantize and verify in a terminal"><style>
.{unique_id}-matrix{{font:{char_height}px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre}}
{styles}</style><rect width="{width}" height="{height}" rx="8" fill="#1b1f24"/>
<g transform="translate({terminal_x},{terminal_y})"><g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def printed() -> str:
    """The demo's output from its first quantize to its table, with short names for the two folders of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).parents[1] / "demo.py"), "--keep", folder]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = text.replace(str(mimoquant.micro_checkpoint()), "mimoquant/micro").replace(f"{folder}/", "")
    begin, end = text.index("$ mimoquant quantize"), text.index("\nrelMSE: ")
    return text[begin:end].rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "demo.svg")
    out = parser.parse_args().out
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    for line in printed().splitlines():
        console.print(Text(line, style="bold" if line.startswith(("$ ", "The micro")) else ""))
    svg = console.export_svg(title="", theme=THEME, code_format=FRAME, unique_id="demo")
    out.write_text(re.sub(r' clip-path="[^"]*"', "", svg) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
