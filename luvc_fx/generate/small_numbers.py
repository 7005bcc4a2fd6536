"""Small integer tensors whose entries are symbols, as far as encoders use them; made while a call is traced.

`image_grid_thw` and the bounds of images steer Python code. In a graph for one size they are constants, as
real tensors (`luvc_fx.generate.constants`); a real tensor cannot hold a symbol that Python code may read.
"""

from __future__ import annotations

import math
from typing import Any


class SmallVector:
    """Stands for an integer tensor ``[n]``. What it lacks ends the graph: sizes are constants then."""

    def __init__(self, numbers: list[Any]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Any:
        return iter(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self.numbers[index]
        return SmallVector(found) if isinstance(index, slice) else found

    def __sub__(self, other: SmallVector) -> SmallVector:
        return SmallVector([a - b for a, b in zip(self.numbers, other.numbers, strict=True)])

    def __floordiv__(self, number: int) -> SmallVector:
        return SmallVector([a // number for a in self.numbers])

    def tolist(self) -> list[Any]:
        """The numbers."""
        return list(self.numbers)


class SmallMatrix:
    """Stands for an integer tensor ``[n, k]``."""

    def __init__(self, rows: list[list[Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def prod(self, dim: int = -1) -> SmallVector:
        """The product of each row."""
        return SmallVector([math.prod(row) for row in self.rows])

    def tolist(self) -> list[list[Any]]:
        """The rows."""
        return [list(row) for row in self.rows]
