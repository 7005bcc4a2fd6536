"""The README's table of model families, made by running the matrix.

``.venv/bin/python tests/family_table.py`` prints it, ``--write`` puts it into README.md. The tests of
`test_families` compare what they measure with what stands there.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from luvc_fx.report import Reason
from tests.support.family_matrix import BACKEND, CELLS, FAMILIES, Outcome, cell, run
from tests.support.paths import ROOT

README = ROOT / "README.md"
START, END = "<!-- families: by tests/family_table.py -->", "<!-- /families -->"
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


def readme_rows() -> dict[tuple[str, str], Row]:
    """What stands in the README, by family (its key in the matrix) and input."""
    keys = {family.title: key for key, family in FAMILIES.items()}
    _, _, rest = README.read_text().partition(START)
    text, _, _ = rest.partition(END)
    rows: dict[tuple[str, str], Row] = {}
    title = ""
    for line in text.strip().splitlines()[2:]:
        parts = [part.strip() for part in line.strip().strip("|").split("|")]
        title = parts[0] or title
        row: Row = dict(zip(COLUMNS, [title, *parts[1:]], strict=True))
        rows[keys.get(title, title), str(row["input"])] = row
    return rows


def write(lines: list[str]) -> None:
    """Put the table between its two comments."""
    text = README.read_text()
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"README.md has no {START} ... {END}")
    README.write_text("\n".join([head + START, *lines, END + tail]))


def main() -> int:
    """Run every cell; with a difference from the oracle nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md")
    arguments = parser.parse_args()
    rows, wrong = [], []
    for family, name in CELLS:
        torch._dynamo.reset()
        started = time.perf_counter()
        told = run(family, name, longer=True, other=True)
        wrong += [f"{family}, {name}: {difference}" for difference in told.differences]
        if told.reasons != cell(family, name).reasons:
            wrong.append(f"{family}, {name}: refused {told.refusals}, expected {cell(family, name).reasons}")
        rows.append(row_of(family, name, told))
        print(f"{family}, {name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        return 1
    lines = lines_of(rows)
    if arguments.write:
        write(lines)
    else:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
