"""Progressive against single-shot pruning at equal mean budgets."""

from __future__ import annotations

from typing import Any

from figure_kit import OTHER, UNPRUNED, Bench, Numbers, about, accuracy, arms, listed, told

from luvc_fx.evaluation.methods import once, progressive
from luvc_fx.schedule import Schedule

NAME, TITLE = "progressive", "A cascade against one prune at the same budget"
BUDGETS = (0.5, 0.25, 0.125)
ONCE = (0, 2)
"""Layers before which everything goes at once."""

ARMS = ("cascade", *(f"once before layer {layer}" for layer in ONCE))
DRAWN = 0.25
LAYERS = 16


def name(arm: str, budget: float) -> str:
    """Of a row."""
    return f"{arm}, {100 * budget:g} %"


def schedules() -> dict[str, Schedule]:
    """Every arm that can reach a budget, by the default ranking."""
    found = {}
    for budget in BUDGETS:
        made = [progressive(budget, LAYERS), *(once(budget, LAYERS, layer) for layer in ONCE)]
        found |= {name(arm, budget): one for arm, one in zip(ARMS, made, strict=True) if one is not None}
    return found


def rivals() -> dict[str, str]:
    """Every arm is compared with the cascade at the same budget."""
    made = schedules()
    pairs = {name(arm, budget): name(ARMS[0], budget) for budget in BUDGETS for arm in ARMS[1:]}
    return {arm: cascade for arm, cascade in pairs.items() if arm in made}


def data(bench: Bench) -> Numbers:
    """The answers of every arm."""
    return {"asked": bench.asked(), "rows": bench.rows(schedules(), rivals())}


def draw(numbers: Numbers) -> Any:
    """Accuracy against budget, and where the tokens go."""
    from matplotlib.figure import Figure

    rows = numbers["rows"]
    figure = Figure(figsize=(13, 5), layout="constrained")
    answers, steps = figure.subplots(1, 2)
    for number, arm in enumerate(ARMS):
        of = [rows[key] for budget in BUDGETS if (key := name(arm, budget)) in rows]
        answers.errorbar(
            [100 * row["budget"] + 0.4 * (number - 1) for row in of],  # beside each other
            [accuracy(row) for row in of],
            yerr=list(zip(*(arms(row) for row in of), strict=True)),
            fmt="osD"[number] + "-",
            linewidth=2.2 if number == 0 else 1.2,
            capsize=3,
            label=arm,
        )
        if (key := name(arm, DRAWN)) in rows:
            tokens = rows[key]["tokens_per_layer"]
            # Dashed lines let those below them be seen.
            style = (
                {"linewidth": 3.0}
                if number == 0
                else {"linewidth": 1.6, "linestyle": ("--", ":")[number - 1]}
            )
            steps.step(range(LAYERS + 1), [*tokens, tokens[-1]], where="post", label=arm, **style)
    answers.axhline(accuracy(rows[UNPRUNED]), color="0.4", linestyle="--", linewidth=1, label="unpruned")
    answers.set_xlabel("visual tokens entering a layer, mean, % of all")
    answers.set_ylabel("accuracy, %, with 95 % intervals")
    answers.set_ylim(None, 100)
    steps.set_title(f"all at a budget of {100 * DRAWN:g} %")
    steps.set_xlabel("decoder layer")
    steps.set_ylabel("visual tokens that enter")
    for axes in (answers, steps):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def caption(numbers: Numbers) -> str:
    """Every comparison with the cascade, and what is missing."""
    rows = numbers["rows"]

    def of(arm: str) -> dict[str, Numbers]:
        keys = {f"at {100 * budget:g} %": name(arm, budget) for budget in BUDGETS}
        return {label: rows[key] for label, key in keys.items() if key in rows}

    against = "; ".join(f"{arm} {told(of(arm), OTHER)}" for arm in ARMS[1:])
    missing = [f"{arm} at {100 * b:g} %" for arm in ARMS for b in BUDGETS if name(arm, b) not in rows]
    return (
        f"The 16 layers of the shipped model, {accuracy(rows[UNPRUNED]):.1f} % without pruning. Budget is "
        "the mean over the layers of the visual tokens that enter one. The cascade halves the tokens stage "
        "by stage, and none enters the last layer (`luvc_fx/evaluation/cascade.py`); the spectrum picks by "
        f"its defaults. Out of reach, as the layers before cost as much: {listed(missing)}. The cascade "
        f"minus the unpruned model, in points: {told(of(ARMS[0]), UNPRUNED)}. Minus the cascade at the same "
        f"budget: {against}. Depths 8 and 24 need models of their own and are not in this "
        f"figure.{about(numbers)}"
    )
