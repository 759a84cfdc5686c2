"""Parse, call, print: the command line.

May import everything; nothing imports it. Computes nothing.
"""

from __future__ import annotations

from mimoquant.cli.app import main as main
