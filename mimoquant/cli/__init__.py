"""PARSE, CALL, PRINT: the command line, which nothing imports."""

from __future__ import annotations

from mimoquant.cli.app import main as main
