"""Draw a shipped set of images with questions and answers.

usage: scripts/make/omni.py [--set omni-v1] [--out calib/omni-v1]

Key idea: a program that draws an image knows all that is to be seen in it, so answers are right without a model or a
person, and nobody else has a right in them. What is drawn is decided by hashes, not by a random generator, so that the
records are the same with every version of Python; pixels also hang on Pillow's version. The two sets have words and
sentences of their own: they share no 13 words in a row, and no image.

Letters are Pillow's own default, Aileron by Sora Sagano (CC0). Origin and licence: `calib/README.md`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw, ImageFont

CALIB = Path(__file__).resolve().parents[2] / "calib"
INK, SHADE, AXIS = (20, 20, 20), (216, 222, 228), (90, 90, 90)
PAPERS = ((255, 255, 255), (248, 244, 232), (232, 240, 248))
PAINTS = {
    "red": (214, 48, 49),
    "green": (39, 148, 84),
    "blue": (46, 98, 200),
    "yellow": (241, 196, 15),
    "purple": (125, 60, 152),
    "orange": (230, 126, 34),
    "grey": (127, 140, 141),
    "black": (30, 30, 30),
}
Record = dict[str, Any]
Box = tuple[int, int, int, int]
T = TypeVar("T")


class Dice:
    """Numbers that depend on a name alone."""

    def __init__(self, name: str) -> None:
        self._numbers = (
            int.from_bytes(hashlib.sha256(f"{name} {count}".encode()).digest()[:8], "big")
            for count in itertools.count()
        )

    def below(self, limit: int) -> int:
        return next(self._numbers) % limit

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def one(self, among: Sequence[T]) -> T:
        return among[self.below(len(among))]

    def some(self, among: Sequence[T], count: int) -> list[T]:
        left = list(among)
        return [left.pop(self.below(len(left))) for _ in range(count)]


@dataclass(frozen=True)
class Voice:
    """The words of a set. Sentences have places in braces; each is one of several."""

    things: Sequence[str]
    names: Sequence[str]
    places: Sequence[str]
    titles: Sequence[str]
    asks: dict[str, Sequence[str]]  # by domain
    bar: Sequence[str]
    extremes: Sequence[str]
    sums: Sequence[str]
    shape: Sequence[str]
    relation: Sequence[str]
    row: Sequence[str]
    paragraphs: Sequence[str]
    ends: Sequence[str]


CALIBRATION = Voice(
    things=[
        "apples",
        "bicycles",
        "candles",
        "drums",
        "eggs",
        "fences",
        "gloves",
        "hammers",
        "kites",
        "lamps",
        "maps",
        "nails",
    ],
    names=["Ada", "Boris", "Chen", "Dolores", "Emeka", "Farah", "Goran", "Hanna"],
    places=["the harbour", "the old mill", "room 14", "the north gate", "the library", "the market hall"],
    titles=["Stock in March", "Sold this week", "Orders by kind", "Repairs in a year", "Loans of the depot"],
    asks={
        "charts": ("Read this chart to me.", "What does the chart say, value by value?", "Turn the chart into text."),
        "shapes": ("Which shapes are there, and where?", "Describe the drawing.", "List what is drawn."),
        "pages": ("Transcribe this page.", "What is written here?", "Type out the text of the image."),
        "tables": ("Read the table row by row.", "What are the entries of this table?", "Write the table as text."),
    },
    bar=("{thing} stand at {value}", "there are {value} {thing}", "for {thing} it shows {value}"),
    extremes=("The largest is {most}, the smallest {least}.", "At the top is {most}, and {least} comes last."),
    sums=("Together they make {total}.", "All of them add up to {total}."),
    shape=("a {colour} {kind} of {size} pixels at the {where}", "{where}: a {kind}, {colour}, {size} pixels across"),
    relation=("The {first} lies {side} the {second}.", "Seen from the {second}, the {first} is {side} it."),
    row=("{name} has {values}.", "In the line of {name} stand {values}."),
    paragraphs=(
        "Dear {name}, the {thing} that you left at {place} are ready. Please fetch them before {hour}.",
        "NOTICE. From {day} on {place} opens at {hour}. Bring {value} {thing} and the yellow card.",
        "{name} asked for {value} {thing}. We found {other}, counted them twice, and put them into {place}.",
        "Invoice {number}. {value} {thing} at {price} each, carried to {place}. Payable to {name} within {other} days.",
    ),
    ends=("That is all.", "Nothing else is shown.", "There is no more in it."),
)
HELD_OUT = Voice(
    things=[
        "anchors",
        "barrels",
        "carpets",
        "dominoes",
        "envelopes",
        "flutes",
        "globes",
        "hinges",
        "jackets",
        "kettles",
        "ladders",
        "mirrors",
    ],
    names=["Ingrid", "Jamal", "Keiko", "Liam", "Mariana", "Nikolai", "Oksana", "Pedro"],
    places=["the west wing", "pier 7", "the greenhouse", "the second floor", "the bakery", "the tram depot"],
    titles=[
        "Counted on Monday",
        "Deliveries, first half",
        "Visitors' choice",
        "Found and returned",
        "In the warehouse",
    ],
    asks={
        "charts": ("Please summarise the diagram.", "How high is each entry here?", "Explain this figure in words."),
        "shapes": ("Tell me about every figure in the picture.", "What has been painted here?", "Name all the forms."),
        "pages": ("Copy the letter word for word.", "Could you read this sheet aloud?", "Extract the wording."),
        "tables": ("Go through the grid line by line.", "Give me the numbers of the grid.", "Spell the grid out."),
    },
    bar=("the number of {thing} is {value}", "{value} belongs to {thing}", "one reads {value} beside {thing}"),
    extremes=("Nothing exceeds {most}, and nothing is below {least}.", "Highest comes {most}; lowest, {least}."),
    sums=("The whole amounts to {total}.", "In total one counts {total}."),
    shape=("one {kind} painted {colour}, {size} wide, {where}", "near the {where} a {colour} {kind} ({size} in width)"),
    relation=("You find the {first} {side} the {second}.", "{side} the {second} there is the {first}."),
    row=("Beside {name} one finds {values}.", "{name}: {values}."),
    paragraphs=(
        "To {name}: your parcel of {value} {thing} waits in {place} until {hour}, then it goes back.",
        "Attention! On {day} no {thing} can be lent in {place}. We are sorry, and open again at {hour}.",
        "Minutes: {name} counted {value} {thing}, {other} of them broken. The rest moves to {place}.",
        "Receipt no. {number}: {thing}, {value} pieces, {price} a piece. Sold by {name} in {place}, {other} returned.",
    ),
    ends=("This completes the picture.", "I can make out no further detail.", "Beyond that it is empty."),
)
SETS = {"omni-v1": (CALIBRATION, 48), "omni-heldout-v1": (HELD_OUT, 32)}  # and how many records a domain


# --- drawing ----------------------------------------------------------------------------------------------------------


def canvas(dice: Dice) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Sides that are mostly no whole number of patches, as people's are."""
    size = dice.between(200, 400), dice.between(180, 340)
    image = Image.new("RGB", size, dice.one(PAPERS))
    return image, ImageDraw.Draw(image)


