"""synth: what it writes is read back by the program, by safetensors itself, and by plain loops written out here."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from micro import contents
from safetensors import safe_open
from safetensors.torch import save_file

from mimoquant.checkpoint.index import open_index, read_json_inside
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError, MimoquantError, UsageError
from mimoquant.model.geometry import read_geometry
from mimoquant.model.layout import TOWER_PREFIXES, ModelLayout, read_layout
from mimoquant.planning.facts import expert_placement
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.quant.engine_torch import TorchEngine
from mimoquant.synthetic.checkpoint import LAYOUTS, SynthSizes, stored_tensors, synth
from mimoquant.synthetic.files import PLACEMENTS, ShardFiles
from mimoquant.synthetic.weights import RandomWeights, encode_fp8
from mimoquant.weights.stored import dequantize, read_stack, split_qkv

SHARED = Path(__file__).parents[3] / "shared"
SMALL = SynthSizes(layers=4, hidden=128, experts=4, top_k=2, vocab=64, dense_intermediate=160, mtp_layers=1)
needs_models = pytest.mark.skipif(not (SHARED / "models/mimo-tiny").is_dir(), reason="no ../shared/models/mimo-tiny")
needs_tools = pytest.mark.skipif(not (SHARED / "tools").is_dir(), reason="no ../shared/tools")


def layout_of(folder: Path) -> ModelLayout:
    return read_layout(open_index(folder), read_json_inside(folder, "config.json"))


def tensor_bytes(folder: Path, *, towers: bool = True) -> dict[str, bytes]:
    index = open_index(folder)
    with CheckpointReader(index) as reader:
        names = [name for name in index.tensors if towers or not name.startswith(TOWER_PREFIXES)]
        return {name: reader.read(name).tobytes() for name in names}


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def bf16_checkpoint(
    folder: Path, *, poison: str | None = None, value: float = math.nan, fused: bool = False
) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint whose q, k and v differ in size by far, so that rows in the wrong place are seen.

    It is made from what transformers calls things, with sizes that are no multiples of 128.
    """
    hidden, layers, experts, inner, dense, vocab = 192, 3, 3, 96, 160, 40
    heads, head_dim, v_dim, kv = 4, 96, 32, {False: 2, True: 4}
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, size: float = 0.05, dtype: torch.dtype = torch.bfloat16) -> None:
        tensors[name] = (torch.randn(shape, generator=generator) * size).to(dtype)

    def block(prefix: str, sliding: bool, norms: tuple[str, ...]) -> None:
        for norm in norms:
            add(f"{prefix}{norm}.weight", hidden)
        rows = {"q": heads * head_dim, "k": kv[sliding] * head_dim, "v": kv[sliding] * v_dim}
        for letter, size in (("q", 0.01), ("k", 1.0), ("v", 30.0)):
            add(f"{prefix}self_attn.{letter}_proj.weight", rows[letter], hidden, size=size)
        if fused:
            matrices = [tensors.pop(f"{prefix}self_attn.{letter}_proj.weight") for letter in "qkv"]
            pieces = [matrix.chunk(2)[rank] for rank in range(2) for matrix in matrices]
            tensors[f"{prefix}self_attn.qkv_proj.weight"] = torch.cat(pieces)
        add(f"{prefix}self_attn.o_proj.weight", hidden, heads * v_dim)
        if sliding:
            add(f"{prefix}self_attn.attention_sink_bias", heads)

    def mlp(prefix: str, width: int) -> None:
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            add(f"{prefix}{name}_proj.weight", *shape)

    add("model.embed_tokens.weight", vocab, hidden)
    add("lm_head.weight", vocab, hidden)
    add("model.norm.weight", hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        block(prefix, layer == 1, ("input_layernorm", "post_attention_layernorm"))
        if layer == 0:
            mlp(f"{prefix}mlp.", dense)
            continue
        add(f"{prefix}mlp.gate.weight", experts, hidden, dtype=torch.float32)
        add(f"{prefix}mlp.gate.e_score_correction_bias", experts, dtype=torch.bfloat16)
        for expert in range(experts):
            mlp(f"{prefix}mlp.experts.{expert}.", inner)
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    block("model.mtp.layers.0.", True, norms)
    add("model.mtp.layers.0.eh_proj.weight", hidden, 2 * hidden)
    mlp("model.mtp.layers.0.mlp.", dense)
    config = {
        "architectures": ["MiMoV2ForCausalLM" if fused else "MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2" if fused else "mimo_v2_flash",
        "auto_map": {"AutoConfig": "configuration.Config"},
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": dense,
        "moe_intermediate_size": inner,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv[False],
        "v_head_dim": v_dim,
        "swa_head_dim": head_dim,
        "swa_num_attention_heads": heads,
        "swa_num_key_value_heads": kv[True],
        "swa_v_head_dim": v_dim,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "hidden_act": "silu",
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "add_swa_attention_sink_bias": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "rope_theta": 1e6,
        "swa_rope_theta": 1e4,
        "partial_rotary_factor": 0.334,
        "attention_value_scale": 0.9,
        **({"attention_projection_layout": "fused_qkv"} if fused else {}),
    }
    if poison:
        tensors[poison][1, 1] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if fused:
        index = {"metadata": {"tp_size": 2}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def near(found: torch.Tensor, wanted: torch.Tensor, block_amax: torch.Tensor | float) -> bool:
    """Within E4M3's half step (2^-4 of the value, or half the smallest subnormal), and bf16's after it."""
    bound = wanted.abs() * (2**-4 + 2**-8) + torch.as_tensor(block_amax) / 448 * 2**-10
    return bool(((found - wanted).abs() <= bound * 1.001).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_checkpoint_is_accepted_and_planned(tmp_path: Path, layout: str) -> None:
    report = synth(tmp_path / "out", layout)
    index = open_index(tmp_path / "out")
    found = layout_of(tmp_path / "out")
    assert (report.tensors, report.files) == (len(index.tensors), len(index.file_sizes))
    assert report.size_bytes == sum(index.file_sizes.values()) < 30e6
    assert index.metadata["total_size"] == index.size_bytes
    assert found.geometry.fp8 and found.mtp_layers == 3 and not found.unknown
    assert bool(found.units.get("towers")) == (layout == "v2.5")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for recipe in ("int4-g128-mse", *(["mxfp4-rtn"] if layout != "flash" else [])):
        assert len(make_plan(tmp_path / "out", load_recipe(recipe)).formats) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_finite_and_have_large_channels(tmp_path: Path, layout: str) -> None:
    synth(tmp_path / "out", layout, sizes=SMALL)
    tensors = load(tmp_path / "out")
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    columns = (tensors[name].float() * tensors[f"{name}_scale_inv"]).std(0)
    assert columns.max() > 8 * columns.median() and 0.02 < columns.median() < 0.1
    assert abs(tensors["model.norm.weight"].float().mean() - 1) < 0.05
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synth(tmp_path / name, "v2.5", sizes=SMALL, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert (
        all(a[name] != c[name] for name in a if name.endswith(".safetensors")) and a["config.json"] == c["config.json"]
    )


def test_same_seed_same_model_in_every_layout(tmp_path: Path) -> None:
    models = []
    for layout in LAYOUTS:
        synth(tmp_path / layout, layout, sizes=SMALL)
        models.append(tensor_bytes(tmp_path / layout, towers=False))
    shared = set.intersection(*(set(model) for model in models))
    assert len(shared) > 70 and all(len({model[name] for model in models}) == 1 for name in shared)
    assert {name.split(".")[-2] for name in set(models[0]) - shared} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("experts", [2, 3, 64, 66])
def test_the_trap(tmp_path: Path, experts: int) -> None:
    sizes = SynthSizes(layers=4, hidden=32, experts=experts, top_k=2, expert_intermediate=32, vocab=8, mtp_layers=0)
    report = synth(tmp_path / "out", "v2.5", sizes=sizes)
    split_layers, parted = expert_placement(layout_of(tmp_path / "out"))
    assert split_layers == ["2"] and sorted(parted) == sorted(report.trap)
    last = {2: [0, 1], 3: [1, 2], 64: range(7, 64, 8), 66: [8, 17, 26, 35, 44, 53, 62, 65]}[experts]
    assert sorted(report.trap) == sorted(f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in last)
    for name in report.trap:
        files = open_index(tmp_path / "out").tensors
        assert files[name].file.replace("shard0", "shard1") == files[f"{name}_scale_inv"].file


def test_pro_has_crlf_and_layer_two_in_two_files(tmp_path: Path) -> None:
    assert synth(tmp_path / "out", "pro", sizes=SMALL).trap == ()
    for name in ("config.json", "model.safetensors.index.json"):
        raw = (tmp_path / "out" / name).read_bytes()
        assert raw.count(b"\n") == raw.count(b"\r\n") > 20
    config = read_json_inside(tmp_path / "out", "config.json")
    assert (config["torch_dtype"], config["attention_value_scale"]) == ("bfloat16", 0.612) and "dtype" not in config
    assert "store_dtype" not in config["quantization_config"]
    files = {name: info.file for name, info in open_index(tmp_path / "out").tensors.items()}
    assert files["model.layers.2.self_attn.o_proj.weight"] == "model_pp0_ep0_shard0.safetensors"
    assert files["model.layers.2.mlp.gate.weight"] == "model_pp0_ep0_shard1.safetensors"
    assert set(files.values()) == {
        "model_pp0_ep0_shard0.safetensors",
        "model_pp0_ep0_shard1.safetensors",
        "model_pp0_ep1_shard0.safetensors",
        "model_mtp.safetensors",
    }


def test_flash_key_counts_and_config(tmp_path: Path) -> None:
    synth(tmp_path / "out", "flash")
    count: dict[str, int] = {}
    for info in open_index(tmp_path / "out").tensors.values():
        count[info.file] = count.get(info.file, 0) + 1
    assert [count[f"model_{part}.safetensors"] for part in ("0", "1", "5", "mtp", "embedding", "final")] == [
        15,
        12,
        11,
        60,
        1,
        2,
    ]
    assert (count["model_1_linear_fc1.safetensors"], count["model_1_linear_fc2.safetensors"]) == (64, 32)
    config = read_json_inside(tmp_path / "out", "config.json")
    assert config["layer_types"] == ["full_attention", *["sliding_attention"] * 4, "full_attention"]
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000


def test_flash_global_k_proj_restarts_its_blocks_at_each_rank(tmp_path: Path) -> None:
    sizes = SynthSizes(
        layers=3, hidden=128, experts=2, top_k=1, vocab=8, kv_heads=4, head_dim=192, v_head_dim=128, mtp_layers=0
    )
    synth(tmp_path / "out", "flash", sizes=sizes)
    tensors = load(tmp_path / "out")
    rows = {
        (layer, letter): len(tensors[f"model.layers.{layer}.self_attn.{letter}_proj.weight_scale_inv"])
        for layer in (0, 1)
        for letter in "qkv"
    }
    assert rows == {(0, "q"): 12, (0, "k"): 8, (0, "v"): 4, (1, "q"): 12, (1, "k"): 12, (1, "v"): 8}
    values, scales = (tensors[f"model.layers.0.self_attn.k_proj.weight{end}"].float() for end in ("", "_scale_inv"))
    original = RandomWeights(0, 0).read("model.layers.0.self_attn.k_proj.weight", (768, 128), "F32")
    blocks = [(head * 192 + begin, head * 192 + end) for head in range(4) for begin, end in ((0, 128), (128, 192))]
    for (begin, end), scale in zip(blocks, scales, strict=True):
        wanted = torch.from_numpy(original[begin:end])
        assert scale == wanted.abs().max() / 448
        assert near(values[begin:end] * scale, wanted, 448 * scale)


def attention_by_loops(
    tensors: dict[str, torch.Tensor], prefix: str, rows: tuple[int, int, int], ranks: int
) -> list[torch.Tensor]:
    """q, k, v of a fused FP8 qkv: one row at a time, each rank's rows and scale rows counted anew."""
    values = tensors[f"{prefix}qkv_proj.weight"].float()
    scales = tensors[f"{prefix}qkv_proj.weight_scale_inv"]
    found: list[list[torch.Tensor]] = [[], [], []]
    row, scale_base = 0, 0
    for _ in range(ranks):
        row_in_rank = 0
        for matrix, count in enumerate(rows):
            for _ in range(count // ranks):
                scale = scales[scale_base + row_in_rank // 128].repeat_interleave(128)[: values.shape[1]]
                found[matrix].append(values[row] * scale)
                row, row_in_rank = row + 1, row_in_rank + 1
        scale_base += math.ceil(row_in_rank / 128)
    assert row == len(values) and scale_base == len(scales)
    return [torch.stack(matrix) for matrix in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_keeps_every_value_in_its_row(tmp_path: Path, layout: str) -> None:
    originals = bf16_checkpoint(tmp_path / "source")
    synth(tmp_path / "out", layout, source=tmp_path / "source")
    model, tensors, engine = layout_of(tmp_path / "out"), load(tmp_path / "out"), TorchEngine("cpu")
    seen = 0
    with CheckpointReader(model.index) as reader:
        weights = [*model.experts.values(), *(weight for unit in model.units.values() for weight in unit)]
        for weight in weights:
            if weight.role == "tower":
                continue
            if weight.scale is None:
                assert torch.equal(tensors[weight.name], originals[weight.name].to(tensors[weight.name].dtype))
                seen += 1
                continue
            bits = dequantize(read_stack(reader, [weight]), weight, model.geometry, engine)
            parts = {weight.name: bits}
            if weight.role == "qkv":
                sliding = weight.name.startswith(("model.layers.1.", "model.mtp."))
                split = split_qkv(bits, model.geometry, sliding=sliding)
                parts = {weight.name.replace("qkv", letter): part for letter, part in zip("qkv", split, strict=True)}
                plain = attention_by_loops(
                    tensors, weight.name.removesuffix("qkv_proj.weight"), model.geometry.attention(int(sliding)).rows, 2
                )
                for part, wanted in zip(split, plain, strict=True):
                    assert np.array_equal(part, wanted.bfloat16().view(torch.uint16).numpy())
            # a block of a fused qkv may hold k and v: its range is then that of v
            amax = max(float(originals[name].float().abs().max()) for name in parts)
            for name, part in parts.items():
                found = torch.from_numpy(part.copy()).view(torch.bfloat16).float()
                assert near(found, originals[name].float(), amax), name
                seen += 1
    assert seen == len(originals)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    config: dict[str, Any] = read_json_inside(tmp_path / "out", "config.json")
    assert config["attention_value_scale"] == 0.9 and config["hybrid_layer_pattern"] == [0, 1, 0]
    assert ("auto_map" in config) == (layout == "flash")


def test_a_fused_source_is_taken_apart(tmp_path: Path) -> None:
    bf16_checkpoint(tmp_path / "split")
    bf16_checkpoint(tmp_path / "fused", fused=True)
    for name in ("split", "fused"):
        synth(tmp_path / f"{name}-flash", "flash", source=tmp_path / name)
    assert tensor_bytes(tmp_path / "split-flash") == tensor_bytes(tmp_path / "fused-flash")


@needs_models
def test_mimo_tiny_becomes_its_published_twin(tmp_path: Path) -> None:
    report = synth(tmp_path / "out", "v2.5", source=SHARED / "models/mimo-tiny")
    twin = SHARED / "models/mimo-tiny-official"
    assert tensor_bytes(tmp_path / "out", towers=False) == tensor_bytes(twin, towers=False)
    files = {name: info.file for name, info in open_index(tmp_path / "out").tensors.items()}
    assert all(files[name] == info.file for name, info in open_index(twin).tensors.items() if name in files)
    assert sorted(report.trap) == sorted(expert_placement(layout_of(twin))[1])
    config, wanted = (read_json_inside(folder, "config.json") for folder in (tmp_path / "out", twin))
    assert wanted.items() <= config.items()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (twin / "tokenizer.json").read_bytes()


@needs_tools
@pytest.mark.parametrize(
    ("layout", "tool", "model"), [("pro", "make_index_pro", "MiMo-V2.5-Pro"), ("v2.5", "make_index_v25", "MiMo-V2.5")]
)
def test_names_shapes_and_files_at_published_size(layout: str, tool: str, model: str) -> None:
    published = tool_module(tool)
    geometry = read_geometry(read_json_inside(SHARED / "mimo" / model, "config.json"), model)
    entries = [entry for stored in stored_tensors(geometry, 3) for entry in stored.entries]
    wanted = {n: t for n, t in published.tensors().items() if not n.startswith(TOWER_PREFIXES)}
    assert {entry.name: (entry.dtype, entry.shape) for entry in entries} == wanted
    place = PLACEMENTS[layout]
    layers_between = tuple(
        f"model.layers.{layer}.mlp.experts." for layer in range(43, 47)
    )  # V2.5 was cut in 43, not 46
    moved = {name for name in wanted if place(geometry, name) != published.shard(name)}
    assert all(layout == "v2.5" and name.startswith(layers_between) for name in moved)


def tool_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SHARED / f"tools/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fp8_blocks_against_plain_rounding() -> None:
    grid = []  # the magnitudes of E4M3 by their definition, in code order
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        grid.append(mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    weight = np.random.default_rng(0).standard_normal((130, 200)).astype(np.float32)
    weight[:128, :128] = 0
    weight[3, 130:136] = np.float32([448, 1.0625, 1.1875, 2**-10, 3 * 2**-10, -17])  # ties, once 448 is the largest
    values, scales = encode_fp8(weight)
    assert scales.shape == (2, 2) and scales[0, 1] == 1 and not values[:128, :128].any()
    for row in (0, 3, 127, 128, 129):
        for column in range(200):
            scaled = float(weight[row, column] / scales[row // 128, column // 128])
            distances = [abs(abs(scaled) - step) for step in grid]
            best = [code for code in range(127) if distances[code] == min(distances)]
            code = best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1]
            assert values[row, column] & 127 == code and (values[row, column] >> 7 == (scaled < 0) or code == 0)


BAD_SIZES = [
    (SynthSizes(layers=2), "layers is 2, the published structure needs at least 3"),
    (SynthSizes(experts=1, top_k=1), "experts is 1, the published structure needs at least 2"),
    (SynthSizes(experts=4, top_k=6), "top_k is 6, but there are 4 experts"),
    (SynthSizes(heads=7), "7 query heads do not divide by 2 kv heads"),
    (SynthSizes(kv_heads=4, swa_kv_heads=2), "384 q rows and 96 k rows do not split by head over 4 ranks"),
    (SynthSizes(hidden=0), "hidden is 0, must be at least 1"),
    (SynthSizes(swa_kv_heads=0), "swa_kv_heads is 0, must be at least 1"),
    (SynthSizes(kv_heads=0), "kv_heads is 0, must be at least 1"),
    (SynthSizes(mtp_layers=65), "65 MTP layers"),
]


@pytest.mark.parametrize(("sizes", "message"), BAD_SIZES)
def test_sizes_that_cannot_be(tmp_path: Path, sizes: SynthSizes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        synth(tmp_path / "out", "v2.5", sizes=sizes)
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"layout 'v3' is unknown \(known: flash, v2.5, pro\)"):
        synth(out, "v3")
    synth(out, "pro", sizes=SMALL)
    with pytest.raises(UsageError, match="out: exists already"):
        synth(out, "pro", sizes=SMALL)
    with pytest.raises(UsageError, match=r"is quantized already \(fp8\)"):
        synth(tmp_path / "new", "flash", source=out)
    with pytest.raises(UsageError, match="sizes cannot be chosen"):
        synth(tmp_path / "new", "flash", source=out, sizes=SMALL)
    with pytest.raises(UsageError, match="not a checkpoint folder"):
        synth(tmp_path / "new", "flash", source=tmp_path / "nowhere")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UsageError, match=r"new.partial: exists already"):
        synth(tmp_path / "new", "flash", sizes=SMALL)


def test_a_source_that_the_layouts_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = bf16_checkpoint(tmp_path / "source")
    shard = tmp_path / "source/model.safetensors"
    save_file(tensors | {"visual.blocks.0.norm1.weight": torch.ones(4)}, shard)
    with pytest.raises(UsageError, match="holds 1 vision, audio or speech tensors"):
        synth(tmp_path / "out", "v2.5", source=tmp_path / "source")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, shard)
    with pytest.raises(CheckpointError, match=r"model.norm.weight is F32, but every layout holds it as BF16"):
        synth(tmp_path / "out", "pro", source=tmp_path / "source")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("layout", "name", "value"),
    [
        ("v2.5", "model.layers.2.mlp.experts.1.up_proj.weight", math.nan),
        ("pro", "model.layers.1.self_attn.k_proj.weight", -math.inf),
    ],
)
def test_a_damaged_source_leaves_nothing_behind(tmp_path: Path, layout: str, name: str, value: float) -> None:
    bf16_checkpoint(tmp_path / "source", poison=name, value=value)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        synth(tmp_path / "out", layout, source=tmp_path / "source")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardFiles, "put", full)
    with pytest.raises(MimoquantError, match=r"out.partial: cannot be written \(No space left on device\)") as caught:
        synth(tmp_path / "out", "flash", sizes=SMALL)
    assert caught.value.exit_code == 4 and not list(tmp_path.iterdir())


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MimoquantError, match=r"cannot be written \(Not a directory\)"):
        synth(tmp_path / "file/out", "flash", sizes=SMALL)
