"""Passes over whole stacks of matrices: an order and its inverse; on CUDA, the bytes of the plain statements."""

from __future__ import annotations

import pytest
import stored_formats
import torch
from torch import Tensor

from mimoquant.calibration import statistics
from mimoquant.model.decoder_layer import add_group
from mimoquant.model.dispatch import Dispatch, Routing
from mimoquant.quant import order
from mimoquant.quant.engine_torch import amax, decode, encode, nvfp4_global_scale, pack_nibbles
from mimoquant.quant.expert_methods import as_read, encode_with
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import push_factor
from mimoquant.quant.method import Method
from mimoquant.quant.products import exact_parts, halves, take_product

EXPERTS, ROWS, WIDTH = 3, 72, 640
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
SYMMETRIC = [fmt for fmt in stored_formats.FORMATS if fmt.symmetric]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orders(size: int, device: str) -> Tensor:
    return torch.stack([torch.randperm(size, generator=torch.Generator().manual_seed(e)) for e in range(EXPERTS)]).to(
        device
    )


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_matrices_are_laid_in_an_order_and_back(dtype: torch.dtype, device: str) -> None:
    matrix = (100 * drawn(EXPERTS, ROWS, WIDTH).abs()).to(dtype).to(device)
    rows, columns = orders(ROWS, device), orders(WIDTH, device)
    laid = order.laid(matrix, rows, columns)
    for e in range(EXPERTS):
        assert torch.equal(laid[e], matrix[e][rows[e]][:, columns[e]])
        assert torch.equal(order.reordered(matrix, rows)[e], matrix[e][rows[e]])
    assert torch.equal(order.laid_back(laid, rows, columns), matrix)
    assert torch.equal(order.turned(matrix), matrix.mT) and order.turned(matrix).is_contiguous()


@every_device
def test_parts_hold_what_they_are_made_of(device: str) -> None:
    """Two halves to 2^-16 of a value; a product of `exact_parts` nearly to what float32 holds."""
    matrix = (drawn(EXPERTS, ROWS, WIDTH) * drawn(EXPERTS, ROWS, 1, seed=1).exp()).to(device)
    assert (sum(half.double() for half in halves(matrix)) - matrix.double()).abs().max() < 2**-15 * matrix.abs().max()
    out = drawn(EXPERTS, ROWS, ROWS, seed=2).to(device)
    true, size = out.double() - matrix.double() @ matrix.double().mT, matrix.double().abs() @ matrix.double().abs().mT
    left, right = exact_parts(matrix)
    take_product(out, left, right.mT)
    assert ((out.double() - true).abs() / size).max() < 4e-6


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
def test_passes_on_cuda_give_the_bytes_of_plain_statements(device: str) -> None:
    matrix, count = drawn(EXPERTS, WIDTH, WIDTH).to(device), torch.tensor([3.0, 1.0, 700.0], device=device)
    high = matrix.to(torch.bfloat16)
    assert all(map(torch.equal, halves(matrix), (high, (matrix - high).to(torch.bfloat16))))
    codes = torch.randint(0, 16, (EXPERTS, WIDTH, ROWS), dtype=torch.uint8, device=device)
    kernels = order.cuda_passes(matrix)
    assert torch.equal(kernels.packed(codes), pack_nibbles(codes.mT.contiguous()))
    keep, share = (torch.rand(EXPERTS, device=device) for _ in range(2))
    for toward in (matrix[0].clone(), matrix.flip(0)):
        plain = (matrix / count[:, None, None]) * keep[:, None, None] + share[:, None, None] * toward
        assert torch.equal(kernels.mixed(matrix, count, toward, keep, share), plain)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("fmt", SYMMETRIC, ids=lambda fmt: fmt.label)
def test_values_are_read_as_they_are_decoded(fmt: Format, device: str) -> None:
    weight = (0.02 * drawn(EXPERTS, ROWS, WIDTH)).to(torch.bfloat16).to(device)
    weight[0, 0] = 0
    parts = encode(weight, fmt, "mse", nvfp4_global_scale(amax(weight), "mse", fmt), signed=True)
    assert torch.equal(as_read(parts, fmt), decode(parts, fmt).to(torch.bfloat16))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("fmt", SYMMETRIC, ids=lambda fmt: fmt.label)
def test_codes_of_both_kinds_of_device_cost_the_same(fmt: Format, device: str) -> None:
    """GPTQ and refinement: sums of another order, so ties fall otherwise, and no more."""
    tokens = drawn(EXPERTS, 900, WIDTH, seed=3) @ (0.1 * drawn(WIDTH, WIDTH, seed=4) + torch.eye(WIDTH))
    weight, gram = (0.02 * drawn(EXPERTS, ROWS, WIDTH)).to(torch.bfloat16), tokens.mT @ tokens / 900
    order_of = order.falling(gram)
    mine, theirs = (push_factor(gram.to(where), order_of.to(where), 0.05) for where in (device, "cpu"))
    assert mine[1:] == theirs[1:] == ([], []) and torch.allclose(mine[0].cpu(), theirs[0], rtol=1e-3, atol=1e-5)
    method, made = Method("gram", gptq=True, refine=2, signed=True), []
    for where in ("cpu", device):
        scale = nvfp4_global_scale(amax(weight), "gram", fmt).to(where)
        encoded = encode_with(weight.to(where), gram.to(where), fmt, method, scale)
        change = encoded.values.cpu().double() - weight.double()
        made.append(((change @ gram.double()) * change).sum((1, 2)))
        assert (encoded.damped, encoded.rounded) == (0, 0)
    assert (made[1] / made[0] - 1).abs().max() < 0.01, made


@every_device
def test_statistics_and_answers_are_those_of_each_expert_s_tokens(device: str) -> None:
    """Experts of many tokens, of some and of none."""
    tokens = drawn(2000, 64).to(torch.bfloat16).to(device)
    first = torch.where(torch.arange(2000) % 8 > 0, 1, torch.arange(2000) // 8 % 2 * 3)
    routing = Routing(torch.stack((first, first * 0 + 4), 1).to(device), torch.rand(2000, 2, device=device))
    dispatch, out = Dispatch.of(routing, 6), torch.zeros(2000, 64, device=device)
    grams = statistics.expert_grams([(tokens, dispatch)], 0, 6, 64)
    expected = torch.zeros(2000, 64, dtype=torch.float64, device=device)
    for expert in range(6):
        chosen = routing.experts == expert
        mine = tokens[chosen.any(-1)].double()
        assert torch.allclose(grams[expert].double(), mine.T @ mine, rtol=1e-5, atol=1e-3)
        expected += (expert + 1) * tokens.double() * (chosen * routing.weights).sum(-1, keepdim=True)
    for group in dispatch.groups(0, 6):
        add_group(out, group, tokens[group.rows].float() * (group.members + 1)[:, None, None])
    assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-5)
