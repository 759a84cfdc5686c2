"""Joint rounds over an expert lower what it answers wrong, by an account of the error that is not theirs."""

from __future__ import annotations

import pytest
import stored_formats
import torch
from torch import Tensor

from mimoquant.quant.engine_torch import amax, decode, nvfp4_global_scale
from mimoquant.quant.expert_methods import encode_with
from mimoquant.quant.formats import Format
from mimoquant.quant.method import WALKED_TOKENS, Method
from mimoquant.quant.reconstruct import Parts, Reconstructed, reconstruct

EXPERTS, HIDDEN, INNER, TOKENS = 2, 128, 128, 3000
every_format = pytest.mark.parametrize("fmt", stored_formats.FORMATS, ids=lambda fmt: fmt.label)
Weights = dict[str, Tensor]


def tokens(count: int, seed: int) -> list[Tensor]:
    """As hidden states are: a few strong directions, different from expert to expert."""
    draw = torch.Generator().manual_seed(1)
    basis = torch.randn(EXPERTS, 16, HIDDEN, generator=draw) / 4
    draw.manual_seed(seed)
    strong = torch.randn(EXPERTS, count, 16, generator=draw) @ basis
    return list((strong + 0.3 * torch.randn(EXPERTS, count, HIDDEN, generator=draw)).to(torch.bfloat16))


def weights() -> Weights:
    draw = torch.Generator().manual_seed(2)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return {
        name: (torch.randn(EXPERTS, *shape, generator=draw) / 8).to(torch.bfloat16) for name, shape in shapes.items()
    }


