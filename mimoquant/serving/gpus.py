"""Kinds of GPU to serve on, and the kernels that engines run experts by on each of them, as data.

Key idea: a kernel is a row, like a contract: for which architectures it holds, whether the engine picks it by itself,
what it rounds activations to, and how that is known. No kind but the H100 and the H200 was tried by us; `launch` says
so of every other. What has no row is not known, and is said to be.

Left out: speed. Sources: vLLM 0.33 (layers/fused_moe/oracle and experts; v1/attention/backends), SGLang 0.5.23
(arg_groups/model_overrides/mimo_v2.py, layers/quantization), vLLM's recipes and SGLang's cookbook for this family
(2026-10); memory as drivers report it, rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

from mimoquant.serving import contracts as c


@dataclass(frozen=True, slots=True)
class Gpu:
    """`memory_gib`: what a process can have of one GPU; `node`: GPUs of one host; `fraction`: of it, what to give.

    `arch`: SM90 and so on, gfx942 and so on. `evidence`: of its attention back ends; `tried`: whether we ran any engine
    on this kind. `between_nodes`: variables that more than one host of them needs in SGLang.
    """

    label: str
    arch: str
    memory_gib: int
    node: int
    fraction: float
    vllm_attention: str  # what vLLM picks for heads of 192/128: FA3 or FA4 need SM90, SM100 or SM103
    sglang_attention: str  # of triton, fa3, fa4: no other takes keys and values of different widths
    evidence: str
    tried: bool = False
    between_nodes: tuple[tuple[str, str], ...] = ()

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def spark(self) -> bool:
        """Whether host and GPU share their memory, one GPU a host."""
        return self.node == 1


_TRITON, _FLASH = "TRITON_ATTN_DIFFKV", "FLASH_ATTN_DIFFKV"
_NVLINK_DOMAIN = (("NCCL_MNNVL_ENABLE", "1"), ("NCCL_CUMEM_ENABLE", "1"))  # SGLang's cookbook, V2.5-Pro on two GB300

GPUS = {
    "a100": Gpu("A100 80 GB", "SM80", 79, 8, 0.90, _TRITON, "triton", c.UNVERIFIED),
    "rtx3090": Gpu("RTX 3090", "SM86", 23, 8, 0.95, _TRITON, "triton", c.UNVERIFIED),
    "rtx4090": Gpu("RTX 4090", "SM89", 23, 8, 0.95, _TRITON, "triton", c.UNVERIFIED),
    "h100": Gpu("H100", "SM90", 79, 8, 0.90, _FLASH, "fa3", c.READ, tried=True),
    "h200": Gpu("H200", "SM90", 140, 8, 0.90, _FLASH, "fa3", c.READ, tried=True),
    "b200": Gpu("B200", "SM100", 178, 8, 0.90, _FLASH, "fa4", c.READ),
    "b300": Gpu("B300", "SM103", 267, 8, 0.90, _FLASH, "fa4", c.READ),
    "gb300": Gpu("GB300", "SM103", 267, 4, 0.90, _FLASH, "fa4", c.READ, between_nodes=_NVLINK_DOMAIN),
    "rtx-pro-6000": Gpu("RTX PRO 6000 Blackwell", "SM120", 95, 8, 0.95, _TRITON, "fa4", c.READ),
    "rtx5090": Gpu("RTX 5090", "SM120", 31, 8, 0.95, _TRITON, "fa4", c.UNVERIFIED),
    "gb10": Gpu("GB10 (DGX Spark)", "SM121", 119, 1, 0.86, _TRITON, "triton", c.UNVERIFIED),
    "mi300x": Gpu("MI300X", "gfx942", 191, 8, 0.90, _TRITON, "triton", c.READ),
    "mi325x": Gpu("MI325X", "gfx942", 255, 8, 0.90, _TRITON, "triton", c.READ),
    "mi355x": Gpu("MI355X", "gfx950", 287, 8, 0.90, _TRITON, "triton", c.READ),
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What runs experts of one subject on GPUs of `archs`.

    `name`: the back end as the engine calls it, None: it is not known, or `stops` says how the engine stops. `option`:
    the word for it where the command has to name it, in versions before `own_since` (None: in all). `log`: its line of
    the log. `rounds`: what it rounds activations to beside bf16 (FP8 where the checkpoint is FP8 is no rounding of
    ours). `shares`: whether it scales those by the largest input scale of a layer's experts, in place of each
    expert's own. `unasked`: where it does so though nothing in the checkpoint asks for that, in words. `ep`: only with
    (or without) expert parallelism. `deepep`: the runner that SGLang's cookbook names beside DeepEP, "" for none; None:
    it has no DeepEP there.
    """

    engine: str
    subject: str
    archs: tuple[str, ...]
    name: str | None
    evidence: str
    source: str
    option: str | None = None
    own_since: c.Version | None = None
    log: str | None = None
    rounds: str | None = None
    shares: bool = False
    unasked: str = ""
    stops: str = ""
    ep: bool | None = None
    environment: tuple[tuple[str, str], ...] = ()
    deepep: str | None = None

    def named(self, version: c.Version) -> str | None:
        """The word for it that the command of this version must have, or None."""
        return self.option if self.own_since is None or version < self.own_since else None


