"""The ways of running a model that are timed side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from luvc_fx.schedule import Merge, Prune, Schedule

EAGER, BASELINE, LUVC, RANDOM, SINGLE, SMALLER = (
    "eager",
    "inductor",
    "luvc_fx",
    "random",
    "single-shot",
    "downsampled",
)

QUICK = (BASELINE, LUVC)

FROZEN = Schedule(
    merge=Merge(axis="width", keep=0.75, depth=0.5),
    prune=(Prune(keep=0.5, depth=0.125), Prune(keep=0.25, depth=0.375), Prune(keep=0.0, layer=-1)),
)
"""A mean budget of 30 % in 24 to 32 layers. It is not a preset: those may change, and results may not."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of running the model.

    Attributes:
        schedule: what luvc_fx does to it; None: the stock model without a compiler.
        smaller: on an input with fewer visual tokens to begin with.
    """

    name: str
    schedule: Schedule | None
    smaller: bool = False


def arms_of(schedule: Schedule, budget: float) -> list[Arm]:
    """All arms for a schedule whose mean budget over the decoder layers is `budget`."""
    random = tuple(dataclasses.replace(prune, selector="random") for prune in schedule.prune)
    return [
        Arm(EAGER, None),
        Arm(BASELINE, Schedule()),
        Arm(LUVC, schedule),
        Arm(RANDOM, Schedule(merge=schedule.merge, prune=random)),
        Arm(SINGLE, Schedule(prune=Prune(keep=budget, layer=0))),
        Arm(SMALLER, Schedule(), smaller=True),
    ]
