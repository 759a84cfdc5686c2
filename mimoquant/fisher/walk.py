"""The walk back: what every layer's output error costs in nats, from one walk forward and one back.

For each layer F = E[g gᵀ], the second moment of g = ∂ log p(y|x) / ∂(output of the layer), over positions and draws.
The labels y are drawn at every position from the model's own prediction there; the gradient at a position collects what
its own and all later labels give. Then ½ E[δᵀ F δ] is the KL of an error δ of that layer's output, to second order.

Key idea: the forward walk keeps what enters each layer, in bfloat16, and goes on from what it has kept, as engines do;
so the forward that is made again on the way back is the same one, and a walk that is taken up goes on from the same
bytes. One layer's weights are there at a time, in either direction. Attention and router are float32, what goes through
experts is bfloat16 with float32 sums, gradients rest between layers in bfloat16. With `exact` everything is float32.

The gradients stay beside the matrices: what they are at the tokens of one expert says what is felt of that expert.

Portions of the tokens (`layer_stream.portions`) are dealt out to ranks; each walks on its own, and their second moments
are summed in the portions' order, so the bytes do not depend on the number of ranks. The walk back ends at the first
layer with experts: nobody rounds what lies before it.

Shapes: D draws, S sequences of a portion, T tokens, H hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mimoquant
from mimoquant.calibration.tokens import CalibrationRecord, TokenSet
from mimoquant.checkpoint.journal import RUN_NAME, JournalLine, RunFolder, opened
from mimoquant.checkpoint.writer import stopping, write_file_durably
from mimoquant.errors import CheckpointError, MimoquantError, UsageError
from mimoquant.fisher.kept import Kept, Place
from mimoquant.fisher.labels import head_gradients, uniforms
from mimoquant.fisher.matrices import FACTS_NAME, Fisher, FisherRecord, Held, LayerFisher
from mimoquant.fisher.passage import Passage, forward_layer
from mimoquant.machine.team import Team
from mimoquant.model.layer_stream import batch_sequences, layer_chunks, made_ahead, portions
from mimoquant.weights.decoded import CheckpointWeights
from mimoquant.weights.embedding import Embedding

Progress = Callable[[str, int], None]  # called with "forward" or "back" and the layer just passed


@dataclass(frozen=True, slots=True)
class FisherSettings:
    """`draws` labels at each position, from `seed`. `states`: where the forward walk's states rest; on the host they do
    not outlive the process, and a walk that is taken up makes those again that it still needs."""

    draws: int = 2
    seed: int = 0
    states: Place = "host"
    exact: bool = False


@torch.no_grad()
def walk_back(
    weights: CheckpointWeights,
    tokens: TokenSet,
    settings: FisherSettings,
    folder: Path,
    *,
    team: Team | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Fisher:
    """Walk `tokens` through a checkpoint and back, and leave the matrices in `folder`; all ranks of `team` call this.

    Args:
        resume: take up what a killed walk left in `folder`.partial, with any number of ranks; a finished one is opened.
    Raises UsageError: `folder` is there, or a walk of something else. CheckpointError: the model's predictions, or its
    gradients, are not finite. StoppedError: disk trouble, resumable.
    """
    team = team or Team(str(weights.device))
    identity = _identity(weights, tokens, settings, team)
    finished = _finished(folder, identity, team) if resume else None
    if finished:
        return finished
    with opened(RunFolder(folder, identity, resume=resume, rank=team.rank), team) as run:
        kept = Kept(run, team, settings.states)
        try:
            walk = _Walk(weights, tokens, settings, kept, progress or (lambda way, layer: None))
            walk.run()
            kept.close()
        except BaseException as error:
            kept.leave()
            if isinstance(error, MimoquantError) and not run.finished and team.size == 1:
                run.discard()  # nothing that a resume could use, and nobody who still writes
            raise
        if not team.leads:
            run.close()
        told = team.gather([line.as_plain() for line in run.finished.values()])  # all journals are closed by then
        if team.leads:
            run.finished = {line["unit"]: JournalLine(**line) for lines in told for line in lines}
            _publish(run, walk, tokens, identity)
        team.gather(None)
    return Fisher.open(folder)


def _identity(weights: CheckpointWeights, tokens: TokenSet, settings: FisherSettings, team: Team) -> dict[str, Any]:
    """What a walk that is taken up must share with the one that began. Other ranks may read copies of the checkpoint
    with times of their own."""
    index = weights.layout.index
    identity = {
        "version": mimoquant.__version__,
        "model": {"headers": index.headers_fingerprint(), "config": weights.layout.config},
        "tokens a sequence": str(tokens.ids.shape[1]),
        "tokens": tokens.sha256,
        "draws": str(settings.draws),
        "seed": str(settings.seed),
        "exact": str(settings.exact),
        "kind of device": team.device.partition(":")[0],
    }
    if team.leads:
        identity["files"] = index.stamps()
    return identity


def _finished(folder: Path, identity: dict[str, Any], team: Team) -> Fisher | None:
    """A walk that needs nothing more. Raises UsageError where it is of something else."""
    there = folder.is_dir() and not (folder / RUN_NAME).is_file()
    if not team.gather(there)[0]:
        return None
    fisher = Fisher.open(folder)
    if team.leads:
        wanted = json.loads(json.dumps(identity))
        differ = next((key for key in wanted if fisher.identity.get(key) != wanted[key]), None)
        if differ:
            raise UsageError(
                f"{folder}: is a walk of something else, {differ} differs",
                hint="resume with what it was made with, or remove the folder and start again",
            )
    team.gather(None)
    return fisher


class _Walk:
    """One walk forward and back. `first`: the first layer whose matrix is wanted."""

    def __init__(
        self, weights: CheckpointWeights, tokens: TokenSet, settings: FisherSettings, kept: Kept, progress: Progress
    ) -> None:
        self.weights, self.settings, self.kept, self.progress = weights, settings, kept, progress
        self.team, self.layers = kept.team, weights.layers
        self.first = min(weights.layout.geometry.moe_layers, default=0)
        self.dtype = torch.float32 if settings.exact else torch.bfloat16
        ids, self.media = torch.from_numpy(tokens.walked), tokens.media
        self.portions = [torch.cat(batches) for batches in portions(ids)]
        self.mine = list(range(len(self.portions)))[self.team.rank :: self.team.size]
        self.positions, self.batch = ids.numel(), batch_sequences(ids.shape[1])
        self._told: dict[str, dict[str, Any]] = {}  # of units that this rank has made

    def run(self) -> None:
        """Do what is not done yet."""
        wanted = range(self.first, self.layers)
        if not (self.kept.has(map(self._fisher, wanted)) and self._has_gradients(self.first)):
            top = self._begun()
            self._forward(self.layers if top is None else top)
            gradients = self._from_head() if top is None else self._taken_up(top)
            self._back(self.layers - 1 if top is None else top, gradients)
        self.kept.finish()

    def _begun(self) -> int | None:
        """The layer that an earlier walk back has come to: the gradients at its output are there, and all of the layers
        above (two layers are written at a time, in any order). None if it has not begun."""
        for layer in range(self.first, self.layers):
            if self._has_gradients(layer) and self.kept.has(map(self._fisher, range(layer + 1, self.layers))):
                return layer
        return None

    def _has_gradients(self, lowest: int) -> bool:
        """Of this layer and all above."""
        return all(self.kept.has(self.units("gradients", layer)) for layer in range(lowest, self.layers))

    def _taken_up(self, layer: int) -> list[Tensor]:
        return [self.kept.get(f"gradients {layer} {portion}").to(self.weights.device) for portion in self.mine]

    # --- forward ------------------------------------------------------------------------------------------------------

    def _forward(self, end: int) -> None:
        """Keep what enters the layers after the first that is wanted, up to `end` (the number of layers: what leaves
        the last)."""
        begin = 0
        for layer in range(self.first + 1, end + 1):
            if not self.kept.has(self.units("states", layer)):
                break
            begin = layer
        if begin == end or end == self.first:
            return
        states = (
            self._embedded()
            if begin == 0
            else [self.kept.get(f"states {begin} {portion}").to(self.weights.device) for portion in self.mine]
        )
        with made_ahead(self._weights(begin, end), self.weights.device) as feed:
            for layer in range(begin, end):
                states, outputs = forward_layer(self.weights, states, feed, self.batch)
                for portion, state, output in zip(self.mine, states, outputs, strict=True):
                    if layer + 1 > self.first:
                        self._put(f"states {layer + 1} {portion}", state, {"output": output})
                self.kept.layer_done()
                self.progress("forward", layer)

    def _weights(self, begin: int, end: int) -> Iterator[Any]:
        for layer in range(begin, end if self.mine else begin):
            yield self.weights.layer(layer)
            yield from self.weights.expert_chunks(layer)

    def _embedded(self) -> list[Tensor]:
        mine = [self.portions[portion] for portion in self.mine]
        embedding = Embedding(self.weights, mine, self.media)
        return [embedding(ids).to(self.dtype) for ids in mine]

    # --- back ---------------------------------------------------------------------------------------------------------

    def _from_head(self) -> list[Tensor]:
        """Draw the labels; gradients at the last layer's output, [D, S, T, H] of each portion."""
        norm, head = (self.weights.tensor(f"{name}.weight") for name in ("model.norm", "lm_head"))
        uniform = uniforms(self.positions, self.settings.draws, self.settings.seed)
        begins = [0]
        for ids in self.portions:
            begins.append(begins[-1] + ids.numel())
        out = []
        for portion in self.mine:
            state = self.kept.get(f"states {self.layers} {portion}").to(self.weights.device)
            self.kept.drop(f"states {self.layers} {portion}")
            some = uniform[begins[portion] : begins[portion + 1]]
            labels, gradients = head_gradients(
                state.flatten(0, 1).to(torch.float32), norm, head, self.weights.config.eps, some
            )
            if self.media:  # no label is drawn where a picture or a sound follows
                gradients *= predicts(self.portions[portion]).to(gradients.device).view(-1, 1)
            out.append(gradients.to(self.dtype).view(-1, *state.shape))
            digest = hashlib.sha256(labels.cpu().numpy().astype("<i4").tobytes()).hexdigest()
            self._put_gradients(self.layers - 1, portion, out[-1], digest)
        self.kept.layer_done()
        return out

    def _back(self, top: int, gradients: list[Tensor]) -> None:
        """From the gradients at the output of layer `top` to those at the first one's, a matrix for each."""
        with made_ahead(self._weights_and_states(top), self.weights.device) as feed:
            for layer in range(top, self.first - 1, -1):
                self._measure(layer, gradients)
                if layer > self.first:
                    gradients = self._through(layer, gradients, feed)
                self.kept.layer_done()
                self.progress("back", layer)

    def _weights_and_states(self, top: int) -> Iterator[Any]:
        for layer in range(top, self.first if self.mine else top, -1):
            yield self.weights.layer(layer)
            for portion in self.mine:
                yield self.kept.get(f"states {layer} {portion}").to(self.weights.device)
                self.kept.drop(f"states {layer} {portion}")
            yield from self.weights.expert_chunks(layer)

    def _through(self, layer: int, gradients: list[Tensor], feed: Iterator[Any]) -> list[Tensor]:
        """From the gradients at a layer's output to those at its input, which is the output of the layer before it."""
        if not self.mine:
            return []
        weights, passages = next(feed), []
        for gradient in gradients:
            passages.append(Passage(self.weights, weights, next(feed), gradient, self.batch))
        if self.weights.layout.geometry.moe[layer]:
            for chunk in layer_chunks(feed, self.weights.layout.geometry.experts):
                for passage in passages:
                    passage.through(chunk)
        out = [passage.input_gradient() for passage in passages]
        for portion, gradient in zip(self.mine, out, strict=True):
            labels = self._facts(f"gradients {layer} {portion}")["labels"]
            self._put_gradients(layer - 1, portion, gradient, labels)
        return out

    def _put_gradients(self, layer: int, portion: int, gradients: Tensor, labels: str) -> None:
        """Gradients at a layer's output. With them go, for who takes the walk up, the digest of the portion's labels
        and what the layer's experts add."""
        output = self._facts(f"states {layer + 1} {portion}")["output"]
        self._put(f"gradients {layer} {portion}", gradients, {"labels": labels, "output": output})

    def _measure(self, layer: int, gradients: list[Tensor]) -> None:
        """Sum up all portions' second moments, and keep the layer's matrix."""
        width, device = self.weights.layout.geometry.hidden, self.weights.device
        total = torch.zeros(width, width, device=device)
        own = dict(zip(self.mine, gradients, strict=True))
        for portion in range(len(self.portions)):
            part = second_moment(own[portion].flatten(0, 2)) if portion in own else torch.empty_like(total)
            self.team.broadcast(part, portion % self.team.size)
            total += part
        total /= self.positions * self.settings.draws
        total = (total + total.T) / 2
        facts = self._layer_facts(layer, total)
        if self.team.leads:
            self._put(self._fisher(layer), total, facts)

    def _layer_facts(self, layer: int, matrix: Tensor) -> dict[str, Any]:
        """Raises CheckpointError where the matrix is not finite."""
        trace = float(torch.diagonal(matrix).sum(dtype=torch.float64))
        squares = float(matrix.square().sum(dtype=torch.float64))
        if not 0 <= trace < float("inf") or not squares < float("inf"):
            problem = f"layer {layer}: the gradients at its output are not finite, their second moment has"
            raise CheckpointError(f"{problem} the trace {trace}")
        every = self.team.gather([self._facts(f"gradients {layer} {portion}") for portion in self.mine])
        size = self.team.size
        told = [every[portion % size][portion // size] for portion in range(len(self.portions))]
        outputs, labels = ([facts[key] for facts in told] for key in ("output", "labels"))
        return {
            "trace": trace,
            "effective_rank": trace**2 / squares if squares else 0.0,
            "output": None if None in outputs else sum(outputs) / self.positions,
            "labels": hashlib.sha256("".join(labels).encode()).hexdigest(),
        }

    # --- units --------------------------------------------------------------------------------------------------------

    def units(self, kind: str, layer: int) -> list[str]:
        """A layer's, one a portion."""
        return [f"{kind} {layer} {portion}" for portion in range(len(self.portions))]

    @staticmethod
    def _fisher(layer: int) -> str:
        return f"fisher {layer}"

    def _put(self, unit: str, values: Tensor, facts: dict[str, Any]) -> None:
        self._told[unit] = facts
        self.kept.put(unit, values, facts)

    def _facts(self, unit: str) -> Mapping[str, Any]:
        return self._told.get(unit) or self.kept.facts(unit) or {}


def predicts(ids: Tensor) -> Tensor:
    """Whether the model predicts the token after each place of ids [S, T]: not one of a picture or a sound (below 0),
    which nobody samples. Of what would come after the last place nothing is known but what stands there."""
    return torch.cat((ids[:, 1:], ids[:, -1:]), dim=1) >= 0


def second_moment(rows: Tensor) -> Tensor:
    """Sum of outer products of rows [N, H], float32 [H, H]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch.mm(rows.T, rows, out_dtype=torch.float32)
    wide = rows.to(torch.float32)
    return wide.T @ wide


def _publish(run: RunFolder, walk: _Walk, tokens: TokenSet, identity: dict[str, Any]) -> None:
    """Leave matrices, gradients and their facts alone in the folder, and give it its name."""
    units = [f"fisher {layer}" for layer in range(walk.first, walk.layers)]
    lines = [run.finished[unit] for unit in units]
    gradients = [walk.units("gradients", layer) for layer in range(walk.first, walk.layers)]
    facts = [line.facts or {} for line in lines]
    costs = [told["trace"] * (told["output"] or 0.0) for told in facts]
    layers = {
        layer: LayerFisher(
            layer,
            line.file,
            line.sha256,
            told["trace"],
            told["effective_rank"],
            told["output"],
            cost / sum(costs) if sum(costs) else 0.0,
            tuple(Held(run.finished[unit].file, run.finished[unit].sha256) for unit in of_layer),
        )
        for layer, line, told, cost, of_layer in zip(
            range(walk.first, walk.layers), lines, facts, costs, gradients, strict=True
        )
    }
    settings = walk.settings
    record = FisherRecord(CalibrationRecord.of(tokens), settings.draws, settings.seed, facts[-1]["labels"])
    for path in sorted(run.partial.glob("states-*")):
        with stopping(path):
            path.unlink()
    plain = Fisher(run.out, record, layers, json.loads(json.dumps(identity))).as_plain()
    write_file_durably(run.path(FACTS_NAME), (json.dumps(plain, indent=2) + "\n").encode())
    run.publish(units + [unit for of_layer in gradients for unit in of_layer])
