"""The comparison as Markdown: methods by budgets, one table a task."""

from __future__ import annotations

from luvc_fx.apps.evaluation.methods import RANDOM, RANDOM_BLOCK, methods
from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.apps.evaluation.result import UNPRUNED, CellResult, EvalResult, Score, WrongImage

SIGNIFICANT = 0.05

EVIDENCE = (0.90, 0.30)
"""A task says something about tokens where the unpruned model is right this often, and this much less often
with a wrong image."""

MISSED = 0.02
"""A measured budget that is off by more than this share of the one asked for is printed, too."""

MARKS = (
    (UNPRUNED, "▼", "▲", "the unpruned model"),
    (RANDOM, "r-", "r+", "random tokens at the same budget"),
    (RANDOM_BLOCK, "b-", "b+", "a random token of each block at the same budget"),
)
"""Names in `Score.against`, the signs of a difference below and above them, and what they are."""

LEGEND = (
    "Each cell: % of the unpruned accuracy, with its 95 % interval (bootstrap over scenes). After it, where "
    "p < 0.05 (sign-flip test over scenes) after Holm's correction per set (over all cells of these "
    "questions and this model, and no others): "
    + "; ".join(f"{below} below and {above} above {what}" for _, below, above, what in MARKS)
    + ". Answers with all seeds of random tokens count together. A budget behind a comma is what was "
    f"measured, where that is more than {100 * MISSED:g} % off. n/a: the method cannot reach the budget."
)


def markdown(result: EvalResult) -> str:
    """The whole report."""
    lines = ["# Accuracy against budget", ""]
    lines += [f"- {name}: {value}" for name, value in result.settings.items()]
    lines += [f"- {name}: {value}" for name, value in result.hardware.items()]
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    lines += [f"- versions: {versions}", "", *_tasks(result), "", LEGEND, ""]
    for task in result.tasks:
        if task != ALL_TASKS and len(result.tasks) == 2:
            continue  # one task is all of them
        title = "All questions" if task == ALL_TASKS else f"Task `{task}`"
        lines += [f"## {title}", "", *_table(result, task, _retention), ""]
    lines += ["## Agreement with the unpruned model's answers, all questions", ""]
    lines += [*_table(result, ALL_TASKS, _agreement), "", "## Methods", ""]
    known = methods()
    names = dict.fromkeys(row.cell.method for row in result.rows[1:])
    lines += [f"- `{name}`: {known[name].about}" for name in names if name in known]
    lines += [
        f"- no answers from {row.cell.name}: {row.cell.reason}" for row in result.rows if row.cell.reason
    ]
    lines += [
        f"- {row.cell.name}: each question had a prefill of its own: {row.apart}"
        for row in result.rows
        if row.apart
    ]
    return "\n".join(lines) + "\n"


def is_evidence(score: Score, wrong: WrongImage | None) -> bool | None:
    """Whether the task may be used as evidence; None where no wrong images were shown.

    A scene that is alone in its task has no wrong image; both accuracies are of the other questions.
    """
    if wrong is None:
        return None
    return score.accuracy >= EVIDENCE[0] and wrong.right_image - wrong.accuracy >= EVIDENCE[1]


def misses(measured: float | None, budget: float | None) -> bool:
    """Whether a measured budget is printed beside the one that was asked for."""
    return measured is not None and budget is not None and abs(measured - budget) > MISSED * budget


def _tasks(result: EvalResult) -> list[str]:
    lines = [
        "| task | questions | scenes | unpruned accuracy | wrong image | 90 %, and 30 points above wrong |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for task in result.tasks:
        score, wrong = result.rows[0].scores[task], result.wrong_image.get(task)
        shown = "not run"
        if wrong is not None:
            shown = f"{100 * wrong.accuracy:.1f} %"
            if wrong.questions != score.questions:
                shown += f" of {wrong.questions}, right image {100 * wrong.right_image:.1f} %"
        counts = {None: "not known", True: "yes", False: "no"}[is_evidence(score, wrong)]
        accuracy = f"{100 * score.accuracy:.1f} %{_interval(score.accuracy_interval)}"
        lines.append(f"| {task} | {score.questions} | {score.scenes} | {accuracy} | {shown} | {counts} |")
    return lines


def _table(result: EvalResult, task: str, show: object) -> list[str]:
    assert callable(show)
    budgets = result.budgets
    by_cell = {(row.cell.method, row.cell.budget): row for row in result.rows[1:]}
    own = [row for row in result.rows[1:] if row.cell.budget is None]
    headings = ["method", *(f"{100 * budget:g} %" for budget in budgets)]
    if own:
        headings.append("own budget")
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for method in dict.fromkeys(row.cell.method for row in result.rows[1:]):
        cells = [method]
        for budget in budgets:
            row = by_cell.get((method, budget))
            off = row is not None and row.scores and misses(row.measured, budget)
            cells.append("" if row is None else f"{show(row, task)}{_budget(row) if off else ''}")
        if own:
            row = by_cell.get((method, None))
            cells.append("" if row is None else f"{show(row, task)}{_budget(row)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _budget(row: CellResult) -> str:
    return "" if row.measured is None else f", at {100 * row.measured:.1f} %"


def _retention(row: CellResult, task: str) -> str:
    score = row.scores.get(task)
    if score is None:
        return "n/a"
    if score.retention is None:
        return "-"
    return f"{100 * score.retention:.1f}{_interval(score.retention_interval)}{marks(score)}"


def _agreement(row: CellResult, task: str) -> str:
    score = row.scores.get(task)
    return "n/a" if score is None else f"{100 * score.agreement:.1f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.1f} - {100 * interval[1]:.1f})"


def marks(score: Score) -> str:
    """The signs of `LEGEND`, with a space in front of each."""
    text = ""
    for name, below, above, _ in MARKS:
        comparison = score.against.get(name)
        if comparison is not None and comparison.adjusted < SIGNIFICANT:
            text += f" {below if comparison.difference < 0 else above}"
    return text
