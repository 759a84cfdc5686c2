"""Codes chosen for the loss, end to end on the embedded checkpoint: better, resumed in every phase, proven, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro import MICRO, contents, held_out, j_of

from mimoquant import pipeline
from mimoquant.checkpoint.journal import JournalLine, RunFolder
from mimoquant.errors import RecipeError, UsageError
from mimoquant.machine.memory import Machine
from mimoquant.output.verify import verify
from mimoquant.planning.calibration_settings import FisherSample
from mimoquant.planning.needs import (
    disk_bytes,
    left_bytes,
    lighter_on_disk,
    needs,
    refusal,
    states_place,
    walk_back_needs,
)
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import Recipe, load_recipe, parse_recipe
from mimoquant.run import objective

TARGETS = r"targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']"
FEW = {"sequences": 32, "tokens": 64}
HALF = FEW | {"sequences": 16}
AWQ = rf"""
default_stage:
  default_modifiers:
    AWQModifier:
      mappings:
        - smooth_layer: 're:.*layers\.[1-9]\.post_attention_layernorm$'
          balance_layers: ['re:.*mlp\.gate$', 're:.*mlp\.experts\.\d+\.gate_proj$', 're:.*mlp\.experts\.\d+\.up_proj$']
        - smooth_layer: 're:.*experts\.\d+\.up_proj$'
          balance_layers: ['re:.*experts\.\d+\.down_proj$']
      duo_scaling: false
      n_grid: 3
    GPTQModifier: {{scheme: W4A16, {TARGETS}}}
mimoquant: {{objective: kl, carve_outs: {{2: bf16, 3: bf16}}, calibration: {{fisher: {{tokens: 512, draws: 1}}}}}}
"""


def plan_of(recipe: Recipe, **settings: object) -> Plan:
    return make_plan(MICRO, recipe.calibrated_on(FEW | settings))


def run(recipe: Recipe, out: Path, **settings: object) -> Path:
    pipeline.quantize(plan_of(recipe, **settings), out, device="cpu")
    return out


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(load_recipe("gptq-int4-g128"), tmp_path_factory.mktemp("kl") / "out")


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folds, kept layers, and a walk back over half of the tokens."""
    return run(parse_recipe(AWQ, "awq"), tmp_path_factory.mktemp("awq") / "out", **HALF)


@pytest.mark.slow
def test_two_thousand_tokens_do_not_make_it_worse(kl: Path, tmp_path: Path) -> None:
    tokens = held_out(28, 64)
    plain = run(load_recipe("gptq-int4-g128"), tmp_path / "output", objective="output")
    assert j_of(kl, tokens) < j_of(plain, tokens)


def test_the_output_is_proven_and_tells_what_the_loss_feels(kl: Path) -> None:
    report = verify(kl, MICRO)
    assert report.ok, report.problems
    layers = json.loads((kl / "report.json").read_text())["calibration"].values()
    assert 0.99 < sum(facts["fisher"]["share"] for facts in layers) < 1.01
    for facts in layers:
        assert facts["fisher"]["trace"] > 0 and 1 < facts["fisher"]["effective_rank"] < 256
        felt, plain = (torch.tensor(facts[name]) for name in ("felt", "felt_plain"))
        assert len(felt) == len(facts["tokens"]) and felt.mean() < 0.7 * plain.mean()


def test_nothing_of_the_walk_back_is_left(kl: Path) -> None:
    assert [path.name for path in kl.iterdir() if path.is_dir() or path.suffix == ".tmp"] == []
    assert not any("fisher" in path.name for path in kl.iterdir())


@pytest.mark.slow
def test_the_written_recipe_repeats_the_run(awq: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(awq / "recipe.yaml"))
    assert recipe.objective == "kl" and recipe.calibration is not None
    assert recipe.calibration.fisher == FisherSample(512, 1) and recipe.calibration.fisher_sequences == 8
    pipeline.quantize(make_plan(MICRO, recipe), tmp_path / "again", device="cpu")
    assert contents(awq) == contents(tmp_path / "again")


@pytest.mark.slow
def test_folds_and_kept_layers_are_proven(awq: Path) -> None:
    report = verify(awq, MICRO)
    assert report.ok, report.problems
    told = json.loads((awq / "report.json").read_text())
    assert list(told["calibration"]) == ["layer 1", "layer 4"] and told["carve_outs"] == {"2": "bf16", "3": "bf16"}
    assert j_of(awq, held_out(28, 64)) < 0.03


class _StopError(Exception):
    pass


