#!/usr/bin/env python
"""What a calibrated run would take on many GPUs, and what bounds it: reckoned from layers that were measured on one.

Key idea: a layer's seconds are those of its codes (in chunks of experts, dealt out in rounds of one a rank), those of
its tokens (in portions, dealt out once), those that every rank spends, and what ranks send each other. The first two
are measured: a layer with few tokens, and V2.5's with a million, of which another model's tokens take their share by
the products that a token goes through. What the disk must give for nobody to wait for it is told beside, in place of a
guess at it. Two H100s were measured once, which is how far the reckoning is checked.

usage: scripts/bench/many_gpus.py [--v25 FEW MANY] [--pro FEW] [--tokens 1048576] [--gpus 1 8 64] [--once .4]
           [--link-gb-s 300] [--network-gb-s 50]
FEW: seconds of a layer with 8,192 tokens, MANY: with 1,048,576 (`gpu.py --only gptq million pro`). --once: seconds of a
layer that no number of GPUs divides (`scaling.py`, the constant of experts). --link-gb-s, --network-gb-s: between GPUs
of a node of eight, and between nodes.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from mimoquant.model.layer_stream import PORTION_TOKENS
from mimoquant.planning.plan import CUDA_CHUNK_BYTES

FEW, MANY, NODE = 2**13, 2**20, 8
TOP_K, INNER = 8, 2048


@dataclass(frozen=True)
class Model:
    """Sizes of a layer, layers, and terabytes that a run reads and writes."""

    name: str
    hidden: int
    qkv: int  # rows
    o: int  # columns
    experts: int
    layers: int
    source_tb: float
    output_tb: float

    @property
    def token_flops(self) -> float:
        """Products of a token in a layer: attention's matrices, experts, and the Gram matrices of what they see."""
        attention = self.hidden * (self.qkv + self.o)
        return 2.0 * (attention + TOP_K * (3 * self.hidden * INNER + self.hidden**2 + INNER**2))

    @property
    def chunks(self) -> int:
        return math.ceil(self.experts / (CUDA_CHUNK_BYTES // (3 * self.hidden * INNER)))

    @property
    def code_bytes(self) -> float:
        """Of a layer's experts in int4 g128."""
        return self.experts * 3 * self.hidden * INNER * (1 / 2 + 2 / 128)


V25 = Model("V2.5", 4096, 14848, 8192, 256, 47, 0.315, 0.170)
PRO = Model("Pro", 6144, 27136, 16384, 384, 69, 1.033, 0.569)


@dataclass(frozen=True)
class Layer:
    """Seconds of a layer on one GPU: of its codes, of a token, of what is done once however many GPUs there are."""

    model: Model
    codes: float
    token: float
    once: float

    @staticmethod
    def of(model: Model, few: float, token: float, once: float) -> Layer:
        return Layer(model, few - once - FEW * token, token, once)

    def parts(self, gpus: int, tokens: int, link: float, network: float) -> dict[str, float]:
        """Seconds by what they are spent on; `link`, `network`: bytes a second."""
        chunks, portions = self.model.chunks, max(1, tokens // PORTION_TOKENS)
        rate = link if gpus <= NODE else network
        sent = 0.0 if gpus == 1 else tokens * (2 * self.model.hidden + 12 * TOP_K) + self.model.code_bytes
        return {
            f"codes, {math.ceil(chunks / gpus)} of {chunks} chunks each": self.codes
            * math.ceil(chunks / gpus)
            / chunks,
            f"tokens, {math.ceil(portions / gpus)} of {portions} portions each": (
                self.token * tokens * math.ceil(portions / gpus) / portions
            ),
            "what is not dealt out": self.once,
            "what ranks send": sent / rate,
        }


def row(layer: Layer, gpus: int, options: argparse.Namespace) -> str:
    model = layer.model
    parts = layer.parts(gpus, options.tokens, options.link_gb_s * 1e9, options.network_gb_s * 1e9)
    seconds = sum(parts.values())
    whole, alone = model.layers * seconds, sum(layer.parts(1, options.tokens, 1, 1).values())
    told = "; ".join(f"{name} {part:.2f} s" for name, part in sorted(parts.items(), key=lambda item: -item[1]) if part)
    disk = 1000 * (model.source_tb + model.output_tb) / whole
    return (
        f"| {model.name} | {gpus} | {seconds:.2f} s | {whole / 60:.1f} min | {alone / seconds:.1f} | {told} "
        f"| {disk:.1f} GB/s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--v25", type=float, nargs=2, default=[2.40, 6.73], metavar=("FEW", "MANY"))
    parser.add_argument("--pro", type=float, default=5.70, metavar="FEW")
    parser.add_argument("--tokens", type=int, default=MANY)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--once", type=float, default=0.4)
    parser.add_argument("--link-gb-s", type=float, default=300)
    parser.add_argument("--network-gb-s", type=float, default=50)
    options = parser.parse_args()
    token = (options.v25[1] - options.v25[0]) / (MANY - FEW)
    layers = [
        Layer.of(V25, options.v25[0], token, options.once),
        Layer.of(PRO, options.pro, token * PRO.token_flops / V25.token_flops, options.once),
    ]
    print("| model | GPUs | a layer | all layers | times as fast as one | by what | the disk must give |")
    print("|---|---|---|---|---|---|---|")
    for layer in layers:
        for gpus in options.gpus:
            print(row(layer, gpus, options))
    measured = Layer.of(V25, 4.8 + 0.0099 * FEW / 1000, 9.9e-6, options.once)  # RESULTS, "Cost is linear"
    one, two = (sum(measured.parts(gpus, MANY, 300e9, 50e9).values()) for gpus in (1, 2))
    print(f"\nTwo H100s by this reckoning: {one:.1f} s on one, {two:.1f} on two, {one / two:.2f} times as fast.")
    print(f"A token of Pro takes {PRO.token_flops / V25.token_flops:.2f} times the products of one of V2.5.")


if __name__ == "__main__":
    main()
