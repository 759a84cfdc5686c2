"""Kinds of GPU to serve on, as data, and what a kernel is there. The kernels that engines run experts by: `kernels`.

No kind but the H100 and the H200 was tried by us; `launch` says so of every other. Left out: speed. Sources: vLLM 0.33
(v1/attention/backends), SGLang 0.5.23 (arg_groups/model_overrides/mimo_v2.py); memory as drivers report it, rounded
down.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    the log. `rounds`: what it rounds activations to, a kind of `model.served_rounding`, known as the rest of the row
    is; said of every row; `rounds_by`: where that was read, where it is not in `source`. `shares`: whether it scales
    those by the largest input scale of a layer's experts, in place of each expert's own. `unasked`: where it does so
    though nothing in the checkpoint asks for that, in words. `ep`: only with (or without) expert parallelism.
    `deepep`: the runner that SGLang's cookbook names beside DeepEP, "" for none; None: it has no DeepEP there.
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
    rounds: str = field(kw_only=True)
    rounds_by: str = ""
    shares: bool = False
    unasked: str = ""
    stops: str = ""
    ep: bool | None = None
    environment: tuple[tuple[str, str], ...] = ()
    deepep: str | None = None

    @property
    def rounds_told(self) -> str:
        """How it is known what it rounds."""
        if self.rounds_by:
            return f"{c.READ}: {self.rounds_by}"
        return f"{'not verified' if self.evidence == c.UNVERIFIED else self.evidence}: {self.source}"

    def named(self, version: c.Version) -> str | None:
        """The word for it that the command of this version must have, or None."""
        return self.option if self.own_since is None or version < self.own_since else None
