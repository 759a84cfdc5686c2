"""What the tests of real engines share."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import PYTHON, outputs


@pytest.fixture(scope="session")
def engine_outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources and outputs of `engine_cases`, by name; tests are skipped where there is no engine to give them to."""
    if not PYTHON.exists():
        pytest.skip("vLLM's environment is missing (scripts/setup_vllm_cpu)")
    return outputs(tmp_path_factory.mktemp("engines"))
