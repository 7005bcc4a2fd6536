"""Retention against budget in every model and set of the evidence, ours beside the others."""

from __future__ import annotations

import json
from typing import Any

from examples.research.evidence.evidence import RESULTS
from examples.research.figures.figure_kit import Bench, Numbers, listed
from luvc_fx.apps.evaluation.markdown import EVIDENCE
from luvc_fx.apps.evaluation.questions import ALL_TASKS

NAME, TITLE = "architectures", "Retention against budget, by architecture and task"
TESTED = RESULTS / "test"
STYLES = {
    "default": ("C0", "o"),
    "default+merge": ("C0", "d"),
    "spectrum": ("C9", "s"),
    "diversity": ("C2", "D"),
    "uniform": ("C4", "^"),
    "norm": ("C5", "v"),
    "random": ("0.45", "X"),
    "random+absorb": ("0.7", "h"),
    "luvc": ("k", "1"),
    "fastv": ("C3", "<"),
    "pact": ("C1", ">"),
    "downsample": ("C6", "p"),
    "single-shot": ("C8", "P"),
    "vtw": ("C7", "*"),
}
COLUMNS = 4


def data(bench: Bench) -> Numbers:
    """What `examples/research/evidence/evidence.py` found on the test split."""
    found: dict[str, Any] = {}
    for path in sorted(TESTED.glob("*.json")):
        result = json.loads(path.read_text())
        lines: dict[str, list[Numbers]] = {}
        for row in result["rows"]:
            if row["method"] in STYLES and row["scores"] and row["budget"] is not None:
                score = row["scores"][ALL_TASKS]
                lines.setdefault(row["method"], []).append(
                    {
                        "budget": row["measured_budget"],
                        "retention": score["retention"],
                        "interval": score["retention_interval"] or [score["retention"]] * 2,
                    }
                )
        score, wrong = result["rows"][0]["scores"][ALL_TASKS], result["wrong_image"][ALL_TASKS]
        found[path.stem] = {
            "unpruned": score["accuracy"],
            "wrong_image": wrong["right_image"] - wrong["accuracy"],
            "questions": score["questions"],
            "lines": {m: sorted(line, key=lambda p: p["budget"]) for m, line in lines.items()},
        }
    return {"sets": found}


def draw(numbers: Numbers) -> Any:
    """A panel for each set."""
    from matplotlib.figure import Figure

    sets = numbers["sets"]
    count = -(-len(sets) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.6 * count), layout="constrained")
    panels = list(figure.subplots(count, COLUMNS, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, (name, found) in zip(panels, sets.items(), strict=False):
        for method, line in found["lines"].items():
            colour, marker = STYLES[method]
            handles[method] = axes.errorbar(
                [100 * point["budget"] for point in line],
                [100 * point["retention"] for point in line],
                yerr=[
                    [max(0.0, 100 * (p["retention"] - p["interval"][0])) for p in line],
                    [max(0.0, 100 * (p["interval"][1] - p["retention"])) for p in line],
                ],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=2.4 if method == "default" else 1.0,
                zorder=3 if method == "default" else 2,
                elinewidth=0.7,
            )
        axes.set_title(f"{name} (unpruned {100 * found['unpruned']:.1f} %)", fontsize=10)
        axes.set_ylim(0, 104)
        axes.grid(alpha=0.3)
        axes.set_xlabel("visual tokens entering a layer, % of all", fontsize=8)
    for axes in panels[len(sets) :]:
        axes.set_axis_off()
    figure.axes[0].set_ylabel("% of the unpruned accuracy")
    order = [method for method in STYLES if method in handles]
    figure.legend([handles[m] for m in order], order, loc="outside lower center", ncols=len(order))
    return figure


def caption(numbers: Numbers) -> str:
    """The extremes of the default, by set."""
    weak = [
        name
        for name, found in numbers["sets"].items()
        if found["unpruned"] < EVIDENCE[0] or found["wrong_image"] < EVIDENCE[1]
    ]
    parts = []
    for name, found in numbers["sets"].items():
        shown = ", ".join(
            f"{100 * point['retention']:.1f} at {100 * point['budget']:.1f} %"
            for point in reversed(found["lines"]["default"])
        )
        parts.append(f"{name}: {shown}")
    return (
        "The test split, 95 % intervals; the sets and all numbers are in "
        "[the tables](../../../docs/evidence/accuracy.md). LLaVA reads "
        "CLIP's tokens one by one, InternVL four at a time by a pixel shuffle, Qwen2-VL four at a time with "
        f"rotary positions of three axes. What the default keeps, in %: {'; '.join(parts)}. No "
        f"evidence by the rule of those tables: {listed(weak)}."
    )
