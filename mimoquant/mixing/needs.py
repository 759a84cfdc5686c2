"""What a sensitivity run needs: passes, memory, disk; and the refusal where a machine has less memory than that.

Key idea: at the last layer there is a branch for every MoE layer, each with hidden states of its own. They rest on the
host; where a GPU computes, what the experts see and what they add, of every branch, is there while a layer is passed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mimoquant.errors import RecipeError, UsageError
from mimoquant.machine.memory import Machine
from mimoquant.mixing.mixtures import formats_of
from mimoquant.planning.documents import ForkNeeds
from mimoquant.planning.needs import (
    Needs,
    expert_bytes,
    fewer_sequences,
    forward_bytes,
    lacking,
    largest_chunk,
    lighter_objective,
    needs,
    token_bytes,
    too_little,
    walk_back_needs,
)
from mimoquant.planning.plan import CUDA_CHUNK_BYTES, Plan
from mimoquant.shipped import HELD_OUT_TOKENS, SENSITIVITY_SEQUENCES
from mimoquant.wording import size

if TYPE_CHECKING:
    from mimoquant.fisher.needs import FisherNeeds

QUICK_DRAWS = 2  # labels at each position, of the walk back

_MARGIN = 3 * 2**29  # of a GPU's memory: a layer's weights beside its experts, twice, and small things


@dataclass(frozen=True, slots=True)
class Forks:
    """A run: of the plan's source, on so many tokens, with so many formats to choose among. `share`: of the tokens, on
    the process that has most of them. `served`: whether the source goes along once more, as it is served. `quick`:
    without forks, by a walk back."""

    plan: Plan
    formats: int
    tokens: int = SENSITIVITY_SEQUENCES * HELD_OUT_TOKENS
    share: float = 1.0
    ranks: int = 1
    served: bool = False
    quick: bool = False

    def back(self, device: str = "cpu", ranks: int = 1) -> FisherNeeds:
        """Of the walk back of a quick run."""
        from mimoquant.fisher.needs import fisher_needs  # torch is loaded only where it is needed
        from mimoquant.fisher.walk import FisherSettings

        settings = FisherSettings(QUICK_DRAWS, states="files")
        return fisher_needs(self.plan.layout.geometry, self.tokens, settings, device, ranks)


def probe_every(formats: int) -> int:
    """One in so many of a probed lane's tokens: with more formats fewer, so that all of it stays within half a pass. A
    sequence's first token is among them where T divides."""
    return 4 if formats <= 3 else 8


def forward_passes(forks: Forks) -> float:
    """Of all tokens, that the forks and the probe take together."""
    geometry = forks.plan.layout.geometry
    layers, moe = geometry.layers, geometry.moe_layers
    if forks.quick:  # forward, and again above the first MoE layer; then in all formats, rerouted, and with an error
        return 2 + (2 * (layers - moe[0] - 1) + (2 + forks.formats) * len(moe)) / layers
    probe = (1 + forks.formats) / (2 * probe_every(forks.formats)) * len(moe)
    more = layers if forks.served else 0
    return (moe[0] + 2 * (layers - moe[0]) + sum(layers - n for n in moe) - 1 + probe + more) / layers


