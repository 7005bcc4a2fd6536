"""Control inputs of an encoder as text, which becomes constants of a graph.

Numbers that say how images are laid out (`image_grid_thw`, `image_sizes` and the like) steer a model's Python
code, and as inputs of a graph they end it wherever they are read. They travel as text, which Dynamo guards on
by value and never makes symbolic (plain integers it would, the second time). In the traced call the text
becomes again what it was made from: lists, or a real tensor, with which a model may do whatever it likes, and
whose values `luvc_fx._compat.known_constants` lets the tracer follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_constant(option: Any) -> str | None:
    """An integer tensor of any shape, or integers in lists one or two deep, as text; None for anything else.

    >>> as_constant(torch.tensor([[1, 8, 8]])), as_constant([(30, 40), (20, 20)]), as_constant([2, 1])
    ('int64|cpu|1,3|1,8,8', 'rows|30,40;20,20', 'row|2,1')
    """
    if isinstance(option, Tensor):
        if option.dtype.is_floating_point or option.dtype.is_complex or option.dtype is torch.bool:
            return None
        dtype = str(option.dtype).removeprefix("torch.")
        return f"{dtype}|{option.device}|{_join(option.shape)}|{_join(option.flatten().tolist())}"
    if not isinstance(option, (list, tuple)):
        return None
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in option]
    if rows and all(type(number) is int for number in rows):
        return f"row|{_join(rows)}"
    lists = all(isinstance(row, (list, tuple)) and row for row in rows)
    if rows and lists and all(type(number) is int for row in rows for number in row):
        return "rows|" + ";".join(_join(row) for row in rows)
    return None


def constant_of(text: str) -> Any:
    """What `as_constant` was given: a tensor of its type, shape and device, or lists. Dynamo traces this."""
    kind, _, rest = text.partition("|")
    if kind == "row":
        return _split(rest)
    if kind == "rows":
        return rows_of(rest)
    device, shape, numbers = rest.split("|")
    return torch.tensor(_split(numbers), dtype=getattr(torch, kind), device=device).reshape(_split(shape))


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


def _join(numbers: Any) -> str:
    return ",".join(map(str, numbers))


def _split(numbers: str) -> list[int]:
    return [int(number) for number in numbers.split(",")] if numbers else []
