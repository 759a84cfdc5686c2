"""The remote code that a checkpoint of model_type `mimo_v2` brings along: transformers has no class for it."""

from transformers import PretrainedConfig


class MiMoV2Config(PretrainedConfig):
    model_type = "mimo_v2"
