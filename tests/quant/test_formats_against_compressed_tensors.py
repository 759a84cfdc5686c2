"""Our formats against compressed-tensors, the library whose layout they are.

The bytes go the whole way: `TorchEngine` → parts → the names and dtypes of `container` → a safetensors shard written by
`ShardWriter` → loaded by safetensors → compressed-tensors' own `decompress`. What `decompress` rounds, in all three
formats, is the finished product `code * scale`, once, to bf16:

* int4: codes, zero points and scales are bf16, where code - zero_point is exact; only the product rounds;
* mxfp4: code and power of two are bf16; their product is exact, and the rounding matters below bf16's range only;
* nvfp4: scale / global_scale promotes to float32 (the E4M3 scale is exact in bf16), so does the product, which is
  rounded at the end.

So the expected value is `engine_torch.decode`, float32, rounded once to bf16. All comparisons are of bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra `peer`)")
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file

from mimoquant.checkpoint.writer import Entry, ShardWriter
from mimoquant.quant import engine_torch
from mimoquant.quant.engine_torch import TorchEngine, decode, encode
from mimoquant.quant.formats import INT4_ZERO_SCALE, Format
from mimoquant.quant.stack import Stack
from mimoquant.weights.container import COMPRESSED_TENSORS, expert_tensors, format_weights, output_config

FORMATS = [
    Format("int4", 32),
    Format("int4", 64),
    Format("int4", 128),
    Format("int4", 32, symmetric=False),
    Format("int4", 64, symmetric=False),
    Format("int4", 128, symmetric=False),
    Format("mxfp4", 32),
    Format("nvfp4", 16),
]
CASES = [pytest.param(fmt, search, id=f"{fmt.label} {search}") for fmt in FORMATS for search in ("absmax", "mse")]
ROWS, WIDTH = 48, 384
SHAPES = {"gate": (ROWS, WIDTH), "up": (ROWS, WIDTH), "down": (WIDTH, 128)}
SIGN = 0x8000


def hard_weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    """bf16 [rows, columns]: normal, with outliers, zero and constant groups, exact ties, tiny and subnormal values."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
    values[rng.random(values.shape) < 0.002] *= 50
    values[1] = 0
    values[2, ::2] = 0
    values[3] = 0.0117
    values[4] *= 1e-30
    values[5] = rng.integers(-12, 13, columns) / 4  # ties of every grid that has a power of two as its scale
    values[6] = rng.integers(-15, 16, columns) / 2
    values[7] *= np.float32(2.0**-120)  # around bf16's smallest normal number
    values[8] = np.abs(values[8])
    values[9, :16] = 0
    values[9, 16] = -3
    return torch.from_numpy(values).to(torch.bfloat16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def encoded(fmt: Format, search: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, np.ndarray]]]:
    """bf16 weights of one expert, and its parts as the engine hands them out."""
    weights = {p: hard_weights(*shape, seed) for seed, (p, shape) in enumerate(SHAPES.items())}
    stacks = {p: Stack(bits(w).numpy().view(np.uint16)[None], None) for p, w in weights.items()}
    return weights, TorchEngine("cpu").encode(stacks, fmt, search)


def through_a_shard(
    parts: dict[str, np.ndarray], fmt: Format, shape: tuple[int, int], path: Path
) -> dict[str, torch.Tensor]:
    """The expert's tensors as a reader of our files gets them: suffix → tensor."""
    stored = expert_tensors(COMPRESSED_TENSORS, fmt, *shape)
    writer = ShardWriter(
        path, [Entry("weight_shape", "I64", (2,))] + [Entry(t.suffix, t.dtype, t.shape) for t in stored]
    )
    writer.write("weight_shape", np.array(shape, np.int64))
    for tensor in stored:
        writer.write(tensor.suffix, np.ascontiguousarray(parts[tensor.part][0]))
    writer.close()
    return load_file(path)


def scheme_of(fmt: Format) -> tuple[str, QuantizationScheme]:
    """(compressed-tensors' format name, scheme), read from the config.json that we write."""
    config = output_config({}, COMPRESSED_TENSORS, {1: fmt}, {})["quantization_config"]
    group = config["config_groups"]["group_0"]
    return group["format"], QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))


