"""OIM beside 1-D ToMe in front of a projector that reads the grid: InternVL's pixel shuffle."""

from __future__ import annotations

from typing import Any

from examples.research.figures.figure_kit import (
    OTHER,
    TYPES,
    UNPRUNED,
    Bench,
    Numbers,
    about,
    accuracy,
    arms,
    told,
)
from examples.research.paths import TRAINED
from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.schedule import Merge, Schedule

NAME, TITLE = "projector", "OIM and 1-D ToMe before a 2-D projector"
FOLDER = "internvl"
STEPS = {
    "24 x 18": (("width", 18, 2),),
    "18 x 18": (("width", 18, 2), ("height", 18, 3)),
    "24 x 12": (("width", 12, 2),),
    "12 x 12": (("width", 12, 2), ("height", 12, 3)),
}
"""By the grid of patches that is left (height x width): axis, its length, and the block before the merge."""

METHODS = ("oim", "tome")


def schedules() -> dict[str, Schedule]:
    """OIM and ToMe at every count."""
    return {
        f"{method} {grid}": Schedule(
            merge=tuple(
                Merge(axis=axis, length=length, layer=block, method=method) for axis, length, block in steps
            )
        )
        for grid, steps in STEPS.items()
        for method in METHODS
    }


def rivals() -> dict[str, str]:
    """OIM is compared with ToMe at the same count."""
    return {f"oim {grid}": f"tome {grid}" for grid in STEPS}


def data(bench: Bench) -> Numbers:
    """The answers of the InternVL."""
    return {"asked": bench.asked(), "rows": bench.of(TRAINED / FOLDER).rows(schedules(), rivals())}


def draw(numbers: Numbers) -> Any:
    """Accuracy by grid, on all questions and on each type."""
    from matplotlib.figure import Figure

    rows = numbers["rows"]
    figure = Figure(figsize=(16, 4.4), layout="constrained")
    tasks = (ALL_TASKS, *TYPES)
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True), tasks, strict=True):
        for number, method in enumerate(METHODS):
            of = [rows[f"{method} {grid}"] for grid in STEPS]
            axes.bar(
                [place + 0.4 * (number - 0.5) for place in range(len(STEPS))],
                [accuracy(row, task) for row in of],
                0.4,
                yerr=list(zip(*(arms(row, task) for row in of), strict=True)),
                color=("C0", "C3")[number],
                capsize=3,
                label=("OIM", "ToMe")[number],
            )
        axes.axhline(accuracy(rows[UNPRUNED], task), color="0.4", linestyle="--", label="no merge")
        axes.set_xticks(range(len(STEPS)), list(STEPS), rotation=30)
        axes.set_title("all types" if task == ALL_TASKS else task)
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.3, axis="y")
    first = figure.axes[0]
    first.set_ylabel("accuracy, %, with 95 % intervals")
    first.legend(loc="lower left")
    return figure


def caption(numbers: Numbers) -> str:
    """Every comparison."""
    rows = numbers["rows"]
    of = {grid: rows[f"oim {grid}"] for grid in STEPS}
    by_type = "; ".join(f"{task}: {told(of, OTHER, task)}" for task in TYPES)
    lost = told({name: row for name, row in rows.items() if name != UNPRUNED}, UNPRUNED)
    return (
        "The small InternVL: 24 x 24 patches, five blocks, and a pixel shuffle that makes one visual token "
        "of 2 x 2 neighbours on the grid. OIM merges after blocks 2 and 3 and keeps a grid, so the shuffle "
        "reads neighbours; ToMe merges as many patches anywhere, and the shuffle, which reads the row as a "
        "grid of that shape all the same, makes one token of four that need not be neighbours. Both compare "
        f"hidden states (ToMe's paper: keys). Without a merge {accuracy(rows[UNPRUNED]):.1f} %. OIM minus "
        f"ToMe in points, all types: {told(of, OTHER)}; {by_type}. Minus the unmerged model: "
        f"{lost}.{about(numbers)}"
    )
