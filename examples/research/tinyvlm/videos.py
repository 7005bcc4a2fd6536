"""Procedural videos on crops of real photos: things that appear, move and stand still.

``film(split, seed, frames)`` returns the same video in every process. A thing that appears in a frame
stays to the end; it moves in a straight line and reaches its end in the last frame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.research.tinyvlm.scenes import (
    COLORS,
    DARK,
    SHAPES,
    SIZE,
    SPLITS,
    Question,
    Thing,
    background,
    paint,
    pick,
    shuffled,
    silhouette,
)

WAYS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0), "still": (0, 0)}
TASKS = ("motion", "start", "end", "first", "last", "moving", "video_color")
STREAM = 20  # added to the split's number, so that videos and images never share random numbers


@dataclass(frozen=True)
class Video:
    """Frames, each with its things (None where a thing is not there yet), and questions."""

    frames: list[tuple[Image.Image, list[Thing | None]]]
    questions: list[Question]
    kind: str = "video"

    @property
    def image(self) -> Image.Image:
        """The last frame."""
        return self.frames[-1][0]


@dataclass(frozen=True)
class _Track:
    shape: str
    color: str
    way: str
    first: int
    boxes: list[tuple[int, int, int, int]]


def film(split: str, seed: int, frames: int) -> Video:
    """The video number ``seed`` of ``split`` with so many ``frames``, 4 or more."""
    rng = np.random.default_rng([SPLITS[split] + STREAM, seed, frames])
    still = background(rng, held_out=split == "test")
    tracks = _tracks(rng, frames)
    looks = [(paint(rng, t.color), t) for t in tracks]
    shown = []
    for f in range(frames):
        image = still.copy()
        things: list[Thing | None] = []
        for ink, t in looks:
            if f < t.first:
                things.append(None)
                continue
            x, y, x1, _ = t.boxes[f]
            image.paste(DARK, (x - 1, y - 1), silhouette(t.shape, x1 - x + 2))
            image.paste(ink, (x, y), silhouette(t.shape, x1 - x))
            things.append(Thing(t.shape, t.color, t.boxes[f]))
        shown.append((image, things))
    return Video(shown, shuffled(rng, _ask(rng, tracks, shown)))


def _tracks(rng: np.random.Generator, frames: int) -> list[_Track]:
    n = int(rng.integers(2, 4))
    colors = pick(rng, tuple(COLORS), n)
    starts = sorted(int(i) for i in rng.permutation(frames // 2 + 1)[:n])
    starts[0] = 0
    order = rng.permutation(n)
    tracks: list[_Track] = []
    for i in range(n):
        for _ in range(60):
            size = int(rng.integers(20, 32))
            way = tuple(WAYS)[rng.choice(5, p=(0.2, 0.2, 0.2, 0.2, 0.2))]
            travel = int(rng.integers(40, 75))
            dx, dy = WAYS[way]
            x, y = (int(v) for v in rng.integers(2, SIZE - size - 1, 2))
            x1, y1 = x + dx * travel, y + dy * travel
            if not (2 <= x1 < SIZE - size - 1 and 2 <= y1 < SIZE - size - 1):
                continue
            if not (_clear(x, size) and _clear(y, size) and _clear(x1, size) and _clear(y1, size)):
                continue
            first = starts[order[i]]
            boxes = []
            for f in range(frames):
                share = max(0.0, (f - first) / (frames - 1 - first))
                a, b = round(x + share * (x1 - x)), round(y + share * (y1 - y))
                boxes.append((a, b, a + size, b + size))
            if all(_apart(box, other.boxes[f]) for other in tracks for f, box in enumerate(boxes)):
                shape = SHAPES[rng.integers(len(SHAPES))]
                tracks.append(_Track(shape, colors[i], way, first, boxes))
                break
    return tracks


def _clear(corner: int, size: int) -> bool:
    """The centre is 3 px or more off every border of the 3 x 3 cells."""
    return min(abs(corner + size / 2 - k * SIZE / 3) for k in (1, 2)) >= 3


def _apart(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[2] + 2 < other[0] or other[2] + 2 < one[0] or one[3] + 2 < other[1] or other[3] + 2 < one[1]


def _ask(
    rng: np.random.Generator, tracks: list[_Track], shown: list[tuple[Image.Image, list[Thing | None]]]
) -> Iterator[Question]:
    shapes = Counter(t.shape for t in tracks)
    by_start = sorted(range(len(tracks)), key=lambda i: tracks[i].first)
    everyone = tuple(range(len(tracks)))
    if len(tracks) > 1:
        for task, i in (("first", by_start[0]), ("last", by_start[-1])):
            other = by_start[1] if task == "first" else by_start[-2]
            if tracks[i].first != tracks[other].first:
                yield Question(task, f"what color appears {task} ?", tracks[i].color, (i,))
    moving = sum(t.way != "still" for t in tracks)
    yield Question("moving", "how many objects move ?", str(moving), everyone)
    for i, t in enumerate(tracks):
        names = [f"{t.color} object", f"{t.color} {t.shape}"] + [t.shape] * (shapes[t.shape] == 1)
        name = names[rng.integers(len(names))]
        yield Question("motion", f"which way does the {name} move ?", t.way, (i,))
        begins = shown[t.first][1][i]
        ends = shown[-1][1][i]
        assert begins is not None
        assert ends is not None
        yield Question("start", f"where does the {name} start ?", begins.cell, (i,))
        yield Question("end", f"where is the {name} at the end ?", ends.cell, (i,))
        if shapes[t.shape] == 1:
            yield Question("video_color", f"what color is the {t.shape} ?", t.color, (i,))
