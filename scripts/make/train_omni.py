"""Train a small MiMo-V2 omni model, which reads pictures, and write it as a bf16 checkpoint in V2.5's names.

What it makes: the text backbone of `train_micro.py` with 16 experts, and the vision tower of the published form at toy
size (a block of each kind, sinks, 2 x 2 merger, LayerNorm without bias).  Pictures are 64 x 64 pixels in four fields,
each with a digit or a shape in one of eight colours, in a frame; chats ask what is where.  Half of every step is text.

How it works:

    scripts/make/train_micro.py --prepare data.npz --text DIR     (CPU) tokenizes the text
    scripts/make/train_omni.py data.npz --out FOLDER [--report FILE]  (one GPU) trains, writes, reloads and checks

Key idea: what a picture shows is a few numbers, from which its pixels are put together on the device, out of glyphs
that were drawn once.  So no step waits for drawing, each view of a picture is another (places, sizes and papers are
drawn anew), and the same numbers make the files that a run of `mimoquant` reads.  A head beside the model, which is
not written, has to tell each field's sign and place from the tower's rows alone: the tower learns from that first.

Whether the model reads pictures is told by two numbers on pictures that were kept back: how often it is right in the
words that only the picture tells, and how often with the picture of the next chat in its place.  Then the written files
are read by `mimoquant`, chats and PNG files by its own reader, and its losses compared with this script's.

Left out: sound, MTP layers, pictures of several sizes, video.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import omni
import torch
import torch.nn.functional as F
import train_micro
from PIL import Image, ImageDraw
from torch import Tensor, nn
from train_micro import MicroModel, Norm, Sizes, Windows

from mimoquant.model.tower_config import COLUMNS, FULL, VisionConfig, read_tower_config
from mimoquant.model.vision import column_order, rotation

Ints = npt.NDArray[np.int64]
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
FIELD, PATCH = 32, 8  # pixels
SIDE = 2 * FIELD
GRID = (1, SIDE // PATCH, SIDE // PATCH)
TOKENS = GRID[1] * GRID[2] // 4  # of a picture
VARIANTS = 48  # of a glyph
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COLOURS = tuple(omni.PAINTS)
SHAPES = ("circle", "square", "triangle", "ring", "cross")
GLYPHS = (*"0123456789", *SHAPES)
WHERE = ("top left", "top right", "bottom left", "bottom right")
TEMPLATE = """{%- macro said(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for turn in messages -%}{{ '<|im_start|>' + turn['role'] + '\\n' + said(turn['content']) + '<|im_end|>\\n' }}
{%- endfor -%}"""
SIZES = {
    "omni": Sizes(
        intermediate_size=512,
        num_attention_heads=8,
        n_routed_experts=16,
        num_experts_per_tok=4,
        hybrid_layer_pattern=(0, 1, 1, 0, 1, 1),
        moe_layer_freq=(0, 1, 1, 1, 1, 1),
    ),
    "small": Sizes(hidden_size=128, hybrid_layer_pattern=(0, 1, 0), moe_layer_freq=(0, 1, 1)),
}
HELD_OUT_SEED = 1000
PARTS = ("text", "chats", "what pictures tell", "the head beside")
Record = dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------
# Pictures and what is said of them
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What pictures show. signs: [pictures, 4, 2], a glyph's and a colour's number of each field; looks: [pictures, 5],
    the variant of each glyph, and the paper."""

    signs: Ints
    looks: Ints


def draw_shown(count: int, seed: int) -> Shown:
    rng = np.random.default_rng(seed)
    signs = np.stack((rng.integers(0, len(GLYPHS), (count, 4)), rng.integers(0, len(COLOURS), (count, 4))), axis=-1)
    looks = rng.integers(0, (VARIANTS,) * 4 + (len(omni.PAPERS),), (count, 5))
    return Shown(signs, looks)


def glyph_masks() -> npt.NDArray[np.uint8]:
    """[glyphs, variants, 32, 32]: how much ink a pixel has, 0 to 255; variants differ in size and place."""
    dice = omni.Dice("glyphs")
    out = np.zeros((len(GLYPHS), VARIANTS, FIELD, FIELD), np.uint8)
    for number, glyph in enumerate(GLYPHS):
        for variant in range(VARIANTS):
            image = Image.new("L", (FIELD, FIELD))
            draw = ImageDraw.Draw(image)
            if glyph in SHAPES:
                side = dice.between(16, 24)
                x, y = dice.between(3, FIELD - 4 - side), dice.between(3, FIELD - 4 - side)
                omni.form(draw, glyph, (x, y, x + side, y + side), 255)
            else:
                letters = omni.font(dice.between(22, 30))
                left, top, right, bottom = draw.textbbox((0, 0), glyph, font=letters)
                x, y = (dice.between(3, FIELD - 3 - int(size)) for size in (right - left, bottom - top))
                draw.text((x - left, y - top), glyph, 255, letters)
            out[number, variant] = np.asarray(image)
    return out


class Painter:
    """Puts pictures together out of glyphs, on a device, and cuts them up."""

    def __init__(self, device: torch.device) -> None:
        self.masks = torch.from_numpy(glyph_masks()).to(device)
        self.paints = torch.tensor([omni.PAINTS[name] for name in COLOURS], dtype=torch.float32, device=device)
        self.papers = torch.tensor(omni.PAPERS, dtype=torch.float32, device=device)
        self.line = torch.tensor(omni.AXIS, dtype=torch.float32, device=device)
        self.frame = torch.ones(SIDE, SIDE, 1, dtype=torch.bool, device=device)
        self.frame[2:-2, 2:-2] = False
        self.limits = torch.tensor((VARIANTS,) * 4 + (len(omni.PAPERS),), device=device)
        self.mean, self.deviation = (255 * torch.tensor(of, device=device) for of in (MEAN, DEVIATION))

    def looks(self, count: int, generator: torch.Generator) -> Tensor:
        """Drawn anew, [count, 5]."""
        return (torch.rand(count, 5, device=self.limits.device, generator=generator) * self.limits).long()

    def paint(self, signs: Tensor, looks: Tensor) -> Tensor:
        """Of [B, 4, 2] and [B, 5], pixels [B, 64, 64, 3], whole numbers in float32."""
        ink = self.masks[signs[..., 0], looks[:, :4]].float()[..., None] / 255  # [B, 4, 32, 32, 1]
        colour, paper = self.paints[signs[..., 1]][:, :, None, None], self.papers[looks[:, 4]][:, None, None, None]
        fields = (paper * (1 - ink) + colour * ink).round().view(-1, 2, 2, FIELD, FIELD, 3)
        return torch.where(self.frame, self.line, fields.transpose(2, 3).reshape(-1, SIDE, SIDE, 3))

    def patches(self, signs: Tensor, looks: Tensor) -> Tensor:
        """[B, patches, values], in the order of the published processor (`calibration.pictures`)."""
        planes = ((self.paint(signs, looks) - self.mean) / self.deviation).permute(0, 3, 1, 2)
        cut = planes.reshape(-1, 3, GRID[1] // 2, 2, PATCH, GRID[2] // 2, 2, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
        both = cut[..., None, :, :].expand(*cut.shape[:-2], 2, PATCH, PATCH)  # two equal frames
        return both.reshape(len(planes), GRID[1] * GRID[2], -1)


Said = list[tuple[str, bool]]  # pieces of an answer, and whether only the picture tells them


def sign(row: Ints) -> Said:
    return [("one ", False), (COLOURS[row[1]], True), (" ", False), (GLYPHS[row[0]], True)]


def joined(parts: Sequence[Said], between: str, last: str) -> Said:
    out: Said = []
    for number, part in enumerate(parts):
        out += [(last if number == len(parts) - 1 else between, False)] if number else []
        out += part
    return out


def described(signs: Ints, rng: np.random.Generator) -> tuple[str, Said]:
    ask = ("Describe the picture.", "What do you see?", "Tell me what is in each corner.")[rng.integers(3)]
    link = (" is ", " there is ", " one sees ")[rng.integers(3)]
    parts = [[(f"{where}{link}", False), *sign(row)] for where, row in zip(WHERE, signs, strict=True)]
    return ask, [("At the ", False), *joined(parts, ", at the ", " and at the "), (".", False)]


def listed(signs: Ints, rng: np.random.Generator) -> tuple[str, Said]:
    ask = ("Read the signs row by row.", "List the signs.", "Which signs are there?")[rng.integers(3)]
    said = joined([sign(row) for row in signs], ", ", " and ")
    return ask, [("There are ", False), *said, (".", False)] if rng.integers(2) else [*said, (".", False)]


def placed(signs: Ints, rng: np.random.Generator) -> tuple[str, Said]:
    field = int(rng.integers(4))
    where = WHERE[field]
    if rng.integers(2):
        return f"Which colour is at the {where}?", [("It is ", False), (COLOURS[signs[field, 1]], True), (".", False)]
    return f"What is at the {where}?", [(f"At the {where} is ", False), *sign(signs[field]), (".", False)]


def counted(signs: Ints, rng: np.random.Generator) -> tuple[str, Said]:
    digits = int((signs[:, 0] < 10).sum())
    ask = ("How many digits are there?", "Count the digits, please.")[rng.integers(2)]
    return ask, [("Of the four signs ", False), (str(digits), True), (" are digits.", False)]


def chats(shown: Shown, seed: int) -> list[list[tuple[str, Said]]]:
    """Of each picture two or three questions with their answers."""
    rng = np.random.default_rng((seed, 1))
    forms = (described, listed, placed, counted)
    return [
        [forms[form](signs, rng) for form in rng.permutation((0, 1, 2, 2, 3))[: rng.integers(2, 4)]]
        for signs in shown.signs
    ]


def chat_text(chat: list[tuple[str, Said]]) -> tuple[str, list[tuple[int, int]]]:
    """As the template writes it, one placeholder for the picture; and the spans that only the picture tells."""
    out, spans = "", []
    for number, (ask, said) in enumerate(chat):
        out += f"<|im_start|>user\n{''.join((MARKS[0], MARKS[2], MARKS[1])) if not number else ''}{ask}<|im_end|>\n"
        out += "<|im_start|>assistant\n"
        for piece, told in said:
            if told:
                spans.append((len(out), len(out) + len(piece)))
            out += piece
        out += "<|im_end|>\n"
    return out, spans


def write_chats(path: Path, count: int, seed: int, *, pictures: bool = True) -> None:
    """Pictures with chats, or the chats' words alone, as a file that `mimoquant --data` takes."""
    shown = draw_shown(count, seed)
    pixels = Painter(torch.device("cpu")).paint(*map(torch.from_numpy, (shown.signs, shown.looks)))
    with path.open("w", encoding="utf-8") as file:
        for picture, chat in zip(pixels.byte().numpy(), chats(shown, seed), strict=True):
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            messages: list[Record] = []
            for ask, said in chat:
                messages.append({"role": "user", "content": [{"type": "text", "text": ask}]})
                messages.append({"role": "assistant", "content": "".join(piece for piece, _ in said)})
            url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
            if pictures:
                messages[0]["content"].insert(0, {"type": "image", "image": url})
            file.write(json.dumps({"messages": messages, "domain": "pictures"}) + "\n")


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


class VisionBlock(nn.Module):
    """One block of the tower; pictures are a batch of one grid."""

    cos: Tensor
    sin: Tensor
    order: Tensor
    back: Tensor

    def __init__(self, config: VisionConfig, kind: int) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        hidden, width = config.hidden, config.head_dim
        self.norm1, self.norm2 = Norm(hidden, 1e-6), Norm(hidden, 1e-6)
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(hidden, (config.heads + 2 * config.kv_heads) * width),
                "proj": nn.Linear(config.heads * width, hidden),
            }
        )
        if kind != FULL:
            self.attn.register_parameter("sinks", nn.Parameter(torch.zeros(config.heads)))
        cos, sin = rotation(GRID, config, torch.zeros(()))
        order = column_order(GRID, config.merge)
        for name, value in (("cos", cos), ("sin", sin), ("order", order), ("back", order.argsort())):
            self.register_buffer(name, value, persistent=False)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, config.intermediate),
                "up_proj": nn.Linear(hidden, config.intermediate),
                "down_proj": nn.Linear(config.intermediate, hidden),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, H] → the same."""
        x = x + self.attn["proj"](self.mixed(self.attn["qkv"](self.norm1(x))))
        y, mlp = self.norm2(x), self.mlp
        out: Tensor = x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return out

    def mixed(self, qkv: Tensor) -> Tensor:
        """Attention: [B, n, (N + 2 K) D] → [B, n, N D]."""
        config, count = self.config, qkv.shape[1]
        heads = qkv.view(len(qkv), count, -1, config.head_dim).transpose(1, 2)
        query, key, value = torch.split(heads, [config.heads, config.kv_heads, config.kv_heads], dim=1)
        query, key = (train_micro.rotate(part, self.cos, self.sin) for part in (query, key))
        key, value = (part.repeat_interleave(config.heads // config.kv_heads, 1) for part in (key, value))
        if self.kind == COLUMNS:
            query, key, value = (part[:, :, self.order] for part in (query, key, value))
        scores = (query @ key.transpose(-1, -2)).float() * config.head_dim**-0.5
        if self.kind != FULL:
            place = torch.arange(count, device=qkv.device)
            first = (place == 0).float()
            scores = scores + self.attn.get_parameter("sinks").view(1, -1, 1, 1) * first
            scores = scores.masked_fill((place[:, None] - place).abs() > config.window, float("-inf"))
        out = scores.softmax(-1).to(value.dtype) @ value
        if self.kind == COLUMNS:
            out = out[:, :, self.back]
        mixed: Tensor = out.transpose(1, 2).flatten(2)
        return mixed


class VisionTower(nn.Module):
    """Patches [B, n, W] → rows for the embedding, [B * n / 4, H], named as in the checkpoint."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        pixels = (config.temporal_patch, config.patch, config.patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(config.channels, config.hidden, pixels, bias=False)})
        self.blocks = nn.ModuleList(VisionBlock(config, kind) for kind in config.kinds)
        first, second = (nn.Linear(config.merged, out, bias=False) for out in (config.merged, config.out_hidden))
        norm = nn.LayerNorm(config.hidden, eps=1e-6, bias=False)
        self.merger = nn.ModuleDict({"ln_q": norm, "mlp": nn.Sequential(first, nn.GELU(), second)})
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                quieter = 0.1 if name.endswith(("mlp.2.weight", "down_proj.weight", "attn.proj.weight")) else 1.0
                nn.init.normal_(weight, std=quieter * weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, patches: Tensor) -> Tensor:
        x = F.linear(patches, self.patch_embed.get_parameter("proj.weight").flatten(1))
        for block in self.blocks:
            x = block(x)
        normed = self.merger["ln_q"](x.float())
        out: Tensor = self.merger["mlp"](normed.reshape(-1, self.merger.get_parameter("mlp.0.weight").shape[1]))
        return out


