"""`sensitivity --quick`: what is predicted, beside the J of forks, a real router, autograd and a float64 head."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import MICRO, held_out
from test_sensitivity import GPTQ, PLANTED, RECIPE, Killed, call, mixtures, plant
from torch import Tensor

import mimoquant
from mimoquant.errors import UsageError
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.fisher.labels import head_gradients, uniforms
from mimoquant.machine.devices import make_engine
from mimoquant.machine.team import Team
from mimoquant.mixing.felt import FeltCosts, LayerFelt, border, crossing, felt, growths, layer_costs
from mimoquant.mixing.forks import Lane
from mimoquant.mixing.mixtures import LayerOption
from mimoquant.mixing.needs import Forks, fork_needs, forward_passes, resume_bytes, state_bytes
from mimoquant.mixing.run import quick_sensitivity, sensitivity
from mimoquant.mixing.walks import Walks, walked
from mimoquant.model.decoder_layer import Router, rms_norm, route
from mimoquant.planning.recipe import load_recipe
from mimoquant.quant.formats import Format
from mimoquant.report.sensitivity_page import ranked, sensitivity_page, sensitivity_text

FEW = ("--sequences", 8, "--tokens", 32)


def test_what_is_felt_is_the_divergence_of_a_small_change() -> None:
    """At the last layer: J of the logits before and after, in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden, change = torch.randn(2, 300, 16, generator=generator)
    norm, head, change = (
        torch.rand(16, generator=generator) + 0.5,
        torch.randn(40, 16, generator=generator),
        change / 50,
    )
    _, gradients = head_gradients(hidden, norm, head, 1e-6, uniforms(300, 64, 0))
    logits = [rms_norm(x.double(), norm.double(), 1e-6) @ head.double().T for x in (hidden, hidden + change)]
    p, q = (z.softmax(-1) for z in logits)
    j = ((p - q) * (p.log() - q.log())).sum(-1) / 2
    assert float(felt(gradients, change).mean()) == pytest.approx(float(j.mean()), rel=0.05)
    assert felt(gradients, 0 * change).count_nonzero() == 0


def routers(count: int = 6, width: int = 16) -> tuple[Tensor, Tensor, Router]:
    generator = torch.Generator().manual_seed(1)
    hidden, norm = torch.randn(400, width, generator=generator), torch.rand(width, generator=generator) + 0.5
    weight, bias = torch.randn(count, width, generator=generator) / 3, torch.randn(count, generator=generator) / 10
    return hidden, norm, Router(weight, bias)


def test_beyond_the_border_a_token_goes_where_it_says() -> None:
    """A small step along the gap's gradient (autograd's) of the distance that was told: the router sends most of the
    tokens that are near a border to the experts that were told, with their weights there."""
    hidden, norm, router = routers()
    distance, there = border(rms_norm(hidden, norm, 1e-6), hidden, norm, router, 2, 1e-6)
    moved = hidden.clone().requires_grad_()
    scores = torch.nn.functional.linear(rms_norm(moved, norm, 1e-6), router.weight).sigmoid()
    ranked_scores = (scores + router.bias).sort(-1, descending=True).values
    gap = ranked_scores[:, 1] - ranked_scores[:, 2]
    (slope,) = torch.autograd.grad(gap.sum(), moved)
    assert torch.allclose(distance, gap / slope.norm(dim=-1), rtol=1e-4)
    near = distance < 0.05
    assert near.sum() > 5
    step = 1.1 * distance[:, None] * slope / slope.norm(dim=-1, keepdim=True)
    for step_of, told in ((-step, there.experts), (step, route(rms_norm(hidden, norm, 1e-6), router, 2).experts)):
        sent = route(rms_norm(hidden + step_of, norm, 1e-6), router, 2)
        assert torch.equal(sent.experts[near].sort(-1).values, told[near].sort(-1).values)
    sent = route(rms_norm(hidden - step, norm, 1e-6), router, 2)
    assert torch.allclose(sent.weights[near].sort(-1).values, there.weights[near].sort(-1).values, atol=0.02)


def test_with_no_other_expert_there_is_no_border() -> None:
    hidden, norm, router = routers(count=2)
    distance, there = border(rms_norm(hidden, norm, 1e-6), hidden, norm, router, 2, 1e-6)
    assert distance.isinf().all() and there.experts.shape == (400, 2)
    assert crossing(distance, torch.ones(400), 16).count_nonzero() == 0


