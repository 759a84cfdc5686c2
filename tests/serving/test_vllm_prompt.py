"""A whole prompt with images and sounds: vLLM's omni model and our forward give the same log-probabilities.

`vllm_prompt.py` says what of vLLM runs. `scripts/test_engines` makes vLLM's environment and runs this. Left out: the
speech tokenizer, video, a GPU's kernels, 4-bit experts (`test_vllm_cpu` has those).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import HEAD, PYTHON, with_remote_code
from micro import edit_json
from omni import VOCAB
from padded_twin import padded_twin
from PIL import Image
from safetensors.torch import load_file, save_file
from small_omni import CODEBOOKS, CODES, readable_omni

from mimoquant.calibration.tokens import TokenSet, load_tokens
from mimoquant.checkpoint.reader import CheckpointReader
from mimoquant.evaluation.eval_kl import open_layout
from mimoquant.evaluation.side_by_side import final_hidden, streams_of
from mimoquant.model.decoder_layer import linear
from mimoquant.model.layer_stream import walk
from mimoquant.model.media import Medium, Picture, Sound
from mimoquant.serving.check import check
from mimoquant.serving.served import read_served
from mimoquant.weights.decoded import CheckpointWeights

pytestmark = pytest.mark.engine
TOKENS = 180
NOISE = 1e-4  # float32 on both sides; log-probabilities
COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # vLLM's, whatever a model says
SIZES = ((40, 56), (30, 45))  # height, width: whole tokens, and what has to be resized


def omni_twin(base: Path) -> Path:
    """The small omni checkpoint with text layers in bf16 and heads that vLLM's attention takes; towers as they are."""
    source = readable_omni(base / "source")
    twin = padded_twin(source, base / "twin", HEAD)
    towers = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    prefixes = ("visual.", "audio_encoder.", "speech_embeddings.")
    tensors = load_file(twin / "model.safetensors") | {n: t for n, t in towers.items() if n.startswith(prefixes)}
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    for name in ("chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(source / name, twin)
    edit_json(twin / "preprocessor_config.json", lambda held: held.update(COLOURS))
    edit_json(twin / "config.json", lambda held: held.update(architectures=["MiMoV2ForCausalLM"], model_type="mimo_v2"))
    return with_remote_code(twin)


def write_chat(folder: Path) -> Path:
    """Text, an image, text, a sound, an image, and an answer."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
    np.save(folder / "codes.npy", draw.integers(0, CODES, (13, CODEBOOKS)))
    parts = [
        {"type": "text", "text": "First look at this drawing of the harbour: "},
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": "Then listen to "},
        {"type": "audio", "audio": "codes.npy"},
        {"type": "image", "image": "1.png"},
        {"type": "text", "text": "What do they have in common, and what not?"},
    ]
    answer = {"role": "assistant", "content": "Both were made at random. " * 12}
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}, answer]}) + "\n")
    return folder / "chat.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A prompt as our own reader makes it, our log-probabilities [tokens - 1, V], and what vLLM answered."""

    tokens: TokenSet
    ours: np.ndarray
    ids: np.ndarray
    theirs: np.ndarray


@dataclass(frozen=True)
class Asked:
    """What vLLM is given; `tokens`: the prompt as our own reader makes it."""

    base: Path
    tokens: TokenSet

    @property
    def checkpoint(self) -> Path:
        return self.base / "twin"

    def by_vllm(self, **loader: bool) -> subprocess.CompletedProcess[str]:
        """Writes out.npz. Each medium has one placeholder: vLLM makes as many of it as it takes tokens."""
        (row,), (media,) = self.tokens.ids.tolist(), self.tokens.media
        more = {placed.start + place for placed in media for place in range(1, placed.tokens)}
        data = self.base / "data"
        job = {
            "checkpoint": str(self.checkpoint),
            "loader": loader,
            "ids": [token for place, token in enumerate(row) if place not in more],
            "images": [str(data / f"{number}.png") for number in range(len(SIZES))],
            "codes": [str(data / "codes.npy")],
            "out": str(self.base / "out.npz"),
        }
        (self.base / "job.json").write_text(json.dumps(job))
        return subprocess.run(
            [PYTHON, Path(__file__).with_name("vllm_prompt.py"), self.base / "job.json"],
            cwd=self.base,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    base = tmp_path_factory.mktemp("prompt")
    twin, data = omni_twin(base), write_chat(base / "data")
    tokens = load_tokens([str(data)], twin, sequences=1, tokens=TOKENS, vocab=VOCAB, takes_media=True)
    assert [type(placed.medium).__name__ for placed in tokens.media[0]] == ["PictureFile", "Sound", "PictureFile"]
    return Asked(base, tokens)


@pytest.fixture(scope="module")
def prompt(asked: Asked) -> Prompt:
    done = asked.by_vllm(enable_weights_track=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    ours = log_probabilities(asked.checkpoint, asked.tokens)
    with np.load(asked.base / "out.npz") as answer:
        return Prompt(asked.tokens, ours, answer["ids"], answer["log_p"].astype(np.float64))


@torch.no_grad()
def log_probabilities(folder: Path, tokens: TokenSet) -> np.ndarray:
    layout = open_layout(folder)
    with CheckpointReader(layout.index) as reader:
        weights = CheckpointWeights(reader, layout, torch.device("cpu"))
        [stream] = streams_of(weights, [[torch.from_numpy(tokens.walked)]], tokens.media)
        walk([stream])
        logits = linear(final_hidden(stream, weights.tensor("model.norm.weight")), weights.tensor("lm_head.weight"))
        return logits.log_softmax(-1).numpy().astype(np.float64)


def test_media_stand_at_the_same_places(prompt: Prompt) -> None:
    assert prompt.ids.tolist() == prompt.tokens.ids[0].tolist()


def test_log_probabilities_are_vllms(prompt: Prompt) -> None:
    found = np.abs(prompt.ours - prompt.theirs)
    print(f"\nmax |dlogp| {found.max():.1e}, mean {found.mean():.1e}, over {found.shape}")
    assert found.max() < NOISE


def test_what_media_are_makes_far_more_of_a_difference(prompt: Prompt, asked: Asked) -> None:
    """So the comparison would see a medium that went wrong: each, turned round, changes all that follows it."""
    for number, placed in enumerate(prompt.tokens.media[0]):
        media = list(prompt.tokens.media[0])
        media[number] = placed._replace(medium=turned(placed.medium))
        other = log_probabilities(asked.checkpoint, replace(prompt.tokens, media=(tuple(media),)))
        changed = np.abs(other - prompt.theirs).max(1)
        assert changed[: placed.start - 1].max(initial=0.0) < NOISE
        assert changed[placed.start + placed.tokens :].min() > NOISE, number


def test_a_plain_checkpoint_with_an_audio_tower_stops_vllm_as_we_say(asked: Asked) -> None:
    [problem] = [p for p in check(read_served(asked.checkpoint), "vllm", "0.32.0", 1) if p.fails]
    assert problem.verdict == "refused" and "embed_tokens" in problem.text
    done = asked.by_vllm()
    assert done.returncode and "not initialized from checkpoint: {'audio_encoder.input_local_transformer" in done.stderr


def turned(medium: Medium) -> Medium:
    """The same size, other contents."""
    if isinstance(medium, Sound):
        return Sound(medium.codes[::-1].copy())
    assert isinstance(medium, Picture)
    return Picture(-medium.patches, medium.grid)
