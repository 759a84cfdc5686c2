"""One format of each kind, for tests of what chooses codes."""

from __future__ import annotations

import pytest

from mimoquant.quant.formats import Format

FORMATS = [
    Format("int4", 32),
    Format("int4", 128),
    Format("int4", 64, symmetric=False),
    Format("mxfp4", 32),
    Format("nvfp4", 16),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