def font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow has no FreeType"
    return found


def data_url(image: Image.Image) -> str:
    """Stored with a palette of what is drawn with, and of steps between ink and paper, which letters' edges have."""
    steps = [
        tuple((a * n + b * (6 - n)) // 6 for a, b in zip(INK, page, strict=True)) for page in PAPERS for n in range(7)
    ]
    colours = [*PAINTS.values(), *PAPERS, SHADE, AXIS, *steps]
    palette = Image.new("P", (1, 1))
    palette.putpalette([level for colour in colours for level in colour])
    out = io.BytesIO()
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def chart(dice: Dice, voice: Voice) -> tuple[Image.Image, list[str]]:
    """Bars, a line or sectors, and what they say."""
    image, draw = canvas(dice)
    things = dice.some(voice.things, dice.between(3, 6))
    values = dice.some(range(2, 100), len(things))
    paints = dice.some(list(PAINTS.values()), len(things))
    title = dice.one(voice.titles)
    draw.text((8, 4), title, INK, font(16))
    dice.one((bars, line, sectors))(draw, (10, 30, image.width - 10, image.height - 26), things, values, paints)
    told = [dice.one(voice.bar).format(thing=thing, value=value) for thing, value in zip(things, values, strict=True)]
    most, least = (things[values.index(pick(values))] for pick in (max, min))
    said = [f"{title}: {'; '.join(told)}.", dice.one(voice.extremes).format(most=most, least=least)]
    return image, [*said, dice.one(voice.sums).format(total=sum(values))]


def bars(draw: ImageDraw.ImageDraw, box: Box, things: list[str], values: list[int], paints: list[Any]) -> None:
    left, top, right, bottom = box
    step = (right - left) / len(things)
    for number, (thing, value, paint) in enumerate(zip(things, values, paints, strict=True)):
        x, high = left + step * number, (bottom - top - 14) * value / 100
        draw.rectangle((x + 3, bottom - high, x + step - 3, bottom), paint)
        draw.text((x + 3, bottom - high - 14), str(value), INK, font(12))
        draw.text((x + 3, bottom + 2 + 10 * (number % 2)), thing, INK, font(11))


def line(draw: ImageDraw.ImageDraw, box: Box, things: list[str], values: list[int], paints: list[Any]) -> None:
    left, top, right, bottom = box
    step = (right - left - 40) / max(1, len(things) - 1)
    points = [(left + 8 + step * n, bottom - (bottom - top - 14) * v / 100) for n, v in enumerate(values)]
    draw.line((left, top, left, bottom, right, bottom), AXIS, 2)
    draw.line([number for point in points for number in point], paints[0], 3)
    for number, ((x, y), value, thing) in enumerate(zip(points, values, things, strict=True)):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), paints[0])
        draw.text((x + 4, y - 14), str(value), INK, font(12))
        draw.text((x - 6, bottom + 2 + 10 * (number % 2)), thing, INK, font(11))