def test_errors_that_point_anywhere_cross_as_often_as_is_told() -> None:
    """Of random errors of one norm; none where there is no error, half of them at the border itself."""
    generator = torch.Generator().manual_seed(2)
    errors = torch.nn.functional.normalize(torch.randn(40_000, 64, generator=generator), dim=-1) * 3
    for distance in (0.0, 0.2, 0.8):
        told = float(crossing(torch.tensor(distance), torch.tensor(3.0), 64))
        assert told == pytest.approx(float((errors[:, 0] < -distance).double().mean()), abs=0.01)
    assert float(crossing(torch.tensor(0.0), torch.tensor(0.0), 64)) == 0


def layer(cost: list[float], change: list[float], *single: float) -> LayerFelt:
    """Of two tokens that are alike, in two formats."""
    two = torch.ones(2)
    of_formats = (torch.tensor(values)[:, None] * two for values in (cost, change))
    return LayerFelt(*of_formats, *(value * two for value in single))


def test_a_jump_costs_what_it_moves_in_turn() -> None:
    layers = [layer([1, 0.5], [2, 0], math.inf, 0, 0, 0, 0), layer([3, 0], [0, 0], 0, 1, 10, 2, 2)]
    layers.append(layer([5, 0], [1, 1], 0, 1, 100, 0, 0))
    layers = [LayerFelt.of(one.packed()) for one in layers]
    costs, stay = layer_costs(layers, 16, 2)
    assert costs.shape == stay.shape == (3, 2, 2) and (stay[:, :, 0] == [[1, 0.5], [3, 0], [5, 0]]).all()
    # the first layer's error crosses half of the time in both later ones, and so does the jump of the second
    assert costs[0, :, 0] == pytest.approx([1 + 0.5 * (10 + 0.5 * 100) + 0.5 * 100, 0.5], rel=1e-6)
    assert costs[1, :, 0] == pytest.approx([3, 0]) and costs[2, :, 1] == pytest.approx([5, 0])
    options = [LayerOption(Format("int4", 128)), LayerOption(Format("int4", 32)), LayerOption(None, "bf16")]
    made = FeltCosts.of(costs, stay, options)
    assert made.costs()[0] == pytest.approx([81, 0.5, 0]) and made.ratio[0] == pytest.approx([1, 0.5 / 81, 0])
    assert made.rerouted == pytest.approx([80 / 81, 0, 0])
    assert made.predicted([1, 0, 2])[0] == pytest.approx(3.5) and made.total[0] == pytest.approx(89)


def test_an_error_grows_on_its_way() -> None:
    """What two layers make of it, up to the second's router, is the product of one layer each."""
    layers = [layer([0.0], [0.1], math.inf, 0, 0, 0, 0), layer([0.0], [0.1], math.inf, 0, 0, 0.15, 0.2)]
    layers.append(layer([0.0], [0.1], 0.1, 1, 1, 0.3, 0.4))
    assert growths(layers) == [pytest.approx(one) for one in ((1, 1), (1.5, 2), (3, 4))]
    costs, _ = layer_costs(layers, 16, 2)
    crossed = [0.5 * math.erfc(0.1 * 4 / size / math.sqrt(2)) for size in (0.1 * 2 * 3, 0.1 * 3)]
    assert costs[:2, 0, 0] == pytest.approx(crossed, rel=1e-5)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("quick")
    done = call(MICRO, "-r", RECIPE, "-o", folder / "r.yaml", "--quick", "--html", folder / "p.html", "--json", *FEW)
    assert done.exit_code == 0, done.stderr
    assert "a walk back and one forward take" in done.stderr
    return json.loads(done.stdout), folder


def test_nothing_is_called_measured_that_was_not(found: tuple[dict[str, Any], Path]) -> None:
    facts, folder = found
    assert facts["costs_by"] == "fisher" and facts["tried"] == [] and "measured" not in facts["chosen"]
    assert [walk["walk"] for walk in facts["cost"]["walks"]] == ["back", "felt"]
    assert all("alone" not in of and 0 <= of["rerouted"] <= 1 for of in facts["layers"])
    assert facts["layers"][-1]["rerouted"] == 0 < facts["layers"][0]["rerouted"], "no router comes after the last"
    assert facts["j"]["mean"] == pytest.approx(sum(of["contribution"]["mean"] for of in facts["layers"]))
    page, text = (folder / "p.html").read_text(), sensitivity_text(facts)
    assert page == sensitivity_page(facts)
    assert "predicted by the Fisher matrix" in text and "no J was measured" in text
    assert max(map(len, text.split("\n"))) <= 100
    assert "What was predicted" in page and ", measured" not in page
    recipe = load_recipe(str(folder / "r.yaml"))
    assert recipe.provenance["sensitivity"]["costs_by"] == "fisher"
    assert "predicted" in recipe.provenance["sensitivity"]["layers"][1]


