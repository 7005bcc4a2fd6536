"""The table of speed says what the committed results say, and those are whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from examples.research.benchmarks import speed_table as table
from luvc_fx.apps.bench import SHAPES
from luvc_fx.schedule import Schedule

RESULTS = table.read()


def test_there_are_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["rows"][0]["shape"]["input"])
def test_a_result_went_through_the_gate(result: dict[str, Any]) -> None:
    assert result["obstacles"] == []
    for row in result["rows"]:
        assert row["shape"]["name"] in SHAPES
        assert row["median_ms"] > 0 and row["spread_ms"] >= 0
        if row["schedule"] is not None:
            Schedule.from_json(json.dumps(row["schedule"]))
    for cost in result["costs"]:
        assert cost["recompiled"] == 0


def test_a_changed_number_is_seen() -> None:
    result = {**RESULTS[0], "rows": [{**RESULTS[0]["rows"][0], "median_ms": 123456.0}]}
    lines = table.lines_of([result])
    assert "123,456 ms" in lines[2]
    assert lines[2] not in table.pages()["speed"]


def test_the_summary_has_the_numbers_of_the_result() -> None:
    """And none of a GPU before there is one."""
    result = RESULTS[0]
    rows = [{**row, "speedup": 7.25} if row["stage"] == "prefill" else row for row in result["rows"]]
    changed = {**result, "rows": rows}
    assert "prefill 7.25x" in table.summary([changed]) and "prefill 7.25x" not in table.summary([result])
    assert "On a GPU none of the 9 planned rows" in table.summary([result])
    assert "On a GPU 1 of the 9 planned rows" in table.summary([result, {**result, "row": "some"}])


def test_the_table_of_the_mask_has_its_figures() -> None:
    took = {"prefill_masked_ms": 7.0, "prefill_causal_ms": 5.0, "step_masked_ms": 0.5, "step_plain_ms": 0.25}
    found = {"layer": {"1549": took, "24": took}, "mask": {"made_anew_ms": 0.5, "two_gathers_ms": 3.0}}
    lines = table.mask_table(found)
    assert lines[3] == "| 24 | 7.0 ms | 5.0 ms | 0.500 ms | 0.250 ms |"
    assert lines[-1].endswith(
        "the mask of 24 rows is made in 0.50 ms; cutting it out of the long one took 3.00."
    )


def test_results_of_one_shape_are_told_apart() -> None:
    """By what the campaign changes: Inductor's mode, the batch, and the row where the schedule is another."""
    row = RESULTS[0]["rows"][0]
    lines = set()
    for name, changed in {
        "plain": {},
        "graphs": {"mode": "reduce-overhead"},
        "batch": {"batch": 8},
        "to-2048": {},
    }.items():
        result = {**RESULTS[0], "row": name, "rows": [{**row, "shape": {**row["shape"], **changed}}]}
        lines |= {table.lines_of([result])[2], table.lines_of([result])[-1]}
    assert len(lines) == 8
    assert any(", batch 8, row batch |" in line for line in lines)
    assert any("1 image, reduce-overhead, row graphs: a budget" in line for line in lines)
