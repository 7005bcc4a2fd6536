"""Latency and accuracy of one trained model on the same videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figure_kit import SPLIT, TRAINED, Bench, Numbers, listed
from questions import export

from luvc_fx.evaluation.markdown import EVIDENCE
from luvc_fx.evaluation.questions import ALL_TASKS
from luvc_fx.evaluation.result import UNPRUNED
from luvc_fx.evaluation.run import Options, run

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


def known(numbers: Numbers) -> list[str]:
    """Tasks that the unpruned model knows well enough to say something about a schedule."""
    scores = numbers["rows"][UNPRUNED]["scores"]
    return [task for task in scores if task != ALL_TASKS and scores[task]["accuracy"] >= EVIDENCE[0]]


def mean(row: Numbers, tasks: list[str]) -> float:
    """Accuracy over the questions of `tasks`, in percent."""
    scores = [row["scores"][task] for task in tasks]
    asked = sum(score["questions"] for score in scores)
    return 100 * sum(score["accuracy"] * score["questions"] for score in scores) / asked


def draw(numbers: Numbers) -> Any:
    """Accuracy against time, and time against tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    tasks = known(numbers)
    for number, (name, row) in enumerate(numbers["rows"].items()):
        style = {
            "marker": "osD^v<>p"[number % 8],
            "color": f"C{number}",
            "linestyle": "none",
            "markersize": 9,
        }
        left.errorbar(row["ms"], mean(row, tasks), xerr=row["spread"] / 2, capsize=3, label=name, **style)
        right.errorbar(100 * row["budget"], row["ms"], yerr=row["spread"] / 2, capsize=3, **style)
    left.set_xlabel("time to the first token, ms, median and quartiles")
    left.set_ylabel(f"accuracy on {listed(tasks)}, %")
    left.legend()
    right.set_xlabel("visual tokens entering a layer, mean, % of all")
    right.set_ylabel("time to the first token, ms")
    right.set_ylim(0, None)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def caption(numbers: Numbers) -> str:
    """Every arm, and what the model does not know."""
    rows, tasks = numbers["rows"], known(numbers)
    whole, scores = rows[UNPRUNED], rows[UNPRUNED]["scores"]
    unknown = [f"{task} {100 * scores[task]['accuracy']:.0f} %" for task in scores if task not in tasks]
    unknown = [text for text in unknown if not text.startswith(ALL_TASKS)]
    arms = "; ".join(
        f"{name} {row['ms']:.0f} ms ({whole['ms'] / row['ms']:.2f} times faster), {mean(row, tasks):.1f} %"
        for name, row in rows.items()
        if name != UNPRUNED
    )
    return (
        f"The small InternVL on {FILMS} films of {FRAMES} frames ({whole['visual']:,} visual tokens) of the "
        f"{SPLIT} split, one prompt of them timed in turns: {ROUNDS} rounds, all arms compiled by Inductor, "
        f"vision tower and all, {numbers['hardware']['device']}, {numbers['hardware']['dtype']}. Without "
        f"pruning {whole['ms']:.0f} ms and {mean(whole, tasks):.1f} % of {listed(tasks)}. {arms}. The model "
        f"does not know {listed(unknown)} well enough, so these are left out and the preset stays unproven "
        "on them."
    )
