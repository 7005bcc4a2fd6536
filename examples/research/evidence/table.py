"""The tables of the evidence, made from ``results/<split>/*.json``.

``python -m examples.research.evidence.table`` prints those of the documentation; docs/generated.py has
``--write`` and ``--check``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from docs import generated
from luvc_fx.apps.evaluation.markdown import EVIDENCE, MARKS, SIGNIFICANT, misses

RESULTS = Path(__file__).parent / "results"
SIGNS = (*MARKS, ("default", "d-", "d+", "our default at the same budget"))
LEGEND = (
    "Numbers are % of the unpruned accuracy with 95 % intervals. Where p < 0.05 after Holm's correction, "
    "which is over the methods and budgets of one set, not over sets (so a set with more rows has fewer "
    "marks): "
    + "; ".join(f"{below} below and {above} above {what}" for _, below, above, what in SIGNS)
    + ". Tokens at random are three sets of places, the same in every image, and intervals are over images "
    "alone; behind a preset's colon they have all else of the preset, its averaging, too. A budget behind a "
    "comma is what was measured, where it is off. `wrong image` and, where it is of fewer questions, the "
    "accuracy in brackets are of the questions whose task has another image."
)
SHORT = (
    "Mean visual tokens a decoder layer, and what is left of the unpruned accuracy in %: **our default** / "
    "random tokens at the same layers and counts / the best other row of the long table, with its name:"
)
TITLES = {
    "internvl-objects": "InternVL, objects",
    "internvl-video4": "InternVL, films of 4 frames",
    "llava-chart": "shipped LLaVA, bar charts",
    "llava-objects": "shipped LLaVA, objects",
    "llava_depth24-objects": "LLaVA of 24 layers, objects",
    "llava_seed1-objects": "LLaVA of another seed, objects",
    "llava_seed2-objects": "LLaVA of a third seed, objects",
    "qwen2_vl-easy": "Qwen2-VL, easy-VQA",
    "qwen2_vl-page": "Qwen2-VL, sheets of numbers",
}
"""What the sets are, in words."""
PRESET_ROWS = (
    ("image", "`image`", "image:random", None),
    ("video", "`video`", "video:random", None),
    ("document", "`document`", "document:random", None),
    *(("default", f"`at_budget({budget})`", "random", budget) for budget in (0.5, 0.25, 0.125)),
)
"""Rows of the table of presets: the method, its name there, random tokens in its place, and the budget."""


def load(split: str) -> dict[str, dict[str, Any]]:
    """Results by the name of their set."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / split).glob("*.json"))}


