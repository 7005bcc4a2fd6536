"""Draw the stages of a prompt side by side with Pillow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luvc_fx.apps.picture.areas import GONE, Stage

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

    Font = FreeTypeFont | BitmapFont

WIDTH = 1168
"""Pixels that the panels of one line share."""
LARGEST, LARGEST_OF_SEVERAL = 320, 200
"""Longest side of a frame at one stage, in pixels, where its patches are no smaller than one pixel."""
COLUMNS = 5
LEAST_COLUMN = 200
"""For the words above a panel."""
FRAMES = 6
"""Frames that are drawn; it is said how many there are."""
GAP, MARGIN, LINE, UNDER_HEAD = 16, 20, 20, 6
TITLE, SMALL = 16, 13
PAPER, INK, GREY = (255, 255, 255), (25, 25, 28), (105, 105, 112)
GONE_SHADE, ABSORBED_SHADE = 0.12, 0.4
"""Brightness of an area that no token stands for, and of one whose token was averaged into another."""
BORDER = (255.0, 255.0, 255.0)
BORDER_OPACITY = 0.55
LEAST_CELL = 4
"""Pixels on the side of a patch from which on borders are drawn between single patches."""


def draw(stages: list[Stage], frames: list[Tensor], notes: list[str]) -> Image:
    """One picture of all stages.

    Args:
        frames: uint8 ``[height, width, 3]`` for each frame of the stages.
        notes: lines below it.
    """
    from PIL import Image, ImageDraw

    shown = frames[:FRAMES]
    if len(frames) > FRAMES:
        notes = [f"The first {FRAMES} of {len(frames)} images, tiles or frames are drawn.", *notes]
    columns = math.ceil(len(stages) / math.ceil(len(stages) / COLUMNS))
    largest = LARGEST if len(shown) == 1 else LARGEST_OF_SEVERAL
    side = min(largest, (WIDTH - (columns - 1) * GAP) // columns)
    cells = [[panel(frame, stage, i, side) for stage in stages] for i, frame in enumerate(shown)]
    title, small = _font(TITLE), _font(SMALL)
    column = max(LEAST_COLUMN, *(row[0].width for row in cells))
    width = 2 * MARGIN + columns * column + (columns - 1) * GAP
    heads = [
        [(line, INK, title) for line in _wrapped(stage.title[:1].upper() + stage.title[1:], title, column)]
        + [(line, GREY, small) for line in _wrapped(_counts(stage), small, column)]
        for stage in stages
    ]
    lines = [line for note in notes for line in _wrapped(note, small, width - 2 * MARGIN)]
    groups = [range(first, min(first + columns, len(stages))) for first in range(0, len(stages), columns)]
    rows = [row[0].height for row in cells]
    tops = [max(len(heads[i]) for i in group) * LINE + UNDER_HEAD for group in groups]
    body = sum(tops) + len(groups) * (sum(rows) + GAP * len(rows))
    height = 2 * MARGIN + body + LINE * len(lines)
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    y = MARGIN
    for group, top in zip(groups, tops, strict=True):
        for place, number in enumerate(group):
            x = MARGIN + place * (column + GAP)
            up = y + top - UNDER_HEAD - LINE * len(heads[number])
            for i, (line, colour, font) in enumerate(heads[number]):
                pen.text((x, up + i * LINE), line, colour, font)
        y += top
        for row, tall in zip(cells, rows, strict=True):
            for place, number in enumerate(group):
                page.paste(row[number], (MARGIN + place * (column + GAP), y))
            y += tall + GAP
    for i, line in enumerate(lines):
        pen.text((MARGIN, y + i * LINE), line, GREY, small)
    return page


def panel(frame: Tensor, stage: Stage, number: int, side: int) -> Image:
    """Frame `number` at one stage: each token's area framed, that of merged patches in their mean colour.

    Args:
        frame: uint8 ``[height, width, 3]``; side: the longest that the panel may be, in pixels.
    """
    from PIL import Image

    owners, absorbed = stage.owners[number], stage.absorbed[number]
    height, width = owners.shape
    cell = max(1, side // max(height, width))
    size = (width * cell, height * cell)
    picture = Image.fromarray(frame.numpy()).resize(size, Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)
    own = torch.where(absorbed, GONE, owners)
    shade = torch.where(absorbed, ABSORBED_SHADE, torch.where(owners == GONE, GONE_SHADE, 1.0))
    shade = shade.to(torch.float32)
    own, shade = (part.repeat_interleave(cell, 0).repeat_interleave(cell, 1) for part in (own, shade))
    merged = _sizes(own) > stage.patches * cell * cell
    colours = torch.where(merged.unsqueeze(-1), _mean_colours(pixels.float(), own), pixels.float())
    colours = colours * shade.unsqueeze(-1)
    if cell >= LEAST_CELL:
        lines = torch.tensor(BORDER, dtype=torch.float32) * BORDER_OPACITY + colours * (1 - BORDER_OPACITY)
        colours = torch.where(_edges(own).unsqueeze(-1), lines, colours)
    return Image.fromarray(colours.round().clamp(0, 255).to(torch.uint8).numpy())


def _sizes(own: Tensor) -> Tensor:
    """Per pixel how many the token has, 0 where there is none."""
    counts = torch.bincount((own + 1).flatten())
    counts[0] = 0
    return counts[own + 1]


def _mean_colours(pixels: Tensor, own: Tensor) -> Tensor:
    numbers = (own + 1).flatten()
    sums = torch.zeros(int(numbers.max()) + 1, 3, dtype=torch.float32)
    sums = sums.index_add(0, numbers, pixels.reshape(-1, 3))
    counts = torch.bincount(numbers).clamp(min=1).unsqueeze(-1)
    return (sums / counts)[numbers].reshape(pixels.shape)


def _edges(own: Tensor) -> Tensor:
    """The first pixels, from above and from the left, of another token or of none."""
    edge = torch.zeros_like(own, dtype=torch.bool)
    edge[1:] |= own[1:] != own[:-1]
    edge[:, 1:] |= own[:, 1:] != own[:, :-1]
    return edge


def _counts(stage: Stage) -> str:
    text = f"{stage.tokens} {stage.what}"
    if stage.tokens != stage.before:
        text = f"{stage.tokens} of {stage.before} {stage.what} left ({stage.tokens / stage.before:.0%})"
    return text + (f", {stage.ends} of them line ends" if stage.ends else "")


def _font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
