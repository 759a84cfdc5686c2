"""Give checkpoints to a real vLLM on a CPU and keep what it answers. Runs in vLLM's own environment, not in ours.

    python vllm_judge.py JOBS.json      {"ids": [[token, ...], ...], "checkpoints": {name: folder}, "out": folder}

For each name there is then OUT/name.npy, float32 [sequences, tokens - 1, vocabulary], log-probabilities of the next
token, or none and the reason at the end of OUT/name.log. vLLM is imported once; each checkpoint has a forked process.

vLLM's own are the reading of config.json, the choice of a scheme for each module, the parameters, all that
`load_weights` does (fused qkv, gate and up, expert names, FP8 re-layout), attention, routing and the experts' product.
No CPU without AMX has a kernel for 4-bit experts or FP8 blocks, so what is replaced is the choice of a kernel: the
loaded parameters go through vLLM's own dequantizers into its unquantized experts and linear layers. All is float32
beside the weights. Added is a count of what was loaded into each expert's parameters, which vLLM does not check.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.flashinfer_moe_ep import _dequant_mxfp4_experts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend, convert_to_nvfp4_moe_kernel_format
from vllm.model_executor.layers.quantization import fp8, modelopt, mxfp4
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_mxfp4 as ct_mxfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as ct_nvfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as ct_fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as ct_int4,
)
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, scaled_dequantize

BLOCK = GroupShape(128, 128)
Experts = tuple[torch.Tensor, torch.Tensor]  # gate over up [E, 2I, H], down [E, H, I]


# --- what vLLM loaded into a layer's experts → matrices, by vLLM's own dequantizers


def int4(layer: Any) -> Experts:
    zero_points = (getattr(layer, f"{part}_weight_zero_point", None) for part in ("w13", "w2"))
    made = int_wna16._process_weights_emulation_gptq(
        layer.w13_weight_packed, layer.w2_weight_packed, layer.w13_weight_scale, layer.w2_weight_scale, *zero_points
    )
    return made[0], made[1]


def mxfp4_packed(layer: Any) -> Experts:
    return (
        _dequant_mxfp4_experts(layer.w13_weight_packed, layer.w13_weight_scale),
        _dequant_mxfp4_experts(layer.w2_weight_packed, layer.w2_weight_scale),
    )


def mxfp4_native(layer: Any) -> Experts:
    return (
        _dequant_mxfp4_experts(layer.w13_weight, layer.w13_weight_scale),
        _dequant_mxfp4_experts(layer.w2_weight, layer.w2_weight_scale),
    )


def nvfp4(layer: Any) -> Experts:
    """As the method itself does, gate's global scale counts for up too."""
    if hasattr(layer, "w13_input_global_scale"):
        tell_input_scales(layer, 1.0 / layer.w13_input_global_scale, 1.0 / layer.w2_input_global_scale)
    return (
        _nvfp4(layer.w13_weight_packed, layer.w13_weight_scale, 1.0 / layer.w13_weight_global_scale[:, 0]),
        _nvfp4(layer.w2_weight_packed, layer.w2_weight_scale, 1.0 / layer.w2_weight_global_scale),
    )


def nvfp4_modelopt(layer: Any) -> Experts:
    """The same, of multipliers."""
    if hasattr(layer, "w13_input_scale"):
        tell_input_scales(layer, layer.w13_input_scale, layer.w2_input_scale)
    return (
        _nvfp4(layer.w13_weight, layer.w13_weight_scale, layer.w13_weight_scale_2[:, 0]),
        _nvfp4(layer.w2_weight, layer.w2_weight_scale, layer.w2_weight_scale_2),
    )


def tell_input_scales(layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """What vLLM would divide a layer's activations by, into the log: its own choice among those of the experts."""
    weights = [torch.empty(0)] * 3
    made = convert_to_nvfp4_moe_kernel_format(NvFp4MoeBackend.EMULATION, layer, *weights, w13, *weights, w2, True)
    print("input scales", layer.layer_name, *(repr(1 / float(made[place])) for place in (3, 7)))


def _nvfp4(codes: torch.Tensor, scale: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    return dequantize_to_dtype(codes, scale, multiplier.contiguous(), torch.float32, swizzle=False)


def fp8_blocks(layer: Any) -> Experts:
    w13, w2 = (
        torch.stack([scaled_dequantize(*pair, BLOCK, torch.bfloat16) for pair in zip(weight, scale, strict=True)])
        for weight, scale in ((layer.w13_weight, layer.w13_weight_scale), (layer.w2_weight, layer.w2_weight_scale))
    )
    return w13, w2


class Fp8Linear:
    """In the place of an FP8 block kernel: the same weights and scales, activations as they are."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.dequantized = scaled_dequantize(layer.weight.data, layer.weight_scale_inv.data, BLOCK)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.dequantized, bias)


# --- the places where vLLM looks for a kernel


def install() -> None:
    """Put the dequantizers where a GPU's kernels would be chosen."""
    ct_int4.select_wna16_moe_backend = lambda **_: (int_wna16.WNA16MoEBackend.EMULATION, Int4EmulationTritonExperts)
    ct_nvfp4.select_nvfp4_moe_backend = lambda **_: (ct_nvfp4.NvFp4MoeBackend.MARLIN, Int4EmulationTritonExperts)
    modelopt.select_nvfp4_moe_backend = lambda **_: (ct_nvfp4.NvFp4MoeBackend.MARLIN, Int4EmulationTritonExperts)
    modelopt.ModelOptMixedPrecisionConfig.get_supported_act_dtypes = lambda self: [torch.float32]
    ct_fp8.select_fp8_moe_backend = lambda **_: (None, None)
    mxfp4.select_deepseek_v4_mxfp4_moe_backend = lambda moe: (mxfp4.Mxfp4MoeBackend.EMULATION, None)
    fp8.init_fp8_linear_kernel = lambda **_: Fp8Linear()
    fp8.Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])
    judge(ct_int4.CompressedTensorsWNA16MoEMethod, int4)
    judge(ct_mxfp4.CompressedTensorsW4A4Mxfp4MoEMethod, mxfp4_packed)
    judge(ct_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod, nvfp4)
    judge(modelopt.ModelOptNvFp4FusedMoE, nvfp4_modelopt)
    judge(ct_fp8.CompressedTensorsW8A8Fp8MoEMethod, fp8_blocks)
    judge(mxfp4.Mxfp4MoEMethod, mxfp4_native)
    judge(UnquantizedFusedMoEMethod, None)


