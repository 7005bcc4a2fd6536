"""The tables of the evidence, made from ``results/<split>/*.json``.

``python examples/evidence/table.py`` prints the README's, ``--write`` puts it there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from luvc_fx.evaluation.markdown import EVIDENCE, SIGNIFICANT

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
START, END = "<!-- evidence: by examples/evidence/table.py -->", "<!-- /evidence -->"


def load(split: str) -> dict[str, dict[str, Any]]:
    """Results by the name of their set."""
    return {
        path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results" / split).glob("*.json"))
    }


def sets_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """What each set is worth."""
    lines = [
        "| set | questions | images | unpruned | wrong image | counts as evidence |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, result in results.items():
        score, wrong = result["rows"][0]["scores"]["all"], result["wrong_image"]["all"]
        counts = score["accuracy"] >= EVIDENCE[0] and score["accuracy"] - wrong >= EVIDENCE[1]
        lines.append(
            f"| {name} | {score['questions']} | {score['scenes']} | {score['accuracy']:.1%} | {wrong:.1%} "
            f"| {'yes' if counts else 'no: unproven'} |"
        )
    return lines


def methods_table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Retention of every method at every budget, with its interval and marks, set by set."""
    budgets = list(
        dict.fromkeys(row["budget"] for r in results.values() for row in r["rows"] if row["budget"])
    )
    lines = [
        "| set | method | " + " | ".join(f"{budget:.1%}" for budget in budgets) + " | own budget |",
        "|---|---|" + "---:|" * (len(budgets) + 1),
    ]
    for name, result in results.items():
        rows = {(row["method"], row["budget"]): row for row in result["rows"][1:]}
        for method in dict.fromkeys(row["method"] for row in result["rows"][1:]):
            cells = [_cell(rows.get((method, budget))) for budget in budgets]
            own = rows.get((method, None))
            cells.append("" if own is None else f"{_cell(own)}, at {own['measured_budget'] or 0:.1%}")
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
    for other, below, above in (("unpruned", "▼", "▲"), ("random", "r-", "r+"), ("spectrum", "s-", "s+")):
        against = score["against"].get(other)
        if against is not None and against["adjusted"] < SIGNIFICANT:
            marks += f" {below if against['difference'] < 0 else above}"
    return f"{100 * score['retention']:.1f} ({100 * low:.1f} - {100 * high:.1f}){marks}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("tune", "dev", "test"), default="test")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    args = parser.parse_args()
    results = load(args.split)
    text = "\n".join([*sets_table(results), "", *methods_table(results)])
    print(text)
    if args.write:
        before, rest = README.read_text().split(START)
        README.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
