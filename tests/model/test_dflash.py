"""DFlash drafters: the forward against one written apart, what is refused, and which backbone a drafter fits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import dflash_reference as apart
import numpy as np
import pytest
import torch
from dflash_reference import changed, small, write_drafter

import mimoquant
from mimoquant.checkpoint.index import read_json_inside
from mimoquant.errors import CheckpointError, UsageError
from mimoquant.model.dflash import draft_blocks, fuse
from mimoquant.model.drafter import open_drafter, read_drafter
from mimoquant.model.geometry import Geometry, read_geometry
from mimoquant.weights.decoded import read_drafter_weights

SLIDING = {"layer_types": ["sliding_attention"] * 2, "is_causal": False, "use_sliding_window": True}
KINDS: dict[str, dict[str, Any]] = {
    "as published": small(),
    "as V2.6 has it": small({"use_swa": None, "swa_window_size": None}, **SLIDING),
    "no window, no sinks, whole heads turned": small(
        {"use_swa": None, "attention_sink_bias": None, "attention_value_scale": None}, partial_rotary_factor=None
    ),
}


def backbone(**values: Any) -> Geometry:
    geometry = read_geometry(read_json_inside(mimoquant.micro_checkpoint(), "config.json"), "here")
    return replace(geometry, **values)


def drafted(folder: Path, captured: torch.Tensor, embedded: torch.Tensor, mask: torch.Tensor, starts: Any) -> Any:
    """captured: of each layer [B, T, H]."""
    drafter, index = open_drafter(folder)
    weights = read_drafter_weights(drafter, index, torch.device("cpu"))
    fused: Any = sum(fuse(layer, place, weights) for place, layer in enumerate(captured))
    return draft_blocks(fused, embedded, mask, weights, drafter, torch.as_tensor(starts))


def inputs(layers: int = 3, tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(layers, 2, tokens, 256, generator=generator),
        torch.randn(2, tokens, 256, generator=generator),
        torch.randn(256, generator=generator),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_equals_one_written_apart_in_float64(kind: str, tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, KINDS[kind])
    captured, embedded, mask = inputs()
    starts = [0, 3, 11]
    ours, judge = drafted(folder, captured, embedded, mask, starts), apart.Reference(folder)
    assert ours.shape == (2, 3, 4, 256)
    for sequence in range(2):
        for at, start in enumerate(starts):
            layers = [layer.double().numpy() for layer in captured[:, sequence]]
            anchor = embedded[sequence, start + 1].double().numpy()
            expected = judge.draft(layers, anchor, mask.double().numpy(), start)
            assert np.abs(ours[sequence, at].numpy() - expected).max() < 1e-4


def test_a_block_sees_nothing_of_the_text_after_its_first_token(tmp_path: Path) -> None:
    folder = write_drafter(tmp_path, small())
    captured, embedded, mask = inputs()
    before = drafted(folder, captured, embedded, mask, [4, 9])
    captured[:, :, 5:], embedded[:, 6:] = 7.0, -3.0
    after = drafted(folder, captured, embedded, mask, [4, 9])
    assert (before[:, 0] - after[:, 0]).abs().max() < 1e-5 < (before[:, 1] - after[:, 1]).abs().max()


def test_chunks_of_starts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, given = write_drafter(tmp_path, small()), inputs()
    whole = drafted(folder, *given, range(12))
    monkeypatch.setattr("mimoquant.model.dflash._ROWS", 2 * 5 * 5)
    assert (drafted(folder, *given, range(12)) - whole).abs().max() < 1e-5


def test_the_mask_embedding_is_read_as_it_is_published(tmp_path: Path) -> None:
    drafter, index = open_drafter(write_drafter(tmp_path, small()))
    held = read_drafter_weights(drafter, index, torch.device("cpu")).mask
    assert held is not None and torch.equal(held, torch.load(tmp_path / "mask_embedding.pt")["embedding"])
    bad: tuple[Any, ...] = (
        {"mask_token_id": 7, "embedding": torch.ones(256)},
        {"mask_token_id": 211, "embedding": torch.ones(8)},
        {"mask_token_id": 211, "embedding": torch.ones(256), "per_position": True},
        {"mask_token_id": 211},
        torch.ones(256),
        Path("a class of its own, which nothing here makes"),
    )
    for value in bad:
        torch.save(value, tmp_path / "mask_embedding.pt")
        with pytest.raises(CheckpointError, match=r"mask_embedding\.pt: "):
            read_drafter_weights(drafter, index, torch.device("cpu"))
    (tmp_path / "mask_embedding.pt").unlink()
    assert read_drafter_weights(drafter, index, torch.device("cpu")).mask is None


def test_the_published_drafters_sizes(shared: Path) -> None:
    """Of MiMo-V2.5-DFlash: 63 tensors, and the bytes of its file but the header."""
    drafter = read_drafter(changed(), Path("dflash"))
    size_bytes = 2 * sum(math.prod(shape) for shape in drafter.shapes().values())
    lock = json.loads((shared / "fixtures/prismwing/dflash-model.lock.json").read_text())
    (file_bytes,) = (f["bytes"] for f in lock["files"] if f["path"] == "dflash/dflash_draft_model.safetensors")
    assert len(drafter.shapes()) == 63 and 0 < file_bytes - size_bytes < 8000
    assert (drafter.depth, drafter.rotary_dim, drafter.window, drafter.windows_by_layer_types) == (7, 64, 1024, False)
    published = read_geometry(read_json_inside(shared / "mimo/MiMo-V2.5", "config.json"), "V2.5")
    assert drafter.misfit(published) is None
    assert drafter.misfit(read_geometry(read_json_inside(shared / "mimo/MiMo-V2.5-Pro", "config.json"), "Pro"))


REFUSED = [
    ({"dflash_config": None}, "has no dflash_config"),
    ({"architectures": ["LiLiCorrDraftModel"]}, "known is ['DFlashDraftModel']"),
    ({"model_type": "llama"}, "model_type is 'llama', known is 'qwen3'"),
    ({"is_causal": True}, "is_causal is True, known is False or absent"),
    ({"hidden_act": "swigluoai"}, "hidden_act is 'swigluoai'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "known: the default type"),
    ({"num_hidden_layers": 2**30}, "more than any drafter has (256)"),
    ({"partial_rotary_factor": 0.42}, "5 of them turned"),
    ({"target_hidden_size": 4096}, "target_hidden_size is 4096, known is absent or 256"),
    ({"draft_vocab_size": 32}, "draft_vocab_size is 32"),
    ({"layer_types": ["sliding_attention"] * 2}, "without is_causal are causal to engines"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "known is one of"),
    ({"layer_types": ["full_attention"]}, "known is one of"),
    (SLIDING | {"use_sliding_window": None}, "so engines find no window"),
    ({"sliding_window": 8}, "swa_window_size is 7, sliding_window beside it 8"),
    ({"block_size": 6}, "block_size is 5, block_size beside it 6"),
    ({"num_attention_heads": 3}, "is no attention known here"),
    ({"v_head_dim": 8}, "is no attention known here"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
    ({"hidden_size": "256"}, "hidden_size is '256'"),
    ({"num_hidden_layers": 2.5}, "expected a whole number"),
]
REFUSED_DFLASH = [
    ({"conv_kernel_size": 4}, "dflash_config.conv_kernel_size is not known"),
    ({"causal": True}, "dflash_config.causal is True"),
    ({"target_layer_ids": [3, 0]}, "[3, 0] do not rise"),
    ({"target_layer_ids": []}, "expected layers of the backbone"),
    ({"target_layer_ids": None}, "target_layer_ids is None"),
    ({"mask_token_id": None}, "mask_token_id is None"),
    ({"swa_window_size": None, "block_size": 1}, "block_size"),
    ({"num_target_layers": 6}, "num_target_layers is 6, num_target_layers beside it 5"),
]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        *((small(**change), told) for change, told in REFUSED),
        *((small(change), told) for change, told in REFUSED_DFLASH),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_drafter(config, Path("drafter"))
    assert told in str(error.value) and str(error.value).startswith("drafter/config.json: ")


def test_a_drafter_that_does_not_fit_says_both_numbers() -> None:
    drafter = read_drafter(small(), Path("drafter"))
    assert drafter.misfit(backbone()) is None
    assert drafter.misfit(backbone(vocab=2048)) is None  # the head's further rows are padding, as beside V2.5-Pro
    cases = [
        (drafter, backbone(hidden=128), "its hidden_size is 256, the backbone's is 128"),
        (drafter, backbone(layers=6), "its num_target_layers is 5, the backbone's is 6"),
        (replace(drafter, target_layers=None), backbone(layers=4), "it captures layer 4, the backbone's 4 end at 3"),
        (drafter, backbone(vocab=1000), "its vocab_size is 1024, the backbone's is 1000"),
        (replace(drafter, mask_token=1024), backbone(), "its mask token is 1024, the backbone's vocab_size is 1024"),
    ]
    for one, beside, told in cases:
        with pytest.raises(CheckpointError, match=r"^drafter: does not fit the backbone OUT: ") as error:
            one.check_fits(beside, "OUT")
        assert str(error.value).endswith(told)


def test_tensors_are_those_of_the_config(tmp_path: Path) -> None:
    write_drafter(tmp_path / "ok", small())
    cases = [
        (small({"attention_sink_bias": None}), "the tensor layers.0.self_attn.attention_sink_bias is unknown"),
        (small(num_hidden_layers=3), "the tensor layers.2.input_layernorm.weight is missing"),
        (small(intermediate_size=48), r"mlp.down_proj.weight is BF16\[256, 40\], expected is BF16\[256, 48\]"),
    ]
    for config, told in cases:
        (tmp_path / "ok" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=told):
            open_drafter(tmp_path / "ok")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        open_drafter(tmp_path)
