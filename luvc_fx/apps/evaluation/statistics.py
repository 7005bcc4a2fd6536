"""Intervals and tests for answers that come in clusters: several questions about one image.

Everything works on sums over clusters, as those are independent of each other and questions are not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95

Numbers = NDArray[np.float64]


def cluster_sums(values: Sequence[float] | NDArray[np.generic], clusters: Sequence[str]) -> Numbers:
    """Sums of `values` ``[n]`` over equal `clusters` ``[n]``: ``[clusters]``, in the order of first sight."""
    codes: dict[str, int] = {}
    which = [codes.setdefault(name, len(codes)) for name in clusters]
    sums = np.bincount(which, weights=np.asarray(values, dtype=np.float64), minlength=len(codes))
    return sums.astype(np.float64)


def ratio_interval(
    above: Numbers, below: Numbers, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of ``sum(above) / sum(below)``, clusters drawn with replacement.

    Args:
        above, below: ``[clusters]``: right answers over questions is an accuracy, right answers over
            right answers without pruning is a retention.

    Returns:
        None with fewer than two clusters, or where a draw has nothing below.

    >>> ratio_interval(np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0]))
    (0.5, 0.5)
    """
    count = len(above)
    if count < 2:
        return None
    drawn = _draws(count, seed, resamples)
    over, under = drawn @ above, drawn @ below
    if not under.all():
        return None
    low, high = np.quantile(over / under, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=2)  # all methods are asked about the same scenes, one after another
def _draws(count: int, seed: int, resamples: int) -> Numbers:
    """How often each cluster is drawn: ``[resamples, clusters]``."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn.astype(np.float64)


def sign_flip(differences: Sequence[int] | NDArray[np.generic]) -> float:
    """Two-sided p of the null that each cluster's difference is as likely as its negative.

    The exact distribution of the sum under all flips of signs, by convolution. With differences of one
    this is the sign test of McNemar.

    Args:
        differences: ``[clusters]``, whole numbers: right answers of one arm minus those of the other.

    Raises:
        ValueError: a difference that is no whole number.

    >>> sign_flip([1, 1, 1, 1, 0])
    0.125
    """
    given = np.asarray(differences, dtype=np.float64)
    steps = np.rint(given).astype(np.int64)
    if not np.array_equal(steps, given):
        raise ValueError("sign_flip: differences must be whole numbers")
    chances = np.ones(1)  # of the sums -reach, -reach + 1, ..., reach
    for step in np.abs(steps[steps != 0]):
        wider = np.zeros(len(chances) + 2 * step)
        wider[: len(chances)] += chances / 2
        wider[2 * step :] += chances / 2
        chances = wider
    reach = len(chances) // 2
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, chances[np.abs(sums) >= abs(int(steps.sum()))].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """P values adjusted for that many comparisons (Holm 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = worst
    return adjusted
