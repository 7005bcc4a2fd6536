"""The ways of running a model that are timed side by side."""

from __future__ import annotations

from dataclasses import dataclass

from luvc_fx.schedule import Merge, Prune, Schedule

EAGER, BASELINE, LUVC, RANDOM, FASTV, SINGLE, SMALLER = (
    "eager",
    "inductor",
    "luvc_fx",
    "random",
    "fastv",
    "single-shot",
    "downsampled",
)

FASTV_LAYER = 2
"""FastV prunes once, before this decoder layer (K = 2 in its paper, arXiv 2403.06764)."""

QUICK = (BASELINE, LUVC)
ALL = (EAGER, BASELINE, LUVC, RANDOM, FASTV, SINGLE, SMALLER)

FROZEN = Schedule(
    merge=(Merge(axis="width", keep=0.75, depth=0.5),),
    prune=(Prune(keep=0.5, depth=0.125), Prune(keep=0.25, depth=0.375), Prune(keep=0.0, layer=-1)),
)
"""A mean budget of 30 % in 24 to 32 layers. Presets may change; this stays, so that timings compare."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of running the model.

    Attributes:
        schedule: what luvc_fx does to it; None: the stock model without a compiler.
        smaller: whether it runs on a smaller input (fewer frames or pixels), which has fewer visual tokens.
    """

    name: str
    schedule: Schedule | None
    smaller: bool = False


def arms_of(schedule: Schedule, budget: float, layers: int) -> list[Arm]:
    """All arms for a schedule whose mean budget over `layers` decoder layers is `budget`.

    FastV, which keeps all tokens in the first layers, is left out where the budget does not allow that.
    """
    random = tuple(prune.with_selector("random") for prune in schedule.prune)
    behind = (budget * layers - FASTV_LAYER) / max(1, layers - FASTV_LAYER)
    arms = [
        Arm(EAGER, None),
        Arm(BASELINE, Schedule()),
        Arm(LUVC, schedule),
        Arm(RANDOM, Schedule(merge=schedule.merge, prune=random)),
        Arm(SINGLE, Schedule(prune=(Prune(keep=budget, layer=0),))),
        Arm(SMALLER, Schedule(), smaller=True),
    ]
    if 0.0 < behind < 1.0:
        fastv = Prune(keep=behind, layer=FASTV_LAYER, selector="fastv", coverage="global")
        arms.insert(4, Arm(FASTV, Schedule(prune=(fastv,))))
    return arms
