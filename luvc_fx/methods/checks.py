"""Checks of single values, whose messages name the field, its value and what is allowed."""

from __future__ import annotations

import math
import operator
import re
import reprlib
from typing import Any, NoReturn

from torch import nn

ABOVE_ZERO = math.nextafter(0.0, 1.0)
BELOW_ONE = math.nextafter(1.0, 0.0)


class _Short(reprlib.Repr):
    """A `repr` that is never long, and that no value can make fail."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 20
        self.maxstring, self.maxlong, self.maxother = 200, 60, 300

    def repr_int(self, x: int, level: int) -> str:
        """Python prints no number of more than some thousand digits."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            return f"a whole number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """`value` as a message names it: its `repr` in one line, with the middle left out where it is long."""
    return re.sub(r"\s*\n\s*", " ", _Short().repr(value))


def refuse(owner: str, field: str, value: object, allowed: str) -> NoReturn:
    """Raise the `ValueError` that every check here raises."""
    where = f"{owner}.{field}" if owner else field
    raise ValueError(f"{where} is {shown(value)}; allowed: {allowed}")


INT64 = 1 << 63
"""Whole numbers of tensors are below it."""


def is_whole(value: object) -> bool:
    """Whether it counts something: an `int` of 64 bits, or what stands for one; no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -INT64 <= value < INT64
    kind = type(value)  # arrays, too, have an index where they hold one number
    return hasattr(kind, "__index__") and not hasattr(kind, "__len__")


def is_number(value: object) -> bool:
    """Whether it is a finite `int` or `float`; no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_whole(owner: str, field: str, value: object, low: int) -> None:
    """`value` is a whole number of at least `low`; `owner` may be empty."""
    if not is_whole(value) or value < low:  # type: ignore[operator]
        below = ", below 2^63" if isinstance(value, int) and value >= INT64 else ""
        refuse(owner, field, value, f"a whole number of at least {low}{below}")


def check_bool(owner: str, field: str, value: object) -> None:
    """`value` is True or False; `owner` may be empty."""
    if not isinstance(value, bool):
        refuse(owner, field, value, "True or False")


def check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        refuse(owner, field, value, ", ".join(repr(c) for c in choices))


def check_either(owner: str, first: tuple[str, object], second: tuple[str, object]) -> None:
    """Exactly one of two ``(field, value)`` pairs has a value."""
    if (first[1] is None) == (second[1] is None):
        raise ValueError(
            f"{owner} needs exactly one of {first[0]} and {second[0]}; "
            f"got {first[0]}={shown(first[1])}, {second[0]}={shown(second[1])}"
        )


def set_number(item: Any, field: str, low: float, high: float, allowed: str, optional: bool = False) -> None:
    """A field of a frozen dataclass is a finite number, which becomes a float (or None, if `optional`).

    `low` and `high` are inclusive; callers exclude an end by passing the next float.
    """
    value, owner = getattr(item, field), type(item).__name__
    if value is None and optional:
        return
    if not is_number(value) or not low <= value <= high:
        refuse(owner, field, value, allowed)
    object.__setattr__(item, field, float(value))


def set_integer(item: Any, field: str, low: int, allowed: str, optional: bool = False) -> None:
    """A field of a frozen dataclass is a whole number from `low` on (or None, if `optional`)."""
    value, owner = getattr(item, field), type(item).__name__
    if value is None and optional:
        return
    try:
        number = operator.index(value)
    except TypeError:
        refuse(owner, field, value, allowed)
    if isinstance(value, bool) or number < low:
        refuse(owner, field, value, allowed)
    object.__setattr__(item, field, number)


def check_module(model: Any) -> None:
    """`model` is a module of torch; whether it is one that luvc_fx can compile is another matter."""
    if not isinstance(model, nn.Module):
        refuse("", "model", model, "a model of transformers")


def check_flag(item: Any, field: str) -> None:
    """A field is True or False, and nothing that merely counts as one."""
    check_bool(type(item).__name__, field, getattr(item, field))