def judge(method: Any, dequantize: Callable[[Any], Experts] | None) -> None:
    """Have a method count what its parameters are given, and end as unquantized experts; None: it is that already."""
    create, process = method.create_weights, method.process_weights_after_loading

    def create_weights(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        others = dict(layer.named_parameters(recurse=False))
        create(self, layer, *args, **kwargs)
        if getattr(self, "use_a16", False):  # parameters for activations that are not quantized
            for name in [name for name, _ in layer.named_parameters(recurse=False) if "_input_" in name]:
                delattr(layer, name)
        layer.given = {}
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in others:
                layer.given[name] = set()
                parameter.weight_loader = counted(parameter.weight_loader, layer.given[name])

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        if not hasattr(layer, "given"):  # made from dequantized weights below
            return process(self, layer)
        missing = list(never_given(layer))
        if missing:
            raise RuntimeError(f"{len(missing)} of the experts' tensors never came, {missing[0]} for one")
        loaded = layer.__dict__.pop("given")
        if dequantize is None:
            return process(self, layer)
        weights = dequantize(layer)
        for name in loaded:
            delattr(layer, name)
        for name, weight in zip(("w13_weight", "w2_weight"), weights, strict=True):
            setattr(layer, name, torch.nn.Parameter(weight.to(self.moe.in_dtype).contiguous(), requires_grad=False))
        plain = UnquantizedFusedMoEMethod(self.moe)
        layer._replace_quant_method(plain)
        return plain.process_weights_after_loading(layer)

    method.create_weights, method.process_weights_after_loading = create_weights, process_weights_after_loading


def counted(load: Callable[..., Any], given: set[tuple[int, str]]) -> Callable[..., Any]:
    def loader(parameter: Any, tensor: Any, name: str, shard_id: str, expert_id: int, **rest: Any) -> Any:
        given.add((expert_id, shard_id))
        return load(parameter, tensor, name, shard_id=shard_id, expert_id=expert_id, **rest)

    return loader


def never_given(layer: Any) -> Iterator[str]:
    for name, given in layer.given.items():
        for shard in ("w1", "w3") if name.startswith("w13") else ("w2",):
            for expert in range(layer.global_num_experts):
                if (expert, shard) not in given:
                    yield f"{layer.layer_name} expert {expert} {name} ({shard})"


# --- one checkpoint


def answer(checkpoint: str, ids: list[list[int]]) -> np.ndarray:
    """Log-probabilities of the whole vocabulary after all tokens but the last, float32 [sequences, tokens - 1, V]."""
    llm = LLM(
        checkpoint,
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(ids[0]) + 8,
        max_num_seqs=len(ids),
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=False,
        seed=0,
        model_loader_extra_config={"enable_weights_track": True},
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    replies = llm.generate([{"prompt_token_ids": sequence} for sequence in ids], asked, use_tqdm=False)
    out = np.full((len(ids), len(ids[0]), llm.llm_engine.model_config.get_vocab_size()), np.nan, np.float32)
    for rows, reply in zip(out, replies, strict=True):
        told = reply.prompt_logprobs
        for position, (begin, end) in enumerate(zip(told.start_indices, told.end_indices, strict=True)):
            rows[position, told.token_ids[begin:end]] = told.logprobs[begin:end]
    return out[:, 1:]


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    install()
    gc.freeze()  # or each child's collections go through all of vLLM
    for name, checkpoint in jobs["checkpoints"].items():
        if child := os.fork():
            os.waitpid(child, 0)
            continue
        code, out = 1, Path(jobs["out"], name)
        try:
            log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            np.save(out.with_suffix(".npy"), answer(checkpoint, jobs["ids"]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
