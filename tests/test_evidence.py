"""The README's table of the evidence is made from the committed results."""

from __future__ import annotations

import copy

import pytest
import table


def test_the_readme_has_the_results() -> None:
    results = table.load("test")
    assert results
    written = table.README.read_text(encoding="utf-8").split(table.START)[1].split(table.END)[0]
    assert written.strip() == table.whole(results), "run examples/evidence/table.py --write"


def test_every_reported_cell_has_enough_questions_of_models_that_know_the_task() -> None:
    for name, result in table.load("test").items():
        for row in result["rows"]:
            if row["scores"]:
                assert row["scores"]["all"]["questions"] >= 2500, (name, row["method"])


def test_a_set_below_ninety_percent_is_no_evidence() -> None:
    name, result = next(iter(table.load("test").items()))
    weak = copy.deepcopy(result)
    assert table.sets_table({name: result})[-1].endswith("| yes |")
    weak["rows"][0]["scores"]["all"]["accuracy"] = 0.89
    assert table.sets_table({name: weak})[-1].endswith("| no: unproven |")


@pytest.mark.parametrize("method", ["default", "random"])
def test_the_short_table_is_read_off_the_long_one(method: str) -> None:
    name, result = next(iter(table.load("test").items()))
    changed = copy.deepcopy(result)
    budget = next(row["budget"] for row in changed["rows"] if row["budget"])
    row = next(r for r in changed["rows"] if r["method"] == method and r["budget"] == budget)
    row["scores"]["all"]["retention"] = 0.123
    mark = "**12.3**" if method == "default" else " 12.3 /"
    assert mark in table.short_table({name: changed})[-1]
    assert mark not in table.short_table({name: result})[-1]
