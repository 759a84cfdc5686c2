"""mimoquant: the fastest and most faithful way to a 4-bit MiMo-V2 checkpoint.

Every verb of the command line is a function here, `mimoquant.quantize` as `mimoquant quantize` (see `mimoquant.api`).
Key idea: they load when they are first asked for, so that `import mimoquant` and `mimoquant --help` stay instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimoquant.__version__ import __version__ as __version__

if TYPE_CHECKING:
    from mimoquant.api import eval_draft as eval_draft
    from mimoquant.api import eval_kl as eval_kl
    from mimoquant.api import inspect as inspect
    from mimoquant.api import launch as launch
    from mimoquant.api import plan as plan
    from mimoquant.api import quantize as quantize
    from mimoquant.api import relayout as relayout
    from mimoquant.api import sensitivity as sensitivity
    from mimoquant.api import synth as synth
    from mimoquant.api import verify as verify

__all__ = [
    "eval_draft",
    "eval_kl",
    "inspect",
    "launch",
    "micro_checkpoint",
    "micro_drafter",
    "plan",
    "quantize",
    "relayout",
    "sensitivity",
    "synth",
    "verify",
]


def micro_checkpoint() -> Path:
    """The trained micro checkpoint that the package ships, in the published V2.5 format (see its README)."""
    return Path(__file__).parent / "micro"


def micro_drafter() -> Path:
    """A DFlash drafter trained for the micro checkpoint, in the published form (see its README)."""
    return Path(__file__).parent / "micro_dflash"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mimoquant' has no attribute {name!r}")
    from mimoquant import api

    return getattr(api, name)