_AMPERE, _HOPPER = ("SM80", "SM86", "SM89"), ("SM90",)
_BLACKWELL, _SM12X = ("SM100", "SM103"), ("SM120", "SM121")
_NO_DEEP_GEMM = (("VLLM_USE_DEEP_GEMM", "0"),)  # its FP8 products are wrong on SM12x by several reports
_AITER = (("VLLM_ROCM_USE_AITER", "1"),)
_ORACLE = "fused_moe/oracle/{}.py of 0.33"
_SPARKS = "public deployments on GB10; DeepGEMM issue #417, vLLM pull request #53680 (disputed)"

_VLLM_MXFP4 = (
    Kernel(c.VLLM, c.NATIVE_MXFP4, _HOPPER, "MARLIN", c.RUN, "0.33 on an H200", log="Using 'MARLIN' Mxfp4 MoE backend"),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        _AMPERE,
        "MARLIN",
        c.UNVERIFIED,
        _ORACLE.format("mxfp4"),
        log="Using 'MARLIN' Mxfp4 MoE backend",
    ),
    Kernel(
        c.VLLM,
        c.NATIVE_MXFP4,
        _BLACKWELL,
        "FLASHINFER_TRTLLM_MXFP4_MXFP8",
        c.READ,
        f"{_ORACLE.format('mxfp4')}; its recipe for V2.6 is verified on GB300",
        log="Using 'FLASHINFER_TRTLLM_MXFP4_MXFP8' Mxfp4 MoE backend",
        rounds="MXFP8",
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
    ),
    Kernel(
        c.VLLM,
        c.CT_MXFP4,
        _HOPPER,
        "MarlinExperts",
        c.RUN,
        "0.33 on an H200, 0.26 on an H100",
        log="Using MarlinExperts for MXFP4 MoE",
    ),
    Kernel(
        c.VLLM,
        c.CT_MXFP4,
        _AMPERE,
        "MarlinExperts",
        c.READ,
        "compressed_tensors_moe_w4a4_mxfp4.py of 0.33",
        log="Using MarlinExperts for MXFP4 MoE",
    ),
    Kernel(
        c.VLLM,
        c.CT_MXFP4,
        (*_BLACKWELL, *_SM12X),
        "CutlassExpertsMxfp4",
        c.READ,
        "issue #56770 is open; compressed_tensors_moe_w4a4_mxfp4.py of 0.33 has no other choice there",
        log="Using CutlassExpertsMxfp4 for MXFP4 MoE",
        rounds="MXFP4",
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
    ),
    Kernel(
        c.VLLM,
        c.INT4,
        (*_AMPERE, *_SM12X),
        "MARLIN",
        c.READ,
        _ORACLE.format("int_wna16"),
        log="Using 'MARLIN' WNA16 MoE backend",
    ),
    Kernel(c.VLLM, c.INT4, _BLACKWELL, None, c.READ, f"{_ORACLE.format('int_wna16')}: Marlin, or FlashInfer for g32"),
    Kernel(c.VLLM, c.INT4_ASYMMETRIC, _HOPPER, "MARLIN", c.RUN, "0.33 on an H200"),
    *(
        Kernel(
            c.VLLM,
            subject,
            (*_AMPERE, *_BLACKWELL, *_SM12X),
            "MARLIN",
            c.READ,
            f"{_ORACLE.format('nvfp4')}: no other takes weights alone",
            log="Using 'MARLIN' NvFp4 MoE backend",
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
    ),
    Kernel(
        c.VLLM,
        c.MO_NVFP4,
        _HOPPER,
        "MARLIN",
        c.RUN,
        "0.33 on an H200",
        log="Using 'MARLIN' NvFp4 MoE backend",
    ),
    Kernel(
        c.VLLM,
        c.NVFP4_INPUTS,
        (*_AMPERE, *_HOPPER),
        "MARLIN",
        c.READ,
        _ORACLE.format("nvfp4"),
        log="Using 'MARLIN' NvFp4 MoE backend",
    ),
    Kernel(
        c.VLLM,
        c.NVFP4_INPUTS,
        _BLACKWELL,
        "FLASHINFER_TRTLLM",
        c.READ,
        f"{_ORACLE.format('nvfp4')}; utils/flashinfer_fp4_moe.py of 0.32",
        log="Using 'FLASHINFER_TRTLLM' NvFp4 MoE backend",
        rounds="NVFP4",
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
        rounds="NVFP4",
        shares=True,
    ),
    Kernel(c.VLLM, c.FP8, ("SM80", "SM86"), "MARLIN", c.READ, _ORACLE.format("fp8")),
    Kernel(
        c.VLLM,
        c.FP8,
        _HOPPER,
        "TRITON",
        c.RUN,
        "0.26 on an H100",
        log="Using TRITON Fp8 MoE backend",
        ep=False,
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
    ),
    Kernel(c.VLLM, c.FP8, _BLACKWELL, "FLASHINFER_TRTLLM", c.UNVERIFIED, _ORACLE.format("fp8")),
    Kernel(c.VLLM, c.FP8, _SM12X, None, c.UNVERIFIED, _SPARKS, environment=_NO_DEEP_GEMM),
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
        rounds="MXFP8",
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
    ),
    Kernel(
        c.SGLANG,
        c.NATIVE_MXFP4,
        _AMPERE,
        None,
        c.READ,
        _MARLIN_SMS,
        stops="stops with RuntimeError: its Marlin for MXFP4 requires SM90 or SM120",
    ),
    Kernel(c.SGLANG, c.MO_NVFP4, _HOPPER, "marlin", c.RUN, "0.5.23 on an H200"),
    Kernel(
        c.SGLANG,
        c.NVFP4_INPUTS,
        (*_AMPERE, *_HOPPER),
        "marlin",
        c.READ,
        "modelopt_quant.py and get_moe_scheme of 0.5.23: as without them",
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
        rounds="NVFP4",
        shares=True,
    ),
    Kernel(c.SGLANG, c.MO_NVFP4, ("SM80",), "marlin", c.READ, "modelopt_quant.py of 0.5.23"),
    Kernel(c.SGLANG, c.CT_NVFP4, _HOPPER, "CompressedTensorsW4A16Nvfp4MoE", c.RUN, "0.5.23 on an H200"),
    Kernel(
        c.SGLANG,
        c.MO_NVFP4,
        (*_BLACKWELL, *_SM12X),
        "marlin",
        c.UNVERIFIED,
        "modelopt_quant.py of 0.5.23: its own choice rounds activations to 4 bits, unscaled",
        option="marlin",
    ),
    Kernel(
        c.SGLANG,
        c.INT4,
        _HOPPER,
        "CompressedTensorsWNA16MarlinMoEMethod",
        c.RUN,
        "0.5.23 on an H200",
        log="Using CompressedTensorsWNA16MarlinMoEMethod",
    ),
    Kernel(
        c.SGLANG,
        c.INT4,
        ("SM80",),
        "CompressedTensorsWNA16MarlinMoEMethod",
        c.READ,
        "compressed_tensors.py of 0.5.23",
        log="Using CompressedTensorsWNA16MarlinMoEMethod",
    ),
    Kernel(
        c.SGLANG,
        c.INT4,
        _BLACKWELL,
        "CompressedTensorsWNA16TritonMoE",
        c.READ,
        "compressed_tensors.py of 0.5.23",
        log="Using CompressedTensorsWNA16TritonMoE",
    ),
    Kernel(
        c.SGLANG, c.FP8, _HOPPER, "triton", c.READ, f"{_OVERRIDES}; its cookbook for V2.5 on H100 and H200", deepep=""
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
    ),
)

KERNELS = (*_VLLM_MXFP4, *_VLLM_OTHERS, *_SGLANG)


def kernel(engine: str, subject: str, arch: str, ep: bool) -> Kernel | None:
    """What runs `subject` there, or None where nothing is known."""
    for row in KERNELS:
        if (row.engine, row.subject) == (engine, subject) and arch in row.archs and row.ep in (None, ep):
            return row
    return None


def unasked(engine: str, subject: str) -> Kernel | None:
    """A kernel that rounds activations on some kind of GPU, though nothing in such a checkpoint asks for that."""
    return next((row for row in KERNELS if (row.engine, row.subject) == (engine, subject) and row.unasked), None)
