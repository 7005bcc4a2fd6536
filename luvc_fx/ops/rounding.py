"""The rounding of every fraction of a number of tokens or frequency bins."""

import math


def round_half_up(value: float) -> int:
    """The nearest whole number; 0.5 goes up, whatever the parity.

    >>> [round_half_up(value) for value in (0.5, 1.5, 2.4)]
    [1, 2, 2]
    """
    return math.floor(value + 0.5)
