"""The Fisher matrices that a walk back has left in a folder: what was measured, and what they were made of."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimoquant.calibration.tokens import CalibrationRecord
from mimoquant.checkpoint.journal import file_sha256
from mimoquant.errors import CheckpointError
from mimoquant.fisher.kept import read_values

FACTS_NAME = "fisher.json"
_READERS = 4  # files at once: one is hashed by one thread


@dataclass(frozen=True, slots=True)
class Held:
    """A file of the folder, and what it was written with."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class LayerFisher:
    """One layer's matrix F = E[g gᵀ], g = ∂ log p(y|x) / ∂(output of the layer), in facts.

    An error δ of a layer's output costs ½ E[δᵀ F δ] nats a token, to second order. `effective_rank`: tr(F)² / tr(F²).
    `output`: mean squared norm of what the layer's experts add to a token; None for a dense layer. `share`: of what it
    would cost if the experts of every layer erred by the same relative amount in every direction; 0 for a dense layer.
    `gradients`: the g themselves, a file for each portion of the tokens.
    """

    layer: int
    file: str
    sha256: str
    trace: float
    effective_rank: float
    output: float | None
    share: float
    gradients: tuple[Held, ...]


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
                {layer["layer"]: _layer(layer) for layer in held["layers"]},
                held["identity"],
            )
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: is damaged") from error

    def load(self, layer: int, device: str = "cpu") -> Tensor:
        """F of a layer, float32 [H, H]. Raises CheckpointError where the file is not the one that was written."""
        facts = self.layers[layer]
        return self._read(Held(facts.file, facts.sha256)).to(device)

    def gradients(self, layer: int, device: str = "cpu") -> Tensor:
        """The g of a layer, bfloat16 [D, S, T, H] of draws and the sequences that were walked back. Raises
        CheckpointError where a file is not the one that was written."""
        with ThreadPoolExecutor(_READERS) as pool:
            return torch.cat([part.to(device) for part in pool.map(self._read, self.layers[layer].gradients)], dim=1)

    def _read(self, held: Held) -> Tensor:
        path = self.folder / Path(held.file).name
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if digest != held.sha256:
            raise CheckpointError(f"{path}: has the sha256 {digest[:16]}, was written with {held.sha256[:16]}")
        return read_values(path)

    def as_plain(self) -> dict[str, Any]:
        """The inverse of `open`."""
        layers = [asdict(self.layers[layer]) for layer in sorted(self.layers)]
        return {"record": self.record.as_plain(), "layers": layers, "identity": self.identity}


def _layer(plain: dict[str, Any]) -> LayerFisher:
    return LayerFisher(**plain | {"gradients": tuple(Held(**held) for held in plain["gradients"])})
