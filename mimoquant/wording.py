"""How figures and names are written: sizes, numbers, ranges, tables, names that a terminal cannot show."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import NotRequired, TypedDict


def layers_of_formats(formats: dict[str, list[int]]) -> str:
    """Each format with the number of its layers, as in "int4 g128 in 46 layers"."""
    return "; ".join(f"{label} in {many(len(layers), 'layer')}" for label, layers in formats.items())


def left_out_note(left_out: list[str]) -> list[str]:
    """What is said wherever J is, of what J leaves out; nothing where it leaves nothing out."""
    return [f"its config quantizes {' and '.join(left_out)} too: J is of its weights alone"] if left_out else []


def rounding_note(experts: str, dense: str, kv_cache: str, input_scales: str | None, stored: str) -> str:
    """What an evaluation rounded beside weights; `stored`: what states were, bf16 or float32."""
    scales = f" ({input_scales} input scales)" if input_scales else ""
    beside = f"{dense} (states stored in bf16 between operations)" if stored == "bf16" else dense
    return f"inputs of experts {experts}{scales}, of FP8 beside them {beside}, KV cache {kv_cache}"


class Reached(TypedDict):
    """What calibration tokens reached in a layer: `calibration.layer_facts.LayerRecord`, by experts."""

    tokens: list[int]
    image_tokens: NotRequired[list[int]]
    sound_tokens: NotRequired[list[int]]


def media_note(layers: Iterable[Reached]) -> str | None:
    """What images and sounds were of what experts saw; None where the data had neither."""
    experts = [
        row
        for layer in layers
        for row in zip(layer["tokens"], layer.get("image_tokens", []), layer.get("sound_tokens", []), strict=False)
    ]
    if not experts:
        return None
    every, images, sounds = map(sum, zip(*experts, strict=True))
    alone = sum(tokens > 0 and tokens == image + sound for tokens, image, sound in experts)
    never = sum(tokens > 0 and image + sound == 0 for tokens, image, sound in experts)
    shares = [percent(part / max(every, 1)) for part in (images, sounds)]
    kinds = " and ".join(f"{share} of {name}" for share, name in zip(shares, ("images", "sounds"), strict=True))
    return (
        f"of the tokens that experts saw, {kinds}; of {len(experts)} experts {alone} saw nothing else, {never} none "
        "of them"
    )


def many(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes for people: decimal units, three digits."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 999.5 else f"{value:.0f} TB"


def number(value: float | None, digits: int = 4) -> str:
    """A figure for people: so many digits, a short exponent, n/a for None."""
    text = "n/a" if value is None else f"{value:.{digits}g}"
    return re.sub(r"e([+-])0*", r"e\1", text).replace("e+", "e")


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Left-aligned columns, the last one right-aligned."""
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=False)), row[-1].rjust(widths[-1])])
        for row in every
    ]


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 → '1-3, 7'."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


WIDTH = 100  # columns of a terminal


NAME_CHARS = 24


HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories that act on their neighbours, or vanish


def visible(text: object) -> str:
    """The text with characters that act or vanish shown by a sign instead: ↵, ⇥, ‹U+200F›. Safe to print."""

    def sign(char: str) -> str:
        hidden = unicodedata.category(char) in HIDDEN or (char.isspace() and char != " ")
        return {"\n": "↵", "\t": "⇥"}.get(char, f"‹U+{ord(char):04X}›") if hidden else char

    plain = str(text)
    return plain if plain.isprintable() else "".join(map(sign, plain))  # pages have tens of thousands of short texts


def percent(share: float | None) -> str:
    """Two decimals, but never 0 or 100 % for what is not."""
    if share is None or 0 < share < 5e-5:
        return "n/a" if share is None else f"{number(100 * share, 2)} %"
    return "> 99.99 %" if 0.99995 <= share < 1 else f"{100 * share:.2f} %"


class Interval(TypedDict):
    """The part of a figure that says how sure it is."""

    low: float
    """Lower end."""
    high: float
    """Upper end."""


class ClampedGroups(TypedDict):
    """Groups of one weight whose scale its format cannot store."""

    zeroed: int
    """All their values became zero."""
    clamped: int
    """Have the format's least or largest scale, which is too large or too small for them."""
    groups: int
    """All of the weight."""


def clamped_notes(counts: dict[str, ClampedGroups]) -> list[str]:
    """A sentence on groups without a scale, by weight; none where there are none."""
    if not counts:
        return []
    zeroed, clamped = (sum(one[kind] for one in counts.values()) for kind in ("zeroed", "clamped"))
    worst = max(counts, key=lambda name: (counts[name]["zeroed"] + counts[name]["clamped"]) / counts[name]["groups"])
    lost, groups = counts[worst]["zeroed"] + counts[worst]["clamped"], counts[worst]["groups"]
    return [
        f"in {many(len(counts), 'weight')} the format has no scale for {many(zeroed + clamped, 'group')} of nonzero "
        f"values: {zeroed} became zero, {clamped} were clamped; most in {worst}, {lost} of {groups} "
        f"({percent(lost / groups)})"
    ]


FEWEST_SEQUENCES = 5  # that an interval over sequences is told of


def has_interval(part: Interval) -> bool:
    """Whether `part` comes from sequences enough; else its ends are -inf and inf."""
    return part["low"] != -math.inf


def interval(part: Interval, digits: int = 4, *, sequences: int | None = None) -> str:
    """ "1 to 2", or "n/a, 1 sequence" where so few say nothing of others."""
    if has_interval(part):
        return f"{number(part['low'], digits)} to {number(part['high'], digits)}"
    if sequences is None:
        return "n/a"
    few = many(sequences, "sequence") if sequences < FEWEST_SEQUENCES else f"under {FEWEST_SEQUENCES} finite sequences"
    return f"n/a, {few}"


_ENDLESS = re.compile(r'^( *(?:"(?:[^"\\]|\\.)*": )?-?)Infinity(?=,?$)', re.MULTILINE)


def json_text(document: object) -> str:
    """One indented JSON document. An end that no interval has is -1e999 or 1e999, which is JSON and is read as
    infinite: a null would count as 0 or as less than any limit where scripts compare."""
    return _ENDLESS.sub(r"\g<1>1e999", json.dumps(document, indent=2))
