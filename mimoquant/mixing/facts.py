"""What a sensitivity run found → its document, and the recipe with its evidence.

Key idea: text, page and recipe are made from the same facts. An expert that quantizing ruins makes its layer look
sensitive, and so may one whose outputs are huge by nature; both are named beside their layer, because the first wants
another method and not more bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import yaml

from mimoquant.__version__ import SCHEMA_VERSION
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.remote import named
from mimoquant.mixing.attribution import Ablation, Estimate, Floats
from mimoquant.mixing.documents import (
    CarveOut,
    ExpertsPart,
    JEstimate,
    MeasuredChoice,
    Measurement,
    MixturePoint,
    MixtureRounding,
    OptionPart,
    SensitivityFindings,
    SensitivityLayer,
)
from mimoquant.mixing.felt import FeltCosts
from mimoquant.mixing.forks import Probe
from mimoquant.mixing.knapsack import best_options
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.model.served_rounding import NVFP4
from mimoquant.weights.container import NONE as NO_SCALES

FAILED = 5.0  # times the median relMSE of its layer: an expert that quantizing ruins
SUPER = 10.0  # times the median over all experts, and within as much of the largest: what such an expert puts out
FRONTIER = 24  # points

Costs = Ablation | FeltCosts


def facts_of(
    mixtures: Mixtures,
    tokens: TokenSet,
    costs: Costs,
    probes: Sequence[Sequence[Probe]],
    *,
    budget_bytes: int | None,
    target_j: float | None,
) -> Measurement:
    """What was measured, and what it predicts."""
    plan = mixtures.plan
    found: Measurement = {
        "schema_version": SCHEMA_VERSION,
        "source": named(plan.layout.index.folder),
        "recipe": plan.recipe.name,
        "method": f"{plan.recipe.method}, scales by {plan.recipe.scale_search}",
        "calibration": plan.recipe.calibration.as_plain() if plan.recipe.calibration else None,
        "costs_by": "forks" if isinstance(costs, Ablation) else "fisher",
        "container": plan.container,
        "options": [option.label for option in mixtures.options],
        "data": {
            "name": tokens.name,
            "sha256": tokens.sha256,
            "sequences": len(tokens.ids),
            "sequence_tokens": tokens.ids.shape[1],
            "origins": list(tokens.origins),
            "shared_with_calibration": None,  # see `run.sensitivity`
        },
        "budget_bytes": budget_bytes,
        "target_j": target_j,
        "notes": mixtures.dropped,
        "rounding": _rounding(mixtures, costs) if isinstance(costs, Ablation) else None,
        "j": _estimate(costs, costs.total),
        "layers": _layers(mixtures, costs, probes),
        "uniform": [
            {**_point(mixtures, costs, [k] * len(mixtures.layers)), "option": option.label}
            for k, option in enumerate(mixtures.options)
        ],
        "carve_outs": _carve_outs(mixtures, costs),
        "frontier": _frontier(mixtures, costs),
    }
    if isinstance(costs, Ablation):
        found["sum_alone"] = _estimate(costs, _share_sum(costs, costs.alone_means, 0))
        found["sum_gains"] = _estimate(costs, _share_sum(costs, costs.gains, 1))
    return found


def _rounding(mixtures: Mixtures, ablation: Ablation) -> MixtureRounding | None:
    """None where nothing was rounded, and nothing is known of a kernel that would."""
    served = mixtures.served
    if not (served.anything or served.known):
        return None
    reference, scales = served.reference, mixtures.plan.recipe.output.input_scales
    return MixtureRounding(
        inputs=dict(served.inputs),
        dense=served.beside_in(mixtures.plan).dense,
        kv_cache=served.beside.cache,
        reference=reference.told if reference.anything else None,
        input_scales=("unit" if scales == NO_SCALES else scales) if NVFP4 in served.inputs.values() else None,
        known=list(served.known),
        j_of_source=_estimate(ablation, ablation.floor),
    )


def choice_facts(
    mixtures: Mixtures, costs: Costs, choice: Sequence[int], measured: Floats | None = None
) -> MeasuredChoice:
    """A choice, its J as predicted and, where it was, as measured, and whether the two are within the interval of their
    difference."""
    predicted = costs.predicted(choice)
    told = predicted if measured is None else measured
    found: MeasuredChoice = {
        "options": {str(layer): option.label for layer, option in mixtures.named(choice).items()},
        "bytes": mixtures.size(choice),
        "predicted": _estimate(costs, predicted),
        "to_all_quantized": _estimate(costs, told / np.maximum(costs.total, 1e-30)),
    }
    if measured is not None:
        off = Estimate.of(measured - predicted)
        found["measured"] = _estimate(costs, measured)
        found["difference"] = _estimate(costs, measured - predicted)
        found["agrees"] = off.low <= 0 <= off.high
    return found


def _share_sum(ablation: Ablation, means: Floats, half: int) -> Floats:
    """A sum over layers, which one half of the sequences has told, scaled to what quantizing adds on all of them."""
    out: Floats = (ablation.total - ablation.floor) * means.sum(1) / np.maximum(ablation.half_means(half), 1e-30)
    return out


def _point(mixtures: Mixtures, costs: Costs, choice: Sequence[int]) -> MixturePoint:
    return MixturePoint(bytes=mixtures.size(choice), predicted=float(costs.predicted(choice)[0]))


def _layers(mixtures: Mixtures, costs: Costs, probes: Sequence[Sequence[Probe]]) -> list[SensitivityLayer]:
    base, geometry = mixtures.options[0].label, mixtures.plan.layout.geometry
    experts = [_experts(of_layer, base) for of_layer in probes]
    median = float(np.median([value for of_layer in experts for value in of_layer["largest"]]))
    bound = max(SUPER * median, max(max(of_layer["largest"]) for of_layer in experts) / SUPER)
    out: list[SensitivityLayer] = []
    for place, layer in enumerate(mixtures.layers):
        own = _estimate(costs, costs.contributions[:, place])
        relmse = [value for value in experts[place]["relmse"] if value is not None]
        usual = float(np.median(relmse)) if relmse else 0.0
        energy, error = (
            sum(values) for values in ([p.energy for p in probes[place]], [p.error[base] for p in probes[place]])
        )
        options: list[OptionPart] = [
            {"option": option.label, "bytes": of_option, "ratio": ratio, "predicted": own["mean"] * ratio}
            for option, of_option, ratio in zip(
                mixtures.options, mixtures.bytes[place], costs.ratio[place].tolist(), strict=True
            )
        ]
        told: SensitivityLayer = {
            "layer": layer,
            "kind": "sliding" if geometry.sliding[layer] else "global",
            "contribution": own,
            "options": options,
            "relative_error": error / max(energy, 1e-30),
            "median_relmse": usual,
            "failed_experts": [e for e, value in enumerate(experts[place]["relmse"]) if (value or 0) > FAILED * usual],
            "super_experts": [e for e, value in enumerate(experts[place]["largest"]) if value > bound],
            "experts": experts[place],
        }
        if isinstance(costs, Ablation):
            told["alone"] = _estimate(costs, costs.alone_means[:, place])
            told["gain"] = _estimate(costs, costs.gains[:, place])
        else:
            told["rerouted"] = float(costs.rerouted[place])
        out.append(told)
    return out


def _experts(probes: Sequence[Probe], base: str) -> ExpertsPart:
    """One value an expert: relMSE of its output (None where no probed token saw it), share of the routing, largest
    |output|."""
    energy, error = (
        np.sum(values, axis=0) for values in ([p.expert_energy for p in probes], [p.expert_error[base] for p in probes])
    )
    routed = np.sum([p.routed for p in probes], axis=0)
    return {
        "relmse": [float(e / n) if n else None for e, n in zip(error, energy, strict=True)],
        "token_share": (routed / max(routed.sum(), 1)).tolist(),
        "largest": np.max([p.largest for p in probes], axis=0).tolist(),
    }


def _carve_outs(mixtures: Mixtures, costs: Costs) -> list[CarveOut]:
    """One layer in bf16, all others quantized: J of each, as measured by forks or as predicted without them."""
    out: list[CarveOut] = []
    bf16 = len(mixtures.options) - 1
    for place, layer in enumerate(mixtures.layers):
        choice = [bf16 if other == layer else 0 for other in mixtures.layers]
        j = costs.predicted(choice)
        if isinstance(costs, Ablation):
            left = 1 - costs.gains[:, place] / np.maximum(costs.half_means(1), 1e-30)
            j = costs.floor + (costs.total - costs.floor) * left
        out.append(CarveOut(layer=layer, bytes=mixtures.size(choice), j=Estimate.of(j).as_plain()))
    return out


def _frontier(mixtures: Mixtures, costs: Costs) -> list[MixturePoint]:
    """The least predicted J at budgets from the smallest mixture to the first without error."""
    classes = [
        list(zip(cost, sizes, strict=True)) for cost, sizes in zip(costs.costs().tolist(), mixtures.bytes, strict=True)
    ]
    least = sum(min(sizes) for sizes in mixtures.bytes)
    most = sum(min(size for cost, size in of_layer if cost == min(c for c, _ in of_layer)) for of_layer in classes)
    out: list[MixturePoint] = []
    for number in range(FRONTIER + 1):
        choice = best_options(classes, least + (most - least) * (number / FRONTIER) ** 2)
        assert choice is not None
        point = _point(mixtures, costs, choice)
        if not out or point["bytes"] > out[-1]["bytes"]:
            out.append(point)
    return out


def recipe_text(mixtures: Mixtures, choice: Sequence[int], facts: SensitivityFindings) -> str:
    """The chosen recipe as YAML, with what it was chosen by."""
    plan = mixtures.planned(choice)
    document = plan.recipe.resolved(plan.container)
    chosen, data = facts["chosen"], facts["data"]
    document["mimoquant"]["provenance"] = {
        "sensitivity": {
            "recipe": facts["recipe"],
            "source_headers_sha256": plan.layout.index.headers_fingerprint(),
            "data": {
                "name": data["name"],
                "sha256": data["sha256"],
                "sequences": data["sequences"],
                "sequence_tokens": data["sequence_tokens"],
            },
            **({"rounding": mixtures.served.told} if mixtures.served.anything else {}),
            "bytes": chosen["bytes"],
            "costs_by": facts["costs_by"],
            "j": {
                "all_quantized": _short(facts["j"]),
                "predicted": _short(chosen["predicted"]),
                **({"measured": _short(chosen["measured"])} if "measured" in chosen else {}),
            },
            "layers": {
                of["layer"]: {
                    "option": chosen["options"][str(of["layer"])],
                    **(
                        {"alone": _short(of["alone"]), "gain": _short(of["gain"])}
                        if "alone" in of
                        else {"predicted": _short(of["contribution"])}
                    ),
                }
                for of in facts["layers"]
            },
        }
    }
    how, told = ("measurement", "measured") if "measured" in chosen else ("prediction", "predicted")
    j = chosen.get("measured", chosen["predicted"])
    head = (
        f"# Chosen by {how} from {facts['recipe']}: J {j['mean']:.4g} nats a token on "
        f"{data['name']}, where all layers in\n# {facts['options'][0]} have {facts['j']['mean']:.4g}. "
        f"Layers in groups of their own have other formats; what was {told} is under provenance.\n"
    )
    return head + yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)


def _short(estimate: JEstimate) -> list[float]:
    """Mean and interval, in four digits."""
    return [float(f"{value:.4g}") for value in (estimate["mean"], estimate["low"], estimate["high"])]


def _estimate(costs: Costs, values: Floats) -> JEstimate:
    """Mean and interval of values [1 + resamples], where there are sequences enough for one."""
    return Estimate.of(values, costs.sequences).as_plain()
