"""The values that options of the command line take."""

from __future__ import annotations

from enum import StrEnum


class Container(StrEnum):
    """`--container`; None lets recipe, format and source decide."""

    COMPRESSED_TENSORS = "compressed-tensors"
    NATIVE = "native"
    MODELOPT = "modelopt"


class Layout(StrEnum):
    """`synth --layout`: the published on-disk formats."""

    FLASH = "flash"
    V25 = "v2.5"
    PRO = "pro"


class Qkv(StrEnum):
    """`relayout --qkv`: how q, k and v lie on disk."""

    SPLIT = "split"
    CANONICAL = "canonical"
    INTERLEAVED = "interleaved"


class QkvDtype(StrEnum):
    """`relayout --dtype`."""

    SOURCE = "source"
    BF16 = "bf16"


class Engine(StrEnum):
    """`verify --engine`."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRANSFORMERS = "transformers"


class Server(StrEnum):
    """`launch --engine`: those that have a server."""

    VLLM = "vllm"
    SGLANG = "sglang"


class Gpu(StrEnum):
    """`launch --gpu`."""

    A100 = "a100"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"
    GB10 = "gb10"
