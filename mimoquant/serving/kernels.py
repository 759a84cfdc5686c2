"""The kernels that engines run experts by, on each kind of GPU, as data.

Key idea: a kernel is a row, like a contract: for which architectures it holds, whether the engine picks it by itself,
what it rounds activations to, and how that is known. What has no row is not known, and is said to be.

Left out: speed. Sources: vLLM 0.33 (layers/fused_moe/oracle and experts), SGLang 0.5.23
(arg_groups/model_overrides/mimo_v2.py, layers/quantization), vLLM's recipes and SGLang's cookbook for this family
(2026-10).
"""

from __future__ import annotations

from mimoquant.model.served_rounding import FP8, FP8_UE8M0, MXFP4, MXFP8, NONE, NVFP4
from mimoquant.serving import contracts as c
from mimoquant.serving.gpus import Kernel

_AMPERE, _HOPPER = ("SM80", "SM86", "SM89"), ("SM90",)
_BLACKWELL, _SM12X = ("SM100", "SM103"), ("SM120", "SM121")
_NO_DEEP_GEMM = (("VLLM_USE_DEEP_GEMM", "0"),)  # its FP8 products are wrong on SM12x by several reports
_AITER = (("VLLM_ROCM_USE_AITER", "1"),)
_ORACLE = "fused_moe/oracle/{}.py of 0.33"
_DEEP_GEMM = (
    "fp8_utils.py and utils/deep_gemm.py of 0.32: scales are powers of two wherever DeepGEMM can be loaded, which its "
    "wheels bring"
)
_AMD = ("gfx942", "gfx950")  # gfx942's own E4M3 is half of the other's, element by element: the same products
_SPARKS = "public deployments on GB10; DeepGEMM issue #417, vLLM pull request #53680 (disputed)"

_VLLM_MXFP4 = (
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        _HOPPER,
        "MARLIN",
        c.RUN,
        "0.33 on an H200",
        log="Using 'MARLIN' Mxfp4 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        _AMPERE,
        "MARLIN",
        c.UNVERIFIED,
        _ORACLE.format("mxfp4"),
        log="Using 'MARLIN' Mxfp4 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        _BLACKWELL,
        "FLASHINFER_TRTLLM_MXFP4_MXFP8",
        c.READ,
        f"{_ORACLE.format('mxfp4')}; its recipe for V2.6 is verified on GB300",
        log="Using 'FLASHINFER_TRTLLM_MXFP4_MXFP8' Mxfp4 MoE backend",
        rounds=MXFP8,
    ),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        _SM12X,
        "MARLIN",
        c.UNVERIFIED,
        _SPARKS,
        option="marlin",
        log="Using 'MARLIN' Mxfp4 MoE backend",
        environment=_NO_DEEP_GEMM,
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        ("gfx942",),
        "AITER_TRITON_MXFP4_BF16",
        c.READ,
        "its recipe for V2.6, verified there; pull request #58262: emulation is 6.5 times slower",
        option="aiter_triton_mxfp4_bf16",
        log="Using 'AITER_TRITON_MXFP4_BF16' Mxfp4 MoE backend",
        environment=_AITER,
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        ("gfx950",),
        "AITER_MXFP4_BF16",
        c.READ,
        f"{_ORACLE.format('mxfp4')}; its recipe for V2.6 is verified there",
        log="Using 'AITER_MXFP4_BF16' Mxfp4 MoE backend",
        environment=_AITER,
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.CT_MXFP4,
        _HOPPER,
        "MarlinExperts",
        c.RUN,
        "0.33 on an H200, 0.26 on an H100",
        log="Using MarlinExperts for MXFP4 MoE",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.CT_MXFP4,
        _AMPERE,
        "MarlinExperts",
        c.READ,
        "compressed_tensors_moe_w4a4_mxfp4.py of 0.33",
        log="Using MarlinExperts for MXFP4 MoE",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.CT_MXFP4,
        (*_BLACKWELL, *_SM12X),
        "CutlassExpertsMxfp4",
        c.READ,
        "issue #56770 is open; compressed_tensors_moe_w4a4_mxfp4.py of 0.33 has no other choice there",
        log="Using CutlassExpertsMxfp4 for MXFP4 MoE",
        rounds=MXFP4,
        unasked="SM100 and newer",
    ),
)