def sets_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """What each set is worth."""
    lines = [
        "| set | questions | images | unpruned | wrong image | counts as evidence | but not these tasks |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for name, result in results.items():
        scores, wrongs = result["rows"][0]["scores"], result["wrong_image"]
        score, wrong = scores["all"], wrongs["all"]
        weak = [task for task in result["tasks"][1:] if not counts(scores[task], wrongs.get(task))]
        without = ", ".join(f"{task} ({scores[task]['accuracy']:.0%})" for task in weak)
        shown = f"{wrong['accuracy']:.1%}"
        if wrong["questions"] != score["questions"]:
            shown += f" ({wrong['right_image']:.1%})"
        lines.append(
            f"| {name} | {score['questions']} | {score['scenes']} | {score['accuracy']:.1%} | {shown} "
            f"| {'yes' if counts(score, wrong) else 'no: unproven'} | {without} |"
        )
    return lines


def counts(score: dict[str, Any], wrong: dict[str, Any] | None) -> bool:
    """The rule of `evaluation.markdown.is_evidence`; without a wrong image a task is no evidence."""
    if wrong is None:
        return False
    return score["accuracy"] >= EVIDENCE[0] and wrong["right_image"] - wrong["accuracy"] >= EVIDENCE[1]


def short_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Of every set and budget: the default, random tokens, and the best other method that has an answer."""
    budgets = _budgets(results)
    lines = [
        "| set | " + " | ".join(f"{budget:.1%}" for budget in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for name, result in results.items():
        shown = []
        for budget in budgets:
            rows = [row for row in result["rows"][1:] if row["budget"] == budget and row["scores"]]
            kept = {row["method"]: row["scores"]["all"]["retention"] for row in rows}
            ours, chance = kept.pop("default"), kept.pop("random")
            best = max(kept, key=lambda method: kept[method])
            shown.append(f"**{100 * ours:.1f}** / {100 * chance:.1f} / {100 * kept[best]:.1f} {best}")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def above(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str, float], dict[str, Any]]:
    """What has more right answers than the default at the same budget, by set, method and budget."""
    return {
        (name, row["method"], row["budget"]): against
        for name, result in results.items()
        for row in result["rows"][1:]
        if row["scores"] and (against := row["scores"]["all"]["against"].get("default"))
        if against["difference"] > 0
    }


def told_above(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is significantly above the default, and, without correction, what is closest to it in each set."""
    found = above(results)
    sure = [_told(key, one) for key, one in found.items() if one["adjusted"] < SIGNIFICANT]
    nearest = []
    for name in results:
        of = {key: one for key, one in found.items() if key[0] == name}
        if of:
            key = min(of, key=lambda key: of[key]["p"])
            nearest.append(f"{_told(key, of[key])}, p = {of[key]['p']:.3f}")
        else:
            nearest.append(f"{name}: nothing is above")
    return [
        f"Significantly above the default: {'; '.join(sure) or 'nothing'}.",
        "",
        "Above it with the smallest p, before any correction for the number of comparisons: "
        f"{'; '.join(nearest)}.",
    ]


def _told(key: tuple[str, str, float], against: dict[str, Any]) -> str:
    name, method, budget = key
    return f"{name}: {method} at {budget:.1%}, {100 * against['difference']:+.1f} points"


def _budgets(results: dict[str, dict[str, Any]]) -> list[float]:
    return list(dict.fromkeys(row["budget"] for r in results.values() for row in r["rows"] if row["budget"]))


def methods_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Retention of every method at every budget, with its interval and marks, set by set."""
    budgets = _budgets(results)
    lines = [
        "| set | method | " + " | ".join(f"{budget:.1%}" for budget in budgets) + " | own budget |",
        "|---|---|" + "---:|" * (len(budgets) + 1),
    ]
    for name, result in results.items():
        rows = {(row["method"], row["budget"]): row for row in result["rows"][1:]}
        for method in dict.fromkeys(row["method"] for row in result["rows"][1:]):
            cells = [_cell(rows.get((method, budget))) for budget in budgets]
            cells.append(_cell(rows.get((method, None))))
            lines.append(f"| {name} | {method} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    score = row["scores"].get("all")
    if score is None or score["retention"] is None:
        return "n/a"
    low, high = score["retention_interval"] or (score["retention"], score["retention"])
    marks = ""
    for other, below, above, _ in SIGNS:
        against = score["against"].get(other)
        if against is not None and against["adjusted"] < SIGNIFICANT:
            marks += f" {below if against['difference'] < 0 else above}"
    measured, budget = row["measured_budget"], row["budget"]
    at = f", at {measured:.1%}" if budget is None or misses(measured, budget) else ""
    return f"{100 * score['retention']:.1f} ({100 * low:.1f} - {100 * high:.1f}){marks}{at}"


def presets_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Of each preset its budget, and what it keeps in the set where it is best and where it is worst."""
    lines = [
        "| schedule | budget | best set | worst set | random tokens there |",
        "| --- | ---: | --- | --- | ---: |",
    ]
    for method, name, control, budget in PRESET_ROWS:
        kept, chance, budgets = {}, {}, []
        for title, result in results.items():
            for row in result["rows"][1:]:
                if row["budget"] == budget and row["method"] == method:
                    kept[title] = row["scores"]["all"]["retention"]
                    budgets.append(row["measured_budget"])
                elif row["budget"] == budget and row["method"] == control:
                    chance[title] = row["scores"]["all"]["retention"]
        best, worst = max(kept, key=lambda title: kept[title]), min(kept, key=lambda title: kept[title])
        shown = [f"{100 * kept[title]:.1f} % ({TITLES[title]})" for title in (best, worst)]
        if len(kept) == 1:
            shown[1] = "only that set"
        share = f"{100 * sum(budgets) / len(budgets):.0f} %"
        lines.append(f"| {name} | {share} | {shown[0]} | {shown[1]} | {100 * chance[worst]:.1f} % |")
    return lines


def short(results: dict[str, dict[str, Any]]) -> str:
    """The sets, the default among others in brief, and what is above it."""
    return "\n".join([*sets_table(results), "", SHORT, "", *short_table(results), "", *told_above(results)])


def long(results: dict[str, dict[str, Any]]) -> str:
    """All methods, with intervals and tests."""
    return "\n".join([LEGEND, "", *methods_table(results)])


def pages() -> generated.Pages:
    """The tables of the documentation."""
    results = load("test")
    presets = "\n".join(presets_table(results))
    return {"evidence": short(results), "evidence_all": long(results), "presets": presets}


if __name__ == "__main__":
    sys.exit(generated.run(pages, generated.parser(__doc__).parse_args()))
