"""Checkpoints as others publish them, made from the micro checkpoint by the published facts alone, not by our code.

Each writer returns the folder of the release and that of its twin: the same values, decoded by hand here, as plain bf16
with split q, k, v. A reader is right where it sees no difference between the two.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Tensors = dict[str, Tensor]


def read(folder: Path) -> tuple[dict[str, Any], Tensors]:
    tensors = {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
    return json.loads((folder / "config.json").read_text()), tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors, metadata: dict[str, Any] | None = None) -> Path:
    """Two shards, experts and the rest, and an index."""
    folder.mkdir()
    shards: dict[str, Tensors] = {"model-1-of-2.safetensors": {}, "model-2-of-2.safetensors": {}}
    for name, value in tensors.items():
        shards[f"model-{1 if '.experts.' in name else 2}-of-2.safetensors"][name] = value.contiguous().clone()
    for file, held in shards.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": metadata or {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def twin(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return write(folder, plain | {"attention_projection_layout": "split"}, tensors)


# --- the source's own form, by hand -----------------------------------------------------------------------------------


def from_blocks(codes: Tensor, scales: Tensor, chunks: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """FP8 with 128x128 blocks as bf16, or as float32; blocks begin anew in each chunk of rows."""
    rows, columns = codes.shape
    per, blocks = rows // chunks, math.ceil(rows // chunks / 128)
    row = torch.tensor([r // per * blocks + r % per // 128 for r in range(rows)])
    return (codes.float() * scales[row][:, torch.arange(columns) // 128]).to(dtype)


def split_qkv(fused: Tensor, config: dict[str, Any], *, sliding: bool, chunks: int = 0) -> list[Tensor]:
    """[q0 k0 v0 | q1 k1 v1 | ...] → q, k, v; as many chunks as KV heads where it is not said."""
    kind, chunks = "swa_" if sliding else "", chunks or config["num_key_value_heads"]
    heads, kv = config[f"{kind}num_attention_heads"], config[f"{kind}num_key_value_heads"]
    rows = [heads * config[f"{kind}head_dim"], kv * config[f"{kind}head_dim"], kv * config[f"{kind}v_head_dim"]]
    parts = [chunk.split([count // chunks for count in rows]) for chunk in fused.chunk(chunks)]
    return [torch.cat([part[i] for part in parts]) for i in range(3)]


def plain_values(config: dict[str, Any], tensors: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Everything in bf16 (or F32, as stored), q, k, v apart. `dtype`: of what is FP8."""
    out: Tensors = {}
    for name, value in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if name.endswith("_scale_inv"):
            continue
        if scales is None or not name.endswith("qkv_proj.weight"):
            out[name] = value if scales is None else from_blocks(value, scales, 1, dtype)
            continue
        fused = from_blocks(value, scales, config["num_key_value_heads"], dtype)
        for letter, part in zip("qkv", split_qkv(fused, config, sliding=is_sliding(name, config)), strict=True):
            out[name.replace("qkv_proj", f"{letter}_proj")] = part
    return out


def is_sliding(name: str, config: dict[str, Any]) -> bool:
    return not name.startswith("model.layers.") or bool(config["hybrid_layer_pattern"][int(name.split(".")[2])])


def rest_values(folder: Path) -> Tensors:
    """All but experts as engines hold it: matrices in bf16, q, k, v apart; the rest as stored."""
    config, tensors = read(folder)
    out: Tensors = {}
    values = plain_values(config, {name: value for name, value in tensors.items() if ".experts." not in name})
    for name, value in values.items():
        held = value.bfloat16() if name.endswith("_proj.weight") else value
        if name.endswith("qkv_proj.weight") and name.startswith("model."):  # [Q|K|V]
            parts = split_qkv(held, config, sliding=is_sliding(name, config), chunks=1)
            out |= {name.replace("qkv_proj", f"{p}_proj"): part for p, part in zip("qkv", parts, strict=True)}
        else:
            out[name] = held
    return out


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name and name.endswith("_proj.weight")


# --- formats, by hand -------------------------------------------------------------------------------------------------


def nearest_codes(scaled: Tensor) -> Tensor:
    magnitude = (scaled.abs()[..., None] - E2M1[:8]).abs().argmin(-1)
    return (magnitude + 8 * (scaled < 0)).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, E8M0 bytes (the ceiling rule), values."""
    blocks = weight.float().unflatten(1, (-1, 32))
    exponent = torch.log2(blocks.abs().amax(-1).clamp(min=1e-30) / 6).ceil().clamp(-127, 127)
    codes = nearest_codes(blocks / torch.exp2(exponent)[..., None])
    values = E2M1[codes.long()] * torch.exp2(exponent)[..., None]
    return pack(codes.flatten(1)), (exponent + 127).to(torch.uint8), values.flatten(1).bfloat16()


def nvfp4(weight: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, E4M3 scales, values."""
    blocks = weight.float().unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1) / 6 / multiplier).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    step = scale.float() * multiplier
    codes = nearest_codes(blocks / step[..., None])
    return pack(codes.flatten(1)), scale, (E2M1[codes.long()] * step[..., None]).flatten(1).bfloat16()


