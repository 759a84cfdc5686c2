"""Give a prompt with images and codes of sounds to a whole omni model of vLLM on a CPU. Runs in vLLM's own environment.

    python vllm_prompt.py JOB.json
    {"checkpoint": folder, "loader": {}, "ids": [token, ...], "images": [file, ...], "codes": [.npy, ...], "out": file}

`loader`: vLLM's model_loader_extra_config. `ids` have one placeholder for each medium. `out`: an .npz with `ids`, as
vLLM made them longer, and `log_p` float32 [tokens - 1, vocabulary], of the token after each.

vLLM's own are the processor of images, the placing of media among ids, towers, embedding, decoder, loading of weights.
Replaced are what no small checkpoint has, and one thing that is wrong: the speech tokenizer, in whose place a waveform
carries the codes; the RMSNorm before the merger, by the LayerNorm of the published code (`test_vllm_towers` has both).
See also `omni_on_cpu`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import omni_on_cpu  # noqa: F401  (before vLLM's models)
import torch
from PIL import Image
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.model_executor.models import mimo_audio
from vllm.model_executor.models.mimo_v2_omni import MiMoV2OmniForCausalLM, MiMoVisionPatchMerger
from vllm.transformers_utils.processors.mimo_v2_omni import MiMoOmniProcessor, MiMoVLProcessor


def waveform(codes: np.ndarray) -> np.ndarray:
    """Codes as a sound: how many codebooks there are, then the codes."""
    return np.concatenate(([codes.shape[1]], codes.ravel())).astype(np.float32)


def install(group: int) -> None:
    """Have codes go where a spectrogram does, and put the published norm before the merger."""
    merger, encoder = MiMoVisionPatchMerger.__init__, mimo_audio.MimoAudioEncoder.__init__

    def with_layer_norm(self: Any, *args: Any, **kwargs: Any) -> None:
        norm = partial(torch.nn.LayerNorm, eps=1e-6, bias=False)
        merger(self, *args, **kwargs | {"norm_layer": norm})

    def without_tokenizer(self: Any, *args: Any, **kwargs: Any) -> None:
        encoder(self, *args, **kwargs)
        self.audio_tokenizer = SimpleNamespace(encoder=self.projection)  # asked for its device alone

    def codes_of(self: Any, audio: Any) -> tuple[torch.Tensor, int]:
        sound = torch.as_tensor(audio[0])
        codes = sound[1:].reshape(-1, int(sound[0]))
        return codes, -(-len(codes) // group)

    ModelRegistry.register_model("MiMoV2OmniForCausalLM", MiMoV2OmniForCausalLM)  # or a process of its own imports it
    MiMoVisionPatchMerger.__init__ = with_layer_norm
    mimo_audio.MimoAudioEncoder.__init__ = without_tokenizer
    mimo_audio.tokenize_audio_batch = lambda codes, *_, **__: [each.long() for each in codes]
    MiMoVLProcessor.preprocess_audio = codes_of
    MiMoOmniProcessor.video_token = property(lambda self: self.image_token)  # the small vocabulary has none


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = json.loads(Path(job["checkpoint"], "config.json").read_text())
    install(config["audio_config"]["group_size"])
    images = [Image.open(file).convert("RGB") for file in job["images"]]
    sounds = [waveform(np.load(file)) for file in job["codes"]]
    llm = LLM(
        job["checkpoint"],
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=1,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": len(images), "audio": len(sounds), "video": 0},
        skip_mm_profiling=True,
        seed=0,
        model_loader_extra_config=job["loader"],
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
    prompt = {"prompt_token_ids": job["ids"], "multi_modal_data": {"image": images, "audio": sounds}}
    [reply] = llm.generate([prompt], asked, use_tqdm=False)
    told = reply.prompt_logprobs
    rows = np.full((len(reply.prompt_token_ids), llm.llm_engine.model_config.get_vocab_size()), np.nan, np.float32)
    for position, (begin, end) in enumerate(zip(told.start_indices, told.end_indices, strict=True)):
        rows[position, told.token_ids[begin:end]] = told.logprobs[begin:end]
    np.savez(job["out"], ids=reply.prompt_token_ids, log_p=rows[1:])


if __name__ == "__main__":
    main()
