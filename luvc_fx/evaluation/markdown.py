"""The comparison as Markdown: methods by budgets, one table a task."""

from __future__ import annotations

from luvc_fx.evaluation.methods import RANDOM, methods
from luvc_fx.evaluation.questions import ALL_TASKS
from luvc_fx.evaluation.result import UNPRUNED, Result, Row, Score

SIGNIFICANT = 0.05

EVIDENCE = (0.90, 0.30)
"""A task says something about tokens where the unpruned model is right this often, and this much less often
with a wrong image."""

LEGEND = (
    "Each cell: % of the unpruned accuracy, with its 95 % interval (bootstrap over scenes). After it, where "
    "p < 0.05 after Holm's correction (sign-flip test over scenes): ▼ below and ▲ above the unpruned model; "
    "r- below and r+ above random tokens at the same budget. n/a: the method cannot reach the budget."
)


def markdown(result: Result) -> str:
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
    return "\n".join(lines) + "\n"


def is_evidence(score: Score, wrong: float | None) -> bool | None:
    """Whether the task may be used as evidence; None without the control."""
    if wrong is None:
        return None
    return score.accuracy >= EVIDENCE[0] and score.accuracy - wrong >= EVIDENCE[1]


def _tasks(result: Result) -> list[str]:
    lines = [
        "| task | questions | scenes | unpruned accuracy | wrong image | 90 %, and 30 points above wrong |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for task in result.tasks:
        score, wrong = result.rows[0].scores[task], result.wrong_image.get(task)
        shown = "not run" if wrong is None else f"{100 * wrong:.1f} %"
        counts = {None: "not known", True: "yes", False: "no"}[is_evidence(score, wrong)]
        accuracy = f"{100 * score.accuracy:.1f} %{_interval(score.accuracy_interval)}"
        lines.append(f"| {task} | {score.questions} | {score.scenes} | {accuracy} | {shown} | {counts} |")
    return lines


def _table(result: Result, task: str, show: object) -> list[str]:
    assert callable(show)
    budgets = result.budgets
    found = {(row.cell.method, row.cell.budget): row for row in result.rows[1:]}
    own = [row for row in result.rows[1:] if row.cell.budget is None]
    headings = ["method", *(f"{100 * budget:g} %" for budget in budgets)]
    if own:
        headings.append("own budget")
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for method in dict.fromkeys(row.cell.method for row in result.rows[1:]):
        cells = [method]
        for budget in budgets:
            row = found.get((method, budget))
            cells.append("" if row is None else show(row, task))
        if own:
            row = found.get((method, None))
            cells.append("" if row is None else f"{show(row, task)}{_budget(row)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _budget(row: Row) -> str:
    return "" if row.measured is None else f", at {100 * row.measured:.1f} %"


def _retention(row: Row, task: str) -> str:
    score = row.scores.get(task)
    if score is None:
        return "n/a"
    if score.retention is None:
        return "-"
    return f"{100 * score.retention:.1f}{_interval(score.retention_interval)}{marks(score)}"


def _agreement(row: Row, task: str) -> str:
    score = row.scores.get(task)
    return "n/a" if score is None else f"{100 * score.agreement:.1f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.1f} - {100 * interval[1]:.1f})"


def marks(score: Score) -> str:
    """The signs of `LEGEND`, with a space in front of each."""
    found = ""
    for name, below, above in ((UNPRUNED, "▼", "▲"), (RANDOM, "r-", "r+")):
        comparison = score.against.get(name)
        if comparison is not None and comparison.adjusted < SIGNIFICANT:
            found += f" {below if comparison.difference < 0 else above}"
    return found