def fork_needs(forks: Forks, device: str = "cpu") -> Needs:
    """Memory of one process of a run. An upper bound that a run comes near."""
    plan, cuda, geometry = forks.plan, device.startswith("cuda"), forks.plan.layout.geometry
    base, states = needs(plan, device, forks.ranks), state_bytes(forks)
    source = expert_bytes(plan, geometry.moe_layers[0], 0)
    experts = min(geometry.experts, max(1, CUDA_CHUNK_BYTES // source)) if cuda else largest_chunk(plan)
    values = 2 * 3 * experts * geometry.hidden * geometry.expert_intermediate  # of a chunk, in bfloat16
    passing = (1 + forks.formats) * values + forward_bytes(plan, experts, forks.tokens)
    ends = 2 * 2 * geometry.vocab * geometry.hidden  # embedding and head
    if forks.quick:
        return _quick_needs(forks, device, Needs(base.host_bytes + passing + ends, base.gpu_bytes + passing + ends))
    if not cuda:
        return Needs(base.host_bytes + 4 * states + passing + ends, 0)
    # The host has the states, and those of a layer ago while they are being written; a GPU what experts see and what
    # they add. There a format is chosen beside the chunk's values and others', then all tokens pass in every format.
    choosing = max(base.gpu_bytes, 6 * experts * source) + 3 * values
    passing += token_bytes(plan, forks.ranks)[1]
    return Needs(
        base.host_bytes + 3 * experts * source + 2 * states, 2 * states + max(choosing, passing) + ends + _MARGIN
    )


def _quick_needs(forks: Forks, device: str, layer: Needs) -> Needs:
    """Of the walk back, or of the walk forward, which holds beside a `layer`'s work its change in every format and the
    gradients there, whichever is more."""
    geometry, cuda = forks.plan.layout.geometry, device.startswith("cuda")
    states = state_bytes(forks)
    gradients = 2 * QUICK_DRAWS * forks.tokens * geometry.hidden
    held = (2 + forks.formats) * states + 2 * gradients + states  # two of each while they are picked, and one product
    back = forks.back(device, forks.ranks)
    if not cuda:
        return Needs(max(layer.host_bytes + 4 * states + held, back.host_bytes), 0)
    forward = layer.gpu_bytes + held + token_bytes(forks.plan, forks.ranks)[1] + _MARGIN
    return Needs(max(layer.host_bytes + 2 * states + gradients, back.host_bytes), max(forward, back.gpu_bytes))


def state_bytes(forks: Forks) -> int:
    """Hidden states (float32) at the last layer: the source's, and with forks those of all layers quantized, and a fork
    of each."""
    geometry = forks.plan.layout.geometry
    streams = 2 if forks.quick else 2 + forks.served + len(geometry.moe_layers)
    return int(forks.share * forks.tokens) * geometry.hidden * 4 * streams


def resume_bytes(forks: Forks, device: str) -> int:
    """Files beside the recipe: states of a layer and of the next, and what the walk back for the loss leaves; with
    `quick` also what the walk back over the tokens that choose does."""
    back = walk_back_needs(forks.plan, device, forks.ranks)
    of_choosing = forks.back().file_bytes if forks.quick else 0
    return 2 * state_bytes(forks) + (back.file_bytes if back else 0) + of_choosing


def foreseen(forks: Forks, device: str = "cpu") -> str:
    """What a run will need, in one sentence."""
    wants = fork_needs(forks, device)
    gpu = f" and {size(wants.gpu_bytes)} of a GPU's" if wants.gpu_bytes else ""
    what = (
        f"a walk back and one forward take {forward_passes(forks):.1f} forward passes of {forks.tokens} tokens and "
        f"{QUICK_DRAWS} back in three reads of the checkpoint"
        if forks.quick
        else f"the forks take {forward_passes(forks):.1f} forward passes of {forks.tokens} tokens in one read of the "
        "checkpoint, each choice that is measured one more"
    )
    return (
        f"{what}; memory{' a process' if forks.ranks > 1 else ''}: at most "
        f"{size(wants.host_bytes)}{gpu}; beside --out {size(resume_bytes(forks, device))} to resume from"
    )


def fork_refusal(forks: Forks, sequences: int, device: str, has: Machine) -> UsageError | None:
    """Why a run cannot fit this machine, and with how many of its `sequences` it would; None where it can."""
    short = lacking(fork_needs(forks, device), has)
    if short is None:
        return None

    def wanted(fewer: int) -> Needs:
        return fork_needs(replace(forks, tokens=forks.tokens // sequences * fewer), device)

    hint = (
        lighter_objective(forks.plan, lambda plan: lacking(fork_needs(replace(forks, plan=plan), device), has) is None)
        or fewer_sequences(sequences, wanted, has, least=4)
        or "take fewer --tokens, more GPUs by torchrun, or a machine with more memory"
    )
    return too_little(forks.plan, short, hint)


def sensitivity_facts(plan: Plan, device: str) -> ForkNeeds | None:
    """What `sensitivity` would need for this recipe, on as many tokens as it takes by itself; None where it refuses."""
    try:
        forks = Forks(plan, len(formats_of(plan)))
    except RecipeError:
        return None
    wants = fork_needs(forks, device)
    return ForkNeeds(
        forward_passes=forward_passes(forks),
        tokens=forks.tokens,
        host_memory_bytes=wants.host_bytes,
        gpu_memory_bytes=wants.gpu_bytes,
        resume_bytes=resume_bytes(forks, device),
    )
