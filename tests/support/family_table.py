"""The table of model families: measured by running the matrix, kept as data, shown as Markdown.

``python -m tests.support.family_table --measure`` runs the matrix (many minutes), or only the families whose
names follow, and writes `OUTCOMES`. The tests of `test_families` compare what they measure with it. `pages`
makes the tables of the documentation of it, without running anything (see docs/generated.py for ``--write``
and ``--check``).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch

from docs import generated
from luvc_fx.report import Reason
from tests.support.family_matrix import BACKEND, CELLS, FAMILIES, Outcome, cell, run

OUTCOMES = Path(__file__).with_name("family_outcomes.json")
COLUMNS = (
    "family",
    "input",
    "visual tokens",
    "graphs: forward",
    "then `generate`",
    "same shape",
    "more text",
    "other image",
    "refused",
)

Row = dict[str, str | None]


def _counts(graphs: dict[str, int]) -> str:
    parts = [f"{graphs[kind]} {kind}" for kind in ("whole", "vision", "prefill", "decode") if kind in graphs]
    # Pieces between graph breaks that hold neither features nor a fusion: how many is Dynamo's business.
    pieces = sum(count for kind, count in graphs.items() if kind in ("other", "text"))
    return " + ".join([*parts, *(["pieces"] if pieces else [])]) or "-"


def tokens_of(family: str, name: str) -> str:
    """What the matrix says about the visual tokens of a cell."""
    given = cell(family, name)
    done = [word for word, is_done in (("merged", given.merged), ("pruned", given.pruned)) if is_done]
    return " and ".join(done) or "left alone"


def reasons_of(reasons: tuple[Reason, ...]) -> str:
    """The last column."""
    return ", ".join(f"`{reason.value}`" for reason in reasons) or "-"


def row_of(family: str, name: str, told: Outcome) -> Row:
    """One row; None where the run did not try what the column says."""
    given = cell(family, name)
    direct = name == BACKEND
    return {
        "family": FAMILIES[family].title,
        "input": name,
        "visual tokens": tokens_of(family, name),
        "graphs: forward": _counts(told.forward),
        "then `generate`": "-" if direct else _counts(told.generate),
        "same shape": str(told.repeated),
        "more text": "-" if direct else _again(told.longer, told),
        "other image": "-" if direct or given.other is None else _again(told.other, told),
        "refused": reasons_of(told.reasons),
    }


def _again(graphs: int | None, told: Outcome) -> str | None:
    """Graphs compiled again; how many pieces a model falls into differs with what ran before it."""
    if graphs is None or not graphs:
        return None if graphs is None else "0"
    return "pieces" if "pieces" in _counts(told.forward) else str(graphs)


def lines_of(rows: list[Row]) -> list[str]:
    """The table as Markdown; a family's name stands once."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    before: str | None = None
    for row in rows:
        shown = {**row, "family": "" if row["family"] == before else row["family"]}
        before = row["family"]
        lines.append(
            ("| " + " | ".join(str(shown[column]) for column in COLUMNS) + " |").replace("|  |", "| |")
        )
    return lines


def summary_lines(rows: list[Row]) -> list[str]:
    """Of each family under `luvc_fx.compile`: on how many inputs tokens merge and are pruned; where not."""
    lines = ["| family | merged | pruned | note |", "| --- | --- | --- | --- |"]
    for title in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == title and row["input"] != BACKEND]
        done = {str(row["input"]): str(row["visual tokens"]).split(" and ") for row in own}
        merged, pruned = (
            [name for name, words in done.items() if word in words] for word in ("merged", "pruned")
        )
        neither = [name for name in done if name not in merged and name not in pruned]
        without = [
            f"{what}: {', '.join(name for name in done if name not in having and name not in neither)}"
            for what, having in (("not merged", merged), ("not pruned", pruned))
            if having and set(done) - set(having) - set(neither)
        ]
        if not merged:
            reasons = dict.fromkeys(str(row["refused"]) for row in own)
            without.append(f"not merged: {', '.join(reasons)}")
        if neither:
            without.append(f"left alone: {', '.join(neither)}")
        lines.append(f"| {title} | {_share(merged, done)} | {_share(pruned, done)} | {'; '.join(without)} |")
    return lines


def _share(having: list[str], of: dict[str, list[str]]) -> str:
    """Yes, no, or on how many of the inputs."""
    if not having:
        return "no"
    return "yes" if len(having) == len(of) else f"{len(having)} of {len(of)} inputs"


def pages() -> generated.Pages:
    """The tables of the documentation."""
    rows = list(measured_rows().values())
    return {"families": "\n".join(lines_of(rows)), "families_summary": "\n".join(summary_lines(rows))}


def measured_rows() -> dict[tuple[str, str], Row]:
    """The committed rows, by family (its key in the matrix) and input."""
    found = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return {(row["key"], row["input"]): {column: row[column] for column in COLUMNS} for row in found}


def measure(families: Collection[str]) -> int:
    """Run every cell of `families`; with a difference from the oracle nothing is written."""
    known, rows, wrong = measured_rows(), [], []
    for family, name in CELLS:
        if family not in families:
            if (family, name) in known:
                rows.append(json.dumps({"key": family, **known[family, name]}))
            continue
        torch._dynamo.reset()
        started = time.perf_counter()
        told = run(family, name, longer=True, other=True)
        wrong += [f"{family}, {name}: {difference}" for difference in told.differences]
        if told.reasons != cell(family, name).reasons:
            wrong.append(f"{family}, {name}: refused {told.refusals}, expected {cell(family, name).reasons}")
        rows.append(json.dumps({"key": family, **row_of(family, name, told)}))
        print(f"{family}, {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        OUTCOMES.write_text("[\n " + ",\n ".join(rows) + "\n]\n", encoding="utf-8")
    return bool(wrong)


def main() -> int:
    """Measure, or show what was measured."""
    parser = generated.parser(__doc__)
    parser.add_argument(
        "--measure", nargs="*", choices=FAMILIES, metavar="FAMILY", help="run those, or all, first"
    )
    arguments = parser.parse_args()
    if arguments.measure is not None and measure(arguments.measure or [*FAMILIES]):
        return 1
    return generated.run(pages, arguments)


if __name__ == "__main__":
    sys.exit(main())