class OmniModel(MicroModel):
    """The language model without MTP layers, and the tower."""

    def __init__(self, sizes: Sizes, vision: VisionConfig) -> None:
        super().__init__(sizes)
        del self.model.mtp
        train_micro.initialize(self)
        self.visual = VisionTower(vision)

    def read(self, tokens: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]. slots [B, T]: which row of the tower's stands there, -1 for none."""
        embedded = self.model.embed_tokens(tokens)
        x = torch.where(slots[..., None] >= 0, rows[slots.clamp(min=0)].to(embedded.dtype), embedded)
        return self.logits(self.trunk(x, self.tables(tokens.shape[1], tokens.device)))


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


class Chats:
    """Chats about pictures in one stream, and windows of it that begin with a chat."""

    def __init__(self, tokenizer: Any, count: int, seed: int, device: torch.device, length: int) -> None:
        shown = draw_shown(count, seed)
        texts = [chat_text(chat) for chat in chats(shown, seed)]
        encodings = tokenizer.encode_batch([text for text, _ in texts])
        self.image, self.length = tokenizer.token_to_id(MARKS[2]), length
        ids: list[Ints] = []
        facts: list[Ints] = []
        slots, starts = [], [0]
        for number, ((_, spans), encoding) in enumerate(zip(texts, encodings, strict=True)):
            own = np.array([*encoding.ids, 0])  # an end of text between two chats
            place = int(np.flatnonzero(own == self.image)[0])
            told = np.zeros(len(own), np.int64)
            told[first_tokens(encoding.offsets, spans)] = 1
            slot = np.full(len(own) + TOKENS - 1, -1)
            slot[place : place + TOKENS] = number * TOKENS + np.arange(TOKENS)
            for part, values in ((ids, own), (facts, told)):
                part.append(np.insert(values, place, np.full(TOKENS - 1, values[place])))
            slots.append(slot)
            starts.append(starts[-1] + len(slot))
        stream = np.array(starts)
        touched = np.searchsorted(stream, stream[:-1] + length + 1) - np.arange(count)
        self.most = int(touched.max())  # pictures of a window
        self.usable = int(np.searchsorted(stream, stream[-1] - length - 1)) - self.most
        if self.usable < 1:
            raise SystemExit(f"{count} chats make no window of {length} tokens")
        self.ids, self.slots, self.facts = (
            torch.from_numpy(np.concatenate(of)).to(device) for of in (ids, slots, facts)
        )
        self.starts = torch.from_numpy(stream).to(device)
        self.signs, self.looks = (torch.from_numpy(of).to(device) for of in (shown.signs, shown.looks))

    def windows(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the chats `first` [B]: ids and slots and facts [B, length + 1], and the pictures' numbers [B, most]. A
        slot counts the rows of these pictures."""
        places = self.starts[first][:, None] + torch.arange(self.length + 1, device=first.device)
        pictures = first[:, None] + torch.arange(self.most, device=first.device)
        begin = TOKENS * (first - torch.arange(len(first), device=first.device) * self.most)
        slots = self.slots[places]
        return self.ids[places], torch.where(slots >= 0, slots - begin[:, None], -1), self.facts[places], pictures


def first_tokens(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Of each span of characters the token in which it begins."""
    ends = np.array([end for _, end in offsets])
    return [int(np.searchsorted(ends, begin, side="right")) for begin, _ in spans]


class Teacher(nn.Module):
    """Tells from the rows of a field alone which glyph, colour and field it is. Not a part of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.counts = (len(GLYPHS), len(COLOURS), len(WHERE))
        self.head = nn.Linear(width, sum(self.counts))

    def forward(self, rows: Tensor, signs: Tensor) -> Tensor:
        """Mean cross entropy of the three, of rows [B * 16, H] and signs [B, 4, 2]."""
        side = GRID[1] // 4  # rows to a side of a field
        fields = rows.view(-1, 2, side, 2, side, rows.shape[1]).transpose(2, 3).reshape(-1, 4, side**2, rows.shape[1])
        told = self.head(fields.float().mean(2)).flatten(0, 1).split(self.counts, dim=-1)
        where = torch.arange(4, device=rows.device).expand(len(signs), 4)
        wanted = (signs[..., 0], signs[..., 1], where)
        parts = [F.cross_entropy(a.float(), b.flatten()) for a, b in zip(told, wanted, strict=True)]
        return torch.stack(parts).mean()


def batch_losses(
    model: OmniModel, teacher: Teacher, text: Windows, chats: Chats, painter: Painter, args: argparse.Namespace
) -> list[Tensor]:
    """Mean cross entropy of text, of chats about pictures, whose looks are drawn anew, of the words among them that
    only pictures tell, and of the teacher."""
    device = text.tokens.device
    first = torch.randint(chats.usable, (args.batch,), device=device, generator=text.generator)
    ids, slots, facts, pictures = chats.windows(first)
    pictures = pictures.flatten()
    signs = chats.signs[pictures]
    rows = model.visual(painter.patches(signs, painter.looks(len(pictures), text.generator)))
    both = torch.cat((ids, text.draw(args.texts)))
    slots = torch.cat((slots, slots.new_full((args.texts, slots.shape[1]), -1)))
    logits = model.read(both[:, :-1], rows, slots[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), both[:, 1:].flatten(), reduction="none").view(len(both), -1)
    of_chats, of_text = torch.split(nats, [args.batch, args.texts])
    inside, told = (where[:, 1:].float() for where in (ids != chats.image, facts > 0))
    weighed = [(of_chats * where).sum() / where.sum() for where in (inside, told)]
    return [of_text.mean(), *weighed, teacher(rows, signs)]


def train_model(
    model: OmniModel, text: Windows, chats: Chats, args: argparse.Namespace, say: Callable[[str], None]
) -> int:
    """Train until --steps are done or --time-limit is near, as `train_micro.train_model`; count steps."""
    device = text.tokens.device
    painter = Painter(device)
    teacher = Teacher(model.sizes.hidden_size).to(device)
    optimizer = train_micro.make_optimizer(nn.ModuleList((model, teacher)), args.rate, fused=device.type == "cuda")
    routers = list(model.routers().values())
    began, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = train_micro.learning_rate(progress, args.rate)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            parts = batch_losses(model, teacher, text, chats, painter, args)
        torch.autograd.backward(torch.stack(parts).sum())
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for router in routers:
            router.balance(1e-3 if progress < 0.85 else 1e-4)
        if step % args.log_every == 0:
            told = ", ".join(f"{n} {p.item():.4f}" for n, p in zip(PARTS, parts, strict=True))
            say(f"step {step:5d} {time.monotonic() - began:4.0f} s: loss of {told}; gradient {norm.item():.2f}")
        step += 1
        progress = max(step / args.steps, (time.monotonic() - began) / args.time_limit)
    return step


@torch.no_grad()
def read_rightly(model: OmniModel, chats: Chats, count: int) -> dict[str, tuple[float, float, int]]:
    """Share of the words told by the picture alone that are the likeliest, the mean loss of chats, and how many words:
    with each chat's picture, and with the picture of the next one."""
    device = chats.ids.device
    painter, out = Painter(device), {}
    for name, shift in (("its picture", 0), ("another picture", 1)):
        right, nats, words, tokens = 0, 0.0, 0, 0
        for begin in range(0, min(count, chats.usable), 32):
            first = torch.arange(begin, min(begin + 32, count, chats.usable), device=device)
            ids, slots, facts, pictures = chats.windows(first)
            other = (pictures.flatten() + shift) % len(chats.signs)
            rows = model.visual(painter.patches(chats.signs[other], chats.looks[other]))
            logits, wanted = model.read(ids[:, :-1], rows, slots[:, :-1]), ids[:, 1:]
            inside, told = wanted != chats.image, facts[:, 1:] > 0
            right += int((logits.argmax(-1) == wanted)[told].sum())
            words += int(told.sum())
            nats += float(F.cross_entropy(logits[inside], wanted[inside], reduction="sum"))
            tokens += int(inside.sum())
        out[name] = right / words, nats / tokens, words
    return out


# --------------------------------------------------------------------------------------------------------------------
# Checkpoint
# --------------------------------------------------------------------------------------------------------------------


def omni_config(sizes: Sizes) -> Record:
    """config.json in the form of V2.5's."""
    ids = {"vision_start_token_id": 1024, "vision_end_token_id": 1025, "image_token_id": 1026}
    kinds = [FULL, 0, 1, FULL]
    config = train_micro.model_config(sizes)
    for key in ("layer_types", "mlp_layer_types", "rope_parameters"):
        del config[key]
    return (
        config
        | ids
        | {
            "architectures": ["MiMoV2ForCausalLM"],
            "model_type": "mimo_v2",
            "vision_model_type": "mimovl",
            "vision_config": {
                "depth": len(kinds),
                "fullatt_block_indexes": [block for block, kind in enumerate(kinds) if kind == FULL],
                "hidden_act": "silu",
                "hidden_size": 128,
                "in_chans": 3,
                "intermediate_size": 256,
                "kv_channels": 32,
                "num_heads": 4,
                "num_key_value_heads": 2,
                "num_query_groups": 2,
                "out_hidden_size": sizes.hidden_size,
                "patch_size": PATCH,
                "qk_channels": 32,
                "spatial_merge_size": 2,
                "spatial_patch_size": PATCH,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "use_sink": True,
                "visual_token_window_size": 16,
                "vit_window_attn_types": kinds,
                "window_size": 2 * PATCH * 2,
            },
            "processor_config": ids
            | {
                "patch_size": PATCH,
                "merge_size": 2,
                "temporal_patch_size": 2,
                "image_min_pixels": 4 * (2 * PATCH) ** 2,
                "image_max_pixels": 1024 * (2 * PATCH) ** 2,
                "pad_token_id": 0,
                "rope_type": "rope",
            },
        }
    )


def with_marks(tokenizer_json: bytes) -> bytes:
    """The tokenizer with marks for pictures."""
    held = json.loads(tokenizer_json)
    for number, mark in enumerate(MARKS):
        held["added_tokens"].append({**held["added_tokens"][0], "id": 1024 + number, "content": mark})
    return json.dumps(held, ensure_ascii=False).encode()


def write_checkpoint(folder: Path, model: OmniModel, tokenizer_json: bytes) -> None:
    """Write the whole folder."""
    train_micro.write_checkpoint(folder, model, tokenizer_json)
    train_micro.write_json(folder / "config.json", omni_config(model.sizes))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    train_micro.write_json(folder / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    beside = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 1 / 255}
    told = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": MEAN, "image_std": DEVIATION}
    train_micro.write_json(folder / "preprocessor_config.json", told | beside)


@torch.no_grad()
def compare_with_mimoquant(folder: Path, work: Path, length: int, device: torch.device) -> tuple[float, float]:
    """Largest difference between the losses that `mimoquant` has of a few chats and this script's, and their mean."""
    from mimoquant.calibration.tokens import load_tokens
    from mimoquant.evaluation.eval_kl import compare, open_layout

    chats, sizes = work / "check.jsonl", Sizes.read(folder)
    write_chats(chats, 24, HELD_OUT_SEED)
    tokens = load_tokens(
        [str(chats)], folder, sequences=4, tokens=length, vocab=sizes.vocab_size, column=None, takes_media=True
    )
    layout = open_layout(folder)
    scores = compare(layout, [layout], tokens, noise_floor=False).comparisons[0].scores
    model = OmniModel(sizes, vision_config(sizes))
    train_micro.fill(model, folder)
    pictures = [torch.from_numpy(placed.medium.patches) for row in tokens.media for placed in row]  # type: ignore
    slots = torch.from_numpy(-1 - tokens.walked)
    slots = torch.where(torch.from_numpy(tokens.walked) < 0, slots, -1)
    ids = torch.from_numpy(tokens.ids)
    rows = model.to(device).visual(torch.stack(pictures).to(device))
    logits = model.read(ids.to(device), rows, slots.to(device)).cpu()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").numpy()
    if scores is None:
        raise SystemExit("no position was scored")
    counted = scores.counted
    return float(np.abs(losses - scores.reference_loss)[counted].max()), float(scores.reference_loss[counted].mean())


def vision_config(sizes: Sizes) -> VisionConfig:
    return read_tower_config(omni_config(sizes), "config.json").need_vision()


def train(args: argparse.Namespace) -> None:
    """Train, write, reload, check and report."""
    from tokenizers import Tokenizer

    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    began, device = time.monotonic(), torch.device(args.device)
    torch.manual_seed(args.seed)
    with np.load(args.data) as archive:
        data: dict[str, Any] = {name: archive[name] for name in archive.files}
    tokenizer_json = with_marks(data["tokenizer"].tobytes())
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    sizes = replace(SIZES[args.size], vocab_size=1024 + 8)  # eight at a time are quicker; five are never used
    if args.length % sizes.sliding_window:
        raise SystemExit(f"--length must be a multiple of {sizes.sliding_window}")
    model = OmniModel(sizes, vision_config(sizes)).to(device)
    say(f"command: {' '.join(sys.argv)}")
    for line in train_micro.environment(device):
        say(line)
    towers = sum(p.numel() for p in model.visual.parameters())
    say(f"parameters: {sum(p.numel() for p in model.parameters())}, {towers} of them in the tower")
    text = Windows(data, args.length + 1, device, args.seed)
    chats = Chats(tokenizer, args.chats, args.seed, device, args.length)
    held = Chats(tokenizer, min(1024, args.chats), HELD_OUT_SEED, device, args.length)
    say(
        f"{args.chats} chats, {len(chats.ids)} tokens, {chats.most} pictures a window: {time.monotonic() - began:.0f} s"
    )
    steps = train_model(model, text, chats, args, say)
    windows = f"{args.batch} windows of chats and {args.texts} of text of {args.length} tokens"
    say(f"training: {steps} steps of {windows}; {time.monotonic() - began:.0f} s with setup")
    write_checkpoint(args.out, model, tokenizer_json)
    check(args, sizes, held, say)
    say(f"all: {time.monotonic() - began:.0f} s")
    if args.report:
        args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


def check(args: argparse.Namespace, sizes: Sizes, held: Chats, say: Callable[[str], None]) -> None:
    """Of the written files: whether pictures are read, and whether `mimoquant` reads the same."""
    device = torch.device(args.device)
    model = OmniModel(sizes, vision_config(sizes))
    train_micro.fill(model, args.out)
    told = read_rightly(model.to(device), held, args.check_windows)
    for name, (share, loss, words) in told.items():
        say(f"held-out chats with {name}: {share:.4f} of {words} words that it alone tells, {loss:.4f} nats/token")
    worst, mean = compare_with_mimoquant(args.out, args.out.parent, args.length, device)
    say(
        f"mimoquant against this script, written files, fp32: losses of {mean:.4f} nats, largest difference {worst:.2e}"
    )
    if not worst <= 1e-3:
        raise SystemExit("mimoquant does not have the same losses on the written checkpoint (limit 1e-3)")
    if not told["its picture"][0] >= args.least:
        raise SystemExit(f"the model does not read pictures: {told['its picture'][0]:.4f}, wanted is {args.least}")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="of train_micro.py --prepare")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--report", type=Path, help="also write what was printed to this file")
    parser.add_argument("--size", choices=list(SIZES), default="omni")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chats", type=int, default=60000)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=64, help="windows of chats a step")
    parser.add_argument("--texts", type=int, default=64, help="windows of text a step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--time-limit", type=float, default=150.0, help="seconds that training may take")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--check-windows", type=int, default=256)
    parser.add_argument(
        "--least", type=float, default=0.0, help="share of the words that must be right, or exit with 1"
    )
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
