"""Have SGLang's own loader read checkpoints on a CPU, at any TP (of which EP for experts), and keep what it made.

    python sglang_loader.py JOBS.json      [{"checkpoint": ..., "tp": n, "ep": n, "backend": ..., "out": ...}, ...]

For each job there is then OUT/rank<r>.safetensors with every parameter of that rank, or the reason at the end of
OUT/rank<r>.log. Ranks are processes of one gloo group, forked after SGLang is imported once. `backend`: of the experts.

SGLang's own are ModelConfig, the quantization config and its choice of a scheme for each module, `MiMoV2ForCausalLM`
and all of its `load_weights`. Its package is installed without what it requires (PYTHONPATH says where) and runs in
vLLM's environment; a stub stands for the packages that importing names and loading does not use. Nothing is computed:
there are no kernels here, and weights stay as loaded.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.processing_auto  # noqa: F401  (looks for torchvision, and must not find the stub)
from safetensors.torch import load_file, save_file

STUBS = {"torchvision", "IPython", "traitlets", "orjson", "sgl_kernel", "gguf"}


class NothingType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=NothingType):
    """Can be named, called, subclassed and used as a decorator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        return getattr(Nothing, name)


class Stub(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        return getattr(Nothing, name)


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so what is installed is not stubbed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STUBS else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


sys.meta_path.append(StubFinder())

from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.layers.dp_attention import initialize_dp_attention  # noqa: E402
from sglang.srt.layers.moe.utils import initialize_moe_config  # noqa: E402
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from sglang.srt.model_loader.loader import _get_quantization_config  # noqa: E402
from sglang.srt.models.mimo_v2 import MiMoV2ForCausalLM  # noqa: E402
from sglang.srt.runtime_context import derive_spawn_ranks, get_context, get_parallel  # noqa: E402

HOPPER = 90  # what a scheme is told where it asks for the GPU; there is none
CompressedTensorsConfig._check_scheme_supported = lambda self, least, error=True: least <= HOPPER


def load(checkpoint: str, tp: int, ep: int, backend: str, rank: int, meeting: Path) -> dict[str, torch.Tensor]:
    """The parameters of one rank, as SGLang's loader leaves them."""
    arguments = get_context().override_server_args(
        device="cpu", model_path=checkpoint, trust_remote_code=True, tp_size=tp, ep_size=ep, moe_runner_backend=backend
    )
    arguments = arguments.install()
    initialize_moe_config()
    get_parallel().override_permanently(
        **derive_spawn_ranks(
            world_rank=rank,
            tp_size=tp,
            ep_join_rank_offset=0,
            attn_cp_size=1,
            attn_tp_size=tp,
            moe_dp_size=1,
            moe_ep_size=ep,
        )
    )
    parallel_state.init_distributed_environment(tp, rank, f"file://{meeting}", rank, "gloo")
    parallel_state.initialize_model_parallel()
    initialize_dp_attention(arguments)
    config = ModelConfig(checkpoint, trust_remote_code=True, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    model = MiMoV2ForCausalLM(config.hf_config, quant_config=_get_quantization_config(config, LoadConfig()))
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    model.load_weights((name, tensor) for file in files for name, tensor in load_file(file).items())
    return {name: parameter.data.contiguous() for name, parameter in model.named_parameters()}


def child(job: dict[str, Any], rank: int) -> int:
    """A process that is one rank of a job; its id."""
    if pid := os.fork():
        return pid
    out, code = Path(job["out"]), 1
    try:
        log = os.open(out / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        made = load(job["checkpoint"], job["tp"], job["ep"], job["backend"], rank, out / "meeting")
        save_file(made, out / f"rank{rank}.safetensors")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    gc.freeze()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        Path(job["out"]).mkdir()
        for pid in [child(job, rank) for rank in range(job["tp"])]:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
