"""Latency and accuracy of one trained model on the same videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.research.figures.figure_kit import SPLIT, Bench, Numbers, listed
from examples.research.paths import TRAINED
from examples.research.tinyvlm.questions import export
from luvc_fx.apps.evaluation.markdown import EVIDENCE
from luvc_fx.apps.evaluation.options import Options
from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.apps.evaluation.result import UNPRUNED
from luvc_fx.apps.evaluation.run import run

NAME, TITLE = "latency", "Latency and accuracy on the same videos"
FOLDER, FRAMES = "internvl", 16
FILMS, ROUNDS = 60, 9
BUDGETS = (0.5, 0.25, 0.125)
PRESET = "video"


def measured(folder: Path, watch: Any) -> Numbers:
    """Answers about the films and times to the first token, as JSON of `luvc-fx eval` has them."""
    questions = folder / f"films-{SPLIT}-{FILMS}"
    if not (questions / "questions.jsonl").exists():
        export(questions, SPLIT, FILMS, frames=FRAMES, as_images=True)
    options = Options(
        model=TRAINED / FOLDER,
        questions=questions / "questions.jsonl",
        out=folder / "latency",
        methods=("default",),
        budgets=BUDGETS,
        schedules=(PRESET, f"{PRESET}:random"),
        batch=8,
        rounds=ROUNDS,
    )
    return run(options, print, watch).to_dict()


def data(bench: Bench) -> Numbers:
    """Of each arm the time, and accuracies by task."""
    result = measured(bench.folder, bench.watch)
    rows = {}
    for row in result["rows"]:
        name = row["method"] if row["budget"] is None else f"{row['method']}, {100 * row['budget']:g} %"
        rows[name] = {
            "visual": row["visual_tokens"],
            "budget": row["measured_budget"],
            "ms": row["prefill_ms"],
            "spread": row["prefill_spread_ms"],
            "scores": row["scores"],
        }
    return {"rows": rows, "hardware": result["hardware"]}


def tasks_of(numbers: Numbers) -> list[str]:
    """By name."""
    return [task for task in numbers["rows"][UNPRUNED]["scores"] if task != ALL_TASKS]


def known(numbers: Numbers) -> list[str]:
    """Tasks that the unpruned model knows well enough to say something about a schedule."""
    scores = numbers["rows"][UNPRUNED]["scores"]
    return [task for task in tasks_of(numbers) if scores[task]["accuracy"] >= EVIDENCE[0]]


def percent(row: Numbers, task: str) -> float:
    """Accuracy."""
    return 100 * float(row["scores"][task]["accuracy"])


def draw(numbers: Numbers) -> Any:
    """Accuracy against time, and time against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, sure = numbers["rows"], known(numbers)
    line = [row for name, row in rows.items() if name == UNPRUNED or name.startswith("default")]
    for number, task in enumerate(tasks_of(numbers)):
        of = sorted((row["ms"], percent(row, task)) for row in line)
        style = {"color": f"C{number}", "linestyle": "-" if task in sure else ":"}
        label = task if task in sure else f"{task} (not known well)"
        left.plot([ms for ms, _ in of], [value for _, value in of], marker="o", label=label, **style)
    for number, (name, row) in enumerate(rows.items()):
        style = {"marker": "osD^v<>p"[number % 8], "color": f"C{number}", "linestyle": "none"}
        right.errorbar(100 * row["budget"], row["ms"], yerr=row["spread"] / 2, capsize=3, label=name, **style)
    left.set_title("without pruning, and the default at each budget")
    left.set_xlabel("time to the first token, ms, median")
    left.set_ylabel("accuracy, %")
    left.set_ylim(0, 103)
    right.set_xlabel("visual tokens entering a layer, mean, % of all")
    right.set_ylabel("time to the first token, ms, median")
    right.set_ylim(0, None)
    left.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def caption(numbers: Numbers) -> str:
    """Every arm, and what the model does not know."""
    rows, sure = numbers["rows"], known(numbers)
    whole = rows[UNPRUNED]
    unknown = [f"{task} {percent(whole, task):.0f} %" for task in tasks_of(numbers) if task not in sure]

    def right(row: Numbers) -> str:
        return ", ".join(f"{task} {percent(row, task):.1f}" for task in sure) + " %"

    def told(name: str, row: Numbers) -> str:
        return f"{name} {row['ms']:.0f} ms ({whole['ms'] / row['ms']:.2f} times faster; {right(row)})"

    arms = "; ".join(told(name, row) for name, row in rows.items() if name != UNPRUNED)
    asked = ", ".join(f"{whole['scores'][task]['questions']} of {task}" for task in sure)
    widest = max(
        50 * (high - low) for row in rows.values() for task in sure for low, high in [_span(row, task)]
    )
    return (
        f"The small InternVL on {FILMS} films of {FRAMES} frames ({whole['visual']:,} visual tokens) of the "
        f"{SPLIT} split, one prompt of them timed in turns: {ROUNDS} rounds, all arms compiled by Inductor, "
        f"vision tower and all, {numbers['hardware']['device']}, {numbers['hardware']['dtype']}. Without "
        f"pruning {whole['ms']:.0f} ms ({right(whole)}). {arms}. Bars are half the quartiles' distance each "
        f"way. Questions: {asked}; an accuracy is known to {widest:.1f} points or better. What the model "
        f"does not know well enough to judge by: {listed(unknown)}. Of the tasks, color and where something "
        "is at the end can be read off the last frame alone, so the preset for videos stays unproven where "
        "frames have to be compared."
    )


def _span(row: Numbers, task: str) -> tuple[float, float]:
    low, high = row["scores"][task]["accuracy_interval"] or (0.0, 1.0)
    return low, high
