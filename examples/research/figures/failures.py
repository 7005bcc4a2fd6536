"""Failure signatures: over-smoothing, spatial collapse, and ToMe in front of pruning along the row."""

from __future__ import annotations

import dataclasses
from typing import Any

from examples.research.figures import integrity
from examples.research.figures.figure_kit import (
    LEVEL,
    OTHER,
    SEEDS,
    TYPES,
    UNPRUNED,
    Bench,
    Numbers,
    about,
    accuracy,
    arms,
    listed,
    told,
)
from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.schedule import Prune, Schedule

NAME, TITLE = "failures", "Failure signatures"
CUTOFFS = (0.03, 0.1, 0.25, 0.6, 1.0)
KEEP, LAYER = 0.25, 2
COUNTS = ("count", "count_color")
LINES = (ALL_TASKS, *COUNTS, "attributes", "position", "chart", "cards")
GRIDS = ("16 x 8", "8 x 8")
ROWS = (("OIM, image preset", "oim"), ("ToMe, image preset", "tome"))


def smoothed(energy: str, cutoff: float) -> str:
    """Name of a row."""
    return f"{energy}, cutoff {cutoff:g}"


def schedules() -> dict[str, Schedule]:
    """All that is asked; the merges are those of the figure about integrity."""
    place = {"keep": KEEP, "layer": LAYER}
    found = {"random": Schedule(prune=(Prune(**place, selector="random"),))}
    for cutoff in CUTOFFS:
        literal = Prune(**place, energy="lowpass", coverage="global", cutoff=cutoff)
        found[smoothed("lowpass", cutoff)] = Schedule(prune=(literal,))
    for cutoff in CUTOFFS[:-1]:  # a filter that lets everything through leaves no residual
        found[smoothed("residual", cutoff)] = Schedule(prune=(Prune(**place, cutoff=cutoff),))
    for grid in GRIDS:
        for method in ("oim", "tome"):
            found[f"{method} {grid}"] = Schedule(merge=integrity.merges(grid, method))
    preset = Schedule.preset("image")
    for name, method in ROWS:
        merge = tuple(dataclasses.replace(merge, method=method) for merge in preset.merge)
        found[name] = dataclasses.replace(preset, merge=merge)
    return found


def rivals() -> dict[str, str]:
    """Spectra against random tokens, OIM against ToMe."""
    pairs = {name: "random" for name in schedules() if name.startswith(("lowpass", "residual"))}
    merged = {f"oim {grid}": f"tome {grid}" for grid in GRIDS}
    return {**pairs, **merged, ROWS[0][0]: ROWS[1][0]}


def data(bench: Bench) -> Numbers:
    """The answers."""
    return {"asked": bench.asked(), "rows": bench.rows(schedules(), rivals())}


