"""What a sensitivity run needs: passes, memory, disk; and the refusal where a machine has less memory than that.

Key idea: at the last layer there is a branch for every MoE layer, each with hidden states of its own. They rest on the
host; where a GPU computes, what the experts see and what they add, of every branch, is there while a layer is passed.
"""

from __future__ import annotations

from dataclasses import replace

from mimoquant.calibration.tokens import TokenSet
from mimoquant.errors import UsageError
from mimoquant.evaluation.forks import PROBE_EVERY
from mimoquant.mixture import Mixtures
from mimoquant.model.layer_stream import PORTION_TOKENS
from mimoquant.needs import Machine, Needs, forward_bytes, lacking, largest_chunk, needs, too_little
from mimoquant.report import size


def forward_passes(mixtures: Mixtures) -> float:
    """Of all tokens, that the forks and the probe take together."""
    layers, first = mixtures.plan.layout.geometry.layers, mixtures.layers[0]
    probe = (1 + _formats(mixtures)) / (2 * PROBE_EVERY) * len(mixtures.layers)
    return (first + 2 * (layers - first) + sum(layers - n for n in mixtures.layers) - 1 + probe) / layers


def fork_needs(mixtures: Mixtures, tokens: TokenSet, device: str = "cpu", ranks: int = 1) -> Needs:
    """Memory of one process of a run. An upper bound that a run comes near."""
    plan, cuda = mixtures.plan, device.startswith("cuda")
    geometry, base, states = plan.layout.geometry, needs(plan, device, ranks), state_bytes(mixtures, tokens, ranks)
    experts = largest_chunk(plan)
    one = 2 * 3 * experts * geometry.hidden * geometry.expert_intermediate  # a chunk in bfloat16
    work = (1 + _formats(mixtures)) * one + forward_bytes(plan, experts, tokens.ids.size)
    work += 2 * 2 * geometry.vocab * geometry.hidden  # embedding and head
    if cuda:  # resting, and as they were a layer ago while they are being written; what experts see, and what they add
        return Needs(base.host_bytes + 2 * states, base.gpu_bytes + 2 * states + work)
    return Needs(base.host_bytes + 4 * states + work, 0)


def state_bytes(mixtures: Mixtures, tokens: TokenSet, ranks: int = 1) -> int:
    """Hidden states (float32) at the last layer, on the rank that has most: the source's, those of all layers
    quantized, and a fork of each."""
    portions = 2 * -(-tokens.ids.size // (2 * PORTION_TOKENS))  # two halves, each dealt in such portions
    share = -(-portions // ranks) / portions
    return int(share * tokens.ids.size * mixtures.plan.layout.geometry.hidden * 4 * (2 + len(mixtures.layers)))


def foreseen(mixtures: Mixtures, tokens: TokenSet, device: str = "cpu", ranks: int = 1) -> str:
    """What a run will need, in one sentence."""
    wants, states = fork_needs(mixtures, tokens, device, ranks), state_bytes(mixtures, tokens, ranks)
    gpu = f" and {size(wants.gpu_bytes)} of a GPU's" if wants.gpu_bytes else ""
    return (
        f"the forks take {forward_passes(mixtures):.1f} forward passes of {tokens.ids.size} tokens in one read of the "
        f"checkpoint, each choice that is measured one more; memory{' a process' if ranks > 1 else ''}: "
        f"{size(wants.host_bytes)}{gpu} at most; beside --out {size(2 * states)} to resume from"
    )


def fork_refusal(mixtures: Mixtures, tokens: TokenSet, device: str, has: Machine, ranks: int = 1) -> UsageError | None:
    """Why a run cannot fit this machine, and with how many sequences it would; None where it can."""
    short = lacking(fork_needs(mixtures, tokens, device, ranks), has)
    if short is None:
        return None
    count, hint = len(tokens.ids) // 2, "take fewer --tokens, more GPUs by torchrun, or a machine with more memory"
    while count >= 4:
        if lacking(fork_needs(mixtures, replace(tokens, ids=tokens.ids[:count]), device, ranks), has) is None:
            hint = f"--sequences {count} would fit"
            break
        count //= 2
    return too_little(mixtures.plan, short, hint)


def _formats(mixtures: Mixtures) -> int:
    return sum(option.fmt is not None for option in mixtures.options)
