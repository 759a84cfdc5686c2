"""The Fisher matrices that a walk back has left in a folder: what was measured, and what they were made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimoquant.calibration.tokens import CalibrationRecord
from mimoquant.checkpoint.index import open_shard
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.errors import CheckpointError

FACTS_NAME = "fisher.json"


@dataclass(frozen=True, slots=True)
class LayerFisher:
    """One layer's matrix F = E[g gᵀ], g = ∂ log p(y|x) / ∂(output of the layer), in facts.

    An error δ of a layer's output costs ½ E[δᵀ F δ] nats a token, to second order. `effective_rank`: tr(F)² / tr(F²).
    `output`: mean squared norm of what the layer's experts add to a token; None for a dense layer. `share`: of what it
    would cost if the experts of every layer erred by the same relative amount in every direction; 0 for a dense layer.
    """

    layer: int
    file: str
    sha256: str
    trace: float
    effective_rank: float
    output: float | None
    share: float


@dataclass(frozen=True, slots=True)
class FisherRecord:
    """What the matrices were made of: tokens, and the labels drawn at each of their positions."""

    tokens: CalibrationRecord
    draws: int
    seed: int
    labels_sha256: str

    def as_plain(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens.as_plain(),
            "draws": self.draws,
            "seed": self.seed,
            "labels_sha256": self.labels_sha256,
        }


@dataclass(frozen=True)
class Fisher:
    """A finished walk back. `identity`: what a walk must share with it to be the same."""

    folder: Path
    record: FisherRecord
    layers: dict[int, LayerFisher]
    identity: dict[str, Any]

    @property
    def samples(self) -> int:
        """Gradients that each matrix is the second moment of."""
        return len(self.record.tokens.sequences) * int(self.identity["tokens a sequence"]) * self.record.draws

    @staticmethod
    def open(folder: Path) -> Fisher:
        """Raises CheckpointError where the folder is not one that a walk back has finished."""
        path = folder / FACTS_NAME
        try:
            held = json.loads(path.read_bytes())
            record = held["record"]
            tokens = record["tokens"]
            return Fisher(
                folder,
                FisherRecord(
                    CalibrationRecord(
                        tokens["name"], tokens["tokens_sha256"], tuple(tokens["origins"]), tuple(tokens["sequences"])
                    ),
                    record["draws"],
                    record["seed"],
                    record["labels_sha256"],
                ),
                {layer["layer"]: LayerFisher(**layer) for layer in held["layers"]},
                held["identity"],
            )
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is damaged") from error

    def load(self, layer: int, device: str = "cpu") -> Tensor:
        """F of a layer, float32 [H, H]. Raises CheckpointError where the file is not the one that was written."""
        facts = self.layers[layer]
        path = self.folder / Path(facts.file).name
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if digest != facts.sha256:
            raise CheckpointError(f"{path}: has the sha256 {digest[:16]}, was written with {facts.sha256[:16]}")
        with CheckpointReader(open_shard(path)) as reader:
            (name,) = reader.index.tensors
            values = torch.from_numpy(reader.read(name)).view(torch.float32).view(reader.index.tensors[name].shape)
        return values.to(device)

    def as_plain(self) -> dict[str, Any]:
        """The inverse of `open`."""
        layers = [asdict(self.layers[layer]) for layer in sorted(self.layers)]
        return {"record": self.record.as_plain(), "layers": layers, "identity": self.identity}
