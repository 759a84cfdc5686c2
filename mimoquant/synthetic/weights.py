"""Where a synthetic checkpoint's values come from: drawn at random, or read from a bf16 checkpoint.

Key idea: both give any logical matrix by name, whole and in float32 (or as bits where it is stored as it is), so
`synth` lays out one like the other. Draws depend on seed, name and shape alone, not on the order of asking.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mimoquant.checkpoint.hf_files import CONFIG_NAME
from mimoquant.checkpoint.index import read_json_inside
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.geometry import FP8_BLOCK
from mimoquant.model.layout import TOWER_PREFIXES, read_layout
from mimoquant.weights.stored import bf16_bits, split_qkv

Array = npt.NDArray[Any]
_E4M3_MAX = np.float32(448)
_BAND = 1024  # rows that are drawn together
_LARGE_CHANNELS = 64  # one input channel in so many is 10 to 20 times larger
PATTERNS = ("hybrid_layer_pattern", "moe_layer_freq")  # a source may have them in transformers' words only


def encode_fp8(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """float32 [O, I] → E4M3 bits [O, I] and float32 scales [ceil(O / 128), ceil(I / 128)]; scale = amax / 448."""
    rows, width = weight.shape
    starts = np.arange(0, width, FP8_BLOCK)
    values = np.empty(weight.shape, np.uint8)
    scales = np.empty((math.ceil(rows / FP8_BLOCK), len(starts)), np.float32)
    for i, begin in enumerate(range(0, rows, FP8_BLOCK)):
        band = weight[begin : begin + FP8_BLOCK]
        amax = np.maximum.reduceat(np.abs(band).max(axis=0), starts)
        scales[i] = np.where(amax == 0, np.float32(1), amax / _E4M3_MAX)  # a block of zeros: any scale will do
        with np.errstate(invalid="ignore"):  # the caller sees Inf in the scales
            scaled = torch.from_numpy(band / np.repeat(scales[i], FP8_BLOCK)[:width])
        values[begin : begin + FP8_BLOCK] = scaled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return values, scales


class RandomWeights:
    """Random tensors, whose bytes depend on seed, name and shape only: SFC64 bits, looked up in normal quantiles.

    numpy promises that its bit streams stay the same over versions, not its distributions; this is also faster.
    """

    def __init__(self, seed: int, mtp_layers: int) -> None:
        self.seed, self.mtp_layers = seed, mtp_layers

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """A logical tensor as bf16 bits (`dtype` BF16) or as float32 (F32, F8_E4M3)."""
        digest = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        stream = np.random.SFC64(int.from_bytes(digest[:16], "little"))
        rows, width = shape[0], math.prod(shape[1:])
        mean, gain = _statistics(stream, name, shape)
        out: Array = np.empty((rows, width), np.uint16 if dtype == "BF16" else np.float32)
        for begin in range(0, rows, _BAND):
            count = min(_BAND, rows - begin)
            raw = stream.random_raw(math.ceil(count * width / 4)).astype("<u8", copy=False).view("<u2")
            band = np.take(_normal_quantiles(), raw[: count * width].reshape(count, width))
            band *= gain
            band += mean
            out[begin : begin + count] = bf16_bits(band) if dtype == "BF16" else band
        return out.reshape(shape)


def _statistics(stream: np.random.SFC64, name: str, shape: tuple[int, ...]) -> tuple[np.float32, Array]:
    """(mean, standard deviation of each column).

    Projections have a few large input channels, which bring most of an output's variance: the others get half of the
    usual 1 / sqrt(in).
    """
    width = math.prod(shape[1:])
    if len(shape) == 1:
        norm = "norm" in name or name.endswith("ln_q.weight")
        kinds = (("e_score_correction_bias", 0.01), ("sink", 0.5), ("norm", 0.1), ("ln_q", 0.1), ("", 0.02))
        std = next(std for part, std in kinds if part in name)
        return np.float32(1 if norm else 0), np.array([std], np.float32)
    if name.startswith(TOWER_PREFIXES):
        return np.float32(0), np.full(width, 1 / math.sqrt(width), np.float32)
    if not name.endswith("_proj.weight"):
        return np.float32(0), np.full(width, 0.02, np.float32)
    gain = np.full(width, 0.5 / math.sqrt(width), np.float32)
    large = max(1, width // _LARGE_CHANNELS)
    draws = stream.random_raw(2 * large)
    gain[draws[:large] % np.uint64(width)] *= (10 + draws[large:] % np.uint64(11)).astype(np.float32)
    return np.float32(0), gain


@functools.cache
def _normal_quantiles() -> npt.NDArray[np.float32]:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 2**16) for i in range(2**16)], np.float32)


class ConvertedWeights:
    """The tensors of a bf16 checkpoint of this family; a fused qkv is taken apart."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader, self.folder = reader, reader.index.folder
        config = read_json_inside(self.folder, CONFIG_NAME)
        quantization = config.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UsageError(
                f"{self.folder}: is quantized already ({method})", hint="only a bf16 checkpoint is converted"
            )
        layout = read_layout(reader.index, config)
        if towers := layout.units.get("towers"):
            raise UsageError(
                f"{self.folder}: holds {len(towers)} vision, audio or speech tensors, which are not converted",
                hint="remove them; v2.5 gets small random ones",
            )
        self.geometry, self.mtp_layers = layout.geometry, layout.mtp_layers
        patterns = zip(PATTERNS, (self.geometry.sliding, self.geometry.moe), strict=True)
        self.config = config | {key: [int(value) for value in values] for key, values in patterns}

    def read(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        """As `RandomWeights.read`; the shape is the source's own."""
        match = re.search(r"self_attn\.([qkv])_proj\.weight$", name)
        if self.geometry.fused_qkv and match:
            layer = re.match(r"model\.layers\.(\d+)\.", name)  # MTP layers are sliding
            sliding = self.geometry.sliding[int(layer[1])] if layer else True
            fused = self._values(f"{name[: match.start(1)]}qkv_proj.weight", dtype)
            return split_qkv(fused, self.geometry, sliding=sliding)["qkv".index(match[1])]
        return self._values(name, dtype)

    def _values(self, name: str, dtype: str) -> Array:
        info, raw = self.reader.index.tensors[name], self.reader.read(name)
        if dtype == "BF16":
            if info.dtype != "BF16":
                raise CheckpointError(f"{self.folder}: {name} is {info.dtype}, but every layout holds it as BF16")
            return raw.view(np.uint16).reshape(info.shape)
        if info.dtype == "F32":
            return raw.view(np.float32).reshape(info.shape)
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(info.shape)
