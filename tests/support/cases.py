"""Schedules and sizes that several test files compare with the oracle."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

from luvc_fx.schedule import Merge, Prune, Schedule

SLOW = pytest.mark.slow


def slow_unless(cases: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Cases to parametrize over (a value or a tuple of values each), slow but for those in `fast`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in fast else SLOW)
        for case in cases
    ]


GAP = 1e-5
"""Below it, float32 in another order of sums may choose otherwise than the oracle."""

SMALL: tuple[tuple[str, int], ...] = (("decoder_layers", 2), ("encoder_layers", 3), ("grid", 4))
PRESET: tuple[tuple[str, int], ...] = (("decoder_layers", 5), ("encoder_layers", 5), ("grid", 4))
"""The shallowest decoder on which no two prunes of a preset meet before one layer."""

INDUCTOR = {
    "image": Schedule.preset("image"),
    "luvc video": Schedule.luvc("video"),
    "random and uniform": Schedule(
        merge=Merge("height", length=3, layer=1),
        prune=(
            Prune(tokens=7, layer=0, selector="random", seed=4),
            Prune(tokens=3, layer=1, selector="uniform"),
        ),
    ),
    "video": Schedule.preset("video"),
    "document": Schedule.preset("document"),
    "luvc image": Schedule.luvc("image"),
    "luvc document": Schedule.luvc("document"),
    "both axes twice": Schedule(
        merge=(
            Merge("width", keep=0.75, layer=0),
            Merge("height", keep=0.75, layer=0),
            Merge("width", length=2, layer=1),
            Merge("height", length=2, layer=1),
        ),
        prune=(Prune(tokens=2, layer=1, energy="ratio", coverage="global", cutoff=0.6),),
    ),
}
"""Compiled by Inductor, which takes most of a minute each."""


def size_for(name: str) -> tuple[tuple[str, int], ...]:
    """The smallest model for a schedule of `INDUCTOR`."""
    if name in ("luvc video", "luvc image"):  # where fewer tokens are left, all tie
        return (*PRESET[:2], ("grid", 12))
    return PRESET if name.split()[-1] in ("image", "video", "document") else SMALL
