"""`sensitivity` as served: forks and choices are what `eval-kl` says of written checkpoints with the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from micro import MICRO, held_out
from typer.testing import CliRunner

from mimoquant import pipeline
from mimoquant.assembly.choices import RoundingChoice
from mimoquant.assembly.evaluations import kept_layers, rounded_checkpoints
from mimoquant.assembly.mixing import served_options
from mimoquant.calibration.tokens import calibration_tokens
from mimoquant.cli.app import app
from mimoquant.errors import UsageError
from mimoquant.evaluation.eval_kl import eval_kl, open_layout
from mimoquant.machine.devices import make_engine
from mimoquant.machine.team import Team
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.needs import Forks, forward_passes, state_bytes
from mimoquant.mixing.walks import Walks
from mimoquant.model.served_rounding import FP8_UE8M0, MXFP4, NONE, NVFP4
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe

FEW = held_out(6, 32)
CALIBRATED = r"""
default_stage:
  default_modifiers:
    GPTQModifier: {scheme: NVFP4, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {scale_search: absmax, calibration: {set: mixed-v1, sequences: 16, tokens: 64}, refine: 0, objective: output}
"""


def walks(held: Mixtures, choice: RoundingChoice) -> Walks:
    calibration = calibration_tokens(held.plan.recipe.calibration, held.plan.layout)
    held.served = served_options(held, choice)
    return Walks(held, FEW, calibration, make_engine("cpu"), Team("cpu"))


def j_of(out: Path, choice: RoundingChoice) -> float:
    told = rounded_checkpoints({"reference": MICRO, "candidate": out}, choice)
    return eval_kl(told["reference"], told["candidate"], FEW, noise_floor=False)["j"]["mean"]


def mean(halves: tuple[Any, Any]) -> float:
    return float(np.concatenate(halves).mean())


def test_trials_are_walked_as_written_checkpoints_are_served(tmp_path: Path) -> None:
    """A layer that is kept spares its activations; the cache costs the source, too."""
    held, choice = Mixtures(make_plan(MICRO, load_recipe("nvfp4-mse"))), RoundingChoice(activations="nvfp4", kv="fp8")
    asked, bf16 = walks(held, choice), len(held.options) - 1
    ablation, _ = asked.ablation()
    mixed = (0, bf16, 0, 0)
    pipeline.quantize(held.planned(mixed), tmp_path / "mixed", device="cpu")
    measured = asked.measure([mixed])[0]
    assert mean(measured) == pytest.approx(j_of(tmp_path / "mixed", choice), rel=1e-4)
    assert kept_layers(open_layout(tmp_path / "mixed")) == [held.layers[1]]

    assert ablation.none is not None
    assert mean(ablation.none) == pytest.approx(j_of(MICRO, RoundingChoice(kv="fp8")), rel=1e-4)
    assert ablation.restored[1] == pytest.approx(measured[1], rel=1e-6)  # all but that layer
    assert (ablation.ratio[:, bf16] == 0).all() and (ablation.ratio[:, 0] == 1).all()
    passes = forward_passes(Forks(held.plan, 2, served=True))
    assert asked.told[0]["forward_passes"] == pytest.approx(passes, rel=0.02)
    assert passes == forward_passes(Forks(held.plan, 2)) + 1
    assert state_bytes(Forks(held.plan, 2, served=True)) > state_bytes(Forks(held.plan, 2))


@pytest.mark.slow
def test_options_are_compared_as_they_are_served() -> None:
    """The probe rounds what each option's kernel rounds, and what is kept in FP8 leaves an error then."""
    held = Mixtures(make_plan(MICRO, load_recipe("nvfp4-w4a4")))
    plain, none = walks(held, RoundingChoice()).ablation()
    told, served = walks(held, RoundingChoice(as_served="vllm:b200")).ablation()
    for (alone,), (rounded,) in zip(none, served, strict=True):
        for label, least in (("nvfp4", 1.2), ("mxfp4", 1.2)):
            assert rounded.error[label] > least * alone.error[label]
        assert rounded.energy == pytest.approx(alone.energy) and "fp8" not in alone.error
    labels = [option.label for option in held.options]
    assert (plain.ratio[:, labels.index("fp8")] == 0).all() and (told.ratio[:, labels.index("bf16")] == 0).all()
    assert (told.ratio[:, labels.index("fp8")] > 0).all() and (told.ratio[:, labels.index("fp8")] < 0.2).all()


@pytest.mark.slow
def test_calibrated_input_scales_are_those_that_are_written(tmp_path: Path) -> None:
    """A reference that is rounded, too, has the scales of the checkpoint that it is compared with."""
    held = Mixtures(make_plan(MICRO, parse_recipe(CALIBRATED, "given")))
    assert held.plan.recipe.output.input_scales == "calibrated"
    choice = RoundingChoice(activations="nvfp4", reference=True)
    ablation, _ = walks(held, choice).ablation()
    pipeline.quantize(held.plan, tmp_path / "all", device="cpu")
    assert mean(ablation.whole) == pytest.approx(j_of(tmp_path / "all", choice), rel=1e-4)


def test_each_option_is_rounded_as_its_own_kernel_does() -> None:
    w4a4 = Mixtures(make_plan(MICRO, load_recipe("nvfp4-w4a4")))
    told = served_options(w4a4, RoundingChoice(as_served="vllm:b200", reference=True))
    assert (
        told.inputs
        == {"nvfp4": NVFP4, "mxfp4": MXFP4, "fp8": FP8_UE8M0, "bf16": NONE}
        == {option.label: told.inputs[option.label] for option in w4a4.options}
    )
    assert told.beside.dense == NONE and told.beside.cache == NONE  # bf16 in compressed-tensors
    assert told.reference.experts == told.reference.dense == FP8_UE8M0
    assert len(told.known) == len(set(told.known)) > 3
    on_hopper = served_options(w4a4, RoundingChoice(as_served="vllm:h200"))
    assert on_hopper.inputs == {"nvfp4": NONE, "mxfp4": NONE, "fp8": FP8_UE8M0, "bf16": NONE} and on_hopper.anything
    native = Mixtures(make_plan(MICRO, load_recipe("mxfp4-rtn")))
    assert served_options(native, RoundingChoice(as_served="sglang:b200")).beside.dense == FP8_UE8M0
    nothing = served_options(w4a4, RoundingChoice(activations="none", dense="none", kv="none"))
    assert not nothing.anything and nothing.told == served_options(w4a4, RoundingChoice()).told == "nothing"
    with pytest.raises(UsageError, match="is not known here"):
        served_options(
            Mixtures(make_plan(MICRO, load_recipe("int4-g128-mse"))), RoundingChoice(as_served="sglang:gb10")
        )


def test_what_was_rounded_is_told_and_compared(tmp_path: Path) -> None:
    few = ("--sequences", "6", "--tokens", "32", "--device", "cpu")
    command = ["sensitivity", str(MICRO), "-r", "mxfp4-rtn", "-o", str(tmp_path / "r.yaml"), *few]
    rounded = ("--activations", "mxfp8", "--dense-activations", "fp8")
    done = CliRunner().invoke(app, [*command, *rounded])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "rounded inputs of experts (mxfp4 mxfp8, " in text and "bf16 none), of FP8 beside them fp8" in text
    assert "of no choice J " in text and "the source is not rounded" in text
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.provenance["sensitivity"]["rounding"].startswith("inputs of mxfp4 mxfp8")
    assert CliRunner().invoke(app, [*command, *rounded, "--resume"]).exit_code == 0
    other = CliRunner().invoke(app, [*command, "--resume"])
    assert other.exit_code == 2 and "its rounding was inputs of mxfp4 mxfp8" in " ".join(other.output.split())
    command[5] = str(tmp_path / "other.yaml")
    both = CliRunner().invoke(app, [*command, "--as-served", "vllm:b200", "--kv", "fp8"])
    assert both.exit_code == 2 and "--kv cannot go with it" in both.output