def mxfp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 codes, E8M0 bytes [out, in/32], values."""
    blocks = weight.float().unflatten(1, (-1, 32))
    exponent = torch.log2(blocks.abs().amax(-1).clamp(min=1e-30) / 448).ceil().clamp(-127, 127)
    codes = (blocks / torch.exp2(exponent)[..., None]).to(torch.float8_e4m3fn)
    values = (codes.float() * torch.exp2(exponent)[..., None]).flatten(1).bfloat16()
    return codes.flatten(1), (exponent + 127).to(torch.uint8), values


def expert_values(folder: Path) -> Tensors:
    """Every expert's values in bf16 but for int4, decoded by hand from whichever layout, by its module's name."""
    tensors, out = read(folder)[1], {}
    for name, codes in tensors.items():
        module, _, suffix = name.rpartition(".")
        if ".experts." not in name or suffix not in ("weight", "weight_packed") or codes.dtype == torch.int32:
            continue
        if codes.dtype == torch.bfloat16:
            out[module] = codes
            continue
        scale = tensors.get(f"{module}.weight_scale", tensors.get(f"{name}_scale_inv"))
        assert scale is not None
        if codes.dtype == torch.float8_e4m3fn:
            out[module] = from_blocks(codes, scale)
            continue
        step = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        if f"{module}.weight_global_scale" in tensors:
            step = step / tensors[f"{module}.weight_global_scale"]
        elif f"{module}.weight_scale_2" in tensors:
            step = step * tensors[f"{module}.weight_scale_2"]
        values = E2M1[unpack(codes).long()]
        out[module] = (values.unflatten(1, (scale.shape[1], -1)) * step[..., None]).flatten(1).bfloat16()
    return out


# --- releases ---------------------------------------------------------------------------------------------------------


def native_mxfp4(source: Path, out: Path) -> tuple[Path, Path]:
    """As Xiaomi publishes it: the FP8 checkpoint with experts in U8 and E8M0, and `store_dtype: mxfp4`."""
    config, tensors = read(source)
    values, stored = plain_values(config, tensors), dict(tensors)
    for name in filter(is_expert, tensors):
        stored[name], stored[f"{name}_scale"], values[name] = mxfp4(values[name])
        del stored[f"{name}_scale_inv"]
    config["quantization_config"] |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
    chunks = {"tp_size": config["num_key_value_heads"]}
    return write(out / "native", config, stored, chunks), twin(out / "native-twin", config, values)


def small_v26(source: Path, out: Path) -> Path:
    """As V2.6: MXFP4 experts, a router in bf16, and what its config.json has that V2.5's has not."""
    folder = native_mxfp4(source, out)[0]
    config, tensors = read(folder)
    tensors |= {name: value.bfloat16() for name, value in tensors.items() if name.endswith("mlp.gate.weight")}
    rope = {"rope_type": "default", "type": "default", "rope_theta": config["rope_theta"]}
    rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    config |= {"moe_router_dtype": "bfloat16", "num_nextn_predict_layers": 3, "rope_parameters": rope}
    chunks = {"save_format": "mxfp4", "tp_size": config["num_key_value_heads"]}
    return write(out / "v26", config, tensors, chunks)


