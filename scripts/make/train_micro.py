"""Train a micro MiMo-V2 language model and write it as a bf16 Hugging Face checkpoint.

What it makes: a model of about six million parameters with every structural trait of the MiMo-V2 "Flash" family at
toy size: full and sliding-window attention side by side (sink logits, scaled values, partial rotary embedding,
unequal key and value widths), a dense first block, sigmoid-routed experts with a correction bias, and three chained
multi-token-prediction (MTP) layers.  The folder it writes loads in transformers as MiMoV2FlashForCausalLM.

How it works, in two steps:

    scripts/make/train_micro.py --prepare data.npz --text DIR   (CPU) trains a byte-level BPE, tokenizes DIR/*.jsonl.xz
    scripts/make/train_micro.py --train data.npz --out FOLDER   (one GPU) trains, writes, reloads, checks and reports

--size takes one of three larger models (about 10, 30 and 120 million parameters; 16, 32 and 64 experts) in its place.

The prepared file holds all that training needs, the tokenizer included.  Each text file belongs to a domain; windows
are drawn at random offsets of a domain that is itself drawn by a fixed weight, so that small domains are repeated more
often than large ones.  Two per cent of the documents of every file are kept back to measure the loss.

The training forward is written for speed at this size: all experts run as two wide matrix products and the router
sets the share of those not chosen to zero.  That is the same function as a sparse dispatch, and the script proves it
on the written files: it reloads them into transformers' own class and compares fp32 logits.

MTP layer k reads position t of the previous hidden state (the trunk's after its last norm, or the previous MTP
layer's after its final_layernorm) and the embedding of token t+k, and predicts token t+k+1 through the shared head.

A fixed seed fixes the data order and the start; when --time-limit ends a run before --steps do, the schedule follows
the clock, and two runs differ by a few steps.

What is left out: attention masks between packed documents, dropout, a KV cache, tensor parallelism, resuming.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# File name prefix -> share of the training windows.  Files that no prefix matches are not used.
DOMAIN_SHARES = {
    "prose_en": 0.10,
    "prose_fra": 0.06,
    "prose_deu": 0.06,
    "code": 0.10,
    "chat": 0.10,
    "instruct": 0.08,
    "math": 0.09,
    "docs": 0.24,
    "tools": 0.12,
    "zh": 0.05,
}
MTP_DEPTH = 3
HELD_OUT_SHARE = 0.02


# --------------------------------------------------------------------------------------------------------------------
# Architecture
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The numbers that fix the architecture; the defaults are the micro model's."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    swa_num_key_value_heads: int = 4
    head_dim: int = 48
    v_head_dim: int = 32
    sliding_window: int = 64
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    max_position_embeddings: int = 2048
    rope_theta: float = 5e6
    swa_rope_theta: float = 1e4
    partial_rotary_factor: float = 0.334
    attention_value_scale: float = 0.707
    layernorm_epsilon: float = 1e-5
    hybrid_layer_pattern: tuple[int, ...] = (0, 1, 1, 0, 1)
    moe_layer_freq: tuple[int, ...] = (0, 1, 1, 1, 1)

    @classmethod
    def read(cls, folder: Path) -> Sizes:
        """Take the sizes from a checkpoint's config.json."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values: dict[str, Any] = {name: config[name] for name in cls.__dataclass_fields__}
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)


# Of growing width, depth and experts; `scripts/bench/growth.py` asks whether what is measured on the smallest holds on
# the others.
SIZES = {
    "micro": Sizes(),
    "10m": Sizes(n_routed_experts=16),
    "30m": Sizes(
        hidden_size=384,
        intermediate_size=512,
        num_attention_heads=8,
        n_routed_experts=32,
        num_experts_per_tok=4,
        hybrid_layer_pattern=(0, 1, 1, 0, 1, 1),
        moe_layer_freq=(0, 1, 1, 1, 1, 1),
    ),
    "120m": Sizes(
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        swa_num_key_value_heads=8,
        n_routed_experts=64,
        num_experts_per_tok=6,
        hybrid_layer_pattern=(0, 1, 1, 0, 1, 1, 0, 1, 1),
        moe_layer_freq=(0, 1, 1, 1, 1, 1, 1, 1, 1),
    ),
}


