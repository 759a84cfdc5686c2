"""Gate and up under what an expert answers: gradients against autograd in float64, and what must hold of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stored_formats import every_format
from test_gptq import parts_of
from torch import Tensor

from mimoquant.calibration.statistics import slopes
from mimoquant.quant import inner_descent
from mimoquant.quant.descent import descend
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.inner_descent import descend_inner
from mimoquant.quant.method import WALKED_TOKENS
from mimoquant.quant.output_metric import dampened, gate_up_metric
from mimoquant.quant.two_sided import two_sided

EXPERTS, HIDDEN, INNER = 2, 128, 64
MXFP4 = Format("mxfp4", 32)


class Problem:
    """Experts whose rows are opened by few tokens of their own, and what two-sided rounding makes of them."""

    def __init__(self, fmt: Format, count: int = 1500) -> None:
        draw = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        kinds = normal(EXPERTS, 12, HIDDEN)  # of tokens
        self.both, self.down = normal(EXPERTS, 2 * INNER, HIDDEN) / 8, normal(EXPERTS, HIDDEN, INNER) / 8
        self.both[:, :INNER] += 0.25 * kinds[:, torch.arange(INNER) % 12] - 0.1 * kinds.sum(1, keepdim=True)
        self.both, self.down = (of.to(torch.bfloat16).to(torch.float32) for of in (self.both, self.down))
        strong = normal(EXPERTS, HIDDEN, 12)
        self.felt = dampened(strong @ strong.mT, 0.1)

        def tokens(many: int) -> list[Tensor]:
            which = torch.randint(12, (EXPERTS, many), generator=draw)
            own = kinds.gather(1, which[..., None].expand(-1, -1, HIDDEN)) / 2 + normal(EXPERTS, many, HIDDEN) / 2
            return list(own.to(torch.bfloat16))

        self.fmt, self.seen, self.others = fmt, tokens(count), tokens(1500)
        x = torch.stack(self.seen).float()
        s = slopes(*(x @ self.both.mT).chunk(2, dim=-1))
        self.gram = x.mT @ x / count
        self.metric = gate_up_metric(self.felt, self.down, s.mT @ s / count)
        self.grid = Grid.of(parts_of(self.both, fmt), fmt)
        self.codes = two_sided(self.both, self.gram, self.metric, self.grid, fmt, 0.05).codes

    def walked(self, seen: list[Tensor] | None = None, codes: Tensor | None = None) -> Tensor:
        codes, weights = self.codes if codes is None else codes, (self.both, self.down)
        matrices = self.gram, self.metric, self.felt
        return descend_inner(weights, matrices, self.grid, codes, self.fmt, self.seen if seen is None else seen)

    def loss(self, codes: Tensor, tokens: list[Tensor]) -> Tensor:
        """[E] float64: what is felt of the answers' error."""
        return torch.stack(
            [
                felt_error(x.double(), both.double(), now.double(), down.double(), felt.double())
                for x, both, now, down, felt in zip(
                    tokens,
                    self.both,
                    self.grid.wide(self.fmt).decode(codes, self.fmt),
                    self.down,
                    self.felt,
                    strict=True,
                )
            ]
        )


def felt_error(x: Tensor, both: Tensor, now: Tensor, down: Tensor, felt: Tensor) -> Tensor:
    """Of one expert, a token."""

    def answer(weight: Tensor) -> Tensor:
        gate, up = (x @ weight.mT).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ down.mT

    off = answer(now) - answer(both)
    return ((off @ felt) * off).sum() / len(x)


def test_slopes_are_the_gradient_that_autograd_has_in_float64() -> None:
    problem = Problem(MXFP4)
    values = problem.grid.wide(MXFP4).decode(problem.codes, MXFP4)
    seen = [problem.seen[0], problem.seen[1][:900]]  # padded
    inner = problem.down.mT @ problem.felt @ problem.down
    tokens = inner_descent._Tokens(slice(0, 2), inner_descent.padded(seen), problem.both, values, inner)
    for e, x in enumerate(seen):
        now = values[e].double().requires_grad_()
        felt_error(
            x.double(),
            problem.both[e].double(),
            now,
            problem.down[e].double(),
            problem.felt[e].double(),
        ).backward()
        assert now.grad is not None
        for panel in (slice(0, 32), slice(64, 128)):
            wanted = now.grad[:, panel] / 2
            assert (tokens.slope(panel)[e] - wanted).norm() < 1e-3 * wanted.norm()
    change = 1e-3 * torch.randn(EXPERTS, 2 * INNER, 32, generator=torch.Generator().manual_seed(3))
    start, later = tokens.off.clone(), values.clone()
    tokens.move(change, slice(32, 64))
    later[:, :, 32:64] += change
    off = inner_descent._Tokens(slice(0, 2), inner_descent.padded(seen), problem.both, later, inner).off
    assert (off - tokens.off).norm() < 1e-2 * (off - start).norm()
    tokens.take_back(torch.ones(EXPERTS, 2 * INNER, dtype=torch.bool))
    assert torch.allclose(tokens.off, start, atol=1e-5)


@every_format
def test_what_is_felt_of_the_answers_falls_on_the_tokens_and_on_others(fmt: Format) -> None:
    problem = Problem(fmt)
    made = problem.walked()
    before, after = (problem.loss(codes, problem.seen) for codes in (problem.codes, made))
    assert (after < before).all() and after.sum() < 0.97 * before.sum()
    before, after = (problem.loss(codes, problem.others) for codes in (problem.codes, made))
    assert after.sum() < 0.995 * before.sum()


def test_few_tokens_decide_nothing() -> None:
    """Then a row's gradient is that of both matrices, and what other tokens say of the answers stays as it was."""
    problem = Problem(MXFP4)
    few = problem.walked([own[:16] for own in problem.seen])
    none = problem.walked([own[:0] for own in problem.seen])
    start = problem.loss(problem.codes, problem.others)
    assert (problem.loss(few, problem.others) < 1.02 * start).all()
    assert (problem.loss(none, problem.others) < 1.02 * start).all()


def test_experts_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(MXFP4, 300)
    seen = [problem.seen[0], problem.seen[1][:100]]
    together = problem.walked(seen)
    monkeypatch.setitem(WALKED_TOKENS, "cpu", 1)
    alone = problem.walked(seen)
    assert (together != alone).float().mean() < 1e-3  # sums over padded tokens go in another order


def test_a_pull_is_the_slope_of_another_start() -> None:
    """Toward the weights from any values, or from the values themselves with the slope there as a pull."""
    problem, fmt = Problem(MXFP4), MXFP4
    codes = problem.codes
    values = problem.grid.wide(fmt).decode(codes, fmt)
    pull = problem.metric @ (problem.both - values) @ problem.gram
    first = descend(problem.both, problem.gram, problem.metric, problem.grid, codes, fmt, 1)
    second = descend(values, problem.gram, problem.metric, problem.grid, codes, fmt, 1, pull=pull)
    assert (first != codes).float().mean() > 0.005
    assert (first != second).float().mean() < 0.05 * (first != codes).float().mean()


def test_what_helps_no_answer_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a hundred times the length: hardly a row's lowers the loss, and together they raise it."""
    problem = Problem(MXFP4)

    def wild(value: Tensor, gram: Tensor, metric: Tensor, *rest: Any, pull: Tensor) -> Tensor:
        return descend(value, gram, metric, *rest, pull=100 * pull)

    monkeypatch.setattr(inner_descent, "descend", wild)
    assert torch.equal(problem.walked(), problem.codes)
