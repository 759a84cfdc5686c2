"""Make vLLM's class for omni models importable, and its kernels runnable, on a CPU without torchvision.

Import it first. The kernel for a vision block's window is written in triton, which has no compiler for a CPU: triton's
own interpreter runs it, the same code. Of transformers' image processor for Qwen2-VL there are two, on torchvision and
on Pillow, with one rule for sizes, which is all that vLLM takes from it.
"""

from __future__ import annotations

import os
import sys

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl as of_pillow
import triton
import triton.language as tl
import vllm.triton_utils

sys.modules["transformers.models.qwen2_vl.image_processing_qwen2_vl"] = of_pillow
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
