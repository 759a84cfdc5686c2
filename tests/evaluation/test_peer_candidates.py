"""What llm-compressor's `oneshot` saves is a candidate: eval-kl gives J of exactly the weights that are in the file.

Beside it the weights are decoded without our code, by compressed-tensors' own decompress or, for NVFP4, in float32 by
hand, put into the reference's transformers model, and J is computed from its logits. What eval-kl cannot score honestly
is refused: FP8 in another form than ours, experts that share a name but not a format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from windows import meant_window

from mimoquant.calibration.tokens import load_tokens
from mimoquant.errors import CheckpointError
from mimoquant.evaluation.eval_kl import eval_kl, open_layout

needs_peer = pytest.mark.skipif(
    find_spec("llmcompressor") is None, reason="llm-compressor is not installed (scripts/setup --dev)"
)
pytestmark = [pytest.mark.slow, needs_peer]

EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Candidate = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def source(shared: Path) -> Path:
    return shared / "models" / "mimo-tiny"


@pytest.fixture(scope="module")
def candidate(source: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """`candidate(modifier, scheme)`: the experts quantized and saved by the peer, in several files."""

    def make(modifier: str, scheme: str) -> Path:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers import quantization
        from llmcompressor.pipelines.cache import IntermediatesCache
        from llmcompressor.utils import load_context
        from transformers import AutoModelForCausalLM

        with load_context():
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        recipe = getattr(quantization, modifier)(scheme=scheme, targets=[EXPERTS])
        ids = np.load(shared / "bench" / "tiny_calib_ids.npy").astype(np.int64)[:2, :128]
        data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
        calibration = {"dataset": data, "max_seq_length": 128, "num_calibration_samples": 2}
        with pytest.MonkeyPatch.context() as patch:  # it pins memory also where there is no accelerator
            patch.setattr(IntermediatesCache, "pin_memory", lambda self, *rest, **options: None, raising=False)
            oneshot(model=model, recipe=[recipe], **(calibration if modifier == "GPTQModifier" else {}))
        out = tmp_path_factory.mktemp("peer") / scheme
        model.save_pretrained(out, save_compressed=True, max_shard_size="5MB")
        assert len(list(out.glob("*.safetensors"))) > 2
        return out

    return make


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a candidate in float32, without our code."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    tensors = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig(**settings).config_groups.values()
    peer = BaseCompressor.get_value_from_registry(settings["format"])
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(modules) == 7 * 16 * 3
    for module in modules:
        parts = {key: tensors.pop(f"{module}.{key}") for key in PARTS if f"{module}.{key}" in tensors}
        if "weight_global_scale" in parts:
            packed, scale = parts["weight_packed"], parts["weight_scale"].float() / parts["weight_global_scale"]
            values = E2M1[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).long()]
            weight = (values.view(*scale.shape, 16) * scale[..., None]).flatten(1)
        else:
            weight = peer.decompress(parts, scheme)["weight"]
        tensors[f"{module}.weight"] = weight
    return {name: value.float() for name, value in tensors.items()}


PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")


@torch.no_grad()
def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    window = meant_window(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, sliding_window=window).eval()
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits[:, :-1].log_softmax(-1)


def plain_copy(folder: Path, out: Path) -> Path:
    """The candidate as a checkpoint that transformers loads without knowing of any quantization."""
    from safetensors.torch import save_file

    out.mkdir()
    save_file(
        {name: value.contiguous() for name, value in decoded(folder).items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("modifier", "scheme"),
    [
        ("QuantizationModifier", "W4A16"),
        ("GPTQModifier", "W4A16"),
        ("QuantizationModifier", "W4A16_ASYM"),
        ("QuantizationModifier", "MXFP4A16"),
        ("QuantizationModifier", "NVFP4A16"),
    ],
)
def test_j_is_that_of_the_weights_in_the_file(
    source: Path, shared: Path, candidate: Candidate, modifier: str, scheme: str, tmp_path: Path
) -> None:
    out = candidate(modifier, scheme)
    text = shared / "text" / "heldout" / "prose_wikitext2_test.txt.xz"
    tokens = load_tokens([str(text)], source, sequences=2, tokens=128, vocab=8192)
    facts = eval_kl(source, out, tokens, noise_floor=False)
    ids = torch.from_numpy(tokens.ids)
    p, q = log_probabilities(source, ids), log_probabilities(plain_copy(out, tmp_path / "plain"), ids)
    j = float(((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2)
    assert 0.01 < facts["j"]["mean"] == pytest.approx(j, rel=0.01 if scheme == "NVFP4A16" else 1e-4)
    assert [row["layer"] for row in facts["layers"] if row["quantized"]] == list(range(1, 8))


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "FP8_DYNAMIC", "MXFP8"])
def test_fp8_in_the_peers_form_is_refused(candidate: Candidate, scheme: str) -> None:
    """Its scales have the name of ours and another dtype or shape; FP8_BLOCK once gave a J of 6 without a word."""
    with pytest.raises(CheckpointError, match=r"experts.0.gate_proj.weight is F8_E4M3.* with scales "):
        open_layout(candidate("QuantizationModifier", scheme))
