"""Insertions are data; their text is what people and the JSON of a report read."""

from __future__ import annotations

import json

import pytest

from luvc_fx.report import GraphReport, Insertion, MergeStep, Report

WIDTH = MergeStep("oim", "width", (16,), (12,))
TEXTS = {
    Insertion("merge", 2, "oim", 256, 192, (WIDTH,)): "merge after encoder block 2: width 16 -> 12",
    Insertion(
        "merge", 0, "oim", 256, 96, (WIDTH, MergeStep("oim", "height", (16,), (8,)))
    ): "merge after encoder block 0: width 16 -> 12; height 16 -> 8",
    Insertion(
        "merge", 1, "tome", None, None, (MergeStep("tome", "width", (8, 8, 6), (4, 4, 4)),)
    ): "merge after encoder block 1: tome, width 8 -> 4, 6 -> 4",
    Insertion("prune", 6, "distinct", 96, 48): "prune before decoder layer 6: distinct 96 -> 48",
    Insertion(
        "prune", 3, "spectrum", 10, 5, absorbs=True
    ): "prune before decoder layer 3: spectrum 10 -> 5, the others averaged into them",
}


@pytest.mark.parametrize(("insertion", "text"), TEXTS.items(), ids=TEXTS.values())
def test_the_text_of_an_insertion(insertion: Insertion, text: str) -> None:
    assert str(insertion) == text
    assert text.startswith(f"{insertion.kind} {insertion.site}: ")


def test_the_json_of_a_report_has_insertions_as_text_and_as_data() -> None:
    report = Report([GraphReport(kind="vision", inserted=[*TEXTS])])
    (graph,) = json.loads(report.to_json())["graphs"]
    assert graph["inserted"] == [*TEXTS.values()] and graph["rewritten"]
    assert [line.strip() for line in str(report).splitlines()[1:6]] == [*TEXTS.values()]
    assert graph["insertions"][0] == {
        "kind": "merge",
        "layer": 2,
        "method": "oim",
        "before": 256,
        "after": 192,
        "steps": [{"method": "oim", "axis": "width", "before": [16], "after": [12]}],
        "absorbs": False,
    }
