"""Which visual tokens a prune keeps: one function a file, all with one signature."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from luvc_fx.schedule import Prune
from luvc_fx.selectors.random import select_random
from luvc_fx.selectors.spectrum import select_spectrum
from luvc_fx.selectors.uniform import select_uniform


class Selector(Protocol):
    """Chooses the visual tokens that stay.

    Args:
        x: ``[B, N, D]``, the visual rows of the residual stream in sequence order.
        prune: the schedule item that asks.
        count: how many to keep, in 0 .. N.
        layer: the decoder layer before which the prune happens, resolved and not negative.
        grid: ``(H, W)`` while the N tokens are whole row-major grids, else None.

    Returns:
        int64 ``[B, count]``: distinct positions in 0 .. N - 1, ascending.

    Raises:
        ValueError: `count` is not in 0 .. N.
    """

    def __call__(
        self, x: Tensor, prune: Prune, count: int, layer: int, grid: tuple[int, int] | None
    ) -> Tensor: ...


SELECTORS: Mapping[str, Selector] = MappingProxyType(
    {"spectrum": select_spectrum, "random": select_random, "uniform": select_uniform}
)

__all__ = ["SELECTORS", "Selector", "select_random", "select_spectrum", "select_uniform"]
