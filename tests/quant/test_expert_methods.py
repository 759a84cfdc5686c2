"""Whole methods on inputs with a few loud channels: which one loses less, and what ends up in the parts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from mimoquant.quant.engine_torch import amax, decode, encode, nvfp4_global_scale, unpack_nibbles
from mimoquant.quant.expert_methods import Encoded, encode_with, energy, loss
from mimoquant.quant.formats import Format
from mimoquant.quant.gptq import gptq
from mimoquant.quant.grid import Grid
from mimoquant.quant.method import Method
from mimoquant.quant.refine import refine

FORMATS = [
    Format("int4", 32),
    Format("int4", 64),
    Format("int4", 128),
    Format("int4", 32, symmetric=False),
    Format("int4", 128, symmetric=False),
    Format("mxfp4", 32),
    Format("nvfp4", 16),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
EXPERTS, ROWS, WIDTH = 2, 16, 256
METHODS = {
    "absmax": Method("absmax"),
    "mse": Method("mse"),
    "gram": Method("gram"),
    "gptq": Method("gram", gptq=True),
    "refined": Method("gram", gptq=True, refine=2),
}


@cache
def stack() -> tuple[Tensor, Tensor]:
    """bf16 weights, and Gram matrices of correlated inputs where six channels are 30 times as loud."""
    generator = torch.Generator().manual_seed(11)
    weight = (torch.randn(EXPERTS, ROWS, WIDTH, generator=generator) * 0.02).to(torch.bfloat16)
    inputs = torch.randn(EXPERTS, 1000, 32, generator=generator) @ torch.randn(EXPERTS, 32, WIDTH, generator=generator)
    inputs = inputs / 6 + 0.5 * torch.randn(EXPERTS, 1000, WIDTH, generator=generator)
    inputs[:, :, torch.randperm(WIDTH, generator=generator)[:6]] *= 30
    return weight, inputs.mT @ inputs / 1000


@cache
def run(fmt: Format, method: Method, weight: Tensor | None = None, gram: Tensor | None = None) -> Encoded:
    weight, gram = stack()[0] if weight is None else weight, stack()[1] if gram is None else gram
    return encode_with(weight, gram, fmt, method, nvfp4_global_scale(amax(weight), method.search, fmt))


def exact(difference: Tensor, gram: Tensor) -> Tensor:
    return ((difference.double() @ gram.double()) * difference.double()).sum((-2, -1))


def loss_of(encoded: Encoded) -> Tensor:
    weight, gram = stack()
    return exact(encoded.values.double() - weight.double(), gram)


@every_format
def test_each_step_loses_less_than_the_one_before(fmt: Format) -> None:
    """It holds for all formats. By how much differs: a power of two leaves the search little to choose."""
    lost = {name: loss_of(run(fmt, method)) for name, method in METHODS.items()}
    assert (lost["mse"] <= lost["absmax"]).all()
    assert (lost["gram"] < (0.98 if fmt.name == "mxfp4" else 0.6) * lost["mse"]).all()
    assert (lost["gptq"] < 0.6 * lost["gram"]).all()
    assert (lost["refined"] < 0.95 * lost["gptq"]).all()


@every_format
def test_gptq_needs_the_search_first(fmt: Format) -> None:
    searched, plain = (loss_of(run(fmt, Method(search, gptq=True))) for search in ("gram", "absmax"))
    assert (searched < plain).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("name", ["gram", "gptq", "refined"])
def test_signed_scales_lose_less(group_size: int, name: str) -> None:
    fmt, method = Format("int4", group_size), METHODS[name]
    signed = Method(method.search, method.gptq, method.damp, method.refine, signed=True)
    with_sign = run(fmt, signed)
    assert (loss_of(with_sign) < loss_of(run(fmt, method))).all()
    negative = with_sign.parts["scale"] < 0
    assert 0.2 < negative.float().mean() < 0.8


def test_the_signed_search_is_never_worse_by_its_own_measure() -> None:
    weight, gram = stack()
    importance = gram.diagonal(dim1=1, dim2=2)
    for group_size in (32, 64, 128):
        fmt = Format("int4", group_size)
        errors = []
        for signed in (False, True):
            values = decode(encode(weight, fmt, "gram", None, importance, signed=signed), fmt).double()
            squares = (values - weight.double()) ** 2 * importance[:, None].double()
            errors.append(squares.reshape(EXPERTS, ROWS, -1, group_size).sum(-1))
        assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and (errors[1] < 0.9 * errors[0]).any()


@pytest.mark.parametrize(
    "fmt", [Format("int4", 32, symmetric=False), Format("mxfp4", 32), Format("nvfp4", 16)], ids=lambda fmt: fmt.label
)
def test_signed_means_nothing_to_other_formats(fmt: Format) -> None:
    plain, signed = run(fmt, Method("gram")), run(fmt, Method("gram", signed=True))
    assert all(torch.equal(plain.parts[name].float(), signed.parts[name].float()) for name in plain.parts)


@pytest.mark.parametrize("name", ["gram", "refined"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_compressed_tensors_reads_negative_scales(group_size: int, name: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (the extra `peer`)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from mimoquant.weights.container import COMPRESSED_TENSORS, expert_tensors, output_config

    fmt, method = Format("int4", group_size), METHODS[name]
    encoded = run(fmt, Method(method.search, method.gptq, method.damp, method.refine, signed=True))
    config = output_config({}, COMPRESSED_TENSORS, {1: fmt}, {})["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**config["weights"]))
    for expert in range(EXPERTS):
        state = {"weight_shape": torch.tensor([ROWS, WIDTH])}
        for stored in expert_tensors(COMPRESSED_TENSORS, fmt, ROWS, WIDTH):
            part = encoded.parts[stored.part][expert]
            state[stored.suffix] = part.view(torch.int32) if stored.dtype == "I32" else part
            assert tuple(state[stored.suffix].shape) == stored.shape
        assert (encoded.parts["scale"][expert] < 0).any()
        theirs = BaseCompressor.get_value_from_registry(config["format"]).decompress(state, scheme)["weight"]
        assert torch.equal(theirs.view(torch.int16), encoded.values[expert].view(torch.int16))


@every_format
def test_it_is_search_then_gptq_then_refinement(fmt: Format) -> None:
    weight, gram = stack()
    scale = nvfp4_global_scale(amax(weight), "mse", fmt)
    parts = encode(weight, fmt, "mse", scale)
    assert torch.equal(run(fmt, Method("mse")).parts["codes"], parts["codes"])
    codes = gptq(weight.float(), gram, Grid.of(parts, fmt), fmt, 0.1).codes
    assert torch.equal(unpack_nibbles(run(fmt, Method("mse", True, 0.1)).parts["codes"]), codes)
    parts, codes = refine(weight.float(), gram, parts, codes, fmt, 1)
    refined = run(fmt, Method("mse", True, 0.1, 1))
    assert torch.equal(unpack_nibbles(refined.parts["codes"]), codes)
    assert torch.equal(refined.parts["scale"].float(), parts["scale"].float())
    for name, (_, shape) in fmt.parts(ROWS, WIDTH).items():
        assert refined.parts[name].shape == (EXPERTS, *shape)
    assert torch.equal(refined.values, decode(refined.parts, fmt).to(torch.bfloat16))


@every_format
def test_equal_importance_is_the_plain_search(fmt: Format) -> None:
    weight, _ = stack()
    scale = nvfp4_global_scale(amax(weight), "mse", fmt)
    plain = encode(weight, fmt, "mse", scale)
    weighed = encode(weight, fmt, "gram", scale, torch.full((EXPERTS, WIDTH), 4.0))
    assert all(torch.equal(plain[name].float(), weighed[name].float()) for name in plain)


@every_format
def test_importance_is_a_weight_of_the_squared_error(fmt: Format) -> None:
    """The weighed choice beats the plain one by the weighed measure, in every group, and loses to it by the plain."""
    weight, gram = stack()
    scale, importance = nvfp4_global_scale(amax(weight), "mse", fmt), gram.diagonal(dim1=1, dim2=2)
    plain, weighed = encode(weight, fmt, "mse", scale), encode(weight, fmt, "gram", scale, importance)
    errors = [
        ((decode(parts, fmt).double() - weight.double()) ** 2 * measure)
        .reshape(EXPERTS, ROWS, -1, fmt.group_size)
        .sum(-1)
        for measure in (importance[:, None].double(), 1.0)
        for parts in (weighed, plain)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all() and (errors[0] < errors[1]).any()
    assert (errors[2] >= errors[3] * (1 - 1e-6)).all()


# --- experts about which the calibration data says nothing ------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt",
    [Format("int4", 64), Format("int4", 32, symmetric=False), Format("mxfp4", 32), Format("nvfp4", 16)],
    ids=lambda fmt: fmt.label,
)
def test_an_expert_with_a_bad_gram_matrix_is_rounded_well(fmt: Format) -> None:
    """It gets what the plain search gives it, also where only GPTQ finds out that something is wrong."""
    weight, gram = (one[:1].repeat(5, 1, 1) for one in stack())
    gram[1] = 0
    gram[2, 5, 5] = float("nan")
    gram[3] *= -1
    gram[4, 3, 200] = gram[4, 200, 3] = 1e4 * gram[0].diagonal().max()
    encoded = run(fmt, Method("gram", gptq=True, refine=2, signed=True), weight, gram)
    assert (encoded.damped, encoded.rounded) == (0, 3)
    unweighed = run(fmt, Method("mse", signed=True), weight, gram)
    weighed = run(fmt, Method("gram", signed=True), weight, gram)
    assert torch.equal(encoded.values[1:4], unweighed.values[1:4])
    assert torch.equal(encoded.values[4], weighed.values[4]), "this one's diagonal is sound"
    alone = run(fmt, Method("gram", gptq=True, refine=2, signed=True), weight[:1], gram[:1])
    assert (encoded.values[0] == alone.values[0]).float().mean() > 0.9


@every_format
def test_groups_without_inputs_get_their_plain_scale(fmt: Format) -> None:
    gram = stack()[1].clone()
    gram[:, :128], gram[:, :, :128] = 0, 0
    encoded, plain = run(fmt, Method("gram"), gram=gram), run(fmt, Method("mse"))
    assert torch.equal(encoded.values[:, :, :128], plain.values[:, :, :128])
    assert torch.isfinite(encoded.values).all()


def test_only_bfloat16_weights_are_taken() -> None:
    weight, _ = stack()
    with pytest.raises(TypeError, match="float32"):
        run(Format("int4", 128), METHODS["refined"], weight=weight.float())


# --- what a method costs ----------------------------------------------------------------------------------------------


def test_loss_and_energy_are_the_exact_ones_within_a_percent() -> None:
    """Also where GPTQ has left little along the directions that are loud, so that products cancel."""
    weight, gram = stack()
    ours = energy(weight, gram)
    assert ours.dtype is torch.float32 and ours.shape == (EXPERTS,)
    torch.testing.assert_close(ours.double(), exact(weight, gram), rtol=1e-4, atol=0)
    for fmt in (Format("int4", 128), Format("nvfp4", 16)):
        for method in METHODS.values():
            encoded = run(fmt, method)
            torch.testing.assert_close(loss(weight, encoded.values, gram).double(), loss_of(encoded), rtol=0.01, atol=0)
    assert torch.equal(loss(weight, weight, gram), torch.zeros(EXPERTS))


def test_bfloat16_products_are_good_enough_for_the_loss() -> None:
    """The rounding that happens on a GPU, done here: both factors in bfloat16, sums in float32."""
    weight, gram = stack()
    encoded = run(Format("int4", 128), METHODS["refined"])
    rough = (encoded.values.float() - weight.float()).to(torch.bfloat16).float()
    estimate = ((rough @ gram.to(torch.bfloat16).float()) * rough).sum((-2, -1))
    assert np.allclose(estimate.numpy(), loss_of(encoded).numpy(), rtol=0.02)
