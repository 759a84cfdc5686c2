"""FP8 blocks to bf16: both engines against a loop in float64, and against compressed-tensors' own dequantizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mimoquant.quant.engine_cpu import CpuEngine
from mimoquant.quant.engine_torch import TorchEngine, dequantize_fp8
from mimoquant.quant.kernels import encode_cpu
from mimoquant.quant.stack import Engine, NonFiniteError

SHAPES = [(128, 128), (1, 1), (136, 128), (128, 160), (200, 330), (5, 7), (257, 129), (1100, 16)]


@pytest.fixture(params=["cpu", "torch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return CpuEngine(3) if request.param == "cpu" else TorchEngine("cpu")


def e4m3(code: int) -> float:
    """The value of an E4M3 byte, by the format's definition."""
    code = int(code)
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nearest_bf16(value: float) -> int:
    """The bits of the bf16 nearest to a float32 `value`, ties to even, in whole numbers."""
    bits = int(np.array(value, np.float32).view(np.uint32))
    low, high = bits & 0xFFFF, bits >> 16
    return high + (low > 0x8000 or (low == 0x8000 and high & 1))


def random_fp8(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.integers(0, 0x7F, shape) | (rng.integers(0, 2, shape) << 7)).astype(np.uint8)


def plain_rows(rows: int) -> np.ndarray:
    return np.arange(rows) // 128


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if math.prod(shape) < 50_000], ids=str)
def test_against_a_loop_in_float64(engine: Engine, shape: tuple[int, int]) -> None:
    """A product of E4M3 and float32 has 28 bits, so float64 holds it; it is rounded to float32, then to bf16."""
    rng = np.random.default_rng(shape[0])
    codes = random_fp8(rng, shape)
    scales = rng.uniform(1e-5, 3e-4, (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))).astype(np.float32)
    scales *= np.float32(2.0) ** rng.integers(-20, 20, scales.shape).astype(np.float32)
    ours = engine.dequantize(codes, scales, plain_rows(shape[0]))
    assert ours.dtype == np.uint16 and ours.shape == shape
    table = [e4m3(code) for code in range(256)]
    for row in range(shape[0]):
        for column in range(shape[1]):
            exact = table[codes[row, column]] * float(scales[row // 128, column // 128])
            assert ours[row, column] == nearest_bf16(np.float32(exact)), (row, column)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_compressed_tensors(engine: Engine, shape: tuple[int, int]) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra `peer`)")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    rng = np.random.default_rng(shape[1])
    codes = random_fp8(rng, shape)
    scales = rng.lognormal(-9, 3, (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))).astype(np.float32)
    fp8 = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    theirs = FP8BlockDequantizer()._create_dequantized_weight(fp8, torch.from_numpy(scales))
    ours = engine.dequantize(codes, scales, plain_rows(shape[0]))
    assert np.array_equal(ours, theirs.view(torch.uint16).numpy())
    assert torch.equal(dequantize_fp8(fp8, torch.from_numpy(scales)).view(torch.int16), theirs.view(torch.int16))


def test_rows_take_the_scale_row_they_are_told(engine: Engine) -> None:
    """Any assignment of rows to scale rows, as in the interleaved qkv where blocks restart at every rank."""
    rng = np.random.default_rng(5)
    codes, scales = random_fp8(rng, (700, 130)), rng.uniform(1e-4, 1e-3, (6, 2)).astype(np.float32)
    for scale_row in (rng.integers(0, 6, 700), np.arange(700) // 128, np.arange(700)[::-1] // 128):
        ours = engine.dequantize(codes, scales, np.ascontiguousarray(scale_row))
        unit = engine.dequantize(codes, np.ones_like(scales), np.zeros(700, np.int64)).astype(np.uint32) << 16
        per_element = np.repeat(scales[scale_row], 128, axis=1)[:, :130]
        expected = torch.from_numpy(unit.view(np.float32) * per_element).to(torch.bfloat16).view(torch.uint16)
        assert np.array_equal(ours, expected.numpy())


def test_subnormal_and_extreme_products(engine: Engine) -> None:
    """Results below bf16's normal range, down to zero, and up to its end."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F][None]
    for exponent in (-149, -140, -133, -127, -126, -110, 60, 118, 119):
        scale = np.full((1, 2), 2.0**exponent, np.float32)
        ours = engine.dequantize(codes, scale, np.zeros(1, np.int64))[0]
        assert ours.tolist() == [nearest_bf16(np.float32(e4m3(code) * 2.0**exponent)) for code in codes[0]]


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800000, 0xFF800000])
def test_a_scale_that_is_not_finite_is_refused(engine: Engine, bits: int) -> None:
    scales = np.ones((2, 2), np.float32)
    scales[1, 0] = np.array(bits, np.uint32).view(np.float32)
    codes = np.full((130, 130), 0x38, np.uint8)
    engine.dequantize(codes[:128], scales, plain_rows(128))
    with pytest.raises(NonFiniteError):
        engine.dequantize(codes, scales, plain_rows(130))


@pytest.mark.parametrize("column", [0, 7, 64, 127, 128, 129])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused(engine: Engine, code: int, column: int) -> None:
    """Wherever it lies: codes are looked at eight at a time, and the last few one by one."""
    codes = np.full((600, 130), 0x7E, np.uint8)
    engine.dequantize(codes, np.ones((5, 2), np.float32), plain_rows(600))
    codes[599, column] = code
    with pytest.raises(NonFiniteError):
        engine.dequantize(codes, np.ones((5, 2), np.float32), plain_rows(600))


def test_a_product_beyond_bf16_is_refused(engine: Engine) -> None:
    with pytest.raises(NonFiniteError):
        engine.dequantize(np.full((1, 1), 0x7E, np.uint8), np.full((1, 1), 1e38, np.float32), np.zeros(1, np.int64))
    for column in (1, 129):  # in one block of a row whose others are small
        codes, scales = np.full((2, 130), 0x7E, np.uint8), np.ones((1, 2), np.float32)
        scales[0, column // 128] = 2.0**120
        with pytest.raises(NonFiniteError):
            engine.dequantize(codes, scales, np.zeros(2, np.int64))
    # the largest float32 is finite, but rounds to infinity in bf16
    with pytest.raises(NonFiniteError):
        engine.dequantize(
            np.full((1, 1), 0x38, np.uint8),
            np.full((1, 1), np.finfo(np.float32).max, np.float32),
            np.zeros(1, np.int64),
        )


def test_the_kernels_own_e4m3_rounding_is_the_dtypes() -> None:
    """Every E4M3 number, every midpoint of two, and their float32 neighbours."""
    numbers = np.array([e4m3(code) for code in range(0x7F)], np.float32)
    middles = (numbers[1:] + numbers[:-1]) / 2
    points = np.concatenate([numbers, middles])
    inf = np.float32(np.inf)
    points = np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf), [449, 464, 1e30]])
    points = points[points >= 0].astype(np.float32)
    expected = torch.from_numpy(points).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert [int(encode_cpu.e4m3_byte(point)) for point in points] == expected.tolist()
    assert [float(encode_cpu.e4m3_value(np.uint32(code))) for code in range(0x7F)] == numbers.tolist()
