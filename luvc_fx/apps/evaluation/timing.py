"""How long schedules take to the first token: Inductor against Inductor, in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from luvc_fx.apps.bench.arms import Arm
from luvc_fx.apps.bench.running import Compiled
from luvc_fx.apps.bench.timing import FIRST_TOKEN, spread
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Schedule

WARM_UP = 2


def time_prefills(
    model: Any,
    inputs: Mapping[str, Tensor],
    schedules: Mapping[str, Schedule],
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, tuple[float, float]]:
    """Median and distance of the quartiles, in milliseconds, of the time to the first token.

    The vision tower is in it. All schedules are compiled first and then run in turns, on one prompt.

    Raises:
        InputError: a graph that ran eagerly, or was compiled while the clock ran.
    """
    compiled = {}
    for name, schedule in schedules.items():
        say(f"compiling {name}")
        compiled[name] = Compiled(model, Arm(name, schedule), inputs, None)
        compiled[name].generate(1)
    times: dict[str, list[float]] = {name: [] for name in schedules}
    graphs = {name: len(arm.report.graphs) for name, arm in compiled.items()}
    say(f"timing {rounds} prefills of each")
    gc.collect()
    names = list(compiled)
    for number in range(-WARM_UP, rounds):
        for name in names if number % 2 else reversed(names):
            arm = compiled[name]
            arm.stages.take()
            arm.generate(1)
            spans = arm.stages.take()
            if number >= 0:
                if not spans.get(FIRST_TOKEN):
                    raise InputError(f"{name} cannot be timed: its prefill ran eagerly")
                times[name].append(spans[FIRST_TOKEN][0].wall)
    for name, arm in compiled.items():
        if len(arm.report.graphs) != graphs[name]:
            raise InputError(f"{name} cannot be timed: it was compiled again while the clock ran")
    return {name: (statistics.median(values), spread(values)) for name, values in times.items()}