def draw(numbers: Numbers) -> Any:
    """Over-smoothing, spatial collapse, and the preset with either merge."""
    from matplotlib.figure import Figure

    rows = numbers["rows"]
    figure = Figure(figsize=(14, 9), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    smooth, best = figure.add_subplot(grid[0, :2]), figure.add_subplot(grid[0, 2:])
    for axes, energy in ((smooth, "lowpass"), (best, "residual")):
        cutoffs = [c for c in CUTOFFS if smoothed(energy, c) in rows]
        for number, task in enumerate(LINES):
            of = [rows[smoothed(energy, c)] for c in cutoffs]
            style = {"linewidth": 2.6, "color": "k"} if not number else {"color": f"C{number - 1}"}
            label = "all types" if not number else task
            axes.plot(
                cutoffs, [accuracy(row, task) for row in of], "os^Dv<>"[number] + "-", label=label, **style
            )
        axes.axhline(accuracy(rows["random"]), color="k", linestyle=":", label="all types, random tokens")
        axes.axhline(accuracy(rows[UNPRUNED]), color="k", linestyle="--", linewidth=0.8, label="unpruned")
        axes.set_xscale("log")
        axes.set_xticks(CUTOFFS, [f"{c:g}" for c in CUTOFFS])
        axes.minorticks_off()
        axes.set_ylim(0, 103)
        axes.set_xlabel("cutoff sigma")
        axes.set_ylabel("accuracy, %")
        axes.grid(alpha=0.3)
    smooth.set_title(f"most low-pass energy, the best of all (keep {KEEP:g} before layer {LAYER})")
    best.set_title("most residual, the best of each block (Prune's default)")
    best.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    best.set_xlim(smooth.get_xlim())
    collapse, preset = figure.add_subplot(grid[1, :3]), figure.add_subplot(grid[1, 3])
    names = [UNPRUNED, *(f"{method} {of}" for of in GRIDS for method in ("oim", "tome"))]
    _grouped(collapse, rows, names, ("0.5", "C0", "C3", "C9", "C1"))
    collapse.set_title("encoder merges alone, by task type")
    _grouped(preset, rows, [name for name, _ in ROWS], ("C0", "C3"), (ALL_TASKS, "position"))
    preset.set_title("the image preset, merged by")
    return figure


def _grouped(
    axes: Any,
    rows: Numbers,
    names: list[str],
    colours: tuple[str, ...],
    tasks: tuple[str, ...] = tuple(TYPES),
) -> None:
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        axes.bar(
            [place + (number - (len(names) - 1) / 2) * width for place in range(len(tasks))],
            [accuracy(rows[name], task) for task in tasks],
            width,
            yerr=list(zip(*(arms(rows[name], task) for task in tasks), strict=True)),
            color=colour,
            capsize=2,
            label=name.partition(", ")[0].replace("oim", "OIM").replace("tome", "ToMe"),
        )
    axes.set_xticks(range(len(tasks)), ["all types" if task == ALL_TASKS else task for task in tasks])
    axes.set_ylim(0, 115)  # the legend is above the bars
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, %, with 95 % intervals")
    axes.legend(fontsize=9, loc="upper center", ncols=len(names), frameon=False, columnspacing=1.0)


def caption(numbers: Numbers) -> str:
    """What each panel shows."""
    rows = numbers["rows"]
    ends = (CUTOFFS[0], CUTOFFS[-1])

    def moves(task: str) -> str:
        first, last = (accuracy(rows[smoothed("lowpass", c)], task) for c in ends)
        return f"{'all types' if task == ALL_TASKS else task} {first:.1f} to {last:.1f} %"

    def by_cutoff(energy: str, cutoffs: tuple[float, ...]) -> str:
        return told({f"{c:g}:": rows[smoothed(energy, c)] for c in cutoffs}, OTHER)

    against = [rows[f"oim {grid}"]["scores"]["position"]["against"][OTHER] for grid in GRIDS]
    collapse = any(one["difference"] > 0 and one["adjusted"] < LEVEL for one in against)
    oim, tome = (rows[name] for name, _ in ROWS)
    where = "; ".join(f"{grid}: {_where(rows, grid)}" for grid in GRIDS)
    return (
        f"**Over-smoothing** (above; keep {KEEP:g} once before layer {LAYER}; mean of {SEEDS} seeds of "
        f"random tokens {accuracy(rows['random']):.1f} %, unpruned {accuracy(rows[UNPRUNED]):.1f} %). Ranked "
        f"by the energy that passes, as the abstract reads, accuracy goes from cutoff {ends[0]:g} to "
        f"{ends[1]:g} so: {listed([moves(task) for task in LINES])}; a single task of counting has half the "
        f"questions of a type. Minus random tokens, by cutoff: {by_cutoff('lowpass', CUTOFFS)}. Ranked by "
        f"the residual in blocks, minus random tokens: {by_cutoff('residual', CUTOFFS[:-1])}. A cutoff of 1 "
        "leaves the residual nothing but the slope of the window, so it is not asked.\n\n"
        "**Spatial collapse** (below left). Position questions, and the mean of the other types, in points "
        f"from the unpruned model: {where}. A collapse under ToMe is "
        f"{'seen' if collapse else 'not seen'}.\n\n"
        "**1-D projector with ToMe** (below right). The `image` preset with its merge by OIM answers "
        f"{accuracy(oim):.1f} %, with as many tokens by ToMe {accuracy(tome):.1f} %. OIM minus ToMe: "
        f"{told({'all types': oim}, OTHER)}, {told({'position': oim}, OTHER, 'position')}. Behind ToMe "
        "neighbours in the row are none in the image, and the spectrum filters along the "
        f"row.{about(numbers)}"
    )


def _where(rows: Numbers, grid: str) -> str:
    others = [task for task in TYPES if task != "position"]
    parts = []
    for method, label in (("oim", "OIM"), ("tome", "ToMe")):
        lost = {t: accuracy(rows[f"{method} {grid}"], t) - accuracy(rows[UNPRUNED], t) for t in TYPES}
        rest = sum(lost[task] for task in others) / len(others)
        parts.append(f"{label} {lost['position']:+.1f} and {rest:+.1f}")
    both = told({"": rows[f"oim {grid}"]}, OTHER, "position")
    return f"{listed(parts)} (position, OIM minus ToMe: {both})"
