"""The values that options of the command line take."""

from __future__ import annotations

from enum import StrEnum


class Container(StrEnum):
    """`--container`; None lets recipe, format and source decide."""

    COMPRESSED_TENSORS = "compressed-tensors"
    NATIVE = "native"


class Layout(StrEnum):
    """`synth --layout`: the published on-disk formats."""

    FLASH = "flash"
    V25 = "v2.5"
    PRO = "pro"


class Engine(StrEnum):
    """`verify --engine`."""

    VLLM = "vllm"
    SGLANG = "sglang"
    TRANSFORMERS = "transformers"
