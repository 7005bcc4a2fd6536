"""The schedules that a search may try."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

from luvc_fx.schedule import Merge, Prune, Schedule
from luvc_fx.schedule.presets import PICK, cascaded

RANKINGS: tuple[dict[str, Any], ...] = (
    PICK,
    {**PICK, "cutoff": 0.1},
    {**PICK, "coverage": "global"},
    {"absorb": True},
    {"selector": "diversity", "absorb": True},
    {"selector": "diversity", "coverage": "global", "absorb": True},
    {"selector": "fastv", "coverage": "global", "absorb": True},
    {"selector": "uniform", "absorb": True},
    {"cutoff": 0.25},
)
"""Ways of choosing tokens."""

MERGES = (
    (),
    (),  # as likely as all others together
    (Merge(axis="width", keep=0.75, depth=0.5),),
    (Merge(axis="height", keep=0.75, depth=0.5),),
)

STARTS = (0.0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
"""Where the first prune may be, as shares of the depth."""

ENDS = (0.5, 0.625, 0.75, 1.0)
"""Where the last visual token may leave; 1 is the last layer."""

SLACK = 1.08
"""How much more than the speed-up asked for a candidate may promise: more would cost accuracy for nothing."""

_TRIES = 4000


def drawn(
    count: int, target: float, layers: int, speedup: Callable[[list[float]], float], seed: int
) -> list[Schedule]:
    """At most `count` different cascades that promise a speed-up of `target`, the same for a seed.

    The first is the one that `luvc-fx eval` calls the default; the others are drawn.

    Args:
        layers: decoder layers.
        speedup: of a prefill in which these shares of the visual tokens enter each layer.
    """
    numbers = random.Random(seed)
    schedules: dict[Schedule, None] = dict.fromkeys(_default(target, layers, speedup))
    for _ in range(_TRIES):
        if len(schedules) == count:
            break
        schedule = _one(numbers, layers)
        if schedule is not None and target <= speedup(shares(schedule, layers)) <= target * SLACK:
            schedules[schedule] = None
    return list(schedules)


def _default(target: float, layers: int, speedup: Callable[[list[float]], float]) -> list[Schedule]:
    """The default cascade with the largest budget, in percent, that promises `target`: one or none."""
    for percent in range(100, 0, -1):
        prunes = cascaded(percent / 100, layers)
        if prunes is not None:
            schedule = Schedule(prune=prunes)
            promised = speedup(shares(schedule, layers))
            if promised >= target:
                return [schedule] if promised <= target * SLACK else []
    return []


def shares(schedule: Schedule, layers: int) -> list[float]:
    """Visual tokens entering each layer, as shares of those that an encoder without merges gives."""
    merged = math.prod(merge.keep for merge in schedule.merge if merge.keep is not None)
    prunes = dict(schedule.prunes_at(layers))
    now, out = 1.0, []
    for layer in range(layers):
        if layer in prunes:
            keep = prunes[layer].keep
            assert keep is not None
            now = keep
        out.append(merged * now)
    return out


def _one(numbers: random.Random, layers: int) -> Schedule | None:
    first = round(numbers.choice(STARTS) * layers)
    last = min(layers - 1, round(numbers.choice(ENDS) * layers))
    stages = numbers.choice((1, 2, 2, 3))
    if not first + stages <= last:
        return None
    ranking = numbers.choice(RANKINGS)
    if first == 0 and Prune(keep=1.0, layer=first, **ranking).selector.needs_attention:
        return None  # the selector needs the attention of the layer before
    places = [first, *sorted(numbers.sample(range(first + 1, last), stages - 1)), last]
    keep, prunes = 1.0, []
    for place in places[:-1]:
        keep *= numbers.choice((0.75, 0.6, 0.5, 0.4, 0.25))
        prunes.append(Prune(keep=round(keep, 4), layer=place, **ranking))
    prunes.append(Prune(keep=0.0, layer=places[-1]))
    return Schedule(merge=numbers.choice(MERGES), prune=tuple(prunes))


def at_random(schedule: Schedule) -> Schedule:
    """The same counts before the same layers with tokens at random: what a search has to beat."""
    prune = tuple(item.with_selector("random") for item in schedule.prune)
    return dataclasses.replace(schedule, prune=prune)
