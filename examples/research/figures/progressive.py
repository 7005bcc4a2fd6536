"""Progressive against single-shot pruning at equal mean budgets, in decoders of three depths."""

from __future__ import annotations

from typing import Any

from examples.research.figures.figure_kit import (
    OTHER,
    UNPRUNED,
    Bench,
    Numbers,
    about,
    accuracy,
    arms,
    listed,
    told,
)
from examples.research.paths import TRAINED
from luvc_fx.apps.evaluation.methods import once, progressive
from luvc_fx.schedule import Schedule
from luvc_fx.schedule.presets import PICK

NAME, TITLE = "progressive", "A cascade against one prune at the same budget"
DEPTHS = {8: "llava_depth8", 16: "llava_seed1", 24: "llava_depth24"}
"""Decoder layers, and the model; the other two were made of that with 16."""

BUDGETS = (0.5, 0.25, 0.125)
LATER = 8
"""The later single prune is before layer ``depth / LATER``."""

ARMS = ("cascade", "once before layer 0", f"once before layer L / {LATER}")
DRAWN, PICTURED = 0.25, 16


def name(arm: str, budget: float) -> str:
    """Of a row."""
    return f"{arm}, {100 * budget:g} %"


def schedules(depth: int) -> dict[str, Schedule]:
    """Every arm that can reach a budget, with the presets' pick."""
    found = {}
    for budget in BUDGETS:
        made = [
            progressive(budget, depth, **PICK),
            *(once(budget, depth, layer, **PICK) for layer in (0, depth // LATER)),
        ]
        found |= {name(arm, budget): one for arm, one in zip(ARMS, made, strict=True) if one is not None}
    return found


def rivals(depth: int) -> dict[str, str]:
    """Every arm is compared with the cascade at the same budget."""
    made = schedules(depth)
    pairs = {name(arm, budget): name(ARMS[0], budget) for budget in BUDGETS for arm in ARMS[1:]}
    return {arm: cascade for arm, cascade in pairs.items() if arm in made}


def data(bench: Bench) -> Numbers:
    """The answers of every arm, by depth."""
    found = {
        str(depth): bench.of(TRAINED / folder).rows(schedules(depth), rivals(depth))
        for depth, folder in DEPTHS.items()
    }
    return {"asked": bench.asked(), "depths": found}


def draw(numbers: Numbers) -> Any:
    """Accuracy against budget for each depth, and where the tokens go."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4.6), layout="constrained")
    panels = figure.subplots(1, len(DEPTHS) + 1)
    lowest = min(accuracy(row) - arms(row)[0] for rows in numbers["depths"].values() for row in rows.values())
    for axes, depth in zip(panels, DEPTHS, strict=False):
        rows = numbers["depths"][str(depth)]
        for number, arm in enumerate(ARMS):
            of = [rows[key] for budget in BUDGETS if (key := name(arm, budget)) in rows]
            axes.errorbar(
                [100 * row["budget"] + 0.5 * (number - 1) for row in of],  # beside each other
                [accuracy(row) for row in of],
                yerr=list(zip(*(arms(row) for row in of), strict=True)),
                fmt="osD"[number] + "-",
                linewidth=2.2 if number == 0 else 1.2,
                capsize=3,
                label=arm,
            )
        axes.axhline(accuracy(rows[UNPRUNED]), color="0.4", linestyle="--", linewidth=1, label="unpruned")
        axes.set_title(f"L = {depth} decoder layers")
        axes.set_xlabel("visual tokens entering a layer, mean, % of all")
        axes.set_ylim(lowest - 1, 100)
    panels[0].set_ylabel("accuracy, %, with 95 % intervals")
    for number, arm in enumerate(ARMS):
        row = numbers["depths"][str(PICTURED)].get(name(arm, DRAWN))
        if row is not None:
            tokens = row["tokens_per_layer"]
            style = {"linewidth": 2.6 - 0.7 * number, "linestyle": ("-", "--", ":")[number]}
            panels[-1].step(range(PICTURED + 1), [*tokens, tokens[-1]], where="post", label=arm, **style)
    panels[-1].set_title(f"{PICTURED} layers, all at a budget of {100 * DRAWN:g} %")
    panels[-1].set_xlabel("decoder layer")
    panels[-1].set_ylabel("visual tokens that enter")
    for axes in panels:
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def caption(numbers: Numbers) -> str:
    """Every comparison with the cascade, and what is missing."""
    parts = []
    for depth, rows in numbers["depths"].items():

        def of(arm: str, rows: dict[str, Numbers] = rows) -> dict[str, Numbers]:
            keys = {f"at {100 * budget:g} %": name(arm, budget) for budget in BUDGETS}
            return {label: rows[key] for label, key in keys.items() if key in rows}

        against = "; ".join(f"{arm} {told(of(arm), OTHER)}" for arm in ARMS[1:] if of(arm))
        missing = [f"{arm} at {100 * b:g} %" for arm in ARMS for b in BUDGETS if name(arm, b) not in rows]
        parts.append(
            f"**{depth} layers**, {accuracy(rows[UNPRUNED]):.1f} % without pruning. The cascade minus the "
            f"unpruned model, in points: {told(of(ARMS[0]), UNPRUNED)}. Minus the cascade at the same "
            f"budget: {against}. Out of reach, as the layers before cost as much: {listed(missing)}."
        )
    return (
        "Budget is the mean over the layers of the visual tokens that enter one. The cascade halves the "
        "tokens stage by stage, and none enters the last layer (`luvc_fx/schedule/budget.py`); tokens "
        "are picked as by the presets in all arms. The models of 8 and 24 layers were made of that of 16 by "
        "dropping layers, and by adding ones that change nothing at first, and trained on "
        "([examples/research/models](../models/README.md)), so they are no independent draws.\n\n"
        + "\n\n".join(parts)
        + about(numbers)
    )
