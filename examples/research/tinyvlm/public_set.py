"""Scenes of a public set: easy-VQA (Victor Zhou, MIT licence, the package easy-vqa), one shape an image.

Its own test part is our test split; the last of its training images are the tune and the dev split.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from luvc_fx.apps.inputs import read_image

IMAGES = {"train": range(3400), "tune": range(3400, 3700), "dev": range(3700, 4000), "test": range(1000)}
PAPER = 60  # summed difference of the channels from the background's, above which a pixel is the shape's


@lru_cache
def _part(test: bool) -> tuple[dict[int, str], dict[int, list[tuple[str, str]]]]:
    """Path and questions with answers, of each image."""
    import easy_vqa

    paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
    listed = easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
    for text, answer, number in zip(*listed, strict=True):
        asked[number].append((text, answer))
    return paths, asked


def public(split: str, seed: int, size: int) -> tuple[Image.Image, tuple[int, int, int, int], list[Any]]:
    """Image number `seed` of `split` at `size` x `size`, its shape's box, and (task, text, answer) each."""
    numbers = IMAGES[split]
    number = numbers[seed % len(numbers)]
    paths, asked = _part(split == "test")
    image = read_image(Path(paths[number]))
    drawn = np.asarray(image, int)
    ys, xs = np.nonzero(np.abs(drawn - drawn[0, 0]).sum(-1) > PAPER)
    scale = size / image.width
    corners = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    x0, y0, x1, y1 = (round(float(v) * scale) for v in corners)
    questions = [(_task(answer), text.replace("?", " ?"), answer) for text, answer in asked[number]]
    return image.resize((size, size), Image.Resampling.BICUBIC), (x0, y0, x1, y1), questions


def _task(answer: str) -> str:
    if answer in ("yes", "no"):
        return "easy_yes_no"
    return "easy_shape" if answer in ("circle", "rectangle", "triangle") else "easy_color"
