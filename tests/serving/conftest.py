"""What the tests of real engines share."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import outputs


@pytest.fixture(scope="session")
def engine_outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources and outputs of `engine_cases`, by name."""
    return outputs(tmp_path_factory.mktemp("engines"))