def sectors(draw: ImageDraw.ImageDraw, box: Box, things: list[str], values: list[int], paints: list[Any]) -> None:
    left, top, right, bottom = box
    side, begin = min(bottom - top, (right - left) * 3 // 5), 0.0
    for number, (thing, value, paint) in enumerate(zip(things, values, paints, strict=True)):
        end = begin + 360 * value / sum(values)
        draw.pieslice((left, top, left + side, top + side), begin, end, paint)
        begin, y = end, top + 18 * number
        draw.rectangle((left + side + 8, y + 2, left + side + 18, y + 12), paint)
        draw.text((left + side + 22, y), f"{thing} {value}", INK, font(11))


def shapes(dice: Dice, voice: Voice) -> tuple[Image.Image, list[str]]:
    """A few forms in a grid of nine, and where they lie."""
    image, draw = canvas(dice)
    cells = dice.some([(row, column) for row in range(3) for column in range(3)], dice.between(2, 6))
    colours, told, named = dice.some(list(PAINTS), len(cells)), [], []
    for (row, column), colour in zip(cells, colours, strict=True):
        side = dice.between(28, min(image.width, image.height) // 3 - 6)
        x, y = (2 * column + 1) * image.width // 6, (2 * row + 1) * image.height // 6
        kind = dice.one(("circle", "square", "triangle", "ring", "cross"))
        form(draw, kind, (x - side // 2, y - side // 2, x + side // 2, y + side // 2), PAINTS[colour])
        where = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
        told.append(dice.one(voice.shape).format(colour=colour, kind=kind, size=side, where=where))
        named.append((row, column, f"{colour} {kind}"))
    (row, column, first), (other_row, other_column, second) = named[:2]
    side_of = ("left of" if column < other_column else "right of") if column != other_column else ""
    side_of = side_of or ("above" if row < other_row else "below")
    related = dice.one(voice.relation).format(first=first, second=second, side=side_of)
    return image, ["; ".join(told) + ".", related[0].upper() + related[1:]]


def form(draw: ImageDraw.ImageDraw, kind: str, box: Box, paint: tuple[int, int, int] | int) -> None:
    left, top, right, bottom = box
    third = (right - left) // 3
    if kind == "circle":
        draw.ellipse(box, paint)
    elif kind == "square":
        draw.rectangle(box, paint)
    elif kind == "triangle":
        draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), paint)
    elif kind == "ring":
        draw.ellipse(box, outline=paint, width=max(3, third // 2))
    else:
        draw.rectangle((left + third, top, right - third, bottom), paint)
        draw.rectangle((left, top + third, right, bottom - third), paint)


def pages(dice: Dice, voice: Voice) -> tuple[Image.Image, list[str]]:
    """Typed paragraphs, in one size of letters."""
    image, draw = canvas(dice)
    size, y = dice.between(13, 19), 8
    texts: list[str] = []
    for template in dice.some(voice.paragraphs, 3):
        text = template.format(
            name=dice.one(voice.names),
            thing=dice.one(voice.things),
            place=dice.one(voice.places),
            day=dice.one(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")),
            hour=f"{dice.between(6, 21)}:{dice.between(10, 59)}",
            value=dice.between(11, 99),
            other=dice.between(2, 10),
            number=dice.between(1000, 9999),
            price=f"{dice.between(1, 90)}.{dice.between(10, 99)}",
        )
        lines = wrapped(text, font(size), image.width - 20)
        if texts and y + len(lines) * (size + 4) > image.height:
            break
        for row in lines:
            draw.text((10, y), row, INK, font(size))
            y += size + 4
        texts.append(text)
        y += size // 2
    return image, ["\n\n".join(texts)]


def wrapped(text: str, letters: ImageFont.FreeTypeFont, width: int) -> list[str]:
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if letters.getlength(longer) <= width:
            out[-1] = longer
        else:
            out.append(word)
    return out


def tables(dice: Dice, voice: Voice) -> tuple[Image.Image, list[str]]:
    """A head, then names with numbers."""
    image, draw = canvas(dice)
    columns, names = dice.some(voice.things, dice.between(2, 3)), dice.some(voice.names, dice.between(3, 6))
    wide, high = (image.width - 16) // (len(columns) + 1), min(28, (image.height - 16) // (len(names) + 1))
    rows = [["", *columns], *([name, *(str(dice.between(0, 999)) for _ in columns)] for name in names)]
    for number, row in enumerate(rows):
        if number % 2:
            draw.rectangle((8, 8 + number * high, image.width - 8, 8 + (number + 1) * high), SHADE)
        for place, entry in enumerate(row):
            draw.text((12 + place * wide, 8 + number * high + high // 4), entry, INK, font(13))
    told = [
        dice.one(voice.row).format(
            name=row[0], values=", ".join(f"{value} {thing}" for thing, value in zip(columns, row[1:], strict=True))
        )
        for row in rows[1:]
    ]
    return image, told


# --- records ----------------------------------------------------------------------------------------------------------

DRAWN: dict[str, Callable[[Dice, Voice], tuple[Image.Image, list[str]]]] = {
    "charts": chart,
    "pages": pages,
    "shapes": shapes,
    "tables": tables,
}


def records(name: str, domain: str) -> Iterator[Record]:
    """One image and one question mostly; every fourth record goes on with a second of its kind."""
    voice, count = SETS[name]
    for number in range(count):
        dice, messages = Dice(f"{name} {domain} {number}"), []
        for _ in range(1 + (number % 4 == 3)):
            image, told = DRAWN[domain](dice, voice)
            asked = {"type": "text", "text": dice.one(voice.asks[domain])}
            shown = {"type": "image", "image": data_url(image)}
            messages.append({"role": "user", "content": [shown, asked] if dice.below(3) else [asked, shown]})
            said = [*told, dice.one(voice.ends)] if domain != "pages" else told
            messages.append({"role": "assistant", "content": " ".join(said)})
        yield {"messages": messages, "domain": domain}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--set", choices=sorted(SETS), default="omni-v1")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or CALIB / arguments.set
    out.mkdir(parents=True, exist_ok=True)
    for domain in DRAWN:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records(arguments.set, domain)]
        path = out / f"{domain}.jsonl.xz"
        path.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{path}: {len(lines)} records, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
