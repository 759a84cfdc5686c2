"""`sensitivity`: forks against checkpoints that are really written, the choice against all choices, a planted layer."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import astuple
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from clamped_weights import GRAM, scaled, with_one_small_group
from micro import MICRO, contents, held_out, j_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mimoquant
from mimoquant import pipeline
from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.index import open_index
from mimoquant.cli.app import app
from mimoquant.errors import CheckpointError, QualityError, UsageError
from mimoquant.evaluation.eval_kl import eval_kl
from mimoquant.evaluation.snapshots import Snapshots
from mimoquant.machine.devices import make_engine
from mimoquant.machine.memory import Machine
from mimoquant.machine.team import Team
from mimoquant.mixing import run as module
from mimoquant.mixing.choose import Chooser
from mimoquant.mixing.layer_options import CalibratedOptions
from mimoquant.mixing.mixtures import Mixtures
from mimoquant.mixing.needs import (
    Forks,
    fork_needs,
    fork_refusal,
    forward_passes,
    sensitivity_facts,
    state_bytes,
)
from mimoquant.mixing.run import sensitivity
from mimoquant.mixing.walks import Walks, forks_of, halves
from mimoquant.output.verify import verify
from mimoquant.planning.plan import make_plan
from mimoquant.planning.recipe import load_recipe, parse_recipe
from mimoquant.quant.formats import Format
from mimoquant.report.sensitivity_page import ranked, sensitivity_page, sensitivity_text
from mimoquant.shipped import HELD_OUT_TOKENS, SENSITIVITY_SEQUENCES

RECIPE = "int4-g128-mse"
GPTQ = r"""
default_stage:
  default_modifiers:
    GPTQModifier: {scheme: W4A16, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {scale_search: absmax, calibration: {set: mixed-v1, sequences: 16, tokens: 64}, refine: 0}
"""
KL = GPTQ.replace("refine: 0", "objective: kl")
PLANTED = 3


def part_of(tokens: TokenSet, sequences: list[int]) -> TokenSet:
    return TokenSet(
        "part",
        tokens.ids[sequences],
        tuple(tokens.domains[i] for i in sequences),
        tokens.sha256,
        tuple(tokens.sequence_hashes[i] for i in sequences),
        tokens.origins,
    )


def mixtures(recipe: str = RECIPE, source: Path = MICRO) -> Mixtures:
    held = parse_recipe(recipe, "given") if "\n" in recipe else load_recipe(recipe)
    return Mixtures(make_plan(source, held))


def j_of_choice(held: Mixtures, choice: list[int], tokens: TokenSet, out: Path) -> float:
    """J of a checkpoint that `quantize` writes, by `eval-kl`."""
    plan = held.planned(choice)
    pipeline.quantize(plan, out, device="cpu")
    return j_of(out, tokens, plan.layout.index.folder)


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["sensitivity", *map(str, arguments), "--device", "cpu"])


def asked(folder: Path) -> tuple[Any, ...]:
    """The command that `found` is of."""
    budget = 1.06 * mixtures().plan.shard_bytes / 2**30
    few = ("--sequences", 14, "--tokens", 48)
    return (MICRO, "-r", RECIPE, "-o", folder / "mixed.yaml", *few, "--budget-gib", budget)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run by the command line, with room for some carve-outs: its facts, and the folder with recipe and page."""
    folder = tmp_path_factory.mktemp("found")
    done = call(*asked(folder), "--html", folder / "page.html", "--json")
    assert done.exit_code == 0, done.stderr
    assert "forward passes of 672 tokens in one read" in done.stderr
    return json.loads(done.stdout), folder


@pytest.mark.slow
def test_forks_take_what_was_foreseen_and_read_each_byte_once(found: tuple[dict[str, Any], Path]) -> None:
    facts, _ = found
    walk, layers = facts["cost"]["walks"][0], 5
    assert walk["forward_passes"] == pytest.approx(forward_passes(Forks(mixtures().plan, 3)), rel=0.02)
    assert walk["forward_passes"] + facts["cost"]["walks"][1]["forward_passes"] <= layers / 2 + 3
    wanted = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    tensors = open_index(MICRO).tensors.items()
    assert walk["bytes_read"] == sum(info.size_bytes for name, info in tensors if name.startswith(wanted))


def test_forks_are_what_written_checkpoints_are(found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """All quantized, one layer quantized, all but one: J of the walk is J of `eval-kl` on what `quantize` writes."""
    (facts, _), held, tokens = found, mixtures(), held_out(14, 48)
    first, second = (part_of(tokens, half) for half in halves(tokens))
    assert facts["j"]["mean"] == pytest.approx(j_of_choice(held, [0] * 4, tokens, tmp_path / "all"), rel=1e-4)
    alone = j_of_choice(held, [4, 4, 0, 4], first, tmp_path / "alone")
    assert facts["layers"][2]["alone"]["mean"] == pytest.approx(alone, rel=1e-4)
    restored = j_of_choice(held, [0, 0, 4, 0], second, tmp_path / "restored")
    whole = float(eval_kl(MICRO, tmp_path / "all", second, noise_floor=False)["j"]["mean"])
    assert facts["layers"][2]["gain"]["mean"] == pytest.approx(whole - restored, rel=1e-3)


def test_the_recipe_is_what_was_measured(found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    facts, folder = found
    chosen, plan = facts["chosen"], make_plan(MICRO, load_recipe(str(folder / "mixed.yaml")))
    assert plan.shard_bytes == chosen["bytes"] <= facts["budget_bytes"]
    labels = {str(n): fmt.label for n, fmt in plan.formats.items()} | {str(n): k for n, k in plan.carve_outs.items()}
    assert labels == chosen["options"] and len(set(labels.values())) > 1
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    j = j_of(tmp_path / "out", held_out(14, 48))
    assert chosen["measured"]["mean"] == pytest.approx(j, rel=1e-4)
    assert chosen["predicted"]["mean"] == pytest.approx(j, rel=0.2)
    assert chosen["agrees"] == (chosen["difference"]["low"] <= 0 <= chosen["difference"]["high"])
    assert verify(tmp_path / "out", MICRO).ok
    evidence = load_recipe(str(tmp_path / "out" / "recipe.yaml")).provenance["sensitivity"]
    assert evidence["bytes"] == chosen["bytes"] and evidence["layers"][1]["option"] == chosen["options"]["1"]
    assert not (folder / "mixed.yaml.partial").exists()


def test_experts_add_up(found: tuple[dict[str, Any], Path]) -> None:
    for layer in found[0]["layers"]:
        experts = layer["experts"]
        assert sum(experts["token_share"]) == pytest.approx(1) and min(experts["largest"]) > 0
        assert all(0.001 < value < 0.1 for value in experts["relmse"])
        assert layer["failed_experts"] == layer["super_experts"] == []
        ratios = [option["ratio"] for option in layer["options"]]
        assert ratios[0] == 1 > ratios[1] > ratios[2] > 0 == ratios[3] == ratios[4]


@pytest.mark.slow
def test_the_choice_is_among_the_best_of_all_choices() -> None:
    """All 256 mixtures of four options in four layers are measured: predictions hold, and at any size what is chosen is
    near the best of all, and no worse than one format everywhere or any one layer kept."""
    held, tokens = mixtures(), held_out(28, 64)
    every = list(itertools.product(range(4), repeat=4))  # fp8 stands for bf16 too
    with contextlib.closing(make_engine("cpu")) as engine:
        walks = Walks(held, tokens, None, engine, Team("cpu"))
        ablation, _ = walks.ablation()
        told = dict(zip(every, walks.measure(every), strict=True))
    j = {choice: float(np.concatenate(halves).mean()) for choice, halves in told.items()}
    off = [np.log(ablation.predicted(choice)[0] / j[choice]) for choice in every if j[choice] > 0]
    assert len(off) == 255 and abs(np.mean(off)) < 0.05 and np.std(off) < 0.1
    simple = [choice for choice in every if len(set(choice)) == 1 or (sum(choice) == 3 == max(choice))]
    assert len(simple) == 8
    over = []
    for budget in sorted({held.size(choice) for choice in every}):
        if budget < held.size([3] * 4):
            chosen = Chooser(held, ablation, lambda some: [told[choice] for choice in some]).within(budget)
            fitting = [choice for choice in every if held.size(choice) <= budget]
            over.append(j[chosen] / min(j[choice] for choice in fitting))
            assert held.size(chosen) <= budget and j[chosen] <= 1.001 * min(j[c] for c in simple if c in fitting)
    assert len(over) > 20 and np.mean(over) < 1.05 and max(over) < 1.15


@pytest.mark.slow
def test_a_trained_model_has_no_better_simple_choice(shared: Path) -> None:
    """In the room of one layer in bf16: J of at most .8 of one format everywhere, and of any one layer in bf16, on
    sequences that did not choose."""
    source = shared / "models" / "mimo-tiny-official"
    if not source.is_dir():
        pytest.skip("the trained model is not there")
    held = mixtures(source=source)
    tokens = load_tokens(["heldout-v1"], source, sequences=56, tokens=64, vocab=8192)
    choosing, telling = part_of(tokens, list(range(28))), part_of(tokens, list(range(28, 56)))
    count, kept = len(held.layers), len(held.options) - 1
    carved = [tuple(kept if n == layer else 0 for n in held.layers) for layer in held.layers]
    uniform = [(k,) * count for k, option in enumerate(held.options) if option.fmt]
    with contextlib.closing(make_engine("cpu")) as engine:
        walks = Walks(held, choosing, None, engine, Team("cpu"))
        chooser = Chooser(held, walks.ablation()[0], walks.measure)
        chosen = chooser.within(max(map(held.size, carved)))
        told = Walks(held, telling, None, engine, Team("cpu")).measure([(kept,) * count, chosen, *carved, *uniform])
    j = [float(np.concatenate(halves).mean()) for halves in told]
    assert j[0] == 0 and j[1] <= 0.8 * min(j[2:])


def plant(folder: Path) -> Path:
    """The micro checkpoint with outlier channels in front of one layer's experts: its norm is a 16th there, and router,
    gate and up take it 16-fold, so the model is the same (but for FP8's last bits) and its groups have a wide range."""
    source = shutil.copytree(MICRO, folder / "planted")
    prefix, wide = f"model.layers.{PLANTED}.", torch.ones(256)
    wide[::32] = 16
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, values in tensors.items():
            if name == f"{prefix}post_attention_layernorm.weight":
                tensors[name] = (values.float() / wide).to(values.dtype)
            elif name == f"{prefix}mlp.gate.weight":
                tensors[name] = values * wide
            elif name.startswith(f"{prefix}mlp.experts.") and name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensors[name] = (values.float() * wide / 16).to(values.dtype)
            elif name.startswith(f"{prefix}mlp.experts.") and name.endswith(
                ("gate_proj.weight_scale_inv", "up_proj.weight_scale_inv")
            ):
                tensors[name] = values * 16
        save_file(tensors, path, {"format": "pt"})
    return source


def test_a_planted_layer_is_found_first(tmp_path: Path) -> None:
    """And at the bytes of int4 g64 everywhere, J is at most .8 of what that has."""
    source = plant(tmp_path)
    held, tokens = mixtures(source=source), held_out(14, 48, source)
    budget = held.size([1, 1, 1, 1])
    facts = sensitivity(held, tokens, tmp_path / "r.yaml", budget_bytes=budget)
    first, second = ranked(facts)[:2]
    assert first["layer"] == PLANTED and first["contribution"]["mean"] > 3 * second["contribution"]["mean"]
    assert first["failed_experts"] == []  # it is the layer, and none of its experts alone
    assert min(facts["carve_outs"], key=lambda point: point["j"]["mean"])["layer"] == PLANTED
    assert facts["chosen"]["options"][str(PLANTED)] == "int4 g32" and facts["chosen"]["bytes"] <= budget
    assert facts["chosen"]["measured"]["mean"] <= 0.8 * j_of_choice(held, [1, 1, 1, 1], tokens, tmp_path / "g64")


@pytest.mark.parametrize("formats", [2, 3, 5])
def test_forks_and_one_choice_are_within_the_bound(formats: int) -> None:
    """L/2 + 3 forward passes, for V2.5's and Pro's layers, with any number of formats."""
    for layers in (48, 70):
        geometry = SimpleNamespace(layers=layers, moe_layers=list(range(1, layers)))
        plan: Any = SimpleNamespace(layout=SimpleNamespace(geometry=geometry))
        assert layers / 2 < forward_passes(Forks(plan, formats)) + 1 <= layers / 2 + 3


@pytest.mark.slow
def test_formats_of_another_family_take_off_a_fifth_in_the_same_bytes(tmp_path: Path) -> None:
    """Of MXFP4 everywhere: the recipe's own size is the budget, unless another one is given."""
    recipe, out, few = tmp_path / "r.yaml", tmp_path / "out", ("--sequences", 28, "--tokens", 64)
    told = call(MICRO, "-r", "mxfp4-mse", "-o", recipe, "--any-format", "--json", *few)
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    chosen, uniform = facts["chosen"], facts["uniform"][0]
    assert uniform["option"] == "mxfp4" and chosen["bytes"] <= uniform["bytes"] == facts["budget_bytes"]
    assert chosen["to_all_quantized"]["mean"] <= 0.8
    plan = mixtures("mxfp4-mse").plan
    assert facts["cost"]["walks"][0]["forward_passes"] == pytest.approx(forward_passes(Forks(plan, 5)), rel=0.02)
    assert {option.partition(" ")[0] for option in chosen["options"].values()} & {"int4"}
    sglang = next(engine for engine in facts["engines"] if engine["engine"] == "sglang")
    assert not sglang["ok"], "it takes no int4 beside another format"
    plan = make_plan(MICRO, load_recipe(str(recipe)))
    assert pipeline.quantize(plan, out, device="cpu") and verify(out, MICRO).ok
    native = call(MICRO, "-r", "mxfp4-mse", "-o", tmp_path / "n.yaml", "--any-format", "--container", "native", *few)
    assert native.exit_code == 2 and "holds mxfp4 and no other format" in native.stderr


@pytest.mark.slow
def test_a_target_is_reached_with_the_least_bytes(tmp_path: Path) -> None:
    source = plant(tmp_path)
    held, tokens = mixtures(source=source), held_out(14, 48, source)
    target = 0.45 * j_of_choice(held, [0, 0, 0, 0], tokens, tmp_path / "g128")
    facts = sensitivity(held, tokens, tmp_path / "r.yaml", target_j=target)
    assert facts["chosen"]["measured"]["mean"] <= target
    assert facts["chosen"]["options"][str(PLANTED)] == "fp8"
    assert facts["chosen"]["bytes"] <= held.size([3 if layer == PLANTED else 1 for layer in held.layers])


@pytest.mark.slow
def test_an_expert_that_quantizing_ruins_is_named(tmp_path: Path) -> None:
    """Huge weights behind an intermediate channel that is always zero: they change nothing, but each group's scale."""
    source, expert = shutil.copytree(MICRO, tmp_path / "source"), "model.layers.2.mlp.experts.5."
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name, values in tensors.items():
            if name == f"{expert}down_proj.weight":
                wide = values.float() / 16
                wide[:, 7] = 400
                tensors[name] = wide.to(values.dtype)
            elif name == f"{expert}down_proj.weight_scale_inv":
                tensors[name] = values * 16
            elif name == f"{expert}up_proj.weight":
                zeroed = values.float()
                zeroed[7] = 0
                tensors[name] = zeroed.to(values.dtype)
        save_file(tensors, path, {"format": "pt"})
    held = mixtures(source=source)
    facts = sensitivity(held, held_out(14, 48, source), tmp_path / "r.yaml")
    named = {layer["layer"]: layer["failed_experts"] for layer in facts["layers"] if layer["failed_experts"]}
    assert named == {2: [5]} and "note: layer 2: experts 5: quantized badly" in sensitivity_text(facts)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [GPTQ, KL], ids=["output", "kl"])
def test_a_calibrated_recipe_is_measured_with_its_own_codes(recipe: str, tmp_path: Path) -> None:
    held, tokens = mixtures(recipe), held_out(14, 48)
    budget = held.size([1, 3, 0, 0])
    facts = sensitivity(held, tokens, tmp_path / "r.yaml", budget_bytes=budget)
    assert facts["j"]["mean"] == pytest.approx(j_of_choice(held, [0] * 4, tokens, tmp_path / "all"), rel=1e-3)
    plan = make_plan(MICRO, load_recipe(str(tmp_path / "r.yaml")))
    pipeline.quantize(plan, tmp_path / "out", device="cpu")
    j = eval_kl(MICRO, tmp_path / "out", tokens, noise_floor=False)["j"]["mean"]
    assert facts["chosen"]["measured"]["mean"] == pytest.approx(j, rel=1e-3)
    assert facts["cost"]["walks"][0]["bytes_read"] == 5331560 and facts["calibration"]["sequences"] == 16
    ratios = [option["ratio"] for option in facts["layers"][0]["options"]]
    assert ratios[0] == 1 > ratios[1] > ratios[2] > 0


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [RECIPE, pytest.param(GPTQ, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_where_it_was(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, tokens = mixtures(recipe), held_out(8, 32)
    budget = held.size([1, 0, 0, 2])
    whole = sensitivity(held, tokens, tmp_path / "whole.yaml", budget_bytes=budget)
    save, left = Snapshots.save, 3

    def stop(self: Snapshots, *told: Any) -> None:
        nonlocal left
        save(self, *told)
        left -= 1
        if not left:
            raise Killed

    monkeypatch.setattr(Snapshots, "save", stop)
    out = tmp_path / "killed.yaml"
    for left in (3, 4):  # in the forks; then in the measurement  # noqa: B007
        with pytest.raises(Killed):
            sensitivity(held, tokens, out, budget_bytes=budget, resume=True)
    assert len(list((tmp_path / "killed.yaml.partial").glob("*.safetensors"))) == 2
    monkeypatch.undo()
    facts = sensitivity(held, tokens, out, budget_bytes=budget, resume=True)
    assert [walk["layers_walked"] for walk in facts["cost"]["walks"][:2]] == [0, 3]
    for name in ("layers", "chosen", "j", "frontier"):
        assert facts[name] == whole[name]
    assert out.read_text() == (tmp_path / "whole.yaml").read_text()


def test_what_is_kept_is_as_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of the last layer, of every branch of both halves."""
    held, tokens, kept = mixtures(), held_out(8, 32), []
    save = Snapshots.save

    def weighed(self: Snapshots, walk: str, layer: int, states: dict[str, torch.Tensor], facts: Any) -> None:
        kept.append(sum(values.nbytes for values in states.values()))
        save(self, walk, layer, states, facts)

    monkeypatch.setattr(Snapshots, "save", weighed)
    sensitivity(held, tokens, tmp_path / "r.yaml")
    assert max(kept) == state_bytes(forks_of(held, tokens, Team())) == 8 * 32 * 256 * 4 * (2 + 4)


def test_what_cannot_fit_is_refused_with_a_number_of_sequences_that_would() -> None:
    plan, plenty = mixtures().plan, 10**12
    forks, few = Forks(plan, 3, 56 * 48), Forks(plan, 3, 14 * 48)
    there = fork_needs(few, "cuda").gpu_bytes
    assert fork_needs(forks, "cuda").gpu_bytes > there > 0 == fork_needs(forks).gpu_bytes
    refused = fork_refusal(forks, 56, "cuda", Machine(plenty, plenty, there))
    assert refused and "GB of GPU memory, here are" in str(refused) and refused.hint == "--sequences 14 would fit"
    refused = fork_refusal(forks, 56, "cpu", Machine(10**6, 10**6))
    assert refused and "of memory, here are 0.00 GB" in str(refused) and refused.hint and "--tokens" in refused.hint
    assert fork_refusal(forks, 56, "cpu", Machine(plenty, plenty)) is None


def test_a_machine_that_is_too_small_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimoquant.machine.memory.machine", lambda *told: Machine(10**7, 10**7))
    out = tmp_path / "r.yaml"
    done = call(MICRO, "-r", RECIPE, "-o", out, "--sequences", 8, "--tokens", 32, "--device", "cpu")
    assert done.exit_code == 2 and "GB of memory, here are 0.01 GB" in done.stderr, done.output
    with pytest.raises(UsageError, match=r"of memory, here are 0\.01 GB"):
        mimoquant.sensitivity(MICRO, RECIPE, out, sequences=8, tokens=32, device="cpu")
    assert not list(tmp_path.iterdir())


def test_ranks_need_less_each() -> None:
    held, tokens = mixtures(), held_out(8, 32)
    team = Team()
    one = forks_of(held, tokens, team)
    team.size = 2
    two = forks_of(held, tokens, team)
    assert one.share == 1 and two.share == 0.5 and state_bytes(two) == state_bytes(one) // 2
    team.size = 3  # a half of the sequences is one portion, which is not shared
    assert forks_of(held, tokens, team).share == 0.5


def test_plan_tells_what_a_run_will_need() -> None:
    """On the tokens that the verb takes by itself, for recipes that it takes."""
    told = mimoquant.plan(MICRO, RECIPE, device="cpu")
    wants = fork_needs(Forks(mixtures().plan, 3, SENSITIVITY_SEQUENCES * HELD_OUT_TOKENS))
    assert told["sensitivity"]["host_memory_bytes"] == wants.host_bytes > told["host_memory_bytes"]
    shown = CliRunner().invoke(app, ["plan", str(MICRO), "-r", RECIPE, "--device", "cpu"]).stdout
    tokens = SENSITIVITY_SEQUENCES * HELD_OUT_TOKENS
    assert f"{told['sensitivity']['forward_passes']:.1f} forward passes of {tokens} tokens" in shown
    given = inspect.signature(mimoquant.sensitivity).parameters
    assert (given["sequences"].default, given["tokens"].default) == (SENSITIVITY_SEQUENCES, HELD_OUT_TOKENS)
    mixed = mixtures().planned([1, 0, 0, 0]).recipe.resolved("compressed-tensors")
    assert sensitivity_facts(make_plan(MICRO, parse_recipe(yaml.safe_dump(mixed), "mixed")), "cpu") is None


class _Ranks:
    """A team in which another rank wants these options."""

    def __init__(self, others: list[Any]) -> None:
        self.others = others

    def gather(self, mine: Any) -> list[Any]:
        told: list[Any] = json.loads(json.dumps([self.others, mine]))
        return told


def test_ranks_choose_codes_of_a_format_that_only_one_of_them_wants() -> None:
    """Only some ranks have probes; all of them must make the same calls, in the same order."""
    g128, g32, mxfp4 = Format("int4", 128), Format("int4", 32), Format("mxfp4", 32)
    mine, theirs = [None, g128], [mxfp4, g128, g32, None]
    asked = []
    for one, other in ((mine, theirs), (theirs, mine)):
        options: Any = object.__new__(CalibratedOptions)
        options.team = _Ranks([astuple(option) for option in other if option])
        asked.append(options._of_any_rank(one))
    assert asked[0] == asked[1] and set(asked[0]) == {g128, g32, mxfp4}


def test_a_source_that_changed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its payload, under the same headers, by its time of change; and the length of the sequences."""
    source = Path(shutil.copytree(MICRO, tmp_path / "source"))
    out, tokens = tmp_path / "r.yaml", held_out(8, 32)

    def stop(self: Snapshots, *told: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Snapshots, "save", stop)
        sensitivity(mixtures(source=source), tokens, out)
    with pytest.raises(UsageError, match="tokens a sequence was 32, is now 16"):
        sensitivity(mixtures(source=source), held_out(16, 16), out, resume=True)
    with pytest.raises(UsageError, match=r"formats was int4 g128, int4 g64, int4 g32, is now .*, mxfp4, nvfp4"):
        every = Mixtures(make_plan(source, load_recipe(RECIPE)), any_format=True)
        sensitivity(every, tokens, out, resume=True)
    os.utime(source / "model_mtp.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match=r"source\.model_mtp\.safetensors was .*, is now .* of 1970-01-01"):
        sensitivity(mixtures(source=source), tokens, out, resume=True)


def test_a_finished_run_is_told_and_left_as_it_is(found: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Also with a page, and from Python."""
    facts, folder = found
    before = contents(folder)
    done = call(*asked(folder), "--resume", "--json", "--html", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert "mixed.yaml: is finished already" in done.stderr and "layer" not in done.stderr
    told = json.loads(done.stdout)
    assert {**told, "elapsed_s": 0} == {**facts, "elapsed_s": 0} and contents(folder) == before
    of_pages = [
        re.sub(r"[0-9a-f]{64}", "", path.read_text()) for path in (tmp_path / "page.html", folder / "page.html")
    ]
    assert of_pages[0] == of_pages[1]
    text = call(*asked(folder), "--resume")
    assert text.exit_code == 0 and "CHOSEN" in text.stdout and not list(folder.glob("*.partial"))
    again = call(*asked(folder))
    assert again.exit_code == 2 and "exists already" in again.stderr


def edited(folder: Path) -> None:
    (folder / "mixed.yaml").write_text("# mine\n" + (folder / "mixed.yaml").read_text())


def without_findings(folder: Path) -> None:
    (folder / "mixed.findings.json").unlink()


def spoiled(folder: Path) -> None:
    (folder / "mixed.findings.json").write_text('{"made_of": 3}')


OTHERS: dict[str, tuple[tuple[Any, ...], Callable[[Path], None], str]] = {
    "sequences": (("--sequences", 12), lambda folder: None, "is finished, and its tokens was "),
    "tokens": (("--tokens", 40), lambda folder: None, "its tokens a sequence was 48, is now 40"),
    "a format": (("--any-format",), lambda folder: None, "its formats was int4 g128, int4 g64, int4 g32, is now "),
    "a budget": (("--budget-gib", 0.0075), lambda folder: None, "its budget in bytes was "),
    "another recipe": (("-r", "int4-g128-rtn"), lambda folder: None, "scale_search was mse, is now absmax"),
    "an edited recipe": ((), edited, "its written recipe was "),
    "no findings": ((), without_findings, "mixed.findings.json, which would tell what it was made of, is not beside"),
    "other findings": ((), spoiled, "mixed.findings.json is not what sensitivity wrote beside a recipe"),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_finished_run_of_something_else_is_refused(
    name: str, found: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    more, change, told = OTHERS[name]
    folder = Path(shutil.copytree(found[1], tmp_path / "copy"))
    change(folder)
    before = contents(folder)
    done = call(*asked(folder), "--resume", *more)
    assert done.exit_code == 2 and told in done.stderr and "mixed.yaml: " in done.stderr, done.output
    assert "hint: choose another" in done.stderr and contents(folder) == before


def test_findings_of_another_run_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "mixed.findings.json").write_text("{}")
    done = call(*asked(tmp_path))
    assert done.exit_code == 2 and "mixed.findings.json: exists already" in done.stderr, done.output


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nvfp4-mse", "gram"])
def test_groups_without_a_scale_are_told(recipe: str, tmp_path: Path) -> None:
    """As `quantize` counts them; and that it would stop, where it would."""
    gram, few = tmp_path / "gram.yaml", ("--sequences", 8, "--tokens", 32, "--json")
    gram.write_text(GRAM.replace("gram}", "gram, calibration: {sequences: 8, tokens: 64}}"))
    source, named = with_one_small_group(tmp_path / "few"), gram if recipe == "gram" else recipe
    done = call(source, "-r", named, "-o", tmp_path / "r.yaml", *few)
    assert done.exit_code == 0, done.output
    (note,) = (note for note in json.loads(done.stdout)["notes"] if "no scale" in note)
    assert note.startswith("in 1 weight the format has no scale for 1 group of nonzero values: 1 became zero")
    if recipe != "gram":
        many = call(scaled(tmp_path / "many", 1e-36), "-r", recipe, "-o", tmp_path / "s.yaml", *few)
        assert many.exit_code == 0, many.output
        notes = json.loads(many.stdout)["notes"]
        assert any(note.startswith("quantize will stop: ") and "2048 of its 2048 groups" in note for note in notes)


def test_mistakes_end_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("")
    out, few = tmp_path / "r.yaml", ("--sequences", 8, "--tokens", 32)
    gptq = tmp_path / "gptq.yaml"
    gptq.write_text(GPTQ)
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        ((MICRO, "-r", RECIPE, "-o", tmp_path / "there.yaml"), 2, "exists already"),
        ((MICRO, "-r", RECIPE, "-o", tmp_path / "r"), 2, "ends in .yaml"),
        ((MICRO, "-r", RECIPE, "-o", tmp_path / "no" / "r.yaml"), 2, "cannot be written"),
        ((MICRO, "-r", RECIPE, "-o", out, "--budget-gib", 1, "--target-kl", 0.1), 2, "only one of them"),
        ((MICRO, "-r", RECIPE, "-o", out, "--budget-gib", 0.001, *few), 2, "of the smallest mixture"),
        ((MICRO, "-r", RECIPE, "-o", out, "--budget-gib", 1, *few), 2, "takes no quantization"),
        (
            (MICRO, "-r", gptq, "-o", out, "--data", "mixed-v1", *few),
            2,
            "with what the recipe was calibrated on (mixed-v1)",
        ),
        ((MICRO, "-r", "nothing", "-o", out), 2, "no recipe is named"),
        ((tmp_path / "no", "-r", RECIPE, "-o", out), 2, "not a checkpoint folder"),
        ((MICRO, "-r", RECIPE, "-o", out, "--html", tmp_path / "no" / "p.html"), 2, "--html"),
    ]
    for arguments, code, message in cases:
        done = call(*arguments)
        assert done.exit_code == code and message in done.stderr, (arguments, done.output)
        assert "Traceback" not in done.output and not out.exists()
        assert not list(tmp_path.glob("*.partial"))


def test_a_folded_norm_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "awq.yaml"
    recipe.write_text(r"""
default_stage:
  default_modifiers:
    AWQModifier:
      mappings: [{smooth_layer: 're:.*layers\.[1-9]\.post_attention_layernorm$', balance_layers: ['re:.*mlp\.gate$',
        're:.*mlp\.experts\.\d+\.gate_proj$', 're:.*mlp\.experts\.\d+\.up_proj$']}]
    QuantizationModifier: {scheme: W4A16, targets: ['re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$']}
mimoquant: {calibration: {sequences: 8, tokens: 32}}
""")
    done = call(MICRO, "-r", recipe, "-o", tmp_path / "r.yaml", "--sequences", 8, "--tokens", 32)
    assert done.exit_code == 2 and "folds the norm of layer 1" in done.stderr, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq.yaml"]


@pytest.mark.slow
def test_a_target_out_of_reach_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where measurements stay above the target, no recipe is written, and another limit can go on."""
    monkeypatch.setattr("mimoquant.mixing.choose.ROUNDS", 0)
    held, tokens, out = mixtures(), held_out(8, 32), tmp_path / "r.yaml"
    facts = sensitivity(held, tokens, tmp_path / "all.yaml")
    low = 0.6 * facts["j"]["mean"]
    monkeypatch.setattr(module.Walks, "measure", lambda self, some: [(np.ones(4), np.ones(4)) for _ in some])
    with pytest.raises(QualityError, match=r"J 1\.00000 is the least of the 1 choices measured"):
        sensitivity(held, tokens, out, target_j=low)
    assert not out.exists() and out.with_name("r.yaml.partial").is_dir()
    monkeypatch.undo()
    again = sensitivity(held, tokens, out, target_j=low, resume=True)
    assert again["cost"]["walks"][0]["layers_walked"] == 0 and again["chosen"]["measured"]["mean"] <= low


def test_broken_logits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimoquant.mixing import forks

    finals = forks.finals_of

    def broken(lane: Any, trial: int, norm: torch.Tensor) -> torch.Tensor:
        out = finals(lane, trial, norm)
        return out * torch.nan if trial == 3 else out

    monkeypatch.setattr(forks, "finals_of", broken)
    with pytest.raises(CheckpointError, match="only layer 2 quantized: 124 of 124 positions"):
        sensitivity(mixtures(), held_out(8, 32), tmp_path / "r.yaml")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_tells_the_facts(found: tuple[dict[str, Any], Path]) -> None:
    facts, folder = found
    page = (folder / "page.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.links == [] and "http" not in page and "<script" not in page
    assert page.count('class="alone"') == page.count('class="gain"') == 4 and page.count('class="carved"') == 4
    assert f"{facts['chosen']['measured']['mean']:.4g}" in page
    assert sensitivity_page(facts) == page
    hostile = sensitivity_page(facts | {"source": "<script>alert(1)</script>", "recipe": "a\u202eb"})
    assert "<script" not in hostile and "\u202e" not in hostile


def test_the_text_fits_a_terminal(found: tuple[dict[str, Any], Path]) -> None:
    text = sensitivity_text(found[0])
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("CHOSEN") and "predicted" in text and "measured" in text
    assert "--refine" not in text, "there is no calibrated method to refine after"
    first, second, third, *_ = (layer["layer"] for layer in ranked(found[0]))
    refined = sensitivity_text(found[0] | {"calibration": {"sequences": 16}}).splitlines()[-1]
    assert refined.endswith(f"--refine 1 --refine-layer {first} --refine-layer {second} --refine-layer {third}")
