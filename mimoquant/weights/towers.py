"""A checkpoint's towers as weights to compute with, a block at a time.

Key idea: towers are stored like the text model's bf16 tensors and read the same way (`CheckpointWeights.tensor`), once
what they must be has been checked (`model.tower_layout`). Nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mimoquant.model.audio import AudioLayer, Projection, sound_rows
from mimoquant.model.decoder_layer import DenseWeights
from mimoquant.model.layout import PROJECTIONS
from mimoquant.model.media import Medium, Picture, Sound, tokens_of
from mimoquant.model.tower_config import FULL, TowerConfig, read_tower_config
from mimoquant.model.tower_layout import LOCAL, OPTIONAL, check_towers
from mimoquant.model.vision import Affine, Merger, VisionBlock, picture_rows
from mimoquant.weights.decoded import CheckpointWeights


class TowerWeights:
    """The towers of a checkpoint: a `vision.VisionSource` and an `audio.AudioSource`."""

    def __init__(self, weights: CheckpointWeights) -> None:
        """Raises CheckpointError where config.json and tensors do not make towers that are known."""
        layout = weights.layout
        self.weights, self.device = weights, weights.device
        self.config: TowerConfig = read_tower_config(layout.config, f"{layout.index.folder}/config.json")
        check_towers(layout, self.config)
        self._names = layout.index.tensors.keys()

    def patches(self) -> Tensor:
        return self.weights.tensor("visual.patch_embed.proj.weight").flatten(1)

    def vision_block(self, number: int) -> VisionBlock:
        prefix, config = f"visual.blocks.{number}.", self.config.need_vision()
        attention, mlp = f"{prefix}attn.", f"{prefix}mlp."
        return VisionBlock(
            norm1=self.weights.tensor(f"{prefix}norm1.weight"),
            norm2=self.weights.tensor(f"{prefix}norm2.weight"),
            qkv=self._affine(f"{attention}qkv"),
            proj=self._affine(f"{attention}proj"),
            gate=self._affine(f"{mlp}gate_proj"),
            up=self._affine(f"{mlp}up_proj"),
            down=self._affine(f"{mlp}down_proj"),
            sinks=self.weights.tensor(f"{attention}sinks") if config.sinks and config.kinds[number] != FULL else None,
        )

    def merger(self) -> Merger:
        bias = self.weights.tensor(OPTIONAL[0]) if OPTIONAL[0] in self._names else None
        norm = self.weights.tensor("visual.merger.ln_q.weight")
        return Merger(norm, bias, *(self._affine(f"visual.merger.mlp.{place}") for place in (0, 2)))

    def speech_embedding(self, codebook: int) -> Tensor:
        return self.weights.tensor(f"speech_embeddings.{codebook}.weight")

    def audio_layer(self, number: int) -> AudioLayer:
        prefix = f"{LOCAL}layers.{number}."
        q, k, v, o = (self._affine(f"{prefix}self_attn.{letter}_proj") for letter in "qkvo")
        return AudioLayer(
            input_norm=self.weights.tensor(f"{prefix}input_layernorm.weight"),
            post_norm=self.weights.tensor(f"{prefix}post_attention_layernorm.weight"),
            q=q,
            k=k,
            v=v,
            o=o,
            mlp=DenseWeights(*(self.weights.tensor(f"{prefix}mlp.{p}_proj.weight") for p in PROJECTIONS)),
        )

    def projection(self) -> Projection:
        norm = self.weights.tensor(f"{LOCAL}norm.weight") if self.config.need_audio().last_norm else None
        return Projection(norm, *(self._affine(f"audio_encoder.projection.mlp.{place}") for place in (0, 2)))

    def _affine(self, module: str) -> Affine:
        bias = f"{module}.bias"
        return Affine(
            self.weights.tensor(f"{module}.weight"), self.weights.tensor(bias) if bias in self._names else None
        )

    def rows(self, media: Sequence[Medium]) -> list[Tensor]:
        """What stands in the embedding for each picture and sound, [tokens, hidden] float32, on the host.

        Raises CheckpointError for a medium whose tower the model lacks, or that is not as it takes them.
        """
        for medium in media:
            tokens_of(medium, self.config)
        pictures = [place for place, medium in enumerate(media) if isinstance(medium, Picture)]
        sounds = [place for place, medium in enumerate(media) if isinstance(medium, Sound)]
        out: dict[int, Tensor] = {}
        if pictures:
            made = picture_rows([m for m in media if isinstance(m, Picture)], self, self.config.need_vision())
            out |= zip(pictures, made, strict=True)
        if sounds:
            made = sound_rows([m for m in media if isinstance(m, Sound)], self, self.config.need_audio())
            out |= zip(sounds, made, strict=True)
        return [out[place] for place in range(len(media))]
