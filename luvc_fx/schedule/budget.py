"""Budgets and cascades of prunes: a cascade of a given budget, and a given cascade at another budget."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def cascade(budget: float, layers: int) -> tuple[tuple[int, float], ...] | None:
    """Where a cascade of that mean budget prunes: ``(decoder layer, keep)``, by layer; None: it cannot.

    No visual token enters the last layer. Before it keeps halve from stage to stage, and each stage is
    twice as long as the one before, so that every stage costs the same: of `first` layers with all tokens,
    2 `first` with a half, 4 `first` with a quarter, and so on to the end. `first` is the largest whole number
    that the budget allows, and what is then left of it goes to the later stages, in proportion. Where
    it does not allow even one whole layer, all keeps of ``first = 1`` shrink in proportion, so that the
    first prune is before layer 0.

    Args:
        budget: mean over the decoder layers of the visual tokens that enter, over the original; in (0, 1].
        layers: decoder layers, at least 2.

    >>> cascade(0.25, 16)
    ((1, 0.5), (3, 0.25), (7, 0.125), (15, 0.0))
    """
    last, total = layers - 1, budget * layers
    if last < 1 or not 0.0 < total <= last:
        return None
    # A longer first stage costs more, so the longest that the budget allows is found by halving.
    whole = bisect.bisect_right(range(1, last + 1), total, key=lambda first: sum(_stages(first, last)))
    first = max(1, whole)
    keeps = _stages(first, last)
    behind = sum(keeps[whole:])  # the first `whole` layers are left as they are
    if behind:
        keeps[whole:] = [keep * (total - whole) / behind for keep in keeps[whole:]]
    keeps.append(0.0)
    return tuple(
        (layer, keep)
        for layer, (before, keep) in enumerate(zip([1.0, *keeps[:-1]], keeps, strict=True))
        if keep != before
    )


def _stages(first: int, count: int) -> list[float]:
    return [0.5 ** ((layer // first + 1).bit_length() - 1) for layer in range(count)]


def mean_share(places: Sequence[tuple[int, float]], layers: int, factor: float = 1.0) -> float:
    """The mean over `layers` of the share of tokens that enter, where keeps are multiplied with `factor`.

    Args:
        places: ``(decoder layer, keep)`` of each prune, by layer. No keep becomes more than 1.

    >>> mean_share([(1, 0.5), (3, 0.0)], 4)
    0.5
    """
    bounds = [*(layer for layer, _ in places), layers]
    shares = (min(1.0, factor * keep) for _, keep in places)
    lengths = (end - start for start, end in itertools.pairwise(bounds))
    return (bounds[0] + sum(share * length for share, length in zip(shares, lengths, strict=True))) / layers


def rescaled(places: Sequence[tuple[int, float]], layers: int, share: float) -> list[float] | None:
    """The keeps of the same prunes, all multiplied with one factor, so that `mean_share` is `share`.

    None where no factor gives it: tokens that no prune takes away are more, or those that every factor
    takes away are too many.

    >>> rescaled([(1, 0.5), (3, 0.0)], 4, 0.375)
    [0.25, 0.0]
    """
    least, most = share_bounds(places, layers)
    if not least < share <= most:
        return None
    # Between the factors at which a keep becomes 1 the share grows evenly.
    turns = sorted({1.0 / keep for _, keep in places if keep})
    high = next((turn for turn in turns if mean_share(places, layers, turn) >= share), turns[-1])
    low = max((turn for turn in turns if turn < high), default=0.0)
    shares = [mean_share(places, layers, factor) for factor in (low, high)]
    factor = low + (high - low) * (share - shares[0]) / (shares[1] - shares[0])
    return [min(1.0, factor * keep) for _, keep in places]


def share_bounds(places: Sequence[tuple[int, float]], layers: int) -> tuple[float, float]:
    """What `mean_share` is above of at every factor, and what it is at most."""
    largest = 1.0 / min((keep for _, keep in places if keep), default=1.0)
    return mean_share(places, layers, 0.0), mean_share(places, layers, largest)
