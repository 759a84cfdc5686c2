"""Mixtures that `sensitivity` chooses, beside one format everywhere and one layer in bf16, at equal bytes.

    python scripts/bench/sensitivity.py CHECKPOINT [--recipe NAME] [--any-format] [--sequences 28]
                                         [--tokens 256] [--pairs]

Half of the sequences choose, the other half tell J. Sizes are those of the finer formats everywhere, and of one
layer kept in bf16.

--pairs: instead, J of a fork for every layer and format alone, on the sequences that choose, beside what `--quick`
predicts of them, and the part of that where tokens stay with their experts (the Fisher matrix alone). Told: Spearman's
rank correlation over all pairs, predictions over J, and the order of the layers by both.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mimoquant.calibration.tokens import TokenSet, calibration_tokens, load_tokens
from mimoquant.evaluation.divergence import bootstrap
from mimoquant.machine.devices import make_engine, resolve_device
from mimoquant.machine.team import Team
from mimoquant.mixing.attribution import Estimate
from mimoquant.mixing.choose import Choice, Chooser
from mimoquant.mixing.forks import Lane
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.walks import Walks, walked
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe
from mimoquant.weights.container import COMPRESSED_TENSORS


def parted(tokens: TokenSet, first: bool) -> TokenSet:
    """The first or the second half of the sequences."""
    rows = slice(0, len(tokens.ids) // 2) if first else slice(len(tokens.ids) // 2, None)
    return replace(tokens, ids=tokens.ids[rows], domains=tokens.domains[rows])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipe", default="int4-g128-mse")
    parser.add_argument("--sequences", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--any-format", action="store_true")
    parser.add_argument("--pairs", action="store_true")
    chosen = parser.parse_args()
    device, begin = resolve_device(chosen.device), time.monotonic()
    container = COMPRESSED_TENSORS if chosen.any_format else None
    held = Mixtures(
        make_plan(chosen.checkpoint, load_recipe(chosen.recipe), container=container), any_format=chosen.any_format
    )
    every = load_tokens(
        ["heldout-v1"],
        chosen.checkpoint,
        sequences=2 * chosen.sequences,
        tokens=chosen.tokens,
        vocab=held.plan.layout.geometry.vocab,
    )
    calibration = calibration_tokens(held.plan.recipe.calibration, held.plan.layout)
    if chosen.pairs:
        pairs(held, parted(every, True), calibration, device)
        return
    with contextlib.closing(make_engine(device)) as engine:
        walks = Walks(held, parted(every, True), calibration, engine, Team(device))
        ablation, _ = walks.ablation()
        print(f"{chosen.recipe}: ablation {time.monotonic() - begin:.0f} s, {walks.told[0]}")
        print(f"J {Estimate.of(ablation.total)}")
        for place, layer in enumerate(held.layers):
            print(
                f"layer {layer}: alone {Estimate.of(ablation.alone_means[:, place])}, "
                f"gain {Estimate.of(ablation.gains[:, place])}, ratios {ablation.ratio[place].round(3)}"
            )
        choices = compared(held, Chooser(held, ablation, walks.measure))
        source = (len(held.options) - 1,) * len(held.layers)  # the reference, which needs no calibration
        clean, others = (
            Walks(held, parted(every, False), tokens, engine, Team(device)) for tokens in (None, calibration)
        )
        clean.measure([source])
        others.references = clean.references
        told = others.measure([choice for _, choice in choices])
    table(held, choices, [np.concatenate(halves) for halves in told])
    print(f"{time.monotonic() - begin:.0f} s")


def compared(held: Mixtures, chooser: Chooser) -> list[tuple[str, Choice]]:
    """What is compared, by name: for each size what is chosen there, and what else has that size."""
    count, kept = len(held.layers), len(held.options) - 1
    simple = {f"{option.label} everywhere": (k,) * count for k, option in enumerate(held.options) if option.fmt}
    carved = {f"layer {layer} in bf16": tuple(kept if n == layer else 0 for n in held.layers) for layer in held.layers}
    out = list(simple.items()) + list(carved.items())
    for budget in sorted({held.size(choice) for _, choice in out}):
        choice = chooser.within(budget)
        measured, predicted = chooser.measured[choice][0], chooser.ablation.predicted(choice)[0]
        print(
            f"{budget} bytes: {[held.options[k].label for k in choice]}, predicted {predicted:.5f}, "
            f"measured {measured:.5f}"
        )
        out.append((f"chosen for {budget}", choice))
    return out


def table(held: Mixtures, choices: list[tuple[str, Choice]], j: list[np.ndarray]) -> None:
    """J of each, and for what is chosen its ratio to the best of the others that are no larger than its budget."""
    print("\n| what | bytes | J | over the best other of that size |\n|---|---|---|---|")
    for (name, choice), values in zip(choices, j, strict=True):
        told = ""
        if name.startswith("chosen"):
            budget = int(name.rpartition(" ")[2])
            best = min(
                (k for k, (other, c) in enumerate(choices) if "chosen" not in other and held.size(c) <= budget),
                key=lambda k: j[k].mean(),
            )
            low, high = bootstrap(values - j[best], np.arange(len(values)))
            base = j[best].mean()
            told = f"{values.mean() / base:.3f} ({1 + low / base:.3f}-{1 + high / base:.3f}) of {choices[best][0]}"
        print(f"| {name} | {held.size(choice)} | {values.mean():.5f} | {told} |")


def pairs(held: Mixtures, tokens: TokenSet, calibration: TokenSet | None, device: str) -> None:
    """Every layer and format alone: J of a fork beside what is predicted."""
    count, kept, formats = len(held.layers), len(held.options) - 1, held.formats
    if held.plan.recipe.objective == "kl":
        raise SystemExit("--pairs: a recipe whose objective is output, please")
    quantizing = [k for k, option in enumerate(held.options) if option.fmt]
    with contextlib.closing(make_engine(device)) as engine, tempfile.TemporaryDirectory() as folder:
        walks = Walks(held, tokens, calibration, engine, Team(device))
        costs, _ = walks.felt(walked(walks, tokens, Path(folder) / "felt"))
        alone = [[k if n == place else kept for n in range(count)] for place in range(count) for k in quantizing]
        trials = [walks._trial(str(choice), choice) for choice in [[kept] * count, *alone]]
        told = walks._walk("pairs", held.plan, [Lane(part, trials) for _, part in walks.mine])
    j = np.concatenate(told, axis=1)[1:].reshape(count, len(formats), -1)
    stay = costs.stay[:, quantizing].mean(2)
    compare(held, j.mean(2), {"predicted": costs.costs()[:, quantizing], "tokens that stay": stay})
    print(f"J of one half of the sequences to the other: {spearman(j[..., ::2].mean(2), j[..., 1::2].mean(2)):.3f}")


def compare(held: Mixtures, j: np.ndarray, predictions: dict[str, np.ndarray]) -> None:
    """J [layers, formats] and predictions of it."""
    print("| layer | " + " | ".join(fmt.label for fmt in held.formats) + " |\n|" + "---|" * (1 + j.shape[1]))
    for place, layer in enumerate(held.layers):
        cells = [" / ".join(f"{one[place, k]:.2e}" for one in (j, *predictions.values())) for k in range(j.shape[1])]
        print(f"| {layer} | " + " | ".join(cells) + " |")
    print(f"J / {' / '.join(predictions)}; layers by J, first format: {order(held, j[:, 0])}")
    for name, values in predictions.items():
        by_format = " ".join(f"{spearman(values[:, k], j[:, k]):.3f}" for k in range(j.shape[1]))
        over = values / j
        print(
            f"{name}: Spearman {spearman(values, j):.3f} over {j.size} pairs, by format {by_format}; over J "
            f"{over.mean():.2f} ({over.min():.2f}-{over.max():.2f}); layers {order(held, values[:, 0])}"
        )


def order(held: Mixtures, costs: np.ndarray) -> list[int]:
    """Layers, the dearest first."""
    return [held.layers[place] for place in np.argsort(-costs)]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Of values without ties."""
    ranks = [np.argsort(np.argsort(values.ravel())) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == "__main__":
    main()
