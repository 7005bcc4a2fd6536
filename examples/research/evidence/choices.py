"""How the defaults were chosen: rankings, merges, and places of the prunes, on the ``tune`` split.

    python -m examples.research.evidence.choices    # half an hour of a CPU core; writes results/choices.*

Rankings have the same cascade (`luvc_fx.schedule.budget`), so the same counts at the same layers; merges
stand in front of the prunes of the ``image`` preset; places are those of each preset without its merges,
beside others of the same mean budget, and a cascade beside less of one. Answers are kept in
``runs/choices``: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from statistics import mean
from typing import Any

from examples.research.evidence.evidence import MODELS, RESULTS
from examples.research.paths import RUNS
from examples.research.tinyvlm.questions import export
from luvc_fx.apps.evaluation.methods import once, progressive
from luvc_fx.apps.evaluation.options import Options
from luvc_fx.apps.evaluation.run import run
from luvc_fx.apps.tuning.candidates import shares
from luvc_fx.schedule import Merge, Prune, Schedule
from luvc_fx.schedule.presets import PICK, PRESETS

WORK = RUNS / "choices"
BUDGETS = (0.25, 0.125)
SETS = (
    ("llava", "objects", 100),
    ("llava_seed1", "objects", 100),
    ("internvl", "objects", 70),
    ("qwen2_vl", "page", 80),
)
"""Model, kind of scene, number of scenes."""

PICKS: dict[str, dict[str, Any]] = {
    f"{selector}, {coverage}{', absorb' if absorb else ''}": {
        "selector": selector,
        "coverage": coverage,
        "absorb": absorb,
    }
    for selector, coverage, absorb in (
        ("spectrum", "block", False),
        ("spectrum", "block", True),
        ("spectrum", "global", True),
        ("diversity", "block", False),
        ("diversity", "block", True),
        ("diversity", "global", True),
        ("distinct", "block", True),
        ("random-block", "block", True),
        ("uniform", "block", True),
    )
}

MERGES: dict[str, tuple[tuple[str, float, float], ...]] = {
    "none": (),
    "width 3/4": (("width", 0.75, 0.5),),
    "height 3/4": (("height", 0.75, 0.5),),
    "width 3/4, earlier": (("width", 0.75, 0.25),),
    "width 3/4, later": (("width", 0.75, 0.75),),
    "width, then height 3/4": (("width", 0.75, 0.5), ("height", 0.75, 0.75)),
    "height, then width 3/4": (("height", 0.75, 0.5), ("width", 0.75, 0.75)),
    "width 1/2": (("width", 0.5, 0.5),),
    "width 3/4 twice": (("width", 0.75, 0.5), ("width", 0.75, 0.75)),
}
"""Axis, what is kept of it, and the depth in the encoder, of each step."""


def places(preset: str, layers: int) -> dict[str, Schedule | None]:
    """The prunes of a preset, and others that let as many tokens in, with the same pick."""
    own = Schedule(prune=Schedule.preset(preset).prune)
    budget = mean(shares(own, layers))
    return {
        f"{preset}: its own": own,
        f"{preset}: a cascade": Schedule.at_budget(budget, layers),
        f"{preset}: once before layer 0": once(budget, layers, 0, **PICK),
        f"{preset}: once before layer 2": once(budget, layers, 2, **PICK),
    }


def gentle(budget: float, layers: int) -> Schedule:
    """Before layer 0, half of what stays in the middle, and all before the last layer."""
    middle = layers // 2
    keep = budget * layers / (middle + (layers - 1 - middle) / 2)
    stages = ((0, keep), (middle, keep / 2), (layers - 1, 0.0))
    return Schedule(prune=tuple(Prune(keep=share, layer=layer, **PICK) for layer, share in stages))


def shapes(budget: float, layers: int) -> dict[str, Schedule | None]:
    """A cascade and less of one, with the same pick."""
    return {
        f"{100 * budget:g} %: a cascade": Schedule.at_budget(budget, layers),
        f"{100 * budget:g} %: before layer 0 and in the middle": gentle(budget, layers),
        f"{100 * budget:g} %: once before layer 0": once(budget, layers, 0, **PICK),
    }


def candidates(layers: int) -> dict[str, tuple[str, str, Schedule]]:
    """By the name of a file: the table, the line in it, and the schedule."""
    found = {}
    for budget in BUDGETS:
        for number, (name, options) in enumerate(PICKS.items()):
            schedule = progressive(budget, layers, **options)
            assert schedule is not None
            found[f"pick{number}-{100 * budget:g}"] = ("picks", name, schedule)
    preset = Schedule.preset("image")
    for number, (name, steps) in enumerate(MERGES.items()):
        merge = tuple(Merge(axis=axis, keep=keep, depth=depth) for axis, keep, depth in steps)
        found[f"merge{number}"] = ("merges", name, dataclasses.replace(preset, merge=merge))
    placed = [places(preset, layers) for preset in PRESETS] + [shapes(budget, layers) for budget in BUDGETS]
    for number, (name, schedule) in enumerate(item for group in placed for item in group.items()):
        assert schedule is not None
        found[f"place{number}"] = ("places", name, schedule)
    return found


def ask(model: str, kind: str, scenes: int) -> dict[str, Any]:
    """Accuracy and budget of every candidate, of random tokens and of the unpruned model on one set."""
    questions = WORK / f"tune-{kind}-{scenes}"
    if not (questions / "questions.jsonl").exists():
        export(questions, "tune", scenes, kind=kind)
    layers = json.loads((MODELS[model] / "config.json").read_text())["text_config"]["num_hidden_layers"]
    tried, files = candidates(layers), []
    for stem, (_, _, schedule) in tried.items():
        files.append(WORK / f"{stem}.json")
        files[-1].write_text(schedule.to_json())
    result = run(
        Options(
            model=MODELS[model],
            questions=questions / "questions.jsonl",
            out=WORK / f"{model}-{kind}",
            methods=("random",),
            budgets=BUDGETS,
            schedules=tuple(map(str, files)),
            split="tune",
            batch=50,
        ),
        print,
        lambda title, done, total: None,
    )
    found: dict[str, Any] = {"questions": result.rows[0].scores["all"].questions, "cells": []}
    for row in result.rows:
        table, name = tried[row.cell.method][:2] if row.cell.method in tried else ("picks", row.cell.method)
        cell = {"table": table, "name": name, "why_not": row.cell.reason, "budget": row.measured}
        if row.scores:
            score = row.scores["all"]
            cell |= {"accuracy": score.accuracy, "interval": score.accuracy_interval}
        found["cells"].append({"accuracy": None, **cell})
    return found


def tables(results: dict[str, Any]) -> str:
    """Accuracy in % by pick, at each budget; by merge and by place, with the mean budget."""
    head = " | ".join(f"{name} ({result['questions']})" for name, result in results.items())
    parts = []
    titles = {"picks": "tokens picked by", "merges": "merged", "places": "pruned"}
    for table, title in titles.items():
        cells = [[c for c in result["cells"] if c["table"] == table] for result in results.values()]
        lines = [f"| {title} | {head} |", "|---|" + "---:|" * len(results)]
        for name in dict.fromkeys(cell["name"] for of_set in cells for cell in of_set):
            shown = [" / ".join(_shown(cell) for cell in of_set if cell["name"] == name) for of_set in cells]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _shown(cell: dict[str, Any]) -> str:
    if cell["accuracy"] is None:
        return "n/a"
    text = f"{100 * cell['accuracy']:.1f}"
    if cell["table"] == "picks":
        return text
    low, high = cell["interval"]
    return f"{text} ({100 * low:.1f} - {100 * high:.1f}) at {100 * cell['budget']:.1f} %"


def main() -> None:
    """All sets, then the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    results = {f"{model} {kind}": ask(model, kind, scenes) for model, kind, scenes in SETS}
    (RESULTS / "choices.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "choices.md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
