"""The README's table of speed says what the committed results say, and those are whole."""

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


def test_the_readme_has_the_table_of_the_results() -> None:
    assert table.written() == table.lines_of(RESULTS)


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
    assert lines[2] not in table.written()


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