def stops_at_line(count: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Die after the `count`-th journal line of the run itself."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        record = RunFolder.record

        def stop(self: RunFolder, line: JournalLine) -> None:
            record(self, line)
            if self.out.name == "out" and len(self.finished) == count:
                raise _StopError

        patch.setattr(RunFolder, "record", stop)

    return prepare


def stops_on_the_way(way: str, layers: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Die in the walk back, when it has passed so many layers in a direction."""

    def prepare(patch: pytest.MonkeyPatch) -> None:
        walk: Callable[..., object] = objective.walk_back

        def walked(*args: object, **more: object) -> object:
            def passed(now: str, layer: int) -> None:
                if now == way and layer == layers:
                    raise _StopError

            return walk(*args, **more | {"progress": passed})

        patch.setattr(objective, "walk_back", walked)

    return prepare


@pytest.mark.parametrize(
    ("dies", "states"),
    [
        pytest.param(stops_on_the_way("forward", 2), "files", id="forward", marks=pytest.mark.slow),
        pytest.param(stops_on_the_way("back", 2), "host", id="back", marks=pytest.mark.slow),
        pytest.param(stops_at_line(3), "host", id="codes", marks=pytest.mark.slow),
        pytest.param(stops_on_the_way("forward", 2), "host", id="forward on the host", marks=pytest.mark.slow),
        pytest.param(stops_on_the_way("back", 2), "files", id="back by files", marks=pytest.mark.slow),
        pytest.param(stops_at_line(1), "files", id="first line", marks=pytest.mark.slow),
    ],
)
def test_killed_in_any_phase_it_resumes_to_the_same_bytes(
    dies: Callable[[pytest.MonkeyPatch], None],
    states: str,
    awq: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(parse_recipe(AWQ, "awq"), **HALF)
    monkeypatch.setattr(objective, "states_place", lambda *args: states)
    with monkeypatch.context() as patch, pytest.raises(_StopError):
        dies(patch)
        pipeline.quantize(plan, tmp_path / "out", device="cpu")
    other = make_plan(MICRO, parse_recipe(AWQ.replace("draws: 1", "draws: 2"), "awq").calibrated_on(HALF))
    with pytest.raises(UsageError, match=r"calibration\.fisher\.draws was 1, is now 2"):
        pipeline.quantize(other, tmp_path / "out", device="cpu", resume=True)
    pipeline.quantize(plan, tmp_path / "out", device="cpu", resume=True)
    assert contents(awq) == contents(tmp_path / "out")


@pytest.mark.slow
def test_killed_while_the_matrices_go(awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that is damaged then makes the walk back begin anew."""
    plan, out = plan_of(parse_recipe(AWQ, "awq"), **HALF), tmp_path / "out"

    def half(folder: Path) -> None:
        (folder / "fisher").rename(folder / "fisher.gone")
        raise _StopError

    with monkeypatch.context() as patch, pytest.raises(_StopError):
        patch.setattr(objective, "let_go", half)
        pipeline.quantize(plan, out, device="cpu")
    shard = next(unit.file for unit in plan.units if unit.layer == 1)
    damaged = bytearray((tmp_path / "out.partial" / shard).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "out.partial" / shard).write_bytes(damaged)
    pipeline.quantize(plan, out, device="cpu", resume=True)
    assert contents(awq) == contents(out)


def test_a_recipe_without_the_key_rounds_for_the_output(tmp_path: Path) -> None:
    """And what it writes does not name an objective, so that its bytes are those of earlier versions."""
    text = f"default_stage: {{default_modifiers: {{GPTQModifier: {{scheme: MXFP4A16, {TARGETS}}}}}}}"
    one = run(parse_recipe(text, "a"), tmp_path / "one", sequences=8)
    two = run(parse_recipe(f"{text}\nmimoquant: {{objective: output}}", "a"), tmp_path / "two", sequences=8)
    assert contents(one) == contents(two)
    assert "objective" not in (one / "recipe.yaml").read_text() and "felt" not in (one / "report.json").read_text()


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("objective: loss", "objective 'loss' is unknown"),
        ("calibration: {fisher: {draws: 1}}", "calibration.fisher is given, and the objective is output"),
        ("objective: kl, calibration: {fisher: 1024}", "expected a mapping with tokens and draws"),
        ("objective: kl, calibration: {fisher: {labels: 2}}", "expected a mapping with tokens and draws"),
        ("objective: kl, calibration: {fisher: {draws: 0}}", "draws is 0, expected a number from 1 to 64"),
        ("objective: kl, calibration: {fisher: {tokens: true}}", "tokens is True, expected a number from 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(block: str, sentence: str) -> None:
    text = f"default_stage: {{default_modifiers: {{GPTQModifier: {{scheme: W4A16, {TARGETS}}}}}}}\n"
    with pytest.raises(RecipeError, match=sentence):
        parse_recipe(f"{text}mimoquant: {{{block}}}", "test")


def test_methods_without_an_objective_refuse_one() -> None:
    text = f"default_stage: {{default_modifiers: {{QuantizationModifier: {{scheme: W4A16, {TARGETS}}}}}}}\n"
    with pytest.raises(RecipeError, match="objective has no meaning for the method rtn"):
        parse_recipe(f"{text}mimoquant: {{objective: kl}}", "test")
    gram = parse_recipe(f"{text}mimoquant: {{scale_search: gram}}", "test")
    with pytest.raises(RecipeError, match="is of the method rtn, an objective has a meaning for GPTQModifier only"):
        gram.calibrated_on({"objective": "kl"})


@pytest.mark.slow
def test_rounds_for_what_an_expert_answers_go_by_what_the_loss_feels_of_it(tmp_path: Path) -> None:
    """Layers before the one that is refined keep their bytes, and no expert's answers are felt more than before."""
    kl = run(load_recipe("gptq-mxfp4"), tmp_path / "kl")
    out = run(load_recipe("gptq-mxfp4"), tmp_path / "out", reconstruct=1, reconstruct_layers=(3,))
    assert verify(out, MICRO).ok
    before, after = (json.loads((folder / "report.json").read_text())["calibration"] for folder in (kl, out))
    answers = after["layer 3"].pop("answer")
    assert all(new <= old for old, new in answers) and sum(new for _, new in answers) < sum(old for old, _ in answers)
    assert before["layer 2"] == after["layer 2"] and before["layer 3"] != after["layer 3"]
    tokens = held_out(28, 64)
    assert j_of(out, tokens) < 1.02 * j_of(kl, tokens)  # of 1,024 tokens no more can be said


def test_a_machine_that_is_too_small_for_the_walk_back_is_told_what_would_fit() -> None:
    recipe = load_recipe("gptq-int4-g128").calibrated_on({"sequences": 64})
    assert recipe.calibration is not None
    many = replace(recipe.calibration, fisher=FisherSample(131_072, 64))
    plan, large = make_plan(MICRO, replace(recipe, calibration=many)), 2**40
    assert states_place(plan, "cpu", Machine(large, large)) == "host"
    assert states_place(plan, "cpu", Machine(large, 2**30)) == "files"
    refused = refusal(plan, "cuda", Machine(large, large, 16 * 10**9))
    assert refused is not None and "GB of GPU memory" in str(refused)
    assert refused.hint == "calibration: {fisher: {tokens: 65536}} in the recipe, or --objective output would fit"
    wants = walk_back_needs(plan, "cpu")
    assert wants is not None and disk_bytes(plan, "cpu", Machine(large, large)) > plan.shard_bytes + plan.side_bytes
    of_layer = 4 * 256**2 + 2 * 64 * 131_072 * 256  # a matrix, and the gradients of every draw
    assert wants.file_bytes >= left_bytes(plan) == of_layer * len(plan.formats)


def test_what_fits_is_named_where_a_disk_or_a_machine_is_small() -> None:
    """Whoever takes what is named has a plan that fits, and the next larger number does not."""
    plan, large = plan_of(load_recipe("gptq-int4-g128"), sequences=2048), Machine(2**40, 2**40)
    room = disk_bytes(plan_of(load_recipe("gptq-int4-g128"), sequences=2048, fisher=FisherSample(32_768)), "cpu", large)
    told = "calibration: {fisher: {tokens: 32768}} in the recipe, or --objective output would fit"
    assert lighter_on_disk(plan, "cpu", large, room) == told
    output = plan_of(load_recipe("gptq-int4-g128"), sequences=2048, objective="output")
    room = disk_bytes(output, "cpu", large)
    assert lighter_on_disk(plan, "cpu", large, room) == "--objective output would fit"
    assert lighter_on_disk(plan, "cpu", large, room - 1) is lighter_on_disk(output, "cpu", large, room - 1) is None

    def refused(sequences: int, has: Machine, **settings: object) -> str | None:
        error = refusal(plan_of(load_recipe("gptq-int4-g128"), sequences=sequences, **settings), "cpu", has)
        return error.hint if error else None

    small = Machine(needs(plan_of(load_recipe("gptq-int4-g128"), sequences=64), "cpu").host_bytes, 0)
    hint = refused(2**20, small)
    assert hint is not None and hint.startswith("--sequences ") and hint.endswith(" with --objective output")
    kl, plain = (int(part.split()[1]) for part in hint.split("; "))
    assert kl < plain and refused(kl, small) is refused(plain, small, objective="output") is None
    assert refused(2 * kl, small) and refused(2 * plain, small, objective="output")


def test_few_tokens_have_more_draws_unless_they_are_given(kl: Path) -> None:
    """As many samples as 16,384 tokens have, at most 8 draws; what was taken is in the recipe that was written."""
    for sequences, tokens, draws in ((512, 2048, 2), (64, 256, 2), (32, 256, 4), (32, 64, 8), (1, 64, 8)):
        recipe = load_recipe("gptq-nvfp4").calibrated_on({"sequences": sequences, "tokens": tokens})
        assert recipe.calibration is not None and recipe.calibration.fisher_draws == draws
        given = replace(recipe.calibration, fisher=FisherSample(131_072, 3))
        assert given.fisher_draws == 3
        told = next(note for note in make_plan(MICRO, recipe).notes if "walked forward" in note)
        assert f"with {draws} draws of labels" in told
    written = load_recipe(str(kl / "recipe.yaml"))
    assert written.calibration is not None and written.calibration.fisher == FisherSample(131_072, 8)
