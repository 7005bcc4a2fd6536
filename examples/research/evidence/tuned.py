"""The tuner against the presets: the same speed, on questions that took no part in the search.

    python -m examples.research.evidence.tuned  # twenty minutes of a CPU core; writes results/tuned.json, .md

`luvc_fx.tune` sees prompts of the ``tune`` split without answers, and is asked for the speed of the preset.
Both then answer questions of the ``dev`` split, beside the same counts of random tokens. Answers are kept in
``runs/tuned``; a search that was stopped begins anew.
"""

from __future__ import annotations

import argparse
import json
from statistics import mean
from typing import Any

import luvc_fx
from examples.research.evidence.evidence import MODELS, RESULTS
from examples.research.paths import RUNS
from examples.research.tinyvlm.questions import export
from luvc_fx.apps.evaluation.options import Options
from luvc_fx.apps.evaluation.prompts import Prompts, collate
from luvc_fx.apps.evaluation.questions import ALL_TASKS, Question, read_questions
from luvc_fx.apps.evaluation.result import UNPRUNED, Cell
from luvc_fx.apps.evaluation.run import Asker
from luvc_fx.apps.evaluation.scoring import score
from luvc_fx.apps.evaluation.statistics import holm
from luvc_fx.apps.evaluation.store import Answers
from luvc_fx.apps.local_model import load
from luvc_fx.apps.tuning.candidates import at_random, shares
from luvc_fx.apps.tuning.divergence import sizes
from luvc_fx.apps.tuning.flops import DecoderCost
from luvc_fx.schedule import Schedule

WORK = RUNS / "tuned"
CASES = (("llava_seed1", "objects", 300), ("internvl", "objects", 300), ("qwen2_vl", "page", 580))
"""Model, kind of scene, and how many scenes of the dev split hold 2,500 questions."""

PRESET = "image"
"""Whose speed the tuner is asked for; `document` drops too little to leave room for a better one."""

SAMPLES = 96
SEEDS = (0, 1, 2)


def asked(kind: str, split: str, scenes: int) -> list[Question]:
    """Questions about so many scenes."""
    folder = WORK / f"{split}-{kind}-{scenes}"
    if not (folder / "questions.jsonl").exists():
        export(folder, split, scenes, kind=kind)
    return read_questions(folder / "questions.jsonl", split)


def samples(prompts: Prompts, questions: list[Question]) -> list[dict[str, Any]]:
    """One prompt about each scene, its task in turns."""
    by_scene: dict[str, list[Question]] = {}
    for question in questions:
        by_scene.setdefault(question.scene, []).append(question)
    chosen = [of[number % len(of)] for number, of in enumerate(by_scene.values())]
    model = prompts.model
    return [collate([prompts.prompt(q)], 1, prompts.padding, model.device, model.dtype) for q in chosen]


def promised(model: Any, schedule: Schedule, prompts: list[dict[str, Any]]) -> float:
    """How many times fewer FLOPs the decoder's prefill takes."""
    found = [sizes(model, prompt) for prompt in prompts]
    visual, text = round(mean(v for v, _ in found)), round(mean(t for _, t in found))
    cost = DecoderCost.of(model)
    rows = [text + round(share * visual) for share in shares(schedule, len(cost.weights))]
    return cost.speedup(text + visual, rows)


def compare(name: str, kind: str, scenes: int) -> dict[str, Any]:
    """Search, then ask."""
    model, processor = load(MODELS[name])
    model = model.float()
    prompts = samples(Prompts(model, processor), asked(kind, "tune", SAMPLES))
    preset = Schedule.preset(PRESET)
    target = promised(model, preset, prompts)
    path = WORK / f"{name}-{kind}.json"
    tuned = luvc_fx.tune(model, prompts, target_speedup=target, say_so=print)
    path.write_text(json.dumps(tuned.to_dict(), indent=1))
    print(tuned)

    options = Options(MODELS[name], WORK, WORK / f"{name}-{kind}", batch=50)
    store = Answers(options.out / "answers.jsonl")
    asker = Asker(model, processor, options, store, lambda title, done, total: None)
    questions = asked(kind, "dev", scenes)
    cells = {
        UNPRUNED: Cell(UNPRUNED, None, Schedule()),
        PRESET: Cell(PRESET, None, preset),
        "tuned": Cell("tuned", None, tuned.schedule),
        "tuned, at random": Cell("tuned, at random", None, at_random(tuned.schedule), seeds=SEEDS),
    }
    said, again = {}, {}
    for cell in cells.values():
        each = [Cell(cell.name, None, schedule) for schedule in cell.schedules]
        said[cell], *again[cell] = [asker.answers(one, questions) for one in each]
    rivals = {PRESET: {cells["tuned"]: cells[PRESET]}}
    scores = score(questions, said, cells[UNPRUNED], rivals, again=again)
    heard = {"tuned": tuned.held_out, **tuned.compared}
    rows = {}
    for label, cell in cells.items():
        found, trial = scores[cell][ALL_TASKS], heard.get(label)
        rows[label] = {
            "schedule": json.loads(cell.schedule.to_json()) if cell.schedule else None,
            "budget": asker.facts(cell, questions)["budget"],
            "speedup": None if trial is None else trial.speedup,
            "kl": None if trial is None else trial.kl,
            "changed": None if trial is None else trial.changed,
            "accuracy": found.accuracy,
            "retention": found.retention,
            "retention_interval": found.retention_interval,
            "against": {
                other: {"difference": one.difference, "p": one.p} for other, one in found.against.items()
            },
        }
    return {
        "questions": len(questions),
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown; p is of a sign-flip test over scenes, with Holm's correction over the models."""
    lines = [
        "| model, set (questions) | schedule | tokens | fewer FLOPs | KL | answers changed | accuracy kept, "
        "% | minus `image` |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    compared = [result["rows"]["tuned"]["against"][PRESET]["p"] for result in results.values()]
    for (name, result), adjusted in zip(results.items(), holm(compared), strict=True):
        for label, row in result["rows"].items():
            heard = ["", "", ""]
            if row["speedup"] is not None:
                heard = [f"{row['speedup']:.2f}x", f"{row['kl']:.4f}", f"{row['changed']:.1%}"]
            low, high = row["retention_interval"]
            kept = f"{100 * row['retention']:.1f} ({100 * low:.1f} - {100 * high:.1f})"
            against = row["against"].get(PRESET)
            minus = ""
            if against is not None:
                minus = f"{100 * against['difference']:+.1f} points, p = {adjusted:.3f}"
            cells = [f"{name} ({result['questions']})", label, f"{row['budget']:.1%}", *heard, kept, minus]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All cases, then the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "tuned.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for model, kind, scenes in CASES:
        results[f"{model}, {kind}"] = compare(model, kind, scenes)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "tuned.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
