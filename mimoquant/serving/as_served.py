"""What an engine's kernels round beside a checkpoint's weights, on a kind of GPU: what `eval-kl --as-served` takes.

Key idea: experts' kernels are the rows of `kernels.KERNELS` that `launch` goes by; here are those of FP8 matrices
beside them. What no row tells is refused, and every answer says which kernel is meant and how that is known.
Left out: speed; weights that a kernel rounds again (in vLLM DeepGEMM's FP8 block scales become powers of two).
Sources: vLLM 0.33 (kernels/linear: scaled_mm, mxfp8), SGLang 0.5.23 (layers/quantization/fp8.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mimoquant.errors import UsageError
from mimoquant.model.served_rounding import FP8, FP8_UE8M0, MXFP8, NONE, Rounding
from mimoquant.serving import contracts as c
from mimoquant.serving.declared import Declared
from mimoquant.serving.gpus import GPUS, Gpu, Kernel
from mimoquant.serving.input_rounding import rounds_inputs
from mimoquant.serving.kernels import kernel
from mimoquant.serving.served import Served


@dataclass(frozen=True, slots=True)
class DenseKernel:
    """What multiplies matrices in FP8 (`stored`: in blocks of 128 x 128, or MXFP8), and rounds inputs to `rounds`."""

    engine: str
    stored: str
    archs: tuple[str, ...]
    name: str
    rounds: str
    evidence: str
    source: str
    stops: str = ""  # how the engine stops there, or why it cannot be measured


_OLD, _HOPPER, _BLACKWELL, _SM12X = ("SM80", "SM86", "SM89"), ("SM90",), ("SM100", "SM103"), ("SM120", "SM121")
_AMD = ("gfx942", "gfx950")
_LINEAR, _SGLANG_FP8 = "kernels/linear of 0.33", "quantization/fp8.py of 0.5.23"
_SGLANG_MXFP8 = "fp8_utils.py of 0.5.23, resolve_mxfp8_dense_gemm_backend"
_NO_MXFP8 = "stops with RuntimeError: its MXFP8 kernels begin with SM90"
_GROUPS_OF_32 = "rounds groups of 32 by float32 scales, which cannot be measured here"
DENSE_KERNELS = (
    DenseKernel(c.VLLM, FP8, _OLD, "Marlin", NONE, c.READ, _LINEAR),
    DenseKernel(
        c.VLLM,
        FP8,
        _HOPPER,
        "DeepGEMM",
        FP8_UE8M0,
        c.READ,
        f"{_LINEAR}; without DeepGEMM CUTLASS, whose scales are float32",
    ),
    DenseKernel(c.VLLM, FP8, _BLACKWELL, "DeepGEMM", FP8_UE8M0, c.READ, _LINEAR),
    DenseKernel(c.VLLM, FP8, _SM12X, "CUTLASS", FP8, c.UNVERIFIED, _LINEAR),
    DenseKernel(c.VLLM, FP8, _AMD, "Triton, or AITER where that is asked for,", FP8, c.READ, "kernels/linear of 0.32"),
    DenseKernel(c.VLLM, MXFP8, ("gfx942",), "a product in bf16", NONE, c.READ, "kernels/linear/mxfp8 of 0.32"),
    DenseKernel(c.VLLM, MXFP8, ("gfx950",), "its own MX product", MXFP8, c.READ, "kernels/linear/mxfp8 of 0.32"),
    DenseKernel(c.VLLM, MXFP8, (*_OLD, *_HOPPER), "Marlin", NONE, c.READ, _LINEAR),
    DenseKernel(c.VLLM, MXFP8, _BLACKWELL, "FlashInfer", MXFP8, c.READ, _LINEAR),
    DenseKernel(c.VLLM, MXFP8, _SM12X, "FlashInfer's CUTLASS", MXFP8, c.UNVERIFIED, _LINEAR),
    DenseKernel(c.SGLANG, FP8, ("SM80", "SM86"), "Marlin", NONE, c.READ, _SGLANG_FP8),
    DenseKernel(c.SGLANG, FP8, ("SM89", *_HOPPER, *_SM12X, *_AMD), "its own choice", FP8, c.UNVERIFIED, _SGLANG_FP8),
    DenseKernel(c.SGLANG, FP8, _BLACKWELL, "DeepGEMM", FP8_UE8M0, c.UNVERIFIED, _SGLANG_FP8),
    DenseKernel(c.SGLANG, MXFP8, (*_BLACKWELL, *_SM12X), "FlashInfer", MXFP8, c.READ, _SGLANG_MXFP8),
    DenseKernel(c.SGLANG, MXFP8, ("gfx950",), "its own MX product", MXFP8, c.READ, _SGLANG_MXFP8),
    DenseKernel(c.SGLANG, MXFP8, _HOPPER, "DeepGEMM", FP8, c.READ, _SGLANG_MXFP8, _GROUPS_OF_32),
    DenseKernel(c.SGLANG, MXFP8, _OLD, "none", NONE, c.READ, _SGLANG_MXFP8, _NO_MXFP8),
)


def parse_place(text: str) -> tuple[str, str]:
    """`vllm:b200` as engine and kind of GPU. Raises UsageError for what is neither."""
    engine, _, gpu = text.partition(":")
    if engine not in (c.VLLM, c.SGLANG) or gpu not in GPUS:
        raise UsageError(
            f"--as-served {text}: expected is ENGINE:GPU, such as vllm:b200",
            hint=f"engines are vllm and sglang; GPUs are {', '.join(GPUS)}",
        )
    return engine, gpu


def as_served(checkpoint: Served, engine: str, gpu: str, *, cache: bool) -> tuple[Rounding, tuple[str, ...]]:
    """What is rounded there, and sentences that say by which kernels and how that is known.

    Args:
        cache: whether the checkpoint's config asks for an FP8 cache; engines take none by themselves.
    Raises UsageError: it is not known what runs these experts there, or nothing does.
    """
    place, label = GPUS[gpu], f"{c.ENGINES[engine].label} {c.ENGINES[engine].read}"
    on, known = f"{label} on {place.label} ({place.arch})", []
    kinds: dict[int, str] = {}
    for subject, layers in _by_subject(checkpoint, engine).items():
        row = _expert_kernel(engine, subject, place, on)
        kind = NONE if row is None else row.rounds
        kinds |= dict.fromkeys(layers, kind)
        if row is not None:
            known.append(_told(on, f"{subject} experts", row.name or "whatever it takes", kind, row.rounds_told))
    dense = NONE
    for stored in sorted(_dense_stored(checkpoint)):
        found = _dense_kernel(engine, stored, place, on)
        dense = FP8 if found.rounds == MXFP8 else found.rounds
        told = f"{'not verified' if found.evidence == c.UNVERIFIED else found.evidence}: {found.source}"
        known.append(_told(on, f"{stored} beside the experts", found.name, found.rounds, told))
    if not place.tried:
        known.append(f"not tried by us: any engine on {place.label} ({place.arch})")
    usual = next(iter(kinds.values()), NONE)
    others = tuple((layer, kind) for layer, kind in sorted(kinds.items()) if kind != usual)
    return Rounding(usual, dense, FP8 if cache else NONE, others), tuple(known)


def kernel_subject(checkpoint: Served, engine: str, subject: str) -> str:
    """The subject that kernels go by: NVFP4 whose config.json asks for activations in it, and which has their scales,
    is one of its own."""
    asks = checkpoint.input_scales and subject in c.NVFP4 and rounds_inputs(Declared(checkpoint, engine))
    return c.NVFP4_INPUTS if asks else subject


def _by_subject(checkpoint: Served, engine: str) -> dict[str, list[int]]:
    """The layers whose experts a kernel runs by one subject, the most common first."""
    found: dict[str, list[int]] = {}
    for layer, forms in checkpoint.experts.items():
        if forms:
            found.setdefault(kernel_subject(checkpoint, engine, forms[0].subject), []).append(layer)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def _expert_kernel(engine: str, subject: str, place: Gpu, on: str) -> Kernel | None:
    if subject == c.BF16:
        return None
    row = kernel(engine, subject, place.arch, ep=False)
    if row is None:
        raise _not_known(f"{subject} experts", on)
    if row.stops:
        raise UsageError(f"{on}: with {subject} experts it {row.stops}", hint="another kind of GPU, or another format")
    return row


def _dense_stored(checkpoint: Served) -> Iterator[str]:
    """In which kinds of FP8 matrices beside the experts are."""
    if "F8_E4M3" in checkpoint.linears.values():
        yield MXFP8 if checkpoint.geometry.mxfp8 and not checkpoint.modelopt_blocks else FP8


def _dense_kernel(engine: str, stored: str, place: Gpu, on: str) -> DenseKernel:
    for row in DENSE_KERNELS:
        if (row.engine, row.stored) == (engine, stored) and place.arch in row.archs:
            if row.stops:
                raise UsageError(f"{on}: with {stored} beside the experts it {row.stops}", hint="another kind of GPU")
            return row
    raise _not_known(f"{stored} beside the experts", on)


def _not_known(what: str, on: str) -> UsageError:
    return UsageError(
        f"{on}: what multiplies {what} is not known here",
        hint="say what is rounded: --activations, --dense-activations",
    )


def _told(on: str, what: str, name: str, kind: str, how: str) -> str:
    rounding = "inputs not rounded" if kind == NONE else f"inputs rounded to {kind}"
    return f"{on}: {what} by {name}, {rounding} ({how})"
