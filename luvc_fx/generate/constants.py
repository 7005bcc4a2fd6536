"""Small integer tensors as constants: as text, and as what stands for them in a traced call.

Sizes of images (`image_grid_thw`, `image_sizes` and the like) steer a model's Python code, and as tensors
they end graphs wherever they are read. They travel as text, which Dynamo guards on by value and never makes
symbolic (plain integers it would, the second time), and are read back inside the traced call.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


class Lengths:
    """Stands for an integer vector, as far as the encoders use one; made while a call is traced."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __getitem__(self, index: slice) -> Lengths:
        return Lengths(self.values[index])

    def __sub__(self, other: Lengths) -> Lengths:
        return Lengths([a - b for a, b in zip(self.values, other.values, strict=True)])

    def __floordiv__(self, number: int) -> Lengths:
        return Lengths([value // number for value in self.values])

    def tolist(self) -> list[int]:
        """The numbers."""
        return list(self.values)


class Grids:
    """Stands for `image_grid_thw` ``[images, 3]``."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def prod(self, dim: int = -1) -> Lengths:
        """Patches of each image."""
        return Lengths([math.prod(row) for row in self.rows])

    def tolist(self) -> list[list[int]]:
        """The rows."""
        return [list(row) for row in self.rows]


def as_text(numbers: Any) -> str:
    """Integers ``[n]`` or ``[n, k]``, a tensor or lists, as text: ``"1,8,8;1,4,12"`` or ``"1;2"``."""
    rows = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    return ";".join(
        ",".join(str(int(number)) for number in (row if isinstance(row, (list, tuple)) else [row]))
        for row in rows
    )


def rows_of(text: str) -> list[list[int]]:
    """The integers of `as_text`; this may be traced."""
    return [[int(number) for number in row.split(",")] for row in text.split(";")]
