"""Headers of a whole output at true scale: names, dtypes, shapes, made from a published config; no file is written."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mimoquant.checkpoint.index import DTYPE_BYTES
from mimoquant.model.geometry import Geometry, read_geometry
from mimoquant.model.layout import PROJECTIONS, layer_rows, mtp_rows, scale_row_counts
from mimoquant.quant.formats import Format
from mimoquant.serving.served import Served, served
from mimoquant.weights.container import CONTAINERS, NATIVE, expert_tensors, output_config, shape_tensor

CONFIGS = Path(__file__).parent / "serving" / "configs"
VARIANTS = ("v2-flash", "v2.5", "v2.5-pro")
V26 = {"v2.6-flash": "v2.5", "v2.6-pro": "v2.5-pro"}  # release → the one whose sizes it has
SOURCES = (*VARIANTS, *V26)
FORMATS = {
    "native": Format("mxfp4", 32),
    "int4-g128": Format("int4", 128),
    "int4-g32": Format("int4", 32),
    "int4-g32-asymmetric": Format("int4", 32, False),
    "mxfp4": Format("mxfp4", 32),
    "nvfp4": Format("nvfp4", 16),
    "modelopt": Format("nvfp4", 16),
}
TOWER_BYTES = 1_977_000_000  # of V2.5, about


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def published_config(variant: str) -> dict[str, Any]:
    """As published, without the towers' settings; the list of ignored layers is written out again."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{V26.get(variant, variant)}.json").read_text())
    if variant in V26:
        config |= {"moe_router_dtype": "bfloat16", "num_nextn_predict_layers": 3}
    modules = [*(f"layers.{layer}" for layer in range(config["num_hidden_layers"])), "decoder"]
    config["quantization_config"]["ignored_layers"] = [f"model.{module}.self_attn.o_proj" for module in modules]
    return config


def output(
    variant: str,
    form: str,
    carve_outs: dict[int, str] | None = None,
    experts: int | None = None,
    published_qkv: bool = False,
) -> tuple[dict[str, Any], dict[str, Header]]:
    """config.json and headers of what `quantize` writes. `form`: a key of FORMATS. `experts`: so many a layer, not the
    published number. `published_qkv`: V2-Flash's global q, k, v stay FP8, as `quantize` leaves them nowhere."""
    source, fmt, kept = published_config(variant), FORMATS[form], carve_outs or {}
    source["n_routed_experts"] = experts or source["n_routed_experts"]
    container = form if form in CONTAINERS else "compressed-tensors"
    moe = read_geometry(source, variant).moe_layers
    shown = read_geometry(source, variant)
    bf16_qkv = (
        () if published_qkv or variant != "v2-flash" else [n for n in range(shown.layers) if not shown.sliding[n]]
    )
    config = output_config(source, container, {n: fmt for n in moe if n not in kept}, kept, bf16_qkv)
    geometry = read_geometry(config, variant, packed=True)
    tensors = {
        "model.embed_tokens.weight": Header("BF16", (geometry.vocab, geometry.hidden)),
        "lm_head.weight": Header("BF16", (geometry.vocab, geometry.hidden)),
        "model.norm.weight": Header("BF16", (geometry.hidden,)),
    }
    for layer in range(geometry.layers):
        for row in layer_rows(geometry, layer):
            add(tensors, geometry, container, *row, bf16_qkv=layer in bf16_qkv)
        if geometry.moe[layer]:
            add_experts(tensors, geometry, container, fmt, layer, kept.get(layer))
    for mtp in range(3):
        for row in mtp_rows(geometry, mtp):
            add(tensors, geometry, container, *row)
    if variant in ("v2.5", *V26):
        tensors["visual.blocks.0.attn.qkv.weight"] = Header("BF16", (TOWER_BYTES // 2, 1))
    return config, tensors


def add(
    tensors: dict[str, Header],
    geometry: Geometry,
    container: str,
    name: str,
    role: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...],
    bf16_qkv: bool = False,
) -> None:
    kept = ("o", "mtp_projection", *(("q", "k", "v") if bf16_qkv else ()))
    fp8 = container == NATIVE and dtypes[0] == "F8_E4M3" and role not in kept
    tensors[name] = Header("F8_E4M3" if fp8 else "F32" if "router" in role else "BF16", shape)
    if fp8:
        rows = scale_row_counts(geometry, role, shape[0])
        ranked = role == "qkv" or (role == "k" and shape[0] == 768)  # the published V2-Flash: global k only
        tensors[f"{name}_scale_inv"] = Header("F32", (rows[-1 if ranked else 0], math.ceil(shape[1] / 128)))


def add_experts(
    tensors: dict[str, Header], geometry: Geometry, container: str, fmt: Format, layer: int, kept: str | None
) -> None:
    for projection in PROJECTIONS:
        shape = geometry.expert_shape(projection)
        parts = {stored.suffix: Header(stored.dtype, stored.shape) for stored in expert_tensors(container, fmt, *shape)}
        if shape_tensor(container, fmt):
            parts["weight_shape"] = Header("I64", (2,))
        if kept == "bf16":
            parts = {"weight": Header("BF16", shape)}
        elif kept == "fp8":
            parts = {
                "weight": Header("F8_E4M3", shape),
                "weight_scale": Header("F32", (shape[0] // 128, shape[1] // 128)),
            }
        for expert in range(geometry.experts):
            for suffix, header in parts.items():
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.{suffix}"] = header


@functools.lru_cache
def at_scale(variant: str, form: str, carve_outs: tuple[tuple[int, str], ...] = ()) -> Served:
    """Facts of a whole output."""
    config, tensors = output(variant, form, dict(carve_outs))
    return served(config, tensors, "/models/OUT", {})


@functools.lru_cache
def release(variant: str) -> Served:
    """Facts of a release itself: FP8 throughout, of V2.6 experts in MXFP4 and the router's weight in bf16."""
    if variant in V26:
        config, tensors = output(variant, "native")
        routers = [name for name in tensors if name.endswith("mlp.gate.weight")]
        tensors |= {name: Header("BF16", tensors[name].shape) for name in routers}
        return replace(served(config, tensors, "/models/RELEASE", {}), answer_tokens=2048)
    moe = read_geometry(published_config(variant), variant).moe_layers
    config, tensors = output(variant, "native", dict.fromkeys(moe, "fp8"), published_qkv=True)
    return served(published_config(variant), tensors, "/models/RELEASE", {})
