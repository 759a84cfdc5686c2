"""MXFP4 as bf16: every code with every exponent, against float64; blocks in their order, in slabs of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimoquant.quant import expand

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def values(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    nibbles = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)
    return np.ldexp(E2M1[nibbles], np.repeat(exponents.astype(np.int64) - 127, 32, axis=-1))


def test_every_value_is_exact() -> None:
    """6 times 2^127 alone is beyond bf16, and 4 times: they become Inf, which encoders refuse."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
    exponents = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, axis=1)
    out = np.empty((255, 512), np.uint16)
    expand.expand(codes, exponents, out)
    found, wanted = torch.from_numpy(out).view(torch.bfloat16).double().numpy(), values(codes, exponents)
    finite = np.abs(wanted) < 2.0**128
    np.testing.assert_array_equal(found[finite].view(np.int64), wanted[finite].view(np.int64))
    assert np.isinf(found[~finite]).all() and not finite.all()


def test_an_exponent_that_is_nan_makes_all_of_its_block_so() -> None:
    out = np.empty((1, 64), np.uint16)
    expand.expand(np.full((1, 32), 0x10, np.uint8), np.array([[255, 127]], np.uint8), out)
    assert torch.from_numpy(out).view(torch.bfloat16).isnan().sum() == 32


@pytest.mark.parametrize("slab", [16, 48, 2**20])
def test_blocks_keep_their_order(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expand, "_SLAB_BYTES", slab)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3, 5, 48), dtype=np.uint8)
    exponents = rng.integers(100, 140, (3, 5, 3), dtype=np.uint8)
    out = np.empty((3, 5, 96), np.uint16)
    expand.expand(codes, exponents, out)
    np.testing.assert_array_equal(torch.from_numpy(out).view(torch.bfloat16).double().numpy(), values(codes, exponents))