_VLLM_OTHERS = (
    Kernel(
        c.VLLM,
        c.INT4,
        _HOPPER,
        "MARLIN",
        c.RUN,
        "0.33 on an H200, 0.26 on an H100",
        log="Using 'MARLIN' WNA16 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.INT4,
        (*_AMPERE, *_SM12X),
        "MARLIN",
        c.READ,
        _ORACLE.format("int_wna16"),
        log="Using 'MARLIN' WNA16 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.INT4,
        _BLACKWELL,
        None,
        c.READ,
        f"{_ORACLE.format('int_wna16')}: Marlin, or FlashInfer for g32",
        rounds=NONE,
    ),
    Kernel(c.VLLM, c.INT4_ASYMMETRIC, _HOPPER, "MARLIN", c.RUN, "0.33 on an H200", rounds=NONE),
    *(
        Kernel(
            c.VLLM,
            subject,
            (*_AMPERE, *_BLACKWELL, *_SM12X),
            "MARLIN",
            c.READ,
            f"{_ORACLE.format('nvfp4')}: no other takes weights alone",
            log="Using 'MARLIN' NvFp4 MoE backend",
            rounds=NONE,
        )
        for subject in c.NVFP4
    ),
    Kernel(
        c.VLLM,
        c.CT_NVFP4,
        _HOPPER,
        "MARLIN",
        c.RUN,
        "0.33 on an H200, 0.26 on an H100",
        log="Using 'MARLIN' NvFp4 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.MO_NVFP4,
        _HOPPER,
        "MARLIN",
        c.RUN,
        "0.33 on an H200",
        log="Using 'MARLIN' NvFp4 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NVFP4_INPUTS,
        _AMPERE,
        "MARLIN",
        c.READ,
        _ORACLE.format("nvfp4"),
        log="Using 'MARLIN' NvFp4 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NVFP4_INPUTS,
        _HOPPER,
        "MARLIN",
        c.RUN,
        "0.33 on an H200: KL 1.7e-5 to weights alone",
        log="Using 'MARLIN' NvFp4 MoE backend",
        rounds=NONE,
    ),
    Kernel(
        c.VLLM,
        c.NVFP4_INPUTS,
        _BLACKWELL,
        "FLASHINFER_TRTLLM",
        c.READ,
        f"{_ORACLE.format('nvfp4')}; utils/flashinfer_fp4_moe.py of 0.32",
        log="Using 'FLASHINFER_TRTLLM' NvFp4 MoE backend",
        rounds=NVFP4,
        shares=True,
    ),
    Kernel(
        c.VLLM,
        c.NVFP4_INPUTS,
        _SM12X,
        "FLASHINFER_CUTLASS",
        c.READ,
        f"{_ORACLE.format('nvfp4')}; public casts of V2.6 name it",
        log="Using 'FLASHINFER_CUTLASS' NvFp4 MoE backend",
        rounds=NVFP4,
        shares=True,
    ),
    Kernel(c.VLLM, c.FP8, ("SM80", "SM86"), "MARLIN", c.READ, _ORACLE.format("fp8"), rounds=NONE),
    Kernel(
        c.VLLM,
        c.FP8,
        _HOPPER,
        "TRITON",
        c.RUN,
        "0.33 on an H200 without DeepGEMM, 0.26 on an H100",
        log="Using TRITON Fp8 MoE backend",
        ep=False,
        rounds=FP8_UE8M0,
        rounds_by=_DEEP_GEMM,
    ),
    Kernel(
        c.VLLM,
        c.FP8,
        _HOPPER,
        "FLASHINFER_CUTLASS",
        c.READ,
        _ORACLE.format("fp8"),
        log="Using FLASHINFER_CUTLASS Fp8 MoE backend",
        ep=True,
        rounds=FP8,
    ),
    Kernel(
        c.VLLM,
        c.FP8,
        _BLACKWELL,
        "FLASHINFER_TRTLLM",
        c.UNVERIFIED,
        _ORACLE.format("fp8"),
        rounds=FP8_UE8M0,
        rounds_by=f"{_DEEP_GEMM}; what goes into down by its own scales, in float32",
    ),
    Kernel(c.VLLM, c.FP8, _SM12X, None, c.UNVERIFIED, _SPARKS, environment=_NO_DEEP_GEMM, rounds=FP8),
    Kernel(c.VLLM, c.FP8, ("SM89",), "TRITON", c.READ, "fused_moe/oracle/fp8.py of 0.32", rounds=FP8),
    Kernel(
        c.VLLM,
        c.FP8,
        _AMD,
        "TRITON",
        c.READ,
        "fused_moe/oracle/fp8.py of 0.32: AITER is for whoever asks for it, and rounds the same groups",
        rounds=FP8,
    ),
)

_OVERRIDES = "model_overrides/mimo_v2.py of 0.5.23"
_MARLIN_SMS = "mxfp4_marlin_moe.py of 0.5.23"

