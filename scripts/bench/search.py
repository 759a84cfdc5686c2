#!/usr/bin/env python
"""The scale search alone, beside llm-compressor's mse observers: one thread, one process, the same bf16 matrix.

Ours is `CpuEngine.encode` with `mse`: search, scales and codes. The peer's is an observer's search for the range, which
scales and codes follow from in another step, not counted. Rounds alternate; seconds are of the processor.

usage: scripts/bench/search.py [--rows 2048] [--columns 4096] [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

FORMATS = {  # name → our format and group, the peer's observer and its arguments for compressed-tensors
    "int4 g128": ("int4", 128, "memoryless_mse", {"num_bits": 4, "type": "int", "strategy": "group"}),
    "MXFP4": ("mxfp4", 32, "memoryless_mse", {"num_bits": 4, "type": "float", "strategy": "group"}),
    "NVFP4": ("nvfp4", 16, "nvfp4_expanded_mse", {"num_bits": 4, "type": "float", "strategy": "tensor_group"}),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def peer_search(name: str, weight: Any) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.observers import Observer

    _, group, observer, settings = FORMATS[name]
    scale = {"MXFP4": torch.uint8, "NVFP4": torch.float8_e4m3fn}.get(name)
    args = QuantizationArgs(symmetric=True, group_size=group, observer=observer, scale_dtype=scale, **settings)
    return Observer.load_from_registry(observer, base_name="weight", args=args), weight


def main() -> None:
    options = arguments()
    for key in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):  # before either library is imported
        os.environ[key] = "1"
    import torch
    from versions import versions

    from mimoquant.quant.engine_cpu import CpuEngine
    from mimoquant.quant.engine_torch import to_numpy
    from mimoquant.quant.formats import Format
    from mimoquant.quant.stack import Stack

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (torch.randn(options.rows, options.columns) * 0.02).to(torch.bfloat16)
    engine, stack = CpuEngine(1), Stack(to_numpy(weight[None]), None)
    names = ("mimoquant", "llmcompressor", "compressed-tensors", "torch", "numba")
    print(f"{options.rows} x {options.columns} bf16, one thread; {versions(names)}\n")
    print("| format | mimoquant, s | peer's observer, s | faster |\n|---|---|---|---|", flush=True)
    for name, (kind, group, observer, _) in FORMATS.items():
        mine, theirs = [], []
        for number in range(options.repeats + 1):  # the first of each warms up
            begin = time.process_time()
            engine.encode(dict.fromkeys(("gate", "up", "down"), stack), Format(kind, group), "mse")
            middle = time.process_time()
            search, observed = peer_search(name, weight)
            search(observed)
            if number:
                mine.append((middle - begin) / 3)
                theirs.append(time.process_time() - middle)
        own, other = statistics.median(mine), statistics.median(theirs)
        print(
            f"| {name} | {own:.3f} ({min(mine):.3f}-{max(mine):.3f}) | {other:.2f} ({min(theirs):.2f}-"
            f"{max(theirs):.2f}), {observer} | {other / own:.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
