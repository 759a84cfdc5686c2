"""What a user should know of a plan before it is run, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mimoquant.model.drafter import carried_drafter
from mimoquant.model.layout import ModelLayout
from mimoquant.model.releases import base_model_note
from mimoquant.model.rounding import has_input_scales
from mimoquant.planning.recipe import Recipe
from mimoquant.planning.stored import config_notes
from mimoquant.planning.targets import not_built_notes
from mimoquant.planning.units import is_wide
from mimoquant.shipped import CALIBRATION_SET, HELD_OUT_SET
from mimoquant.weights.container import MODELOPT, NATIVE, NONE, UNIT, keeps_fp8
from mimoquant.wording import duration, ranges, size

if TYPE_CHECKING:
    from mimoquant.planning.documents import HubReads


_TEXT_SETS = {CALIBRATION_SET, HELD_OUT_SET}
_OFTEN = 1.5  # sizes of the source that are read, from which on it is better kept


def hub_notes(reads: HubReads, source_bytes: int, free: int | None) -> Iterator[str]:
    """What a source on the Hub costs, and whether keeping it pays. `free`: bytes of the output's disk, if known."""
    took = "" if reads["seconds"] is None else f", {duration(reads['seconds'])} at the rate that was measured"
    often = "each byte once" if reads["times"] == 1 else f"{reads['times']:g} times the source's {size(source_bytes)}"
    yield f"{size(reads['bytes'])} are read from the Hub ({often}){took}"
    if reads["times"] > _OFTEN and (free is None or free > source_bytes):
        room = "where a disk has room for it" if free is None else f"of which {size(free)} are free here"
        yield f"--keep-source DIR makes each byte come once; it takes {size(source_bytes)}, {room}"


def plan_notes(layout: ModelLayout, recipe: Recipe, container: str, carve_outs: dict[int, str]) -> list[str]:
    """What a user should know before starting."""
    notes = config_notes(layout)
    geometry = layout.geometry
    _, problem = carried_drafter(layout.index.folder, geometry)
    if problem and not recipe.output.mend_json:
        notes.append(f"the drafter is copied as it is, but {problem}")
    notes += not_built_notes(layout, recipe)
    notes += _dense_notes(layout, recipe, container)
    if container == NATIVE and "bf16" in carve_outs.values():
        notes.append("bf16 layers in the native container go by ignored_layers, as vLLM 0.33 reads it; SGLang untried")
    if not layout.mtp_layers:
        notes.append("the source has no MTP layers: speculative decoding by MTP will not be possible")
    if layout.unknown:
        notes.append(f"{len(layout.unknown)} unknown tensors are copied as they are, first {layout.unknown[0]}")
    if recipe.calibration is not None:
        calibration = recipe.calibration
        notes.append(
            f"calibrates on {', '.join(calibration.data)}: {calibration.sequences} sequences of "
            f"{calibration.tokens} tokens"
        )
        if "vision_config" in layout.config and not _TEXT_SETS.issuperset(calibration.data):
            notes.append(
                f"should the data have images or sounds, each of their tokens takes {4 * geometry.hidden / 1e3:.1f} kB "
                "of host memory more until it is embedded"
            )
        if calibration.fisher is not None:
            notes.append(
                f"chooses codes for the loss: {calibration.fisher_sequences * calibration.tokens} of these tokens are "
                f"walked forward and back first, with {calibration.fisher_draws} draws of labels"
            )
    if not recipe.casts and any(weight.packed for weight in layout.experts.values()):
        notes.append(
            "the source's experts are MXFP4, 4 bits already: their exact values are rounded anew, and J says how far "
            "that is from MXFP4; nvfp4-cast and mxfp4-cast change no value"
        )
    if unnamed := base_model_note(layout, recipe.output.named_base):
        notes.append(unnamed)
    if recipe.real_fold and any(map(recipe.folds_norm, geometry.moe_layers)):
        notes.append("fold exact-real rounds norms and routers anew, so a few tokens may go to other experts")
    if keeps_fp8(container, recipe.output.dense) and layout.ragged_qkv_layers:
        notes.append(
            f"FP8 q, k, v of layers {ranges(layout.ragged_qkv_layers)} become bf16: vLLM puts the block scales of "
            "such a k and v on other rows"
        )
    return notes


def _dense_notes(layout: ModelLayout, recipe: Recipe, container: str) -> list[str]:
    """What becomes of FP8 beside the experts, and of their activations."""
    notes, geometry = [], layout.geometry
    dequantized = sum(weight.scale is not None for weights in layout.units.values() for weight in weights)
    keeps = keeps_fp8(container, recipe.output.dense)
    if not keeps and dequantized:
        why = "has no place for their block scales"
        if container == MODELOPT:
            why = "has no name for their block scales that vLLM and SGLang both read (--dense fp8 keeps them)"
        notes.append(
            f"{dequantized} FP8 weights beside the experts (attention, dense MLP, MTP) become bf16: {container} {why}"
        )
    if container == MODELOPT and keeps:
        notes.append(
            f"{dequantized} weights beside the experts stay FP8 as FP8_BLOCK_SCALES, qkv as it lies: SGLang 0.5.23 "
            "reads them; vLLM up to 0.33 stops there (issue #55496 and pull request #50617 are open)"
        )
    if wide := sum(is_wide(weight) for weights in layout.units.values() for weight in weights):
        notes.append(
            f"{wide} float32 matrices beside the experts become bf16, rounded once, as engines hold them and J has them"
        )
    if container == NATIVE and not geometry.fp8:
        stays = "goes out in bf16" if wide else "stays bf16"
        held = "goes out in FP8 as it is" if dequantized else f"{stays}, in ignored_layers: the source has no FP8 of it"
        notes.append(f"attention, dense MLP and MTP {held}; the experts have the values of the source's, in MXFP4")
    if recipe.output.input_scales != NONE:
        scales = "1" if recipe.output.input_scales == UNIT else "by the largest inputs among the calibration tokens"
        notes.append(
            f"input scales are {scales}, so NVFP4 experts are declared with activations in 4 bits: kernels on "
            "Blackwell round them by these, which `eval-kl --as-served vllm:b200` measures; others compute weights-only"
        )
    if has_input_scales(layout):
        becomes = "left out" if recipe.output.input_scales == NONE else "replaced"
        notes.append(f"the source's own input scales, of its experts' activations, are {becomes}: a cast keeps weights")
    if not keeps and geometry.fused_qkv:
        notes.append(
            f"fused qkv ({geometry.qkv_chunks} interleaved ranks) is written as bf16 q_proj, k_proj, v_proj with "
            "attention_projection_layout: split, which vLLM and SGLang load rightly at any tensor parallelism"
        )
    return notes
