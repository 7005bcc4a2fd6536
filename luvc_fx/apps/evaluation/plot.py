"""The Pareto plot: accuracy against the tokens that are left, and against time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from luvc_fx.apps.evaluation.questions import ALL_TASKS
from luvc_fx.apps.evaluation.result import CellResult, EvalResult
from luvc_fx.report.errors import InputError


def draw(result: EvalResult, path: Path) -> None:
    """Write the picture to `path`, in the format of its ending; time only where it was measured.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install matplotlib") from None
    panels: list[tuple[str, Callable[[CellResult], float | None]]] = [
        ("visual tokens entering a decoder layer, mean, % of all", _percent)
    ]
    if any(row.prefill_ms is not None for row in result.rows):
        panels.append(("time to the first token, ms, median", lambda row: row.prefill_ms))
    figure = Figure(figsize=(6.5 * len(panels) + 1.5, 4.8), layout="constrained")
    for axes, (label, place) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, method in enumerate(dict.fromkeys(row.cell.method for row in result.rows)):
            points = []
            for row in result.rows:
                x = place(row)
                if row.cell.method == method and row.scores and x is not None:
                    points.append((x, row.scores[ALL_TASKS]))
            points.sort(key=lambda point: point[0])
            if not points:
                continue
            accuracies = [100 * score.accuracy for _, score in points]
            spans = [score.accuracy_interval or (score.accuracy, score.accuracy) for _, score in points]
            below = [a - 100 * low for a, (low, _) in zip(accuracies, spans, strict=True)]
            above = [100 * high - a for a, (_, high) in zip(accuracies, spans, strict=True)]
            axes.errorbar(
                [x for x, _ in points],
                accuracies,
                yerr=[[max(0.0, v) for v in below], [max(0.0, v) for v in above]],
                label=method,
                marker="osD^v<>pX*P"[number % 11],
                color=f"C{number % 10}",
                linewidth=2.2 if number <= 1 else 1.0,
                elinewidth=0.6,
                capsize=2,
            )
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %, with 95 % intervals")
        axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"the plot cannot be written to '{path}': {error}") from None


def _percent(row: CellResult) -> float | None:
    return None if row.measured is None else 100 * row.measured
