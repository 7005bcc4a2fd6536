"""The one rule that turns a budget into a cascade of prunes; `luvc-fx eval` gives it to every method."""

from __future__ import annotations

import bisect


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
