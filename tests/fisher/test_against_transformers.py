"""Gradients and matrices of a whole walk back against automatic differentiation of transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from walks import Seen, opened_weights, some_tokens, walked, watch
from windows import meant_window

import mimoquant
from mimoquant.fisher.matrices import Fisher
from mimoquant.fisher.walk import FisherSettings
from mimoquant.model.decoder_layer import DenseWeights
from mimoquant.model.layout import PROJECTIONS

transformers = pytest.importorskip("transformers", reason="transformers is not installed (scripts/setup --dev)")

DRAWS = 2


def flash_twin(source: Path, folder: Path) -> Path:
    """A checkpoint's decoded weights under the names and in the layout that transformers loads, in bf16."""
    tensors: dict[str, Tensor] = {}
    with opened_weights(source) as weights:
        for name in ("model.embed_tokens", "model.norm", "lm_head"):
            tensors[f"{name}.weight"] = weights.tensor(f"{name}.weight")
        for number in range(weights.layers):
            layer, prefix = weights.layer(number), f"model.layers.{number}."
            tensors[f"{prefix}input_layernorm.weight"] = layer.input_norm
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm
            for letter in "qkvo":
                tensors[f"{prefix}self_attn.{letter}_proj.weight"] = getattr(layer.attention, letter)
            if layer.attention.sink is not None:
                tensors[f"{prefix}self_attn.attention_sink_bias"] = layer.attention.sink
            if isinstance(layer.mlp, DenseWeights):
                for projection in PROJECTIONS:
                    tensors[f"{prefix}mlp.{projection}_proj.weight"] = getattr(layer.mlp, projection)
                continue
            tensors[f"{prefix}mlp.gate.weight"] = layer.mlp.weight
            tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = layer.mlp.bias
            for expert in range(weights.layout.geometry.experts):
                for projection in PROJECTIONS:
                    tensors[f"{prefix}mlp.experts.{expert}.{projection}_proj.weight"] = weights.expert(
                        number, expert, projection
                    )
        config = dict(weights.layout.config)
    config |= {"model_type": "mimo_v2_flash", "architectures": ["MiMoV2FlashForCausalLM"]}
    for key in ("quantization_config", "attention_projection_layout", "dtype"):
        config.pop(key, None)
    folder.mkdir()
    save_file(
        {name: held.contiguous() for name, held in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gradients_of(folder: Path, ids: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """By layer ∂ sum log p(labels) / ∂(output of the layer), [D, N, H], in float32."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        attn_implementation="eager",
        sliding_window=meant_window(folder),
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    model.eval().requires_grad_(False)
    held: dict[int, Tensor] = {}

    def hook(number: int) -> object:
        def keep(module: torch.nn.Module, given: object, out: Tensor | tuple[Tensor, ...]) -> None:
            held[number] = out if isinstance(out, Tensor) else out[0]
            if not held[number].requires_grad:
                held[number].requires_grad_()

        return keep

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(hook(number))
    log_p = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    out: dict[int, list[Tensor]] = {number: [] for number in held}
    for of_draw in labels.view(*ids.shape, -1).unbind(-1):
        total = log_p.gather(-1, of_draw[..., None]).sum()
        grads = torch.autograd.grad(total, list(held.values()), retain_graph=True)
        for number, gradient in zip(held, grads, strict=True):
            out[number].append(gradient.flatten(0, 1))
    return {number: torch.stack(held) for number, held in out.items()}


def compare(fisher: Fisher, seen: Seen, theirs: dict[int, Tensor]) -> None:
    for layer, facts in fisher.layers.items():
        ours, reference = seen.at(layer), theirs[layer]
        assert float((ours - reference).norm() / reference.norm()) < 1e-3
        matrix = torch.einsum("dnh,dnk->hk", reference, reference) / reference.shape[:2].numel()
        assert float((fisher.load(layer) - matrix).norm() / matrix.norm()) < 1e-3
        assert facts.trace == pytest.approx(float(reference.square().sum(-1).mean()), rel=1e-3)
        rank = float(torch.trace(matrix) ** 2 / matrix.square().sum())
        assert facts.effective_rank == pytest.approx(rank, rel=1e-2)


def test_the_micro_checkpoints_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer sequences than the window, every kind of layer, chosen and routed weights, sinks."""
    source = mimoquant.micro_checkpoint()
    tokens, seen = some_tokens(source, 6, 96), watch(monkeypatch)
    fisher = walked(source, tokens, FisherSettings(DRAWS, exact=True), tmp_path / "fisher")
    assert list(fisher.layers) == [1, 2, 3, 4]
    twin = flash_twin(source, tmp_path / "twin")
    compare(fisher, seen, gradients_of(twin, torch.from_numpy(tokens.ids), seen.all_labels()))


@pytest.mark.slow
def test_mimo_tinys_gradients(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shared / "models" / "mimo-tiny"
    tokens, seen = some_tokens(source, 4, 96), watch(monkeypatch)
    fisher = walked(source, tokens, FisherSettings(DRAWS, exact=True), tmp_path / "fisher")
    assert list(fisher.layers) == list(range(1, 8))
    compare(fisher, seen, gradients_of(source, torch.from_numpy(tokens.ids), seen.all_labels()))
