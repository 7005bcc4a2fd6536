"""Cutoff x keep x layer: one prune, its accuracy by task type, and its ideal speed."""

from __future__ import annotations

import itertools
from typing import Any

from examples.research.figures.figure_kit import (
    LEVEL,
    TYPES,
    UNPRUNED,
    Bench,
    Numbers,
    about,
    accuracy,
    listed,
    widest,
)
from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.schedule import Prune, Schedule
from luvc_fx.schedule.presets import PICK

NAME, TITLE = "sensitivity", "Cutoff, keep and layer of one prune"
CUTOFFS = (0.1, 0.25, 0.6)
KEEPS = (0.5, 0.25, 0.125)
LAYERS = (0, 2, 6)


def name(layer: int, keep: float, cutoff: float) -> str:
    """Of a row."""
    return f"layer {layer}, keep {keep:g}, cutoff {cutoff:g}"


def schedules() -> dict[str, Schedule]:
    """One prune by the presets' pick at every place, count and cutoff."""
    return {
        name(layer, keep, cutoff): Schedule(prune=(Prune(keep=keep, layer=layer, cutoff=cutoff, **PICK),))
        for layer, keep, cutoff in itertools.product(LAYERS, KEEPS, CUTOFFS)
    }


def data(bench: Bench) -> Numbers:
    """The answers under every schedule."""
    return {"asked": bench.asked(), "rows": bench.rows(schedules())}


def lost(numbers: Numbers, row: str, task: str = ALL_TASKS) -> float:
    """Accuracy minus the unpruned model's, in points."""
    rows = numbers["rows"]
    return accuracy(rows[row], task) - accuracy(rows[UNPRUNED], task)


def draw(numbers: Numbers) -> Any:
    """A heat map for each layer and task type, and the speed beside them."""
    from matplotlib.figure import Figure

    tasks = [ALL_TASKS, *TYPES]
    figure = Figure(figsize=(15, 2 + 1.8 * len(LAYERS)), layout="constrained")
    axes = figure.subplots(len(LAYERS), len(tasks) + 1)
    limit = max(1.0, *(abs(lost(numbers, row, task)) for row in schedules() for task in tasks))
    fastest = max(row["speedup"] for row in numbers["rows"].values())
    for line, layer in zip(axes, LAYERS, strict=True):
        for place, task in zip(line, tasks, strict=False):
            values = [
                [lost(numbers, name(layer, keep, cutoff), task) for keep in KEEPS] for cutoff in CUTOFFS
            ]
            shown = place.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            _write(place, values, "+.1f", limit)
        speeds = [[numbers["rows"][name(layer, keep, CUTOFFS[0])]["speedup"] for keep in KEEPS]]
        line[-1].imshow(speeds, cmap="Greens", vmin=1, vmax=fastest, aspect="auto")
        _write(line[-1], speeds, ".2f", fastest)
    titles = ["all types", *TYPES, "ideal speed, times"]
    for row, line in enumerate(axes):
        for column, place in enumerate(line):
            place.set_xticks(range(len(KEEPS)), [f"{keep:g}" for keep in KEEPS])
            place.set_yticks([])
            if row == 0:
                place.set_title(titles[column])
            if row == len(LAYERS) - 1:
                place.set_xlabel("keep")
    for line, layer in zip(axes, LAYERS, strict=True):
        line[0].set_ylabel(f"before layer {layer}\ncutoff")
        line[0].set_yticks(range(len(CUTOFFS)), [f"{cutoff:g}" for cutoff in CUTOFFS])
    bar = figure.colorbar(shown, ax=axes, shrink=0.5, aspect=30, pad=0.01)
    bar.set_label("accuracy minus the unpruned model's, points")
    return figure


def _write(axes: Any, values: list[list[float]], form: str, limit: float) -> None:
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            light = "w" if abs(value) > 0.65 * limit else "k"
            axes.text(x, y, format(value, form), ha="center", va="center", fontsize=9, color=light)


def caption(numbers: Numbers) -> str:
    """How far each of the three moves the answers, and which type suffers most."""
    rows = numbers["rows"]

    def most(axis: int, task: str = ALL_TASKS) -> float:
        """The largest range along one of layer, keep and cutoff with the other two held."""
        values: dict[tuple[float, ...], list[float]] = {}
        for key in itertools.product(LAYERS, KEEPS, CUTOFFS):
            values.setdefault(key[:axis] + key[axis + 1 :], []).append(lost(numbers, name(*key), task))
        return max(max(of) - min(of) for of in values.values())

    worst = min(schedules(), key=lambda row: lost(numbers, row))
    by_type = listed(
        [f"{task} {min(lost(numbers, row, task) for row in schedules()):+.1f}" for task in TYPES]
    )
    against = {row: rows[row]["scores"][ALL_TASKS]["against"][UNPRUNED]["adjusted"] for row in schedules()}
    free = [row for row, p in against.items() if p >= LEVEL]
    best = "None is left."
    if free:
        fastest = max(free, key=lambda row: rows[row]["speedup"])
        best = (
            f"Of these the fastest is {fastest}: {rows[fastest]['speedup']:.2f} times fewer FLOPs, "
            f"{lost(numbers, fastest):+.1f} points."
        )
    over = [(layer, keep) for layer in LAYERS for keep in KEEPS]
    means = {c: sum(lost(numbers, name(*place, c)) for place in over) / len(over) for c in CUTOFFS}
    return (
        "One prune by the presets' pick (of each block the most distinct token, the others averaged in): "
        f"accuracy minus the unpruned model's {accuracy(rows[UNPRUNED]):.1f} % (all types), in points. Ideal "
        "speed is the FLOPs of a prefill's decoder layers without pruning over those with it, and does not "
        f"depend on the cutoff. With the other two held, the layer moves the accuracy by up to {most(0):.1f} "
        f"points, keep by up to {most(1):.1f} and the cutoff by up to {most(2):.1f}; the mean over layers "
        f"and keeps is {listed([f'{value:+.1f} at cutoff {c:g}' for c, value in means.items()])}. The worst "
        f"is {worst}, {lost(numbers, worst):+.1f}; the worst of each type: {by_type}. "
        f"{len(against) - len(free)} of {len(against)} schedules differ significantly from the unpruned "
        f"model on all types; the other {len(free)} cannot be told from it with so many questions. {best} An "
        f"accuracy on all types is known to {widest(list(rows.values())):.1f} points (half the widest "
        "interval), one of a single type to "
        f"{max(widest(list(rows.values()), task) for task in TYPES):.1f}.{about(numbers)}"
    )
