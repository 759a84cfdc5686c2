"""Targets as people write them for MoE models: what transformers does not build is left and told, the rest refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimoquant.errors import RecipeError
from mimoquant.planning.plan import Plan, make_plan
from mimoquant.planning.recipe import parse_recipe
from tests.conftest import Checkpoint, TensorBytes, make_checkpoint

# layer 0 is dense, so a recipe for experts has to ignore it; the lists are those of llm-compressor's own MoE examples
DENSE = ["re:.*mlp.gate_proj", "re:.*mlp.up_proj", "re:.*mlp.down_proj"]
USUAL = ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*"]
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"


def planned(folder: Path, targets: Any, ignore: Any) -> Plan:
    modifier = {"targets": targets, "scheme": "W4A16", "ignore": ignore}
    text = yaml.safe_dump({"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}})
    return make_plan(folder, parse_recipe(text, "test"))


def told(plan: Plan) -> list[str]:
    return [note for note in plan.notes if "transformers builds none" in note]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two MTP layers, a tower whose names end as experts' do, and speech embeddings."""
    checkpoint = make_checkpoint(mtp=2)
    for name, shape in {
        "visual.blocks.0.mlp.gate_proj.weight": (8, 8),
        "visual.blocks.0.mlp.experts.0.up_proj.weight": (8, 8),
        "visual.blocks.0.norm.weight": (8,),
        "visual.patch_embed.proj.weight": (8, 3, 2, 2),
    }.items():
        checkpoint.tensors[name] = TensorBytes("BF16", shape, bytes(2 * _count(shape)))
    return checkpoint.save(tmp_path_factory.mktemp("targets"))


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@pytest.mark.parametrize(
    ("targets", "ignore", "left"),
    [
        (["Linear"], [*USUAL, *DENSE], {"MTP layers": 2, "towers": 1}),  # eh_proj; a tower's up_proj
        ("Linear", [*USUAL, *DENSE], {"MTP layers": 2, "towers": 1}),
        ("Linear", [*USUAL, *DENSE, "re:.*mtp.*", "re:visual.*"], {}),
        ("Linear", [*USUAL, r"re:model\.layers\.0\."], {"MTP layers": 8, "towers": 2}),
        ("Linear", ["lm_head", "re:.*self_attn", r"re:^model\.layers\.0\.mlp"], {"MTP layers": 8, "towers": 2}),
        (r"re:.*(gate|up|down)_proj$", [r"re:model\.layers\.0\."], {"MTP layers": 6, "towers": 2}),
        (r"re:.*mlp\..*_proj$", [*DENSE, "re:.*visual.*"], {}),
        (r"re:.*mlp\.experts\..*", [], {"towers": 1}),
        (EXPERTS, USUAL, {"towers": 1}),
        ([EXPERTS, "Linear"], [*USUAL, *DENSE, "re:model.mtp"], {"towers": 1}),
    ],
)
def test_what_transformers_does_not_build_is_left_and_counted(
    folder: Path, targets: Any, ignore: list[str], left: dict[str, int]
) -> None:
    plan = planned(folder, targets, ignore)
    assert sorted(plan.formats) == [1, 2] and not plan.carve_outs
    notes = told(plan)
    assert len(notes) == len(left)
    for what, count in left.items():
        assert any(note.startswith(f"{count} matrices of {what} match") for note in notes), (what, notes)
    first = [unit for unit in plan.units if unit.name in ("mtp", "towers")]
    assert all(step.role != "expert" for unit in first for step in unit.steps)


@pytest.mark.parametrize(
    ("targets", "ignore", "module"),
    [
        (["Linear"], USUAL, "model.layers.0.mlp.gate_proj"),
        (["Linear"], [*USUAL[1:], *DENSE], "lm_head"),
        ("Linear", ["lm_head", *DENSE], "model.layers.0.self_attn.q_proj"),
        (r"re:.*(gate|up|down)_proj$", ["lm_head"], "model.layers.0.mlp.gate_proj"),
        (r"re:.*mlp\.", DENSE, "model.layers.1.mlp.gate"),
        # these mean what no module of transformers' has, and nothing of the experts
        ([EXPERTS, r"re:model\.mtp\..*eh_proj"], [], "model.mtp.layers.0.eh_proj"),
        ([EXPERTS, "model.mtp.layers.1.mlp.up_proj"], [], "model.mtp.layers.1.mlp.up_proj"),
        (["Linear", r"re:.*mtp.*down_proj$"], [*USUAL, r"re:model\.layers\.0\."], "model.mtp.layers.0.mlp.down_proj"),
        ([r"re:.*experts\.[1-3]\..*", r"re:visual\."], [], "visual.blocks.0.mlp.experts.0.up_proj"),
    ],
)
def test_what_it_builds_and_what_is_asked_for_by_name_is_refused(
    folder: Path, targets: Any, ignore: list[str], module: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(folder, targets, ignore)
    assert f"would quantize {module} (" in str(caught.value) and caught.value.exit_code == 2


def test_tensors_that_nobody_knows_are_still_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    def edit(checkpoint: Checkpoint) -> None:
        checkpoint.tensors["model.extra.up_proj.weight"] = TensorBytes("BF16", (2, 2), bytes(8))

    folder = tiny_checkpoint(edit=edit)
    text = yaml.safe_dump(
        {"s_stage": {"s_modifiers": {"GPTQModifier": {"targets": "re:.*(up|gate|down)_proj", "scheme": "W4A16"}}}}
    )
    recipe = parse_recipe(text.replace("scheme", "ignore: ['re:model.layers.0.']\n      scheme"), "test")
    with pytest.raises(RecipeError, match=r"would quantize model\.extra\.up_proj \(unknown\)"):
        make_plan(folder, recipe, allow_unknown=True)


@pytest.mark.slow
def test_compressed_tensors_matches_no_more_of_transformers_model(folder: Path) -> None:
    """The claim that the rule rests on, asked of the libraries. Slow because importing them takes six seconds."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    transformers = pytest.importorskip("transformers")
    import torch

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_modules()]
    assert not [name for name in names if "mtp" in name or "visual" in name or "audio" in name]
    found = {name for name, _ in match.match_named_modules(model, ["Linear"], [*USUAL, *DENSE])}
    assert all(".mlp.experts" in name for name in found), found
