"""Checks of single values, whose messages name the field, its value and what is allowed."""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

ABOVE_ZERO = math.nextafter(0.0, 1.0)
BELOW_ONE = math.nextafter(1.0, 0.0)


def refuse(owner: str, field: str, value: object, allowed: str) -> NoReturn:
    """Raise the `ValueError` that every check here raises."""
    raise ValueError(f"{owner}.{field} is {value!r}; allowed: {allowed}")


def check_choice(owner: str, field: str, value: object, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        refuse(owner, field, value, ", ".join(repr(c) for c in choices))


def check_either(owner: str, first: tuple[str, object], second: tuple[str, object]) -> None:
    """Exactly one of two ``(field, value)`` pairs has a value."""
    if (first[1] is None) == (second[1] is None):
        raise ValueError(
            f"{owner} needs exactly one of {first[0]} and {second[0]}; "
            f"got {first[0]}={first[1]!r}, {second[0]}={second[1]!r}"
        )


def set_number(item: Any, field: str, low: float, high: float, allowed: str, optional: bool = False) -> None:
    """A field of a frozen dataclass is a finite number, which becomes a float (or None, if `optional`).

    `low` and `high` are inclusive; callers exclude an end by passing the next float.
    """
    value, owner = getattr(item, field), type(item).__name__
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(owner, field, value, allowed)
    if not low <= value <= high:
        refuse(owner, field, value, allowed)
    object.__setattr__(item, field, float(value))


def set_integer(item: Any, field: str, low: int, allowed: str, optional: bool = False) -> None:
    """A field of a frozen dataclass is a whole number from `low` on (or None, if `optional`)."""
    value, owner = getattr(item, field), type(item).__name__
    if value is None and optional:
        return
    if isinstance(value, bool):
        refuse(owner, field, value, allowed)
    try:
        number = operator.index(value)
    except TypeError:
        refuse(owner, field, value, allowed)
    if number < low:
        refuse(owner, field, value, allowed)
    object.__setattr__(item, field, number)


def check_flag(item: Any, field: str) -> None:
    """A field is True or False, and nothing that merely counts as one."""
    value = getattr(item, field)
    if not isinstance(value, bool):
        refuse(type(item).__name__, field, value, "True or False")
