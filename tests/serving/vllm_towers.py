"""Give pictures and codes of sounds to vLLM's own towers on a CPU. Runs in vLLM's own environment, not in ours.

    python vllm_towers.py JOB.json     {"checkpoint": folder, "media": file, "out": file}

`media`, `out`: safetensors. There `picture N` [n, C * T * P * P], `grid N` [3] and `codes N` [frames, codebooks]; here
what the towers make of each, `picture N` and `sound N` [tokens, width], float32, and besides `picture N, LayerNorm`
with the norm of the published code before the merger, in whose place vLLM has an RMSNorm.

vLLM's own are the modules, their arithmetic and the loading of their weights; see also `omni_on_cpu`. Left out is the
making of codes from a waveform.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import omni_on_cpu  # noqa: F401  (before vLLM's models)
import torch
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.models.mimo_audio import MimoAudioEncoder
from vllm.model_executor.models.mimo_v2_omni import MiMoVisionTransformer
from vllm.transformers_utils.configs.mimo_v2_omni import Mimo_VLVisionConfig


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The towers' tensors, in float32."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: load_file(checkpoint / name) for name in sorted(set(index.values()))}
    prefixes = ("visual.", "audio_encoder.", "speech_embeddings.")
    return {name: held[file][name].float() for name, file in index.items() if name.startswith(prefixes)}


def vision(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> MiMoVisionTransformer:
    tower = MiMoVisionTransformer(Mimo_VLVisionConfig(**config))
    mine = {name.removeprefix("visual."): t for name, t in tensors.items() if name.startswith("visual.")}
    loaded = tower.load_weights(mine.items())
    assert loaded == {name for name, _ in tower.named_parameters()}, "vLLM left parameters without values"
    for module in tower.modules():
        if method := getattr(module, "quant_method", None):
            method.process_weights_after_loading(module)
    return tower


def audio(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> MimoAudioEncoder:
    tower = MimoAudioEncoder(config)
    mine = {n.removeprefix("audio_encoder."): t for n, t in tensors.items() if not n.startswith("visual.")}
    missing, unexpected = tower.load_state_dict(mine, strict=False)
    assert (missing, unexpected) == (["input_local_transformer.embed_tokens.weight"], []), (missing, unexpected)
    return tower


@torch.no_grad()
def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = json.loads(Path(job["checkpoint"], "config.json").read_text())
    tensors, media = tensors_of(Path(job["checkpoint"])), load_file(job["media"])
    out: dict[str, torch.Tensor] = {}
    rendezvous = f"file://{Path(job['out']).with_suffix('.rendezvous')}"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        initialize_model_parallel(1)
        tower, encoder = vision(config["vision_config"], tensors), audio(config["audio_config"], tensors)
        for name in sorted(name for name in media if name.startswith("picture ")):
            out[name] = tower(media[name], media[name.replace("picture", "grid")][None])
        norm = torch.nn.LayerNorm(len(tower.merger.ln_q.weight), eps=1e-6, bias=False)
        norm.weight, tower.merger.ln_q = torch.nn.Parameter(tower.merger.ln_q.weight.data), norm
        for name in list(out):
            out[f"{name}, LayerNorm"] = tower(media[name], media[name.replace("picture", "grid")][None])
        for name in sorted(name for name in media if name.startswith("codes ")):
            groups = encoder.process_audio(media[name])
            hidden = encoder.apply_input_local_transformer(encoder.apply_speech_embeddings(groups))
            out[name.replace("codes", "sound")] = encoder.projection(hidden.reshape(len(hidden), -1))
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, job["out"])


if __name__ == "__main__":
    main()
