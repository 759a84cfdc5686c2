"""Options that several verbs have, each described once; the values that options take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mimoquant.cli.terminal import hush
from mimoquant.shipped import shipped_recipes, shipped_sets


class Container(StrEnum):
    """`--container`; None lets recipe, format and source decide."""

    COMPRESSED_TENSORS = "compressed-tensors"
    NATIVE = "native"
    MODELOPT = "modelopt"


class Dense(StrEnum):
    """`--dense`: FP8 beside the experts, in ModelOpt's container."""

    BF16 = "bf16"
    FP8 = "fp8"


class InputScales(StrEnum):
    """`--input-scales`: of NVFP4 experts' activations."""

    NONE = "none"
    UNIT = "unit"
    CALIBRATED = "calibrated"


class Layout(StrEnum):
    """`synth --layout`: the published on-disk formats."""

    FLASH = "flash"
    V25 = "v2.5"
    PRO = "pro"


class Objective(StrEnum):
    """What codes are chosen for."""

    KL = "kl"
    OUTPUT = "output"


class Qkv(StrEnum):
    """`relayout --qkv`: how q, k and v lie on disk."""

    SPLIT = "split"
    CANONICAL = "canonical"
    INTERLEAVED = "interleaved"


class QkvDtype(StrEnum):
    """`relayout --dtype`."""

    SOURCE = "source"
    BF16 = "bf16"


class ExpertRounding(StrEnum):
    """`--activations`."""

    NONE = "none"
    FP8 = "fp8"
    MXFP8 = "mxfp8"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"


class Fp8Rounding(StrEnum):
    """`--dense-activations` and `--kv`."""

    NONE = "none"
    FP8 = "fp8"


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
    RTX3090 = "rtx3090"
    RTX4090 = "rtx4090"
    H100 = "h100"
    H200 = "h200"
    B200 = "b200"
    B300 = "b300"
    GB300 = "gb300"
    RTX_PRO_6000 = "rtx-pro-6000"
    RTX5090 = "rtx5090"
    GB10 = "gb10"
    MI300X = "mi300x"
    MI325X = "mi325x"
    MI355X = "mi355x"


DEVICES = ["auto", "cpu", "cuda"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", callback=hush, help="Print nothing on stderr but errors and hints.")
]
RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="The recipe: how to quantize. A shipped one's name, or a file.",
        metavar="NAME|FILE",
        autocompletion=shipped_recipes,
    ),
]
VersionOption = Annotated[
    str | None, typer.Option(help="The engine's version; by default the newest that is known here.", metavar="X")
]
UnknownOption = Annotated[
    bool,
    typer.Option("--allow-unknown", help="Copy tensors whose role is not known, instead of refusing the checkpoint."),
]
ContainerOption = Annotated[
    Container | None, typer.Option(help="How the quantized experts are stored; by default what fits their format.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        help="What the card names as base model: the source's repository on the Hub, where its files do not tell.",
        metavar="OWNER/NAME",
    ),
]
DenseOption = Annotated[
    Dense | None,
    typer.Option(help="What FP8 attention, dense MLP and MTP become with --container modelopt; by default bf16."),
]
InputScalesOption = Annotated[
    InputScales | None,
    typer.Option(
        help="Input scales of NVFP4 experts, whose activations engines then round to 4 bits too: none (weights only), "
        "1 for each, or by the calibration tokens."
    ),
]
MendOption = Annotated[
    bool,
    typer.Option(
        "--mend-json", help="Write JSON files that have a comma too many without it, instead of refusing them."
    ),
]
KeepSourceOption = Annotated[
    Path | None,
    typer.Option(
        "--keep-source",
        help="Keep a SOURCE on the Hub in this folder, as a download would; it must not exist.",
        metavar="DIR",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="What computes: auto, cpu or cuda. Without calibration the output is the same on both.",
        autocompletion=lambda: DEVICES,
    ),
]
GpuMemoryOption = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Limit the GPU's memory to so many GB; with less, fewer experts are computed at once.",
        metavar="GB",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Calibrate on this shipped set, file or folder instead of the recipe's; repeatable.",
        metavar="SET|FILE",
        autocompletion=shipped_sets,
    ),
]
DataColumnOption = Annotated[
    str | None, typer.Option(help="Read only this column of each record, as text or as a chat.", metavar="NAME")
]
SequencesOption = Annotated[
    int | None, typer.Option(min=1, help="Calibrate on at most so many sequences; by default as the recipe says.")
]
TokensOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens per calibration sequence; by default as the recipe says.")
]
RefineOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=100,
        help="Rounds in which gate, up and down of an expert are chosen anew together, after the method.",
        metavar="ROUNDS",
    ),
]
RefineLayersOption = Annotated[
    list[int] | None, typer.Option("--refine-layer", min=0, help="Refine only this layer; repeatable.", metavar="LAYER")
]
ObjectiveOption = Annotated[
    Objective | None,
    typer.Option(help="Choose codes for the loss (kl) or for what each projection answers; by default as the recipe."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on where an interrupted run stopped; a finished one is left as it is.")
]
PlaceOption = Annotated[str, typer.Option(help="What computes: auto, cpu or cuda.", autocompletion=lambda: DEVICES)]
HeldOutOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure on this: a shipped set, a file of text, records or ids, a folder of them; repeatable.",
        metavar="SET|FILE",
        autocompletion=shipped_sets,
    ),
]
HeldOutSequencesOption = Annotated[
    int | None, typer.Option(min=1, help="Measure on at most so many sequences; by default on all.")
]
ActivationsOption = Annotated[
    ExpertRounding | None,
    typer.Option(help="Round what goes into routed experts to this, as kernels do; NVFP4 by the stored input scales."),
]
DenseActivationsOption = Annotated[
    Fp8Rounding | None,
    typer.Option(
        help="Round what goes into attention and dense MLP where they are stored in FP8; such a model's states are "
        "stored in bf16 between operations then, as engines do."
    ),
]
KvOption = Annotated[Fp8Rounding | None, typer.Option(help="Round keys and values as an FP8 cache does.")]
AsServedOption = Annotated[
    str | None,
    typer.Option(
        help="Round what this engine's kernels round on this kind of GPU, such as vllm:b200.", metavar="ENGINE:GPU"
    ),
]
ReferenceAsServedOption = Annotated[
    bool, typer.Option("--reference-as-served", help="Round the reference too, not only the candidate.")
]
HeldOutTokensOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]


def option_value(choice: StrEnum | None) -> str | None:
    """What was chosen, as the functions behind the verbs take it."""
    return choice.value if choice else None