class Norm(nn.Module):
    """RMS norm, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotary_table(sizes: Sizes, sliding: bool, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, rotary width] of the rotary embedding of one kind of layer."""
    width = int(sizes.head_dim * sizes.partial_rotary_factor)
    theta = sizes.swa_rope_theta if sliding else sizes.rope_theta
    rate = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width))
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rate
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to the leading part of each head's width; the result keeps x's dtype."""
    width = cos.shape[-1]
    turned, kept = x[..., :width].float(), x[..., width:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), kept), dim=-1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys with one extra sink logit a head; tensors are [B, heads, T, D].

    Queries are cut into blocks of one window; each block sees its own keys and those of the block before it.
    """
    batch, heads, length, _ = q.shape

    def blocks(x: Tensor) -> Tensor:
        return x.reshape(batch, heads, length // window, window, x.shape[-1])

    def with_previous(x: Tensor) -> Tensor:
        own = blocks(x)
        return torch.cat((F.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1], own), dim=-2)

    scores = (blocks(q) @ with_previous(k).transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    row = torch.arange(window, device=q.device)[:, None] + window
    column = torch.arange(2 * window, device=q.device)[None, :]
    seen = (column <= row) & (column > row - window)
    first = torch.arange(length // window, device=q.device)[:, None, None] == 0
    seen = seen & ~(first & (column < window))
    scores = scores.masked_fill(~seen, float("-inf"))
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sink.float().view(1, heads, 1, 1, 1))
    mixed: Tensor = (scores - total).exp().to(v.dtype) @ with_previous(v)
    return mixed.reshape(batch, heads, length, v.shape[-1])


class Attention(nn.Module):
    """Full causal attention, or sliding-window attention with sinks."""

    def __init__(self, sizes: Sizes, sliding: bool) -> None:
        super().__init__()
        self.sizes, self.sliding = sizes, sliding
        heads = sizes.num_attention_heads
        groups = sizes.swa_num_key_value_heads if sliding else sizes.num_key_value_heads
        self.q_proj = nn.Linear(sizes.hidden_size, heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(sizes.hidden_size, groups * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(sizes.hidden_size, groups * sizes.v_head_dim, bias=False)
        self.o_proj = nn.Linear(heads * sizes.v_head_dim, sizes.hidden_size, bias=False)
        if sliding:
            self.attention_sink_bias = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        """Mix the positions of x [B, T, H]; T must be a multiple of the window."""
        batch, length, _ = x.shape
        cos, sin = tables[self.sliding]

        def split(y: Tensor, width: int) -> Tensor:
            return y.view(batch, length, -1, width).transpose(1, 2)

        q = rotate(split(self.q_proj(x), self.sizes.head_dim), cos, sin)
        k = rotate(split(self.k_proj(x), self.sizes.head_dim), cos, sin)
        v = split(self.v_proj(x), self.sizes.v_head_dim) * self.sizes.attention_value_scale
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if self.sliding:
            mixed = window_attention(q, k, v, self.attention_sink_bias, self.sizes.sliding_window)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class DenseMlp(nn.Module):
    """Gated SiLU MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x through the MLP."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Sigmoid scores in fp32; the correction bias takes part in the choice of experts only."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.top_k = sizes.num_experts_per_tok
        self.weight = nn.Parameter(torch.zeros(sizes.n_routed_experts, sizes.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(sizes.n_routed_experts))
        self.register_buffer("load", torch.zeros(sizes.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weights [tokens, experts], zero for experts not chosen; counts the choices in `load`."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
            with torch.no_grad():
                chosen = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
                mask = torch.zeros_like(scores).scatter_(1, chosen, 1.0)
                self.load += mask.sum(0)
            weights = scores * mask
            return weights / (weights.sum(-1, keepdim=True) + 1e-20)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Move the bias of overloaded experts down and of the others up by one fixed step; forget the counts."""
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Experts(nn.Module):
    """The experts' weights, stacked: gate rows above up rows in `gate_up`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        count, inner, hidden = sizes.n_routed_experts, sizes.moe_intermediate_size, sizes.hidden_size
        self.gate_up = nn.Parameter(torch.zeros(count, 2 * inner, hidden))
        self.down = nn.Parameter(torch.zeros(count, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run every expert on every token and add the results with the router's weights."""
        count, double, hidden = self.gate_up.shape
        both = F.linear(x, self.gate_up.reshape(count * double, hidden)).view(-1, count, double)
        gate, up = both.chunk(2, dim=-1)
        inner = F.silu(gate) * up * weights[:, :, None].to(both.dtype)
        return F.linear(inner.flatten(1), self.down.permute(1, 0, 2).reshape(hidden, -1))


class SparseMlp(nn.Module):
    """Router and experts."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = Router(sizes)
        self.experts = Experts(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, H] through the chosen experts."""
        flat = x.flatten(0, 1)
        out: Tensor = self.experts(flat, self.gate(flat))
        return out.view_as(x)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, sizes: Sizes, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(sizes.hidden_size, sizes.layernorm_epsilon)
        self.self_attn = Attention(sizes, sliding=bool(sizes.hybrid_layer_pattern[index]))
        self.post_attention_layernorm = Norm(sizes.hidden_size, sizes.layernorm_epsilon)
        self.mlp = SparseMlp(sizes) if sizes.moe_layer_freq[index] else DenseMlp(sizes)

    def forward(self, x: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        """Add attention and MLP to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), tables)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class MtpBlock(nn.Module):
    """One multi-token-prediction layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, eps = sizes.hidden_size, sizes.layernorm_epsilon
        self.enorm, self.hnorm = Norm(hidden, eps), Norm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm = Norm(hidden, eps)
        self.self_attn = Attention(sizes, sliding=True)
        self.pre_mlp_layernorm = Norm(hidden, eps)
        self.mlp = DenseMlp(sizes)
        self.final_layernorm = Norm(hidden, eps)

    def forward(self, hidden: Tensor, embedded: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        """Join the previous hidden state with the embedding of the token that follows it."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)).float()
        x = x + self.self_attn(self.input_layernorm(x), tables)
        x = x + self.mlp(self.pre_mlp_layernorm(x))
        out: Tensor = self.final_layernorm(x)
        return out


class Trunk(nn.Module):
    """Everything below the output head, named as in the checkpoint."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Block(sizes, index) for index in range(len(sizes.hybrid_layer_pattern)))
        self.norm = Norm(sizes.hidden_size, sizes.layernorm_epsilon)
        self.mtp = nn.ModuleDict({"layers": nn.ModuleList(MtpBlock(sizes) for _ in range(MTP_DEPTH))})


class MicroModel(nn.Module):
    """The language model with its MTP layers."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Trunk(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def routers(self) -> dict[int, Router]:
        """The routers by layer index."""
        mlps = {index: layer.get_submodule("mlp") for index, layer in enumerate(self.model.layers)}
        return {index: mlp.gate for index, mlp in mlps.items() if isinstance(mlp, SparseMlp)}

    def tables(self, length: int, device: torch.device) -> dict[bool, tuple[Tensor, Tensor]]:
        """Rotary tables of full (False) and sliding (True) layers."""
        return {sliding: rotary_table(self.sizes, sliding, length, device) for sliding in (False, True)}

    def trunk(self, x: Tensor, tables: dict[bool, tuple[Tensor, Tensor]]) -> Tensor:
        """Embedded tokens [B, T, H] through all layers and the last norm."""
        for layer in self.model.layers:
            x = layer(x, tables)
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Output logits, in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.lm_head.weight)

    def forward(self, tokens: Tensor, length: int) -> list[Tensor]:
        """Logits of the trunk and of each MTP depth for the first `length` positions.

        `tokens` holds MTP_DEPTH tokens more than `length`, or just `length`: then only the trunk's logits come back.
        """
        tables = self.tables(length, tokens.device)
        embedded = self.model.embed_tokens(tokens)
        hidden = self.trunk(embedded[:, :length], tables)
        out = [self.logits(hidden)]
        if tokens.shape[1] < length + MTP_DEPTH:
            return out
        for depth, layer in enumerate(self.model.mtp.get_submodule("layers").children(), start=1):
            hidden = layer(hidden, embedded[:, depth : depth + length], tables)
            out.append(self.logits(hidden))
        return out


def initialize(model: MicroModel, std: float = 0.04) -> None:
    """Normal weights; the projections that write to the residual stream start smaller."""
    shrink = (2 * len(model.sizes.hybrid_layer_pattern)) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
            nn.init.normal_(parameter, std=std * shrink if writes else std)


# --------------------------------------------------------------------------------------------------------------------
# Text to tokens
# --------------------------------------------------------------------------------------------------------------------


def read_documents(folder: Path) -> dict[str, list[str]]:
    """Texts by domain from folder/*.jsonl.xz, each with a "text" field; empty texts are dropped."""
    domains: dict[str, list[str]] = {name: [] for name in DOMAIN_SHARES}
    for path in sorted(folder.glob("*.jsonl.xz")):
        name = next((prefix for prefix in DOMAIN_SHARES if path.name.startswith(prefix)), None)
        if name is None:
            continue
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            texts = [str(json.loads(line)["text"]).replace("\r\n", "\n") for line in lines]
        domains[name] += [text for text in texts if text.strip()]
    if not all(domains.values()):
        raise SystemExit(f"no text for: {', '.join(name for name, texts in domains.items() if not texts)}")
    return domains


def take_bytes(texts: list[str], budget: int) -> Iterator[str]:
    """Pieces of texts, cut at paragraphs, until the budget is used up."""
    for text in texts:
        for piece in text.split("\n\n"):
            if budget <= 0:
                return
            budget -= len(piece.encode())
            yield piece + "\n\n"


def train_tokenizer(domains: dict[str, list[str]], vocab_size: int, sample_bytes: int) -> Any:
    """Byte-level BPE, trained on a sample in the domains' shares; digits stay single."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = (p for name, share in DOMAIN_SHARES.items() for p in take_bytes(domains[name], int(sample_bytes * share)))
    tokenizer.train_from_iterator(sample, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {vocab_size}")
    return tokenizer


def token_byte_counts(tokenizer: Any) -> npt.NDArray[np.uint8]:
    """How many bytes of text each entry stands for; the document separator stands for none."""
    size = tokenizer.get_vocab_size()
    counts = [len(tokenizer.id_to_token(index)) for index in range(size)]
    return np.array([0, *counts[1:]], dtype=np.uint8)


def encode(tokenizer: Any, texts: list[str]) -> npt.NDArray[np.uint16]:
    """One token stream: the separator, then a text, and so on; a separator ends it."""
    parts: list[npt.NDArray[np.uint16]] = []
    separator = np.zeros(1, dtype=np.uint16)
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256]):
            parts += [separator, np.array(encoding.ids, dtype=np.uint16)]
    return np.concatenate([*parts, separator])


def prepare(text: Path, target: Path, seed: int, vocab_size: int, sample_bytes: int) -> None:
    """Write the prepared file: both token streams, their bounds by domain, and the tokenizer."""
    began = time.monotonic()
    rng = random.Random(seed)
    train, held = {}, {}
    for name, texts in read_documents(text).items():
        rng.shuffle(texts)
        count = max(1, round(HELD_OUT_SHARE * len(texts)))
        held[name], train[name] = texts[:count], texts[count:]
    tokenizer = train_tokenizer(train, vocab_size, sample_bytes)
    print(f"tokenizer: {vocab_size} entries, {time.monotonic() - began:.0f} s")
    streams: dict[str, list[npt.NDArray[np.uint16]]] = {"train": [], "held": []}
    for name in DOMAIN_SHARES:
        streams["train"].append(encode(tokenizer, train[name]))
        streams["held"].append(encode(tokenizer, held[name]))
        size = sum(len(text.encode()) for text in train[name])
        print(
            f"{name:10} {len(train[name]):6} texts {size / 1e6:6.2f} MB -> {len(streams['train'][-1]) / 1e6:6.2f} M "
            f"tokens; held out {len(held[name])} texts, {len(streams['held'][-1])} tokens"
        )
    arrays: dict[str, Any] = {
        "domains": np.array(list(DOMAIN_SHARES)),
        "shares": np.array(list(DOMAIN_SHARES.values())),
        "token_bytes": token_byte_counts(tokenizer),
        "tokenizer": np.frombuffer(tokenizer.to_str(pretty=False).encode(), dtype=np.uint8),
    }
    for kind, parts in streams.items():
        arrays[kind] = np.concatenate(parts)
        arrays[f"{kind}_bounds"] = np.cumsum([0] + [len(part) for part in parts])
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, {time.monotonic() - began:.0f} s")


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class Windows:
    """Draws training windows on the device, without the host taking part."""

    def __init__(self, data: dict[str, Any], length: int, device: torch.device, seed: int) -> None:
        self.tokens = torch.from_numpy(data["train"].astype(np.int32)).to(device)
        bounds = torch.from_numpy(data["train_bounds"]).to(device)
        self.start, self.room = bounds[:-1], (bounds[1:] - bounds[:-1] - length).double()
        self.shares = torch.from_numpy(data["shares"]).float().to(device)
        self.offsets = torch.arange(length, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """`count` windows [count, length]."""
        domain = torch.multinomial(self.shares, count, replacement=True, generator=self.generator)
        place = torch.rand(count, generator=self.generator, device=self.start.device, dtype=torch.float64)
        first = self.start[domain] + (place * self.room[domain]).long()
        return self.tokens[first[:, None] + self.offsets].long()


def losses(model: MicroModel, window: Tensor, length: int) -> list[Tensor]:
    """Mean cross entropy of the trunk and of each MTP depth."""
    logits = model(window[:, : length + MTP_DEPTH], length)
    targets = [window[:, depth + 1 : depth + 1 + length] for depth in range(len(logits))]
    return [F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(logits, targets, strict=True)]


def make_optimizer(model: nn.Module, rate: float, fused: bool) -> torch.optim.AdamW:
    """AdamW; norms and sinks are not decayed."""
    wide = [p for p in model.parameters() if p.dim() > 1]
    narrow = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first two per cent, then a cosine down to two per cent of the peak."""
    if progress < 0.02:
        return peak * (progress + 5e-4) / 0.02
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98))))


def train_model(
    model: MicroModel,
    windows: Windows,
    args: argparse.Namespace,
    say: Callable[[str], None],
    held_out: Callable[[], str],
) -> int:
    """Train until --steps are done or --time-limit is near, the schedule following whichever is ahead; count steps."""
    device = windows.tokens.device
    optimizer = make_optimizer(model, args.rate, fused=device.type == "cuda")
    routers = list(model.routers().values())
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.rate)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            parts = losses(model, windows.draw(args.batch), args.length)
        loss = parts[0] + args.mtp_weight * torch.stack(parts[1:]).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for router in routers:
            router.balance(1e-3 if progress < 0.85 else 1e-4)
        if step % args.log_every == 0:
            shown = " ".join(f"{part.item():.4f}" for part in parts)
            rate = (step + 1) * args.batch * args.length / (time.monotonic() - began)
            say(f"step {step:5d} loss {shown} gradient {norm.item():.2f} {rate / 1e6:.2f} M tokens/s")
            if step % (8 * args.log_every) == 0 and step:
                say(f"  held out: {held_out()}")
                for router in routers:
                    router.load.zero_()
        step += 1
        progress = max(step / args.steps, (time.monotonic() - began) / args.time_limit)
    return step


@dataclass
class Score:
    """Held-out sums of one domain, or of all."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0
    hits: tuple[int, ...] = (0,) * (MTP_DEPTH + 1)

    def __add__(self, other: Score) -> Score:
        hits = tuple(a + b for a, b in zip(self.hits, other.hits, strict=True))
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.text_bytes + other.text_bytes, hits)

    def line(self) -> str:
        """Loss, bits per byte and next-token accuracy in words."""
        bits = self.nats / math.log(2) / self.text_bytes
        return f"{self.nats / self.tokens:.4f} nats/token, {bits:.4f} bits/byte, top-1 {self.hits[0] / self.tokens:.4f}"


@torch.no_grad()
def evaluate(model: MicroModel, data: dict[str, Any], length: int, device: torch.device) -> dict[str, Score]:
    """Held-out scores by domain in fp32, over consecutive windows; a stream's tail that fills no window is left out."""
    counts = torch.from_numpy(data["token_bytes"].astype(np.int64)).to(device)
    span = length + MTP_DEPTH + 1
    scores: dict[str, Score] = {}
    for index, name in enumerate(data["domains"].tolist()):
        first, last = data["held_bounds"][index : index + 2]
        stream = torch.from_numpy(data["held"][first:last].astype(np.int64)).to(device)
        score = Score()
        starts = range(0, len(stream) - span + 1, length)
        for chunk in (starts[i : i + 32] for i in range(0, len(starts), 32)):
            window = torch.stack([stream[start : start + span] for start in chunk])
            logits = model(window[:, :-1], length)
            targets = [window[:, depth + 1 : depth + 1 + length] for depth in range(MTP_DEPTH + 1)]
            nats = F.cross_entropy(logits[0].flatten(0, 1), targets[0].flatten(), reduction="sum").item()
            hits = tuple(int((a.argmax(-1) == b).sum()) for a, b in zip(logits, targets, strict=True))
            score += Score(nats, targets[0].numel(), int(counts[targets[0]].sum()), hits)
        scores[name] = score
    return scores


# --------------------------------------------------------------------------------------------------------------------
# Checkpoint
# --------------------------------------------------------------------------------------------------------------------


def export_tensors(model: MicroModel) -> dict[str, Tensor]:
    """The checkpoint's tensors: experts one by one, bf16 but for the routers."""
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if ".mlp.gate." in name:
            out[name] = value.float().contiguous()
        elif name.endswith(".experts.gate_up"):
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                stem = f"{name.removesuffix('.gate_up')}.{expert}"
                out[f"{stem}.gate_proj.weight"] = gate.to(torch.bfloat16, copy=True)
                out[f"{stem}.up_proj.weight"] = up.to(torch.bfloat16, copy=True)
        elif name.endswith(".experts.down"):
            for expert, down in enumerate(value):
                out[f"{name.removesuffix('.down')}.{expert}.down_proj.weight"] = down.to(torch.bfloat16, copy=True)
        else:
            out[name] = value.to(torch.bfloat16).contiguous()
    return out


def load_checkpoint(folder: Path) -> MicroModel:
    """Read a written checkpoint back into this script's own model, in fp32."""
    model = MicroModel(Sizes.read(folder))
    fill(model, folder)
    return model


def fill(model: MicroModel, folder: Path) -> None:
    """Give a model the weights of a written checkpoint, in fp32."""
    from safetensors.torch import load_file

    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / shard)
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        stem, _, kind = name.rpartition(".")
        if kind in ("gate_up", "down"):
            count = model.sizes.n_routed_experts
            wanted = ("gate_proj", "up_proj") if kind == "gate_up" else ("down_proj",)
            rows = [torch.cat([tensors.pop(f"{stem}.{e}.{part}.weight") for part in wanted]) for e in range(count)]
            state[name] = torch.stack(rows).float()
        else:
            state[name] = tensors.pop(name).float()
    if tensors:
        raise SystemExit(f"tensors without a place: {sorted(tensors)[:5]}")
    model.load_state_dict(state)


def model_config(sizes: Sizes) -> dict[str, Any]:
    """config.json with the original key set and the one that transformers reads."""
    full = {
        "rope_type": "default",
        "rope_theta": sizes.rope_theta,
        "partial_rotary_factor": sizes.partial_rotary_factor,
    }
    kinds = ("full_attention", "sliding_attention")
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": len(sizes.hybrid_layer_pattern),
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "v_head_dim": sizes.v_head_dim,
        "swa_num_attention_heads": sizes.num_attention_heads,
        "swa_num_key_value_heads": sizes.swa_num_key_value_heads,
        "swa_head_dim": sizes.head_dim,
        "swa_v_head_dim": sizes.v_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sizes.max_position_embeddings,
        "initializer_range": 0.02,
        "layernorm_epsilon": sizes.layernorm_epsilon,
        "rms_norm_eps": sizes.layernorm_epsilon,
        "use_cache": True,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": sizes.rope_theta,
        "swa_rope_theta": sizes.swa_rope_theta,
        "partial_rotary_factor": sizes.partial_rotary_factor,
        "sliding_window": sizes.sliding_window,
        "sliding_window_size": sizes.sliding_window,
        "attention_chunk_size": sizes.sliding_window,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_value_scale": sizes.attention_value_scale,
        "hybrid_layer_pattern": list(sizes.hybrid_layer_pattern),
        "moe_layer_freq": list(sizes.moe_layer_freq),
        "n_routed_experts": sizes.n_routed_experts,
        "num_experts_per_tok": sizes.num_experts_per_tok,
        "moe_intermediate_size": sizes.moe_intermediate_size,
        "n_shared_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "layer_types": [kinds[kind] for kind in sizes.hybrid_layer_pattern],
        "mlp_layer_types": [("dense", "sparse")[kind] for kind in sizes.moe_layer_freq],
        "rope_parameters": {kinds[0]: full, kinds[1]: full | {"rope_theta": sizes.swa_rope_theta}},
    }


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> None:
    """Cut the tensors, in the order of their names, into shards of about equal size, with an index."""
    from safetensors.torch import save_file

    total = sum(value.nbytes for value in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for name in sorted(tensors):
        shards[min(count - 1, done * count // total)][name] = tensors[name]
        done += tensors[name].nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def write_checkpoint(folder: Path, model: MicroModel, tokenizer_json: bytes) -> None:
    """Write the whole checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, export_tensors(model))
    write_json(folder / "config.json", model_config(model.sizes))
    generation = {"bos_token_id": 0, "eos_token_id": 0, "temperature": 1.0, "top_p": 0.95, "do_sample": True}
    write_json(folder / "generation_config.json", generation | {"pad_token_id": 0})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[0],
        "pad_token": SPECIALS[0],
        "model_max_length": model.sizes.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)


@torch.no_grad()
def compare_with_transformers(folder: Path, model: MicroModel, data: dict[str, Any], length: int) -> tuple[float, str]:
    """Largest difference of fp32 logits on held-out tokens, and a greedy sample from transformers' model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello, 123!"}], tokenize=False, add_generation_prompt=True
    )
    if len(tokenizer) != model.sizes.vocab_size or tokenizer.decode(tokenizer(chat)["input_ids"]) != chat:
        raise SystemExit("the tokenizer does not give back its text")
    other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if type(other).__name__ != "MiMoV2FlashForCausalLM":
        raise SystemExit(f"transformers loaded {type(other).__name__}")
    places = [int(start) for start in data["held_bounds"][:-1] if start + length <= len(data["held"])]
    tokens = torch.stack([torch.from_numpy(data["held"][p : p + length].astype(np.int64)) for p in places])
    worst = float((other(tokens).logits - model(tokens, length)[0]).abs().max())
    prompt = tokenizer("Question: Tom has 5 apples and buys 7 more. How many", return_tensors="pt")
    sample = other.generate(**prompt, max_new_tokens=60, do_sample=False)
    return worst, str(tokenizer.decode(sample[0]))


# --------------------------------------------------------------------------------------------------------------------
# Report and command line
# --------------------------------------------------------------------------------------------------------------------


def unigram_loss(data: dict[str, Any]) -> float:
    """Held-out nats per token of the training stream's token frequencies (domains in their shares, add-one)."""
    size = len(data["token_bytes"])
    frequency = np.zeros(size)
    for share, first, last in zip(data["shares"], data["train_bounds"][:-1], data["train_bounds"][1:], strict=True):
        frequency += share * (np.bincount(data["train"][first:last], minlength=size) + 1) / (last - first + size)
    return float(-np.log(frequency[data["held"]] / frequency.sum()).mean())


def balance_lines(model: MicroModel) -> list[str]:
    """Per layer, the experts' shares of the tokens counted since the last reset (1.0 is even)."""
    lines = []
    for index, router in model.routers().items():
        share = router.load / router.load.mean()
        shown = " ".join(f"{value:.2f}" for value in share.tolist())
        bias = router.e_score_correction_bias
        lines.append(f"layer {index}: load {shown} (bias {bias.min():+.3f} to {bias.max():+.3f})")
    return lines


def environment(device: torch.device) -> list[str]:
    """Hardware and library versions."""
    import safetensors
    import tokenizers
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"
    libraries = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "safetensors": safetensors}
    versions = [f"{library} {module.__version__}" for library, module in libraries.items()]
    versions += [f"numpy {np.__version__}", f"Python {platform.python_version()}"]
    return [f"hardware: {name}", f"versions: {', '.join(versions)}"]


def report_scores(title: str, scores: dict[str, Score], say: Callable[[str], None]) -> None:
    """Print the held-out scores, all domains first."""
    total = sum(scores.values(), Score())
    say(f"{title}: {total.line()} ({total.tokens} tokens)")
    depth = ", ".join(f"depth {k} {total.hits[k] / total.tokens:.4f}" for k in range(1, MTP_DEPTH + 1))
    say(f"  MTP top-1 accuracy: {depth}")
    for name, score in scores.items():
        say(f"  {name:10} {score.line() if score.tokens else 'too short'}")


def check_written(args: argparse.Namespace, data: dict[str, Any], say: Callable[[str], None]) -> float:
    """Reload the written folder, report on it, and give the largest logit difference from transformers."""
    device = torch.device(args.device)
    written = load_checkpoint(args.out)
    worst, sample = compare_with_transformers(args.out, written, data, args.length)
    say(f"transformers against this script, written files, fp32: largest logit difference {worst:.2e} (limit 1e-3)")
    report_scores("held out, written checkpoint", evaluate(written.to(device), data, args.length, device), say)
    for line in balance_lines(written):
        say(line)
    say(f"greedy sample: {sample!r}")
    return worst


def train(args: argparse.Namespace) -> None:
    """Train, write, reload, check and report."""
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    began = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    with np.load(args.train) as archive:
        data: dict[str, Any] = {name: archive[name] for name in archive.files}
    sizes = replace(SIZES[args.size], vocab_size=len(data["token_bytes"]))
    if args.length % sizes.sliding_window:
        raise SystemExit(f"--length must be a multiple of {sizes.sliding_window}")
    if sizes.swa_num_key_value_heads != 2 * sizes.num_key_value_heads:
        raise SystemExit("transformers' class gives sliding layers twice the key-value heads of global ones")
    model = MicroModel(sizes)
    initialize(model)
    model.to(device)
    say(f"command: {' '.join(sys.argv)}")
    for line in environment(device):
        say(line)
    say(f"parameters: {sum(p.numel() for p in model.parameters())} (MTP and experts included)")
    windows = Windows(data, args.length + MTP_DEPTH + 1, device, args.seed)

    def held_out() -> str:
        return sum(evaluate(model, data, args.length, device).values(), Score()).line()

    steps = train_model(model, windows, args, say, held_out)
    say(f"training: {steps} steps, {steps * args.batch * args.length} tokens seen of {len(data['train'])} distinct")
    say(f"  {time.monotonic() - began:.0f} s with setup")
    say(f"held-out loss of the token frequencies alone: {unigram_loss(data):.4f} nats/token")
    report_scores("held out, fp32 master weights", evaluate(model, data, args.length, device), say)
    write_checkpoint(args.out, model, data["tokenizer"].tobytes())
    worst = check_written(args, data, say)
    say(f"all: {time.monotonic() - began:.0f} s")
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not worst <= 1e-3:
        raise SystemExit("the written checkpoint does not give the same logits in transformers")


def main() -> None:
    """Read the command line and do the step it names."""
    parser = argparse.ArgumentParser(description="Train a micro MiMo-V2 model and write a bf16 checkpoint.")
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument("--prepare", type=Path, metavar="FILE.npz", help="tokenize the texts of --text into FILE.npz")
    step.add_argument("--train", type=Path, metavar="FILE.npz", help="train on a prepared file")
    parser.add_argument("--text", type=Path, help="folder of *.jsonl.xz with a text field (for --prepare)")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--sample-bytes", type=int, default=10_000_000, help="text that the BPE is trained on")
    parser.add_argument("--size", choices=list(SIZES), default="micro", help="of the model (for --train)")
    parser.add_argument("--out", type=Path, help="checkpoint folder to write (for --train)")
    parser.add_argument("--report", type=Path, help="also write what was printed to this file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--mtp-weight", type=float, default=0.3, help="weight of the mean MTP loss")
    parser.add_argument("--time-limit", type=float, default=290.0, help="seconds that training may take")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.prepare:
        if args.text is None:
            parser.error("--prepare needs --text")
        prepare(args.text, args.prepare, args.seed, args.vocab_size, args.sample_bytes)
    else:
        if args.out is None:
            parser.error("--train needs --out")
        train(args)


if __name__ == "__main__":
    main()
