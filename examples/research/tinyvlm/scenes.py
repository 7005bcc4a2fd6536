"""Procedural scenes on crops of real photos, with exact ground truth.

``sample(split, seed)`` returns the same scene in every process.  The splits use disjoint random
streams, and the test split also uses photo regions (the right 30 % of every photo) that no other
split ever sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from pathlib import Path

import matplotlib
import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from examples.research.tinyvlm.public_set import public
from luvc_fx.apps.inputs import read_image

SIZE = 128
SPLITS = {"train": 0, "tune": 1, "dev": 2, "test": 3}
KINDS = ("objects", "chart", "cards")
KIND_SHARE = (0.5, 0.3, 0.2)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (225, 40, 40),
    "orange": (250, 140, 25),
    "yellow": (245, 225, 50),
    "green": (40, 170, 60),
    "cyan": (60, 215, 225),
    "blue": (45, 80, 225),
    "purple": (150, 55, 195),
    "white": (243, 243, 243),
}
CELLS = (
    ("top-left", "top", "top-right"),
    ("left", "center", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
TASKS = {
    "objects": ("color", "shape", "position", "count", "count_color"),
    "chart": ("bar_value", "tallest", "shortest"),
    "cards": ("card_digit", "card_color"),
    "page": ("row_number", "row_count"),
    "easy": ("easy_yes_no", "easy_shape", "easy_color"),
}
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
)
TEST_REGION = 0.7  # photo columns right of this share of the width are only used by the test split
DARK = (25, 25, 25)


@dataclass(frozen=True)
class Question:
    """One question about a scene; ``answer`` is a word, or the words of a number's digits.

    ``about`` holds the indices in ``Scene.things`` of what the answer has to be read from.
    """

    task: str
    text: str
    answer: str
    about: tuple[int, ...] = ()


@dataclass(frozen=True)
class Thing:
    """Something drawn: ``box`` is (x0, y0, x1, y1) in pixels; ``number`` is a digit or a height."""

    shape: str
    color: str
    box: tuple[int, int, int, int]
    number: int | None = None

    @property
    def center(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def cell(self) -> str:
        """Word of the 3x3 cell that holds the centre."""
        x, y = self.center
        return CELLS[int(3 * y / SIZE)][int(3 * x / SIZE)]


@dataclass(frozen=True)
class Scene:
    """An image with its kind, its questions and what was drawn on it."""

    image: Image.Image
    kind: str
    questions: list[Question]
    things: list[Thing]

    @property
    def frames(self) -> list[tuple[Image.Image, list[Thing | None]]]:
        """The image and what is on it, as a video of one frame."""
        return [(self.image, list(self.things))]


def sample(split: str, seed: int, kind: str | None = None) -> Scene:
    """The scene number ``seed`` of ``split``; ``kind`` forces a scene type."""
    if kind == "easy":
        return _easy(split, seed)
    rng = np.random.default_rng([SPLITS[split], seed])
    drawn = KINDS[rng.choice(len(KINDS), p=KIND_SHARE)]
    kind = kind or drawn
    image = background(rng, held_out=split == "test")
    draw = {"objects": _objects, "chart": _chart, "cards": _cards, "page": _page}[kind]
    things, questions = draw(rng, image)
    return Scene(image, kind, questions, things)


def _easy(split: str, seed: int) -> Scene:
    """A scene of the public set; its words of colour and shape are from the answers about it."""
    image, box, asked = public(split, seed, SIZE)
    known = {task: answer for task, _, answer in asked}
    thing = Thing(known.get("easy_shape", ""), known.get("easy_color", ""), box)
    return Scene(image, "easy", [Question(*each, about=(0,)) for each in asked], [thing])


@lru_cache
def _photos() -> list[Image.Image]:
    folder = Path(skimage.__file__).parent / "data"
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photos = [read_image(p) for p in [*(folder / n for n in PHOTOS), hopper]]
    for photo in photos:
        photo.thumbnail((512, 512))
    return photos


def background(rng: np.random.Generator, held_out: bool) -> Image.Image:
    """A random square crop of a photo, flipped, dimmed and slightly desaturated at random."""
    photos = _photos()
    photo = photos[rng.integers(len(photos))]
    border = int(photo.width * TEST_REGION)
    left, right = (border, photo.width) if held_out else (0, border)
    limit = min(right - left, photo.height)
    side = int(limit * rng.uniform(0.6, 1.0)) if held_out else int(limit * rng.uniform(0.3, 1.0))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, photo.height - side + 1))
    image = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.4, 0.9))
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.55, 0.9))


def paint(rng: np.random.Generator, color: str) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.array(COLORS[color]) + rng.integers(-12, 13, 3), 0, 255))


@lru_cache(maxsize=512)
def silhouette(shape: str, size: int) -> Image.Image:
    """Anti-aliased silhouette, (size, size), mode L."""
    big = 4 * size
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    last = big - 1
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
        if shape == "ring":
            inset = int(0.27 * big)
            draw.ellipse((inset, inset, last - inset, last - inset), fill=0)
    elif shape == "square":
        inset = int(0.06 * big)
        draw.rectangle((inset, inset, last - inset, last - inset), fill=255)
    elif shape == "triangle":
        draw.polygon([(big / 2, 0), (last, last), (0, last)], fill=255)
    elif shape == "cross":
        a, b = int(0.33 * big), int(0.67 * big)
        draw.rectangle((a, 0, b, last), fill=255)
        draw.rectangle((0, a, last, b), fill=255)
    else:  # star
        radii = [big / 2 if i % 2 == 0 else 0.2 * big for i in range(10)]
        draw.polygon(
            [(big / 2 + r * sin(i * pi / 5), big / 2 - r * cos(i * pi / 5)) for i, r in enumerate(radii)],
            fill=255,
        )
    return mask.resize((size, size), Image.Resampling.BOX)


def _place(rng: np.random.Generator, sizes: list[int], tries: int = 80) -> list[tuple[int, int, int, int]]:
    """Boxes that do not overlap and whose centres are 3 px or more off every 3x3 cell border."""
    boxes: list[tuple[int, int, int, int]] = []
    for size in sizes:
        for _ in range(tries):
            x, y = (int(v) for v in rng.integers(2, SIZE - size - 1, 2))
            off = min(abs(v + size / 2 - k * SIZE / 3) for v in (x, y) for k in (1, 2))
            free = all(x + size + 3 < a or c + 3 < x or y + size + 3 < b or d + 3 < y for a, b, c, d in boxes)
            if off >= 3 and free:
                boxes.append((x, y, x + size, y + size))
                break
    return boxes


def pick(rng: np.random.Generator, options: tuple[str, ...], count: int) -> list[str]:
    return [options[i] for i in rng.permutation(len(options))[:count]]


def _objects(rng: np.random.Generator, image: Image.Image) -> tuple[list[Thing], list[Question]]:
    n = int(rng.integers(1, 7))
    sizes = sorted((int(s) for s in rng.integers(18, 41 if n < 4 else 33, n)), reverse=True)
    palette = pick(rng, tuple(COLORS), int(rng.integers(1, 7)))
    kinds = pick(rng, SHAPES, int(rng.integers(3, 7)))
    things = []
    for box in _place(rng, sizes):
        shape = kinds[rng.integers(len(kinds))]
        color = palette[rng.integers(len(palette))]
        x, y, x1, _ = box
        size = x1 - x
        image.paste(DARK, (x - 1, y - 1), silhouette(shape, size + 2))
        image.paste(paint(rng, color), (x, y), silhouette(shape, size))
        things.append(Thing(shape, color, box))
    return things, shuffled(rng, _ask_objects(rng, things))


def _ask_objects(rng: np.random.Generator, things: list[Thing]) -> Iterator[Question]:
    shapes = Counter(t.shape for t in things)
    colors = Counter(t.color for t in things)
    both = Counter((t.color, t.shape) for t in things)
    yield Question("count", "how many objects are there ?", str(len(things)), tuple(range(len(things))))
    absent = pick(rng, tuple(c for c in COLORS if c not in colors), 1)
    for color in [*colors, *absent]:
        if colors[color] == 1 and rng.random() < 0.6:
            continue  # most colours occur once; without this "1" would be most of the answers
        text = f"how many {color} objects are there ?"
        about = tuple(i for i, t in enumerate(things) if t.color == color)
        yield Question("count_color", text, str(colors[color]), about)
    for i, t in enumerate(things):
        names = []
        if shapes[t.shape] == 1:
            yield Question("color", f"what color is the {t.shape} ?", t.color, (i,))
            names.append(t.shape)
        if colors[t.color] == 1:
            yield Question("shape", f"what shape is the {t.color} object ?", t.shape, (i,))
            names.append(f"{t.color} object")
        if both[t.color, t.shape] == 1:
            names.append(f"{t.color} {t.shape}")
        if names:
            name = names[rng.integers(len(names))]
            yield Question("position", f"where is the {name} ?", t.cell, (i,))


def _chart(rng: np.random.Generator, image: Image.Image) -> tuple[list[Thing], list[Question]]:
    unit = 11
    n = int(rng.integers(3, 7))
    base = int(rng.integers(115, 123))
    left = int(rng.integers(6, 13))
    slot = (SIZE - 6 - left) // n
    width = int(slot * rng.uniform(0.6, 0.85))
    grid = Image.new("RGB", (SIZE - 8, 1), (255, 255, 255))
    for k in range(10):
        image.paste(grid, (4, base - k * unit), Image.new("L", grid.size, 160 if k == 0 else 70))
    draw = ImageDraw.Draw(image)
    things = []
    for i, color in enumerate(pick(rng, tuple(COLORS), n)):
        value = int(rng.integers(1, 10))
        x = left + i * slot
        box = (x, base - value * unit, x + width, base)
        draw.rectangle(box, fill=paint(rng, color), outline=DARK)
        things.append(Thing("bar", color, box, value))
    return things, shuffled(rng, _ask_chart(things))


def _ask_chart(things: list[Thing]) -> Iterator[Question]:
    order = sorted(range(len(things)), key=lambda i: things[i].number or 0)
    low, high = order[0], order[-1]
    if things[high].number != things[order[-2]].number:
        yield Question("tallest", "which bar is tallest ?", things[high].color, (high,))
    if things[low].number != things[order[1]].number:
        yield Question("shortest", "which bar is shortest ?", things[low].color, (low,))
    for i, t in enumerate(things):
        text = f"what is the value of the {t.color} bar ?"
        yield Question("bar_value", text, str(t.number), (i,))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), size)


def _cards(rng: np.random.Generator, image: Image.Image) -> tuple[list[Thing], list[Question]]:
    n = int(rng.integers(2, 5))
    boxes = _place(rng, sorted((int(s) for s in rng.integers(34, 47, n)), reverse=True))
    draw = ImageDraw.Draw(image)
    things = []
    for box, color in zip(boxes, pick(rng, tuple(COLORS), n), strict=False):
        digit = int(rng.integers(0, 10))
        x0, y0, x1, _ = box
        draw.rounded_rectangle(box, 5, fill=paint(rng, color), outline=DARK)
        ink = (245, 245, 245) if color in ("red", "blue", "purple") else DARK
        middle = ((x0 + x1) / 2, (y0 + x1 - x0 + y0) / 2)
        draw.text(middle, str(digit), ink, _font(int(0.8 * (x1 - x0))), anchor="mm")
        things.append(Thing("card", color, box, digit))
    return things, shuffled(rng, _ask_cards(things))


def _ask_cards(things: list[Thing]) -> Iterator[Question]:
    digits = Counter(t.number for t in things)
    for i, t in enumerate(things):
        text = f"what number is on the {t.color} card ?"
        yield Question("card_digit", text, str(t.number), (i,))
        if digits[t.number] == 1:
            text = f"what color is the card with {t.number} ?"
            yield Question("card_color", text, t.color, (i,))


def _page(rng: np.random.Generator, image: Image.Image) -> tuple[list[Thing], list[Question]]:
    """A sheet with numbers of two digits, one a row, each row tinted."""
    n = int(rng.integers(2, 6))
    high = int(rng.integers(17, 22))
    wide = int(rng.integers(70, 105))
    x0 = int(rng.integers(3, SIZE - wide - 3))
    y0 = int(rng.integers(3, SIZE - n * high - 7))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x0 - 2, y0 - 2, x0 + wide + 2, y0 + n * high + 2), fill=(236, 234, 228), outline=DARK)
    things, questions = [], []
    size = high - 3
    for i, color in enumerate(pick(rng, tuple(COLORS), n)):
        top = y0 + i * high
        draw.rectangle((x0, top + 1, x0 + wide, top + high - 1), fill=paint(rng, color))
        ink = (245, 245, 245) if color in ("red", "blue", "purple") else DARK
        left = x0 + int(rng.integers(3, wide - 2 * size))
        digits = (int(rng.integers(1, 10)), int(rng.integers(0, 10)))
        for place, digit in enumerate(digits):
            box = (left + place * size * 3 // 4, top + 1, left + (place + 1) * size * 3 // 4, top + high - 1)
            middle = ((box[0] + box[2]) / 2, top + high / 2)
            draw.text(middle, str(digit), ink, _font(size), anchor="mm")
            things.append(Thing("card", color, box, digit))
        text = f"what number is in the {color} row ?"
        questions.append(Question("row_number", text, " ".join(map(str, digits)), (2 * i, 2 * i + 1)))
    questions.append(Question("row_count", "how many rows are there ?", str(n), tuple(range(2 * n))))
    return things, shuffled(rng, iter(questions))


def shuffled(rng: np.random.Generator, questions: Iterator[Question]) -> list[Question]:
    listed = list(questions)
    return [listed[i] for i in rng.permutation(len(listed))]
