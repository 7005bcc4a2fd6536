"""What a compilation leaves behind: counters, logs, tlparse's artifacts, causes of recompiles."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx.dynamo import rewrite
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.paths import ROOT
from tests.support.replay import quietly, toy, toy_inputs, toy_whole

BOTH = Schedule(
    merge=Merge("width", length=2, layer=0), prune=(Prune(tokens=3, layer=1), Prune(tokens=0, layer=2))
)


def counters() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["luvc_fx"])


# ------------------------------------------------------------------------------------------ counters


def test_counters() -> None:
    captured = toy_whole()
    for schedule in (BOTH, Schedule(), Schedule(prune=Prune(tokens=99, layer=1))):
        quietly(schedule)(captured.copy(), list(captured.example_inputs))
    found = counters()
    assert found.pop("masks rebuilt") == 0
    assert found == {"graphs": 3, "rewritten": 1, "merges": 1, "prunes": 2, "refused: schedule": 1}


def test_a_failed_pass_counts_as_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(rewrite, "PASSES", (*rewrite.PASSES, broken))
    captured = toy_whole()
    quietly(BOTH)(captured.copy(), list(captured.example_inputs))
    assert counters() == {"graphs": 1, "refused: pass-failed": 1}


# ---------------------------------------------------------------------------------------------- logs


def test_info_is_the_report_and_debug_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    captured = toy_whole()

    def told(level: int) -> list[str]:
        caplog.clear()
        backend = luvc_fx.backend(BOTH, inner="eager", strict=True)
        with caplog.at_level(level, logger="luvc_fx"):
            backend(captured.copy(), list(captured.example_inputs))
        return [r.getMessage() for r in caplog.records if r.name.startswith("luvc_fx")]

    assert told(logging.WARNING) == []
    report, compiled = told(logging.INFO)
    assert compiled.startswith("compiled in 0.")
    assert report.startswith("whole graph, ")
    assert "prune before decoder layer 1: spectrum" in report
    before, again, after, _ = told(logging.DEBUG)
    assert again.splitlines()[1:4] == report.splitlines()[1:4]
    assert before.startswith("captured graph\n")
    assert after.startswith("rewritten graph\n")
    assert "scaled_dot_product_attention" in before
    assert "torch.ops.aten.gather" in after
    assert "torch.ops.aten.gather" not in before


PROGRAM = """
import torch
from tests.support.replay import toy, toy_inputs
import luvc_fx
from luvc_fx.schedule import Prune, Schedule
backend = luvc_fx.backend(Schedule(prune=Prune(tokens=3, layer=1)), inner="eager", strict=True)
with torch.no_grad():
    compiled = torch.compile(toy(), backend=backend, dynamic=False)
    compiled(**toy_inputs(rows=1))
    compiled(**toy_inputs(rows=2))
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """Standard error under TORCH_LOGS="+luvc_fx", and the structured trace, of two compilations."""
    folder = tmp_path_factory.mktemp("trace")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TORCH_LOGS": "+luvc_fx",
        "TORCH_TRACE": str(folder),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    artifacts: list[dict[str, Any]] = []
    for line in next(folder.glob("*.log")).read_text().splitlines():
        if line.startswith("V"):
            record = json.loads(line[line.index("] {") + 2 :])
            artifacts.append({**record, "text": ""})
        elif artifacts:
            artifacts[-1]["text"] += line.removeprefix("\t") + "\n"
    ours = [a for a in artifacts if a.get("artifact", {}).get("name", "").startswith("luvc_fx")]
    return done.stderr, ours


def test_torch_logs_by_the_name_of_the_package(process: tuple[str, list[dict[str, Any]]]) -> None:
    errors, _ = process
    lines = [line for line in errors.splitlines() if "report/telemetry.py" in line]
    assert any("whole graph, " in line for line in lines)
    assert any(line.endswith("captured graph") for line in lines)
    assert any(line.endswith("rewritten graph") for line in lines)
    assert any("compiled again (0/1) because of 0/0: tensor 'ids' size mismatch" in line for line in lines)


def test_artifacts_of_tlparse(process: tuple[str, list[dict[str, Any]]]) -> None:
    _, artifacts = process
    names = [(a["artifact"]["name"], a["artifact"]["encoding"]) for a in artifacts]
    assert names == [("luvc_fx_report", "json"), ("luvc_fx_rewritten_graph", "string")] * 2
    assert [(a["frame_id"], a["frame_compile_id"]) for a in artifacts] == [(0, 0), (0, 0), (0, 1), (0, 1)]
    report = json.loads(artifacts[2]["text"])
    assert report["tokens_per_layer"] == [16, 3, 3]
    assert report["compile_id"] == "0/1"
    assert "torch.ops.aten.gather" in artifacts[3]["text"]


# ------------------------------------------------------------------------------- causes of recompiles


@torch.no_grad()
def test_each_recompile_has_its_cause() -> None:
    model = toy()
    backend = luvc_fx.backend(BOTH, inner="eager", strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    compiled(**toy_inputs(rows=1))
    compiled(**toy_inputs(rows=2))
    other = luvc_fx.backend(Schedule(), inner="eager", strict=True)
    torch.compile(model, backend=other, dynamic=False)(**toy_inputs(rows=2))
    first, second = backend.report.graphs
    assert first.recompile_reason == ""
    assert "compiled again" not in str(first)
    assert "size mismatch at index 0. expected 1, actual 2" in second.recompile_reason
    assert f"compiled again ({second.compile_id}) because of" in str(second)
    (third,) = other.report.graphs
    assert "BACKEND_MATCH failure" in third.recompile_reason
    numbers = [graph.compile_id.partition("/")[2] for graph in (first, second, third)]
    assert numbers == ["0", "1", "2"]


def test_outside_of_a_compilation_there_is_no_cause() -> None:
    captured = toy_whole()
    backend = quietly(BOTH)
    backend(captured.copy(), list(captured.example_inputs))
    assert (backend.report.graphs[0].compile_id, backend.report.graphs[0].recompile_reason) == ("", "")


# --------------------------------------------------------------------------------------------- report


def test_the_report_as_data() -> None:
    captured = toy_whole()
    backend = quietly(BOTH)
    backend(captured.copy(), list(captured.example_inputs))
    (graph,) = json.loads(backend.report.to_json())["graphs"]
    assert graph["kind"] == "whole"
    assert (graph["encoder_blocks"], graph["decoder_layers"], graph["batch"]) == (2, 3, 2)
    assert (graph["images"], graph["lead"], graph["grid"], graph["merged_grid"]) == (2, 0, [4, 4], [4, 2])
    assert graph["tokens_per_layer"] == [8, 3, 0]
    assert graph["flops_before"] > graph["flops_after"] > 0
    assert graph["kv_bytes_before"] == graph["kv_bytes_after"] == [], "the toy has no cache"
    timed = {"recognise and plan", "costs", "retarget", "merge_tokens", "prune_tokens", "shrink_fusion"}
    assert timed <= graph["milliseconds"].keys()
    assert all(spent >= 0 for spent in graph["milliseconds"].values())