def lossless_cast(v26: Path, out: Path, style: str) -> Path:
    """V2.6 as others cast it to NVFP4: two equal E4M3 scales for an exponent, 2^k beside them with k the largest one
    less 8, gate and up together.

    `style`: "fp8", the release's FP8 as FP8_BLOCK_SCALES, input scales of 1; "float32", all dense matrices so, qkv as
    [Q|K|V], weights-only; "beside", as that in bf16 with the settings in hf_quant_config.json alone, and KV scales.
    """
    config, tensors = read(v26)
    stored = {name: value for name, value in tensors.items() if ".experts." not in name}
    layers: dict[str, dict[str, Any]] = {}
    for name in filter(is_expert, tensors):
        tied = [name.replace("up_proj", "gate_proj"), name.replace("gate_proj", "up_proj")]
        live = [block_is_live(tensors[n]) * tensors[f"{n}_scale"].int() for n in tied]
        least = max(int(exponents.max()) for exponents in live) - 8
        exponent = tensors[f"{name}_scale"].int() - least
        scale = torch.exp2(exponent.clamp(-9, 8).float()).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale"] = tensors[name], scale.repeat_interleave(2, 1)
        stored[f"{name}_scale_2"] = torch.exp2(torch.tensor(least - 127.0))
        layers[name.removesuffix(".weight")] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        if style == "fp8":
            stored[name.replace("weight", "input_scale")] = torch.tensor(1.0)
            layers[name.removesuffix(".weight")]["quant_algo"] = "NVFP4"
    if style == "fp8":
        scaled = [name.removesuffix(".weight") for name in stored if f"{name}_scale_inv" in stored]
        layers |= {module: {"quant_algo": "FP8_BLOCK_SCALES", "group_size": 128} for module in scaled}
    else:
        rest = {name: value for name, value in tensors.items() if ".experts." not in name}
        values = plain_values(config, rest, torch.float32 if style == "float32" else torch.bfloat16)
        stored = {name: value for name, value in stored.items() if ".experts." in name} | fused_again(values)
        config["conversion_metadata"] = {"qkv_layout": "global_q_k_v"}
    settings = {"quant_algo": "MIXED_PRECISION", "exclude_modules": [], "quantized_layers": layers}
    del config["quantization_config"]
    if style == "beside":
        heads = [name for name in stored if name.endswith("qkv_proj.weight")]
        stored |= {
            name.replace("qkv_proj.weight", f"{p}_proj.{p}_scale"): torch.tensor(0.5) for name in heads for p in "kv"
        }
    else:
        config["quantization_config"] = {"quant_method": "modelopt"} | settings
    folder = write(out / style, config, stored)
    if style == "beside":
        said = settings | {"kv_cache_quant_algo": "FP8"}
        (folder / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": said})
        )
    return folder


def block_is_live(codes: Tensor) -> Tensor:
    """[O, I/32]: whether any value of a block is not zero."""
    return (unpack(codes) & 7).unflatten(1, (-1, 32)).amax(-1) > 0


def fused_again(values: Tensors) -> Tensors:
    """q, k, v one after the other as qkv."""
    out = dict(values)
    for name in [name for name in values if name.endswith("self_attn.q_proj.weight") and name.startswith("model.")]:
        parts = [out.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        out[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    return out


def modelopt_nvfp4(source: Path, out: Path) -> tuple[Path, Path]:
    """As lukealonso publishes V2.5: NVFP4 experts; attention and dense MLP in MXFP8 whose `weight_scale_inv` is a
    scale; qkv as [Q|K|V], though the config still says fused_qkv and the index tp_size."""
    config, tensors = read(source)
    values = plain_values(config, tensors)
    stored = {name: value for name, value in values.items() if name in tensors}  # not the parts of a qkv
    layers: dict[str, dict[str, Any]] = {}
    for name in filter(is_expert, tensors):
        tied = name.replace("up_proj", "gate_proj"), name.replace("gate_proj", "up_proj")
        amax = max(from_blocks(tensors[one], tensors[f"{one}_scale_inv"]).abs().max() for one in tied)
        stored[f"{name}_scale_2"] = amax.float() / (6 * 448)
        stored[name], stored[f"{name}_scale"], values[name] = nvfp4(values[name], stored[f"{name}_scale_2"])
        stored[name.replace("weight", "input_scale")] = torch.tensor(0.0031)
        layers[name.removesuffix(".weight")] = {"quant_algo": "NVFP4", "group_size": 16}
    for name in [name for name in tensors if f"{name}_scale_inv" in tensors and not is_expert(name)]:
        parts = [name.replace("qkv_proj", f"{p}_proj") for p in "qkv"] if "qkv_proj" in name else [name]
        codes, scales, decoded = mxfp8(torch.cat([values[part] for part in parts]))
        stored[name], stored[f"{name}_scale_inv"] = codes, scales
        values |= zip(parts, decoded.split([len(values[part]) for part in parts]), strict=True)
        layers[name.removesuffix(".weight")] = {"quant_algo": "MXFP8", "group_size": 32}
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    config["quantization_config"] = {"quant_method": "modelopt", **settings}
    folder = write(out / "modelopt", config, stored, {"tp_size": config["num_key_value_heads"]})
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    return folder, twin(out / "modelopt-twin", config, values)


def as_compressed_tensors(modelopt: Path, out: Path) -> Path:
    """The codes of a ModelOpt checkpoint under compressed-tensors' names, its multiplier turned into a divisor."""
    config, tensors = read(modelopt)
    renamed: Tensors = {}
    for name, value in tensors.items():
        module, _, suffix = name.rpartition(".")
        if ".experts." not in name:
            renamed[name] = value
        elif suffix == "weight_scale_2":
            renamed[f"{module}.weight_global_scale"] = (1 / value).reshape(1)
        else:
            renamed[f"{module}.weight_packed" if suffix == "weight" else name] = value
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    return write(out, config, renamed)
