"""Which cells a comparison has: those of methods at budgets, and those of schedules that are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from luvc_fx.apps.evaluation.methods import SEEDED, SEEDS, methods, with_selector
from luvc_fx.apps.evaluation.options import Options
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell
from luvc_fx.apps.inputs import read_schedule
from luvc_fx.report.errors import InputError
from luvc_fx.selectors import registered


def chosen_methods(options: Options) -> list[str]:
    """The names of the methods that are compared, each once.

    Raises:
        InputError: an unknown method, or a budget that is not allowed.
    """
    known = methods()
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        raise InputError(f"method {unknown[0]!r} is not known; allowed: {', '.join(known)}")
    for budget in options.budgets:
        if not 0.0 < budget <= 1.0:
            raise InputError(f"--budgets holds {budget:g}; allowed: numbers in (0, 1]")
    return list(dict.fromkeys(options.methods or known))


def method_cells(options: Options, names: Sequence[str], layers: int) -> list[Cell]:
    """The cells of these methods, budget by budget, and then those with a budget of their own."""
    known, cells = methods(), []
    for budget in dict.fromkeys(options.budgets):
        for name in names:
            if known[name].own_budget:
                continue
            schedule = known[name].make(budget, layers)
            cell = Cell(name, budget, schedule, budget if known[name].smaller else None)
            cells.append(_seeded(cell, options.seed))
    for name in names:
        if known[name].own_budget:
            cells.append(Cell(name, None, known[name].make(1.0, layers)))
    return cells


def _seeded(cell: Cell, seed: int) -> Cell:
    """With several seeds where a selector draws."""
    draws = cell.schedule is not None and any(prune.selector.name in SEEDED for prune in cell.schedule.prune)
    return dataclasses.replace(cell, seeds=tuple(range(seed, seed + SEEDS)) if draws else ())


def each_seed(cell: Cell) -> list[Cell]:
    """The cell as it is, or one for each of its seeds."""
    if not cell.seeds:
        return [cell]
    return [
        dataclasses.replace(cell, method=f"{cell.method}, seed {seed}", schedule=schedule, seeds=())
        for seed, schedule in zip(cell.seeds, cell.schedules, strict=True)
    ]


def schedule_cells(options: Options) -> list[Cell]:
    """The cells of `options.schedules`; results are looked up by their names.

    Raises:
        InputError: a schedule that cannot be read, or a name that is taken.
    """
    taken = {name: f"the method {name!r}" for name in methods()} | {UNPRUNED: "the unpruned model"}
    cells, rows = [], set()
    for text in dict.fromkeys(options.schedules):
        source, selector = _parts(text)
        cell = _schedule_cell(source, selector, options.seed)
        stem = Path(source).stem
        if taken.setdefault(stem, source) != source or cell.method in rows:
            raise InputError(
                f"schedule {text!r} cannot be told from {taken[stem]} by its name, {cell.method!r}; allowed: "
                "files whose names, without folders, are all different and of no method"
            )
        rows.add(cell.method)
        cells.append(cell)
    return cells


def _parts(text: str) -> tuple[str, str]:
    """A preset or a file, and the selector behind its colon, or nothing."""
    name, colon, selector = text.rpartition(":")
    return (name, selector) if colon and selector in registered() else (text, "")


def _schedule_cell(source: str, selector: str, seed: int) -> Cell:
    """The row of a preset or a file, maybe with another selector."""
    schedule, name = read_schedule(source), Path(source).stem
    if not selector:
        return Cell(name, None, schedule)
    return _seeded(Cell(f"{name}:{selector}", None, with_selector(schedule, selector, seed)), seed)


def rivals_of(selector: str, cells: Iterable[Cell]) -> dict[Cell, Cell]:
    """The cell of that method at each cell's budget, or of the same schedule with that selector."""
    rivals = {}
    by_name = {(cell.method, cell.budget): cell for cell in cells}
    for (method, budget), cell in by_name.items():
        stem = method.partition(":")[0]
        rival = by_name.get((f"{stem}:{selector}", None) if budget is None else (selector, budget))
        if rival is not None:
            rivals[cell] = rival
    return rivals
