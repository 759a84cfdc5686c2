"""What codes are chosen for: the walk back of a run, and what it says of a layer's projections.

Key idea: before anything is quantized the first of the calibration tokens go through the clean model and back, once,
and leave a Fisher matrix a layer in `OUT.partial/fisher`. It goes when the last layer is written. Where hidden states
rest on the way, on the host or in files, follows from the memory that is free; the matrices do not depend on it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mimoquant.calibration import statistics
from mimoquant.calibration.layer_facts import LayerFisherFacts
from mimoquant.calibration.tokens import TokenSet
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.checkpoint.writer import stopping
from mimoquant.fisher.matrices import Fisher
from mimoquant.fisher.walk import FisherSettings, walk_back
from mimoquant.machine import memory
from mimoquant.machine.team import Team
from mimoquant.model.decoder_layer import ExpertChunk
from mimoquant.planning.needs import states_place
from mimoquant.planning.plan import Plan
from mimoquant.quant.engine_torch import decode, pack_nibbles, unpack_nibbles
from mimoquant.quant.expert_methods import Encoded
from mimoquant.quant.formats import Format
from mimoquant.quant.grid import Grid
from mimoquant.quant.inner_descent import descend_inner
from mimoquant.quant.method import WALKED_MOST, Method
from mimoquant.quant.output_metric import DAMP, dampened, experts_fisher, gate_up_metric, shrunk_fisher
from mimoquant.run.portions import Seen
from mimoquant.weights.decoded import CheckpointWeights

Told = Callable[[str, int, int], None]  # what is walked, layers passed, layers

_FOLDER, _GOING = "fisher", "fisher.gone"  # in a run's folder; what it is called while it is removed


def walked_back(
    plan: Plan, reader: CheckpointReader, tokens: TokenSet, folder: Path, team: Team, told: Told | None = None
) -> Fisher:
    """The Fisher matrices of a plan's source, below the run's `folder`; a walk that was begun there is taken up."""
    calibration, layers = plan.recipe.calibration, plan.layout.geometry.layers
    assert calibration is not None and calibration.fisher is not None
    places = team.gather(states_place(plan, team.device, memory.machine(team.device), team.size))
    settings = FisherSettings(calibration.fisher_draws, states="files" if "files" in places else "host")

    first = min(plan.layout.geometry.moe_layers)

    def passed(way: str, layer: int) -> None:
        done = (layer + 1, layers) if way == "forward" else (layers - layer, layers - first)
        if told and team.leads:
            told(f"walk {way}", *done)

    some, weights = (
        tokens.first(calibration.fisher_sequences),
        CheckpointWeights(reader, plan.layout, torch.device(team.device)),
    )
    return walk_back(weights, some, settings, folder / _FOLDER, team=team, resume=True, progress=passed)


def let_go(folder: Path) -> None:
    """Remove what `walked_back` has left. Killed on the way, a folder by its name is still whole or not there."""
    held, going = folder / _FOLDER, folder / _GOING
    with stopping(held):
        shutil.rmtree(going, ignore_errors=True)
        if held.is_dir():
            os.rename(held, going)
            shutil.rmtree(going)


class OutputMetrics:
    """What the loss feels of the outputs of one layer's experts. `told`: what was measured there.

    Args:
        trains: bool, which sequences the tokens are of that `seen` has below; those that were walked back come first.
    """

    def __init__(self, fisher: Fisher, layer: int, device: torch.device, trains: Tensor) -> None:
        facts = fisher.layers[layer]
        self.told: LayerFisherFacts = {
            "trace": facts.trace,
            "effective_rank": facts.effective_rank,
            "share": facts.share,
        }
        self.pooled = shrunk_fisher(fisher.load(layer, str(device)), fisher.samples)
        gradients = fisher.gradients(layer, str(device))
        self.gradients = gradients[:, trains[: gradients.shape[1]].to(device)].flatten(1, 2)

    def experts(self, chunk: ExpertChunk, seen: Seen) -> Tensor:
        """[E, H, H] of the answers of a chunk's experts, which is down_proj's metric."""
        halves, count = statistics.gradient_grams(self.gradients, seen, chunk.begin, chunk.begin + len(chunk.down))
        own, _ = experts_fisher(halves, count, self.pooled)
        return dampened(own, DAMP)


def felt_of_gate_up(
    felt_EHH: Tensor, chunk: ExpertChunk, seen: Seen, count: list[int], sample: Tensor, n0: float
) -> Tensor:
    """[E, 2I, 2I] of a chunk's gate and up.

    Args:
        felt_EHH: of what its experts answer. sample: tokens that the statistics of `seen` are shrunk toward by `n0`.
    """
    width = 2 * chunk.gate.shape[1]
    end = chunk.begin + len(chunk.gate)
    sums = statistics.expert_grams(seen, chunk.begin, end, width, statistics.slopes_of(chunk))
    forced = statistics.forced_slopes(sample, chunk.gate, chunk.up)
    return gate_up_metric(felt_EHH, chunk.down.to(torch.float32), statistics.shrink(sums, count, forced, n0))


def gate_and_up(chunk: ExpertChunk) -> Tensor:
    """One stack of rows: they share the Gram matrix, and in NVFP4 the global scale."""
    return torch.cat([chunk.gate, chunk.up], dim=1)


def before_answers(method: Method) -> Method:
    """How gate's and up's codes are chosen first, where the last round is `for_answers`: with a round at least, since
    scales are chosen in it, too."""
    return replace(method, refine=max(1, method.refine - 1)) if method.refine else method


def for_answers(
    both: Encoded, chunk: ExpertChunk, matrices: tuple[Tensor, Tensor, Tensor], fmt: Format, seen: Seen
) -> Encoded:
    """A chunk's gate and up, stacked, with codes chosen once more for what its experts answer.

    Args:
        matrices: Gram matrices and metrics that `both` was made for, and what is felt of the answers.
    """
    weights, end = (gate_and_up(chunk), chunk.down), chunk.begin + len(chunk.gate)
    tokens = statistics.tokens_of(seen, chunk.begin, end, WALKED_MOST)
    codes = unpack_nibbles(both.parts["codes"])
    codes = descend_inner(weights, matrices, Grid.of(both.parts, fmt), codes, fmt, tokens)
    parts = both.parts | {"codes": pack_nibbles(codes)}
    return replace(both, parts=parts, values=decode(parts, fmt).to(torch.bfloat16))