def as_parts(parts: dict[str, np.ndarray], fmt: Format) -> dict[str, torch.Tensor]:
    """An engine's numpy parts as what `decode` takes."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    dtype = {"int4": torch.bfloat16, "mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}[fmt.name]
    return tensors | {"scale": tensors["scale"].view(dtype)}


@pytest.mark.parametrize(("fmt", "search"), CASES)
def test_their_decompress_reads_our_files_to_the_bit(fmt: Format, search: str, tmp_path: Path) -> None:
    name, scheme = scheme_of(fmt)
    compressor = BaseCompressor.get_value_from_registry(name)
    weights, parts = encoded(fmt, search)
    for projection, shape in SHAPES.items():
        state = through_a_shard(parts[projection], fmt, shape, tmp_path / projection)
        expected_names = set(compressor.compression_param_names(scheme))
        assert set(state) - {"weight_shape"} == expected_names - {"weight_shape"}
        theirs = compressor.decompress(state, scheme)["weight"]
        ours = decode(as_parts(parts[projection], fmt), fmt)[0].to(torch.bfloat16)
        assert theirs.dtype is torch.bfloat16 and theirs.shape == shape
        assert torch.equal(bits(theirs), bits(ours))
        error = (theirs.float() - weights[projection].float()).norm() / weights[projection].float().norm()
        assert error < 0.2, "the values are the weights, not just anything both sides agree on"


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_the_dtypes_on_disk_are_theirs(fmt: Format, tmp_path: Path) -> None:
    """Their `compress` of the same weight gives tensors of the same names, dtypes and shapes."""
    name, scheme = scheme_of(fmt)
    weights, parts = encoded(fmt, "absmax")
    ours = through_a_shard(parts["gate"], fmt, SHAPES["gate"], tmp_path / "ours")
    weight = weights["gate"]
    grouped = weight.unflatten(-1, (-1, fmt.group_size))
    global_scale = generate_gparam(weight.min().float(), weight.max().float()) if fmt.name == "nvfp4" else None
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": global_scale}
    state = {key: value for key, value in state.items() if value is not None}
    theirs = BaseCompressor.get_value_from_registry(name).compress(state, scheme)
    for key in set(ours) - {"weight_shape"}:
        assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key


def qparams(fmt: Format, weight: torch.Tensor, global_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """compressed-tensors' scale and zero point, all of it in float32."""
    grouped = weight.float().unflatten(-1, (-1, fmt.group_size))
    args = QuantizationArgs(**format_weights(fmt))
    return calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_scales_are_theirs_rounded_to_bf16(group_size: int) -> None:
    for symmetric in (True, False):
        fmt, weight = Format("int4", group_size, symmetric), hard_weights(ROWS, WIDTH, 1)
        ours = encode(weight[None], fmt)["scale"][0]
        theirs, _ = qparams(fmt, weight)
        silent = (weight.unflatten(-1, (-1, group_size)) == 0).all(-1)
        assert silent.any()
        assert torch.equal(bits(ours)[~silent], bits(theirs.to(torch.bfloat16))[~silent])
        # where all is zero they write the epsilon of the dtype they compute in: bf16's when they get bf16
        zeros = torch.zeros(1, 1, dtype=torch.bfloat16)
        theirs, _ = calculate_qparams(zeros, zeros, QuantizationArgs(**format_weights(fmt)))
        assert theirs.item() == INT4_ZERO_SCALE
        assert (ours[silent] == INT4_ZERO_SCALE).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_zero_points_are_theirs_for_our_scale(group_size: int) -> None:
    """Their zero point comes from the unrounded scale, ours from the one that is stored: at most one level apart."""
    fmt, weight = Format("int4", group_size, symmetric=False), hard_weights(ROWS, WIDTH, 2)
    parts = encode(weight[None], fmt)
    ours = engine_torch.unpack_zero_points(parts["zero_point"])[0]
    low = weight.float().unflatten(-1, (-1, group_size)).amin(-1).clamp(max=0)
    expected = torch.round(torch.clamp(-8 - low / parts["scale"][0].float(), -8, 7)).to(torch.int8)
    assert torch.equal(ours, expected)
    _, theirs = qparams(fmt, weight)
    spread = weight.float().unflatten(-1, (-1, group_size)).abs().amax(-1)
    normal = spread > 1e-30  # of zeros they take 0 / 0, and a subnormal bf16 scale is too coarse to compare
    assert ((ours - theirs)[normal].abs() <= 1).all() and (ours == theirs)[normal].float().mean() > 0.95