_SGLANG = (
    Kernel(
        c.SGLANG,
        c.NATIVE_MXFP4,
        _HOPPER,
        "marlin",
        c.RUN,
        f"0.5.23 on an H200; {_OVERRIDES}; its cookbook names it on H200",
        option="marlin",
        own_since=(0, 5, 23),
        log="MiMoV2 on SM90: moe_runner_backend=marlin.",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.NATIVE_MXFP4,
        _BLACKWELL,
        "flashinfer_mxfp4",
        c.READ,
        _OVERRIDES,
        option="flashinfer_mxfp4",
        own_since=(0, 5, 23),
        log="MiMoV2 on SM100: moe_runner_backend=flashinfer_mxfp4.",
        rounds=MXFP8,
        deepep="deep_gemm",
    ),
    Kernel(
        c.SGLANG,
        c.NATIVE_MXFP4,
        _SM12X,
        "marlin",
        c.READ,
        f"pull request #40722 is open: left to itself it takes FP8's path, whose scales are float32; {_MARLIN_SMS}",
        option="marlin",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.NATIVE_MXFP4,
        _AMPERE,
        None,
        c.READ,
        _MARLIN_SMS,
        stops="stops with RuntimeError: its Marlin for MXFP4 requires SM90 or SM120",
        rounds=NONE,
    ),
    Kernel(c.SGLANG, c.MO_NVFP4, _HOPPER, "marlin", c.RUN, "0.5.23 on an H200", rounds=NONE),
    Kernel(
        c.SGLANG,
        c.NVFP4_INPUTS,
        (*_AMPERE, *_HOPPER),
        "marlin",
        c.READ,
        "modelopt_quant.py and get_moe_scheme of 0.5.23: as without them",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.NVFP4_INPUTS,
        _BLACKWELL,
        "flashinfer_trtllm",
        c.READ,
        "modelopt_quant.py of 0.5.23: left to itself it runs this one on weights that it did not lay out for it; "
        "compressed_tensors_w4a4_nvfp4_moe.py, where left to itself it takes each expert's own scale",
        option="flashinfer_trtllm",
        rounds=NVFP4,
        shares=True,
    ),
    Kernel(c.SGLANG, c.MO_NVFP4, ("SM80",), "marlin", c.READ, "modelopt_quant.py of 0.5.23", rounds=NONE),
    Kernel(c.SGLANG, c.CT_NVFP4, _HOPPER, "CompressedTensorsW4A16Nvfp4MoE", c.RUN, "0.5.23 on an H200", rounds=NONE),
    Kernel(
        c.SGLANG,
        c.MO_NVFP4,
        (*_BLACKWELL, *_SM12X),
        "marlin",
        c.UNVERIFIED,
        "modelopt_quant.py of 0.5.23: its own choice rounds activations to 4 bits, unscaled",
        option="marlin",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.INT4,
        _HOPPER,
        "CompressedTensorsWNA16MarlinMoEMethod",
        c.RUN,
        "0.5.23 on an H200",
        log="Using CompressedTensorsWNA16MarlinMoEMethod",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.INT4,
        ("SM80",),
        "CompressedTensorsWNA16MarlinMoEMethod",
        c.READ,
        "compressed_tensors.py of 0.5.23",
        log="Using CompressedTensorsWNA16MarlinMoEMethod",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.INT4,
        _BLACKWELL,
        "CompressedTensorsWNA16TritonMoE",
        c.READ,
        "compressed_tensors.py of 0.5.23",
        log="Using CompressedTensorsWNA16TritonMoE",
        rounds=NONE,
    ),
    Kernel(
        c.SGLANG,
        c.FP8,
        _HOPPER,
        "triton",
        c.READ,
        f"{_OVERRIDES}; its cookbook for V2.5 on H100 and H200",
        deepep="",
        rounds=FP8,
    ),
    Kernel(
        c.SGLANG,
        c.FP8,
        _BLACKWELL,
        "flashinfer_trtllm",
        c.READ,
        f"{_OVERRIDES}; its cookbook for V2.5, verified on B200 and GB300",
        option="flashinfer_trtllm",
        own_since=(0, 5, 17),
        log="MiMoV2 on SM100: moe_runner_backend=flashinfer_trtllm.",
        rounds=FP8,
    ),
    Kernel(
        c.SGLANG,
        c.FP8,
        ("SM89", *_SM12X, *_AMD),
        None,
        c.UNVERIFIED,
        "moe_runner/triton.py and aiter.py of 0.5.23: either rounds groups of 128",
        rounds=FP8,
    ),
)

KERNELS = (*_VLLM_MXFP4, *_VLLM_OTHERS, *_SGLANG)


def rounding_words(kind: str) -> str:
    """A kind of rounding, as people write it."""
    return "FP8 under powers of two" if kind == FP8_UE8M0 else kind.upper()


def kernel(engine: str, subject: str, arch: str, ep: bool) -> Kernel | None:
    """What runs `subject` there, or None where nothing is known."""
    for row in KERNELS:
        if (row.engine, row.subject) == (engine, subject) and arch in row.archs and row.ep in (None, ep):
            return row
    return None


def unasked(engine: str, subject: str) -> Kernel | None:
    """A kernel that rounds activations on some kind of GPU, though nothing in such a checkpoint asks for that."""
    return next((row for row in KERNELS if (row.engine, row.subject) == (engine, subject) and row.unasked), None)
