"""Fixtures for all tests: where the shared material lies, and small checkpoints made on the spot.

The tiny checkpoints go through the safetensors library, not through our writer, and hold random bytes of the right
dtype: enough for everything that looks at names, shapes and layout.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# A machine that is busy draws slowly, which is no fault of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; torch's threads would fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job's, which the programs we start would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
ENGINES = (".vllm-cpu", ".sglang-cpu")  # environments; scripts/setup_sglang makes both


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow`, `gpu` and `engine` tests run only where `-m` asks for them."""
    if config.getoption("markexpr"):
        return
    for item in items:
        for marker in ("slow", "gpu", "engine"):
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: run with -m {marker}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without the engines their tests are skipped; not in CI, which makes them: a skip there would hide the suite."""
    missing = [name for name in ENGINES if not (REPOSITORY / name / ".setup").exists()]
    if missing and item.get_closest_marker("engine"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{missing[0]} is missing (scripts/setup_sglang)")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of fixtures and models beside the repository; tests that need it are skipped in a lone clone."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder is not beside this clone")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def calibration_tokens_are_made_once() -> Iterator[None]:
    """What runs take from the shipped sets: to make it takes a fifth of a second, as long as a small run itself.

    Only where a run looks its recipe's tokens up, and where nothing but plain files lies beside the tokenizer: whoever
    calls `load_tokens` gets its own, and so does a folder with links or with other files.
    """
    from mimoquant.calibration import tokens
    from mimoquant.shipped import shipped_sets

    load, made = tokens.load_tokens, {}

    def once(data: Sequence[str], folder: Path, **settings: Any) -> tokens.TokenSet:
        beside = sorted(path for path in folder.iterdir() if path.suffix != ".safetensors")
        if not set(data) <= set(shipped_sets()) or any(path.is_symlink() or not path.is_file() for path in beside):
            return load(data, folder, **settings)
        key = (*data, *settings.items(), *((path.name, path.read_bytes()) for path in beside))
        if key not in made:
            made[key] = load(data, folder, **settings)
        return replace(made[key], ids=made[key].ids.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "load_tokens", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def disks_need_not_be_waited_for() -> Iterator[None]:
    """No test cuts the power: what fsync makes durable is shown by a model of a disk, which notes its calls. A tenth of
    the suite's time would be spent on waiting for it. Other processes, those that are killed among them, do wait."""

    def checked(descriptor: int) -> None:
        os.fstat(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", checked)
        yield


@pytest.fixture(scope="session", autouse=True)
def the_command_line_is_made_once() -> Iterator[None]:
    """Of the app, not with each call of the runner: that takes as long as many a verb on a small checkpoint."""
    import typer.testing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
        yield


# --- tiny checkpoints -------------------------------------------------------------------------------------------------

_TORCH_DTYPES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F32": "float32", "U8": "uint8", "I32": "int32"}
_TORCH_DTYPES |= {"F16": "float16", "F8_E5M2": "float8_e5m2", "U32": "uint32"}


@dataclass(frozen=True)
class TensorBytes:
    """One tensor of a checkpoint to be written; `data` is little-endian bytes of `dtype`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def random(cls, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> TensorBytes:
        """Finite values: bf16 and F32 around 0.02, FP8 any code but NaN."""
        count = math.prod(shape)
        if dtype == "F8_E4M3":
            codes = rng.integers(0, 0x7F, count, dtype=np.uint8) | (rng.integers(0, 2, count, dtype=np.uint8) << 7)
            return cls(dtype, shape, codes.astype(np.uint8).tobytes())
        values = rng.normal(0, 0.02, count).astype(np.float32)
        if dtype == "BF16":
            return cls(dtype, shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        return cls(dtype, shape, values.tobytes())


def save_tensors(path: Path, tensors: dict[str, TensorBytes]) -> None:
    """Write one shard with the safetensors library."""
    import torch
    from safetensors.torch import save_file

    def tensor(source: TensorBytes) -> torch.Tensor:
        dtype = getattr(torch, _TORCH_DTYPES[source.dtype])
        if not source.data:
            return torch.empty(source.shape, dtype=dtype)
        return torch.frombuffer(bytearray(source.data), dtype=torch.uint8).view(dtype).reshape(source.shape)

    save_file({name: tensor(source) for name, source in tensors.items()}, path, {"format": "pt"})


@dataclass
class Checkpoint:
    """A checkpoint in the making: change `config` and `tensors`, then `save`."""

    config: dict[str, Any]
    tensors: dict[str, TensorBytes]
    shard_of: Callable[[str], int] = field(default=lambda name: 1)
    metadata: dict[str, Any] = field(default_factory=dict)  # of the index

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        shards: dict[str, dict[str, TensorBytes]] = {}
        for name, tensor in self.tensors.items():
            shards.setdefault(f"model-{self.shard_of(name)}.safetensors", {})[name] = tensor
        for file, tensors in shards.items():
            save_tensors(folder / file, tensors)
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        index = {"metadata": self.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return folder


def flash_config(**changes: Any) -> dict[str, Any]:
    """A mimo_v2_flash config: layer 0 dense, 1 sliding MoE, 2 global MoE, 4 experts of width 128, hidden 128."""
    config: dict[str, Any] = {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "torch_dtype": "bfloat16",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": None,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
    return config | changes


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def make_checkpoint(
    *, fp8: bool = False, fused: bool = False, mtp: int = 0, seed: int = 0, **changes: Any
) -> Checkpoint:
    """A valid small checkpoint, its tensors spelled out here without the help of the code under test.

    Args:
        fp8: experts, dense MLP and q, k, v in FP8 blocks. fused: one qkv_proj per layer, interleaved by KV heads.
        mtp: number of MTP layers. changes: config keys.
    """
    config = flash_config(**changes)
    if fused:
        config |= {
            "model_type": "mimo_v2",
            "architectures": ["MiMoV2ForCausalLM"],
            "attention_projection_layout": "fused_qkv",
        }
    if fp8:
        ignored = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(config["num_hidden_layers"])]
        config.setdefault("quantization_config", FP8_CONFIG | {"ignored_layers": ignored})
    rng = np.random.default_rng(seed)
    tensors: dict[str, TensorBytes] = {}
    hidden, ranks = config["hidden_size"], config["num_key_value_heads"]

    def plain(name: str, *shape: int, dtype: str = "BF16") -> None:
        tensors[name] = TensorBytes.random(dtype, shape, rng)

    def scaled(name: str, rows: int, columns: int, ranked: bool = False) -> None:
        plain(name, rows, columns, dtype="F8_E4M3" if fp8 else "BF16")
        if fp8:
            scale_rows = ranks * math.ceil(rows / ranks / 128) if ranked else math.ceil(rows / 128)
            scale = rng.uniform(1e-4, 2e-4, (scale_rows, math.ceil(columns / 128))).astype(np.float32)
            tensors[f"{name}_scale_inv"] = TensorBytes("F32", scale.shape, scale.tobytes())

    def attention(prefix: str, sliding: bool) -> None:
        kind = "swa_" if sliding else ""
        heads, kv = config[f"{kind}num_attention_heads"], config[f"{kind}num_key_value_heads"]
        dim, v_dim = config[f"{kind}head_dim"], config[f"{kind}v_head_dim"]
        rows = {"q": heads * dim, "k": kv * dim, "v": kv * v_dim}
        if fused:
            scaled(f"{prefix}self_attn.qkv_proj.weight", sum(rows.values()), hidden, ranked=True)
        else:
            for letter, count in rows.items():
                scaled(f"{prefix}self_attn.{letter}_proj.weight", count, hidden)
        plain(f"{prefix}self_attn.o_proj.weight", hidden, heads * v_dim)
        if sliding:
            plain(f"{prefix}self_attn.attention_sink_bias", heads)

    def mlp(prefix: str, width: int) -> None:
        scaled(f"{prefix}gate_proj.weight", width, hidden)
        scaled(f"{prefix}up_proj.weight", width, hidden)
        scaled(f"{prefix}down_proj.weight", hidden, width)

    plain("model.embed_tokens.weight", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        plain(f"{prefix}input_layernorm.weight", hidden)
        plain(f"{prefix}post_attention_layernorm.weight", hidden)
        attention(prefix, bool(config["hybrid_layer_pattern"][layer]))
        if config["moe_layer_freq"][layer]:
            plain(f"{prefix}mlp.gate.weight", config["n_routed_experts"], hidden, dtype="F32")
            plain(f"{prefix}mlp.gate.e_score_correction_bias", config["n_routed_experts"], dtype="F32")
            for expert in range(config["n_routed_experts"]):
                mlp(f"{prefix}mlp.experts.{expert}.", config["moe_intermediate_size"])
        else:
            mlp(f"{prefix}mlp.", config["intermediate_size"])
    plain("model.norm.weight", hidden)
    plain("lm_head.weight", config["vocab_size"], hidden)
    for layer in range(mtp):
        prefix = f"model.mtp.layers.{layer}."
        plain(f"{prefix}eh_proj.weight", hidden, 2 * hidden)
        for norm in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            plain(f"{prefix}{norm}.weight", hidden)
        attention(prefix, sliding=True)
        mlp(f"{prefix}mlp.", config["intermediate_size"])
    return Checkpoint(config, tensors, metadata={"tp_size": ranks} if fused else {})


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    """`tiny_config(key=value, ...)`: the config of a tiny checkpoint."""
    return flash_config


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_checkpoint(edit=..., name=..., **settings)` writes a small checkpoint and returns its folder.

    `settings` go to `make_checkpoint`; `edit` may change the `Checkpoint` before it is saved.
    """

    def write(*, edit: Callable[[Checkpoint], None] | None = None, name: str = "source", **settings: Any) -> Path:
        checkpoint = make_checkpoint(**settings)
        if edit:
            edit(checkpoint)
        return checkpoint.save(tmp_path / name)

    return write