@pytest.mark.parametrize(("fmt", "search"), CASES)
def test_codes_are_their_quantize_in_float32(fmt: Format, search: str) -> None:
    weight = hard_weights(ROWS, WIDTH, 3)
    global_scale = engine_torch.nvfp4_global_scale(engine_torch.amax(weight[None]), search, fmt)
    parts = encode(weight[None], fmt, search, global_scale)
    scale = parts["scale"][0].float()
    if fmt.name == "mxfp4":
        scale = torch.pow(2.0, scale.double() - 127).float()
    zero = engine_torch.unpack_zero_points(parts["zero_point"])[0] if not fmt.symmetric else None
    theirs = quantize(
        weight.float(),
        scale,
        zero,
        QuantizationArgs(**format_weights(fmt)),
        dtype=torch.int8 if fmt.name == "int4" else None,
        global_scale=global_scale if fmt.name == "nvfp4" else None,
    )
    if fmt.name == "int4":
        assert torch.equal(parts["codes"][0].view(torch.int32), pack_to_int32(theirs, 4))
        return
    theirs = torch.where((weight == 0) & weight.signbit(), -0.0, theirs)  # we keep the sign of a zero, they drop it
    assert torch.equal(parts["codes"][0], pack_fp4_to_uint8(theirs))


def test_mxfp4_exponents_are_theirs() -> None:
    from compressed_tensors.compressors.mx_utils import compress_mx_scale

    fmt = Format("mxfp4", 32)
    amax = torch.tensor([[m * 2.0**e for e in range(-126, 126, 3)] for m in (1.0, 1.5, 1.7421875, 1.75, 1.9921875)])
    weight = torch.nn.functional.pad(amax.reshape(-1, 1, 1), (0, 31)).reshape(-1, 32).to(torch.bfloat16)
    weight = torch.cat([weight, hard_weights(ROWS, WIDTH, 4).reshape(-1, 32)])
    weight = weight[: len(weight) // 8 * 8]
    theirs, _ = qparams(fmt, weight)
    assert torch.equal(encode(weight[None], fmt)["scale"][0], compress_mx_scale(theirs, torch.uint8))


def test_nvfp4_global_scale_is_theirs_within_one_ulp() -> None:
    """They write 2688 / amax with a Python number, which torch computes as 2688 * (1 / amax); we divide."""
    amax = torch.cat([hard_weights(64, 64, 5).flatten().abs(), torch.tensor([0.0, 2.0**-133, 1e30, 3e38]).bfloat16()])
    ours = engine_torch.nvfp4_global_scale(amax.float(), "absmax", Format("nvfp4", 16))
    theirs = torch.cat([generate_gparam(-value, value) for value in amax.float()])
    assert ((bits(ours) - bits(theirs)).abs() <= 1).all()
    with np.errstate(over="ignore"):
        divided = (2688.0 / np.maximum(amax.double().numpy(), np.finfo(np.float32).tiny)).astype(np.float32)
    assert np.array_equal(ours.numpy(), np.where(np.isinf(divided), np.float32(1), divided))


def test_nvfp4_scales_are_theirs() -> None:
    fmt = Format("nvfp4", 16)
    for weight in (hard_weights(ROWS, WIDTH, 5), torch.zeros(8, 32, dtype=torch.bfloat16)):
        global_scale = generate_gparam(weight.float().min(), weight.float().max())
        theirs, _ = qparams(fmt, weight, global_scale)
        ours = encode(weight[None], fmt, "absmax", global_scale)["scale"][0]
        assert torch.equal(bits(ours), bits(theirs.to(torch.float8_e4m3fn)))


def test_packing_is_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-8, 8, (48, 272), dtype=torch.int8, generator=generator)
    packed = engine_torch.pack_nibbles((levels + 8).to(torch.uint8))
    assert torch.equal(packed.view(torch.int32), pack_to_int32(levels, 4))
    assert torch.equal(unpack_from_int32(packed.view(torch.int32), 4, levels.shape), levels)
    zero = engine_torch.pack_zero_points(levels[None].float())
    assert torch.equal(zero[0], pack_to_int32(levels, 4, packed_dim=0))
    assert torch.equal(engine_torch.unpack_zero_points(zero)[0], levels)
    assert torch.equal(unpack_from_int32(zero[0], 4, levels.shape, packed_dim=0), levels)


def test_fp4_packing_is_theirs_with_the_sign_of_zero() -> None:
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    table = torch.cat([table, -table])  # -0.0 is code 8
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack_fp4_to_uint8(table[codes.long()])
    assert torch.equal(engine_torch.pack_nibbles(codes), packed)
    assert torch.equal(bits(unpack_fp4_from_uint8(packed, 256, 2, torch.float32)), bits(table[codes.long()]))
    parts = {"codes": packed.reshape(1, 8, 32).repeat(1, 1, 2), "scale": torch.full((1, 8, 4), 127, dtype=torch.uint8)}
    ours = decode(parts, Format("mxfp4", 32))[0]
    assert torch.equal(bits(ours), bits(unpack_fp4_from_uint8(parts["codes"][0], 8, 128, torch.float32)))
    assert int((ours.to(torch.bfloat16).view(torch.int16) == SIGN - 2**16).sum()) > 0, "a negative zero is among them"
