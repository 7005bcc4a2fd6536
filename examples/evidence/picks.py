"""How the default pick was chosen: rankings, with and without averaging, on the ``tune`` split.

    python examples/evidence/picks.py       # ten minutes of a CPU core; writes results/picks.json, .md

Every candidate has the same cascade (`luvc_fx.evaluation.cascade`), so the same counts at the same layers.
Answers are kept in ``runs/picks``: a run that was stopped goes on.
"""

from __future__ import annotations

import json
from typing import Any

from evidence import MODELS, RESULTS, ROOT
from questions import export

from luvc_fx.evaluation.methods import progressive
from luvc_fx.evaluation.run import Options, run

WORK = ROOT / "runs" / "picks"
BUDGETS = (0.25, 0.125)
SETS = (
    ("llava", "objects", 100),
    ("llava_seed1", "objects", 100),
    ("internvl", "objects", 70),
    ("qwen2_vl", "page", 80),
)
"""Model, kind of scene, number of scenes."""

CANDIDATES: dict[str, dict[str, Any]] = {
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


def ask(model: str, kind: str, scenes: int) -> dict[str, Any]:
    """Accuracy of every candidate and of the unpruned model on one set; shares of right answers."""
    folder = WORK / f"tune-{kind}-{scenes}"
    if not (folder / "questions.jsonl").exists():
        export(folder, "tune", scenes, kind=kind)
    files = {}
    layers = json.loads((MODELS[model] / "config.json").read_text())["text_config"]["num_hidden_layers"]
    for budget in BUDGETS:
        for number, (name, options) in enumerate(CANDIDATES.items()):
            schedule = progressive(budget, layers, **options)
            assert schedule is not None
            path = WORK / f"{number}-{budget}.json"
            path.write_text(schedule.to_json())
            files[path.stem] = (name, budget)
    result = run(
        Options(
            model=MODELS[model],
            questions=folder / "questions.jsonl",
            out=WORK / f"{model}-{kind}",
            methods=("random",),
            budgets=BUDGETS,
            schedules=tuple(str(WORK / f"{stem}.json") for stem in files),
            split="tune",
            batch=50,
        ),
        print,
        lambda title, done, total: None,
    )
    found: dict[str, Any] = {"questions": result.rows[0].scores["all"].questions, "cells": []}
    for row in result.rows:
        name, budget = files.get(row.cell.method, (row.cell.method, row.cell.budget))
        found["cells"].append({"pick": name, "budget": budget, "accuracy": row.scores["all"].accuracy})
    return found


def table(results: dict[str, Any]) -> str:
    """Accuracy by pick and set, % at each budget."""
    lines = [
        "| tokens picked by | " + " | ".join(f"{n} ({r['questions']})" for n, r in results.items()) + " |"
    ]
    lines.append("|---|" + "---:|" * len(results))
    names = dict.fromkeys(cell["pick"] for result in results.values() for cell in result["cells"])
    for name in names:
        shown = []
        for result in results.values():
            values = [f"{100 * c['accuracy']:.1f}" for c in result["cells"] if c["pick"] == name]
            shown.append(" / ".join(values))
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All sets, then the files."""
    results = {f"{model} {kind}": ask(model, kind, scenes) for model, kind, scenes in SETS}
    (RESULTS / "picks.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "picks.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    main()
