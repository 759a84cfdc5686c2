#!/usr/bin/env python
"""Weights at the edges (rows of zeros, one-hot, 1e30, subnormal, saturated FP8, scales of 0 and Inf ...): does a device
write the bytes of the plain torch engine on the CPU, in every format, and refuse what it refuses?

One line a format, search and weight; exit 1 where one differs. Needs numpy and torch, on CUDA Triton. With --device cpu
it is the compiled engine (numba) that is held against the plain one.

usage: scripts/stress/check_numerics.py --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reliability")]

from edge_weights import EDGES, FORMATS, NOT_FINITE, SEARCHES, outcome, same  # noqa: E402

from mimoquant.machine.devices import make_engine  # noqa: E402
from mimoquant.quant.engine_torch import TorchEngine  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    plain, differ, count = TorchEngine("cpu"), 0, 0
    with contextlib.closing(make_engine(options.device)) as engine:
        print(f"{type(engine).__name__} on {engine.name} against {type(plain).__name__} on {plain.name}")
        for fmt, search, (name, stack) in itertools.product(FORMATS, SEARCHES, (EDGES | NOT_FINITE).items()):
            wanted, found = outcome(plain, stack, fmt, search), outcome(engine, stack, fmt, search)
            assert (wanted is None) == (name in NOT_FINITE), f"{name}: the reference itself is wrong"
            equal = found is None if wanted is None else found is not None and same(wanted, found)
            digest = hashlib.sha256(b"".join(part.tobytes() for part in (wanted or {}).values())).hexdigest()[:16]
            told = "refused" if wanted is None else digest
            pow2 = ", power of two" * fmt.pow2_global
            print(f"{fmt.label}{pow2}, {search}, {name}: {told} {'same' if equal else 'DIFFERENT'}", flush=True)
            differ, count = differ + (not equal), count + 1
    print(f"{count} cases, {differ} differ")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