def inner(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(x @ gate.mT) * (x @ up.mT)


def start(given: Weights, seen: list[Tensor], fmt: Format) -> tuple[dict[str, Parts], dict[str, Tensor]]:
    """Every projection by GPTQ and its refinement, as the calibrated run makes it, and the Gram matrices."""
    x = torch.stack(seen).float()
    hidden = inner(x, given["gate"].float(), given["up"].float())
    grams = dict.fromkeys(("gate", "up"), x.mT @ x / x.shape[1]) | {"down": hidden.mT @ hidden / x.shape[1]}
    method = Method("gram", gptq=True, refine=2, signed=True)
    both = torch.cat([given["gate"], given["up"]], dim=1)
    shared = nvfp4_global_scale(amax(both), "gram", fmt)
    scales = {"gate": shared, "up": shared, "down": nvfp4_global_scale(amax(given["down"]), "gram", fmt)}
    return {n: encode_with(w, grams[n], fmt, method, scales[n]).parts for n, w in given.items()}, grams


def error(given: Weights, parts: dict[str, Parts], fmt: Format, seen: list[Tensor]) -> Tensor:
    """[E] float64: squared distance of the answers over the original's energy."""
    out = []
    for e, x in enumerate(seen):
        exact = [given[n][e].double() for n in ("gate", "up", "down")]
        stored = [decode(parts[n], fmt)[e].double() for n in ("gate", "up", "down")]
        answers = [inner(x.double(), gate, up) @ down.mT for gate, up, down in (exact, stored)]
        out.append((answers[1] - answers[0]).square().sum() / answers[0].square().sum())
    return torch.stack(out)


def walked(fmt: Format, seen: list[Tensor], held: list[Tensor]) -> tuple[Weights, dict[str, Parts], Reconstructed]:
    given = weights()
    before, grams = start(given, tokens(TOKENS, 3), fmt)
    return given, before, reconstruct(given, before, grams, fmt, seen, held, 1)


@pytest.mark.slow
@every_format
def test_the_answers_error_falls_on_the_tokens_and_on_others(fmt: Format) -> None:
    seen, held = tokens(TOKENS, 3), tokens(1500, 4)
    given, before, made = walked(fmt, seen, held)
    assert (error(given, made.parts, fmt, seen) < 0.97 * error(given, before, fmt, seen)).all()
    told, own = made.after / made.before, error(given, made.parts, fmt, held) / error(given, before, fmt, held)
    assert torch.allclose(told.double(), own, atol=5e-3) and (own < 0.985).all()
    for name, parts in made.parts.items():
        assert {part: (v.dtype, v.shape) for part, v in parts.items()} == {
            part: (v.dtype, v.shape) for part, v in before[name].items()
        }
        kept = [part for part in parts if part not in ("codes", "scale")]
        assert all(torch.equal(parts[part], before[name][part]) for part in kept)


@pytest.mark.parametrize(
    "fmt", [pytest.param(fmt, marks=() if fmt.name == "mxfp4" else pytest.mark.slow) for fmt in stored_formats.FORMATS]
)
def test_what_the_loss_feels_of_the_answers_falls_where_it_is_asked_for(fmt: Format) -> None:
    """Under a metric with a few strong directions, by float64 sums of our own; and less than without the metric."""
    given, seen, held = weights(), tokens(800, 3), tokens(400, 4)
    before, grams = start(given, seen, fmt)
    draw = torch.Generator().manual_seed(6)
    strong = torch.randn(EXPERTS, HIDDEN, 12, generator=draw)
    felt = 1e-9 * (strong @ strong.mT + torch.eye(HIDDEN))

    def of(parts: dict[str, Parts]) -> Tensor:
        out = []
        for e, x in enumerate(held):
            exact, stored = (
                inner(x.double(), gate, up) @ down.mT
                for gate, up, down in (
                    [given[n][e].double() for n in ("gate", "up", "down")],
                    [decode(parts[n], fmt)[e].double() for n in ("gate", "up", "down")],
                )
            )
            off, metric = stored - exact, felt[e].double()
            out.append(((off @ metric) * off).sum() / ((exact @ metric) * exact).sum())
        return torch.stack(out)

    plain, made = (reconstruct(given, before, grams, fmt, seen, held, 1, metric) for metric in (None, felt))
    assert (of(made.parts) < 0.96 * of(before)).all() and (of(made.parts) < 0.96 * of(plain.parts)).all()
    assert torch.allclose(made.before.double(), of(before), rtol=1e-2)
    assert torch.allclose(made.after.double(), of(made.parts), rtol=1e-2)


def test_who_saw_nothing_or_gets_worse_keeps_the_codes() -> None:
    """The first expert saw no token; the held-out tokens of the second are none of its own."""
    fmt, seen, held = Format("mxfp4", 32), tokens(TOKENS, 3), tokens(1500, 4)
    seen[0], held[1] = seen[0][:0], torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(5)).bfloat16()
    given, before, made = walked(fmt, seen, held)
    for name, parts in made.parts.items():
        assert torch.equal(parts["codes"][0], before[name]["codes"][0])
    worse = error(given, made.parts, fmt, held) > error(given, before, fmt, held) * (1 + 1e-6)
    assert not worse.any() and (made.after <= made.before).all()


def test_without_held_out_tokens_the_walk_alone_decides() -> None:
    fmt, seen = Format("mxfp4", 32), tokens(TOKENS, 3)
    given, before, made = walked(fmt, seen, [one[:0] for one in seen])
    assert not made.before.any() and not made.after.any()
    assert (error(given, made.parts, fmt, seen) < error(given, before, fmt, seen)).all()


def test_experts_do_not_know_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, seen, held = Format("nvfp4", 16), tokens(TOKENS, 3), tokens(1500, 4)
    _, _, alone = walked(fmt, seen, held)
    monkeypatch.setitem(WALKED_TOKENS, "cpu", 10 * TOKENS)
    given, _, together = walked(fmt, seen, held)
    one, other = error(given, alone.parts, fmt, held), error(given, together.parts, fmt, held)
    assert torch.allclose(one, other, rtol=0.02)  # sums of other shapes round otherwise here and there