def test_passes_and_files_are_as_foreseen(found: tuple[dict[str, Any], Path]) -> None:
    forks = Forks(mixtures().plan, 3, 8 * 32, quick=True)
    passes = sum(walk["forward_passes"] for walk in found[0]["cost"]["walks"])
    assert passes == pytest.approx(forward_passes(forks), rel=0.02)
    assert resume_bytes(forks, "cpu") > 2 * state_bytes(forks) == 2 * 2 * 256 * 256 * 4
    assert fork_needs(forks, "cuda").gpu_bytes > 0


def test_a_planted_layer_is_found_first_without_forks(tmp_path: Path) -> None:
    source = plant(tmp_path)
    facts = quick_sensitivity(mixtures(source=source), held_out(8, 48, source), tmp_path / "r.yaml")
    first, second = ranked(facts)[:2]
    assert first["layer"] == PLANTED and first["contribution"]["mean"] > 3 * second["contribution"]["mean"]


def test_a_limit_of_j_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "r.yaml"
    done = call(MICRO, "-r", RECIPE, "-o", out, "--quick", "--target-kl", 0.01, *FEW)
    assert done.exit_code == 2 and "measures no J, so J of 0.01 cannot be kept" in done.stderr, done.output
    with pytest.raises(UsageError, match="measures no J"):
        mimoquant.sensitivity(MICRO, RECIPE, out, target_kl=0.01, quick=True)
    assert not list(tmp_path.iterdir())


def test_a_rounding_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    with pytest.raises(UsageError, match=r"--quick predicts what weights cost, and inputs of .* would be rounded"):
        mimoquant.sensitivity(MICRO, RECIPE, out, activations="nvfp4", quick=True, sequences=8, tokens=32)
    assert not list(tmp_path.iterdir())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(*(np.argsort(np.argsort(values.ravel())) for values in (a, b)))[0, 1])


@pytest.mark.slow
def test_predictions_are_the_j_of_forks(tmp_path: Path) -> None:
    """Every layer and format alone. Without what routers do it is half of it, and in another order."""
    held, tokens, kept = mixtures(), held_out(28, 64), 4
    engine = make_engine("cpu")
    walks = Walks(held, tokens, None, engine, Team())
    costs, _ = walks.felt(walked(walks, tokens, tmp_path / "felt"))
    choices = [[k if n == layer else kept for n in range(4)] for layer in range(4) for k in range(3)]
    trials = [walks._trial(str(choice), choice) for choice in [[kept] * 4, *choices]]
    told = walks._walk("pairs", held.plan, [Lane(part, trials) for _, part in walks.mine])
    j = np.concatenate(told, axis=1)[1:].mean(1).reshape(4, 3)
    predicted, stay = costs.costs()[:, :3], costs.stay[:, :3].mean(2)
    assert spearman(predicted, j) >= 0.9 > spearman(stay, j)
    assert np.abs(np.log(predicted / j)).max() < 0.35 and (stay[0] < 0.6 * j[0]).all()
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [RECIPE, GPTQ])
def test_a_killed_run_predicts_the_same(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on the way back, then on the way forward."""
    held, tokens = mixtures(recipe), held_out(8, 32)
    whole = quick_sensitivity(held, tokens, tmp_path / "whole.yaml")
    out, layers = tmp_path / "killed.yaml", []

    def stop(what: str, done: int, of: int) -> None:
        layers.append(what)
        if layers[-1] == "walk back" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        quick_sensitivity(held, tokens, out, progress=stop)
    save = Snapshots.save

    def killed(self: Snapshots, walk: str, layer: int, *told: Any) -> None:
        save(self, walk, layer, *told)
        if layer == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Snapshots, "save", killed)
        quick_sensitivity(held, tokens, out, resume=True)
    with pytest.raises(UsageError, match="costs was fisher, is now forks"):
        sensitivity(held, tokens, out, resume=True)
    facts = quick_sensitivity(held, tokens, out, resume=True)
    assert facts["layers"] == whole["layers"] and 0 < facts["cost"]["walks"][1]["layers_walked"] < 5
    assert out.read_text() == (tmp_path / "whole.yaml").read_text()
