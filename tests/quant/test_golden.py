"""Numbers that other people's programs produced, kept in files.

Two sources. `golden/*.json` travel with the repository: a few hundred numbers each, written once by compressed-tensors
(`python tests/quant/test_golden.py` writes them again; that function says how). The larger vectors of microxcaling,
ModelOpt, compressed-tensors and of the real checkpoint lie in the shared folder; their tests are skipped without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimoquant.quant import engine_torch
from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine, decode, encode
from mimoquant.quant.formats import INT4_ZERO_SCALE, Format
from mimoquant.quant.stack import Engine, NonFiniteError, Stack

GOLDEN = Path(__file__).parent / "golden"
MXFP4, NVFP4 = Format("mxfp4", 32), Format("nvfp4", 16)


@pytest.fixture(params=["cpu", "torch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return CpuEngine(1) if request.param == "cpu" else TorchEngine("cpu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def encode_one(engine: Engine, weight_bits: np.ndarray, fmt: Format) -> dict[str, np.ndarray]:
    """The parts of one bf16 matrix, given as its bits."""
    stack = Stack(weight_bits[None], None)
    parts = engine.encode({"gate": stack, "up": stack, "down": stack}, fmt, "absmax")["down"]
    return {name: part[0] for name, part in parts.items()}


# --- golden/*.json ----------------------------------------------------------------------------------------------------


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_int4_packing(engine: Engine) -> None:
    numbers = golden("int4_packing.json")
    levels = torch.tensor(numbers["levels"], dtype=torch.int8)
    packed = engine_torch.pack_nibbles((levels + 8).to(torch.uint8)).view(torch.int32)
    assert packed.tolist() == numbers["packed"]
    zero = engine_torch.pack_zero_points(levels.float()[None])
    assert zero[0].tolist() == numbers["packed_along_rows"]
    assert engine_torch.unpack_zero_points(zero)[0].tolist() == numbers["levels"]


@pytest.mark.parametrize("name", ["int4_rounding.json", "mxfp4_rounding.json", "nvfp4_rounding.json"])
def test_rounding(engine: Engine, name: str) -> None:
    numbers = golden(name)
    fmt = Format(**numbers["format"])
    parts = encode_one(engine, np.array(numbers["weight_bf16"], np.uint16), fmt)
    assert parts["scale"].tolist() == numbers["scale"]
    assert parts["codes"].tolist() == numbers["packed"]
    if fmt.name == "nvfp4":
        assert parts["global_scale"].view(np.uint32).tolist() == numbers["global_scale_bits"]


def write_golden_files() -> None:
    """Write golden/*.json with compressed-tensors 0.19 (`calculate_qparams`, `generate_gparam`, `quantize`, packers).

    All arithmetic is in float32 and starts from bf16 weights: normal, on ties, one-sided and with an outlier. No row is
    all zero and no weight is -0.0, because there the library and this program differ on purpose. int4 scales are
    rounded to bf16 before `quantize`, as they are stored. Dtypes that JSON lacks are written as their bits.
    """
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rng = np.random.default_rng(20251122)

    def write(name: str, numbers: dict[str, Any]) -> None:
        lines = (f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in numbers.items())
        (GOLDEN / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    GOLDEN.mkdir(exist_ok=True)
    levels = torch.from_numpy(rng.integers(-8, 8, (16, 16)).astype(np.int8))
    write(
        "int4_packing.json",
        {
            "levels": levels.tolist(),
            "packed": pack_to_int32(levels, 4).tolist(),
            "packed_along_rows": pack_to_int32(levels, 4, packed_dim=0).tolist(),
        },
    )

    values = rng.normal(0, 0.02, (8, 64)).astype(np.float32)
    values[1], values[2] = rng.integers(1, 24, 64) / 4, np.abs(values[2])
    values[3, 7], values[4] = 1.5, values[4] * 1e-6
    weight = torch.from_numpy(values).to(torch.bfloat16)
    schemes = {
        "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "nvfp4": {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    }
    for name, scheme in schemes.items():
        args, x = QuantizationArgs(symmetric=True, **scheme), weight.float()
        grouped = x.unflatten(-1, (-1, args.group_size))
        global_scale = generate_gparam(x.min(), x.max()) if name == "nvfp4" else None
        scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, global_scale)
        scale = scale.to(torch.bfloat16).float() if name == "int4" else scale
        codes = quantize(x, scale, None, args, dtype=torch.int8 if name == "int4" else None, global_scale=global_scale)
        numbers: dict[str, Any] = {
            "format": {"name": name, "group_size": args.group_size},
            "weight_bf16": weight.view(torch.uint16).tolist(),
        }
        if name == "int4":
            numbers["scale"] = scale.to(torch.bfloat16).view(torch.uint16).tolist()
            numbers["packed"] = pack_to_int32(codes, 4).contiguous().view(torch.uint8).tolist()
        else:
            stored = compress_mx_scale(scale, torch.uint8) if name == "mxfp4" else scale.to(torch.float8_e4m3fn)
            numbers["scale"] = stored.view(torch.uint8).tolist()
            numbers["packed"] = pack_fp4_to_uint8(codes).tolist()
        if global_scale is not None:
            numbers["global_scale_bits"] = global_scale.view(torch.int32).tolist()
        write(f"{name}_rounding.json", numbers)


# --- the shared vectors -----------------------------------------------------------------------------------------------


def vectors(shared: Path, name: str) -> dict[str, torch.Tensor]:
    path = shared / "fixtures" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with np.load(path) as arrays:
        return {key: torch.from_numpy(np.atleast_1d(arrays[key])) for key in arrays.files}


def prismwing(shared: Path, name: str) -> dict[str, Any]:
    path = shared / "fixtures" / "prismwing" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text(encoding="utf-8"))


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal float32 values, the sign of zero aside."""
    return torch.equal(bits(a + 0.0), bits(b + 0.0))


def test_compressed_tensors_int4_packing(shared: Path) -> None:
    arrays = vectors(shared, "golden_pack_int4_compressed_tensors.npz")
    codes = (arrays["values"] + 8).to(torch.uint8)
    assert torch.equal(engine_torch.pack_nibbles(codes).view(torch.int32), arrays["packed"])
    assert torch.equal(engine_torch.pack_zero_points(arrays["values"].float()[None])[0], arrays["packed_dim0"])
    odd = torch.nn.functional.pad((arrays["values_odd"] + 8).to(torch.uint8), (0, 3))
    assert torch.equal(engine_torch.pack_nibbles(odd).view(torch.int32), arrays["packed_odd"])


def test_modelopt_mxfp4_bytes_decode_to_their_values(shared: Path) -> None:
    arrays = vectors(shared, "golden_fp4_modelopt.npz")
    parts = {"codes": arrays["mxfp4_packed"][None], "scale": arrays["mxfp4_scale_e8m0"].reshape(1, 64, 8)}
    assert torch.equal(bits(decode(parts, MXFP4)[0]), bits(arrays["mxfp4_dequant"]))


def test_modelopt_nvfp4_bytes_decode_to_their_values(shared: Path) -> None:
    """They multiply by `scale2`, so what others wrote is read by multiplying, and equal but for the sign of a zero."""
    arrays = vectors(shared, "golden_fp4_modelopt.npz")
    parts = {
        "codes": arrays["nvfp4_packed"][None],
        "scale": arrays["nvfp4_scale_bytes"][None].view(torch.float8_e4m3fn),
        "multiplier": arrays["nvfp4_scale2"],
    }
    assert same_values(decode(parts, NVFP4)[0], arrays["nvfp4_dequant"])


def equal_codes(ours: torch.Tensor, theirs: torch.Tensor, group_size: int) -> torch.Tensor:
    """Which packed codes are equal [O, G, S], but for the sign of a zero."""
    ours, theirs = (engine_torch.unpack_nibbles(codes).unflatten(-1, (-1, group_size)) for codes in (ours, theirs))
    return (ours == theirs) | ((ours & 7 == 0) & (theirs & 7 == 0))


TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # halfway between two e2m1 values


def test_modelopt_mxfp4_codes_are_ours_where_the_scales_are(shared: Path) -> None:
    """Their exponent is the ceiling, ours rounds up from mantissa 1.75 on: theirs is ours or one more.

    Exact ties aside: they always round those down, we to the even code.
    """
    arrays = vectors(shared, "golden_fp4_modelopt.npz")
    x = arrays["x_bf16_as_f32"].unflatten(-1, (-1, 32))
    ours = encode(arrays["x_bf16_as_f32"][None].to(torch.bfloat16), MXFP4)
    theirs = arrays["mxfp4_scale_e8m0"].reshape(64, 8)
    same = ours["scale"][0] == theirs
    assert 0.5 < same.float().mean() < 1
    normal = ours["scale"][0] > 0  # a group of zeros aside
    assert torch.isin((theirs.int() - ours["scale"][0].int())[normal], torch.tensor([0, 1])).all()
    ties = torch.isin(x.abs() / torch.pow(2.0, theirs.float() - 127)[..., None], TIES)
    equal = equal_codes(ours["codes"][0], arrays["mxfp4_packed"], 32)
    assert equal[same[..., None] & ~ties].all()


def test_modelopt_nvfp4_codes_and_scales_are_ours(shared: Path) -> None:
    """With their global scale. A block scale that E4M3 rounds to zero becomes 0.125 here, as in compressed-tensors;
    they write 1 for a group of zeros and E4M3's smallest number for the others.
    """
    arrays = vectors(shared, "golden_fp4_modelopt.npz")
    weight = arrays["x_bf16_as_f32"][None].to(torch.bfloat16)
    ours = encode(weight, NVFP4, "absmax", 1 / arrays["nvfp4_scale2"])
    amax = weight[0].float().unflatten(-1, (-1, 16)).abs().amax(-1)
    vanishes = (amax / 6 / arrays["nvfp4_scale2"]).to(torch.float8_e4m3fn).float() == 0
    ours_scale = ours["scale"][0].float()
    theirs_scale = arrays["nvfp4_scale_bytes"].view(torch.float8_e4m3fn).float()
    assert torch.equal(ours_scale != theirs_scale, vanishes) and vanishes.any()
    assert (ours_scale[vanishes] == 0.125).all()
    assert torch.equal(theirs_scale[vanishes], torch.where(amax[vanishes] == 0, 1.0, 2.0**-9))
    x = weight[0].float().unflatten(-1, (-1, 16)).abs() / (theirs_scale * arrays["nvfp4_scale2"])[..., None]
    ties = ((x[..., None] / TIES - 1).abs() < 1e-6).any(-1)  # they multiply where we divide
    assert (equal_codes(ours["codes"][0], arrays["nvfp4_packed"], 16) | ties)[~vanishes | (amax == 0)].all()
    assert ties.float().mean() < 0.01


ROUNDINGS = ["nearest", "even", "floor"]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_microxcaling_values_pass_through_unchanged(shared: Path, rounding: str) -> None:
    """Whatever the rule that chose them: their values lie on our grid, and encoding finds the same grid again."""
    theirs = vectors(shared, "golden_mxfp4_microxcaling.npz")[f"microxcaling_mxfp4_{rounding}"]
    for search in ("absmax", "mse"):
        assert same_values(decode(encode(theirs[None], MXFP4, search), MXFP4)[0], theirs)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_microxcaling_rounds_as_we_do_where_the_exponents_agree(shared: Path, rounding: str) -> None:
    """Their exponent is the floor, so groups whose largest mantissa is below 1.75 have ours too.

    There `even` is our rounding. `nearest` takes ties away from zero, and `floor` cuts off.
    """
    arrays = vectors(shared, "golden_mxfp4_microxcaling.npz")
    x, theirs = arrays["x"].unflatten(-1, (-1, 32)), arrays[f"microxcaling_mxfp4_{rounding}"].unflatten(-1, (-1, 32))
    mantissa, exponent = torch.frexp(x.abs().amax(-1))
    agree = (mantissa > 0) & (mantissa < 1.75 / 2) & (exponent > -110)
    assert 0.5 < agree.float().mean() < 1
    parts = encode(arrays["x"][None], MXFP4)
    assert torch.equal(parts["scale"][0].int()[agree], (exponent + 127 - 1 - 2)[agree])
    ours = decode(parts, MXFP4)[0].unflatten(-1, (-1, 32))
    scale = torch.pow(2.0, exponent.float() - 3)[..., None]
    x, ours, theirs = (values.abs().div(scale)[agree] for values in (x, ours, theirs))
    if rounding == "even":
        assert torch.equal(ours, theirs)
    elif rounding == "nearest":
        ties = torch.isin(x, TIES)
        assert torch.equal(ours[~ties], theirs[~ties])
        assert (theirs[ties] >= ours[ties]).all() and (theirs > ours).any()
    else:
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        assert torch.equal(theirs, grid[torch.searchsorted(grid, x, right=True) - 1])
        assert (ours >= theirs).all() and (ours > theirs).any()


def test_all_e4m3_codes(shared: Path, engine: Engine) -> None:
    expected = np.array(prismwing(shared, "f8-e4m3fn-all-bytes.json")["expected_f32_bits"], np.uint32)
    codes, unit, first_row = np.arange(256, dtype=np.uint8), np.ones((1, 1), np.float32), np.zeros(1, np.int64)
    finite = np.isfinite(expected.view(np.float32))
    assert np.flatnonzero(~finite).tolist() == [0x7F, 0xFF]
    row = codes[finite][None]
    decoded = engine.dequantize(row, np.ones((1, 2), np.float32), first_row).astype(np.uint32) << 16
    assert np.array_equal(decoded[0], expected[finite]), "every code is exact in bf16"
    for code in codes[~finite]:
        with pytest.raises(NonFiniteError):
            engine.dequantize(np.full((1, 8), code), unit, first_row)


def test_real_fp8_rows_reproduce_their_products(shared: Path, engine: Engine) -> None:
    """Four rows of a published FP8 weight, times a vector.

    With scales of one our decoder is exact, so the recorded product follows to 1e-5 from its values; with the real
    scales it rounds each value once to bf16.
    """
    record = prismwing(shared, "mtp-gate-fp8-gemv.json")
    codes, scale = np.array(record["raw_u8"], np.uint8), np.array([record["scale_inv"]], np.float32)
    vector, rows = np.array(record["input"], np.float64), np.zeros(4, np.int64)
    assert codes.shape == (4, 4096) and scale.shape == (1, 32)

    def dequantized(scales: np.ndarray) -> np.ndarray:
        return (engine.dequantize(codes, scales, rows).astype(np.uint32) << 16).view(np.float32)

    per_column = np.repeat(scale[0], 128)
    exact = dequantized(np.ones_like(scale)) * per_column
    np.testing.assert_allclose(exact.astype(np.float64) @ vector, record["expected_f32"], rtol=1e-5)
    rounded = torch.from_numpy(exact).to(torch.bfloat16).float().numpy()
    assert np.array_equal(dequantized(scale).view(np.uint32), rounded.view(np.uint32))
    np.testing.assert_allclose(dequantized(scale) @ vector, record["expected_f32"], rtol=5e-3)


def test_real_fp8_block_values(shared: Path, engine: Engine) -> None:
    record = prismwing(shared, "mtp-gate-fp8-block.json")
    codes, scale = np.array(record["raw_u8"], np.uint8), np.array([[record["scale_inv"]]], np.float32)
    rows = np.zeros(len(codes), np.int64)
    decoded = engine.dequantize(codes, np.ones((1, 1), np.float32), rows).astype(np.uint32) << 16
    assert decoded.view(np.float32).tolist() == record["decoded_fp8"]
    ours = engine.dequantize(codes, scale, rows)
    expected = torch.tensor(record["dequantized"]).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(ours, expected)


def test_zero_groups_keep_a_usable_scale(engine: Engine) -> None:
    parts = encode_one(engine, np.zeros((8, 128), np.uint16), Format("int4", 128))
    assert (parts["scale"].astype(np.uint32) << 16).view(np.float32).tolist() == [[INT4_ZERO_SCALE]] * 8
    assert (parts["codes"] == 0x88).all()


if __name__ == "__main__":
    write_golden_files()
