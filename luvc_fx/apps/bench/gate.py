"""Reasons why a speed-up would mislead: while there is one, the benchmark gives no speed-up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luvc_fx.report import Report
from luvc_fx.schedule import Schedule

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""RMS of the difference of the last token's logits, over their RMS."""


def refusals(name: str, report: Report) -> list[str]:
    """What the schedule asked for and was refused."""
    return [f"{name}: {refusal}" for refusal in report.all_refusals()]


def unmatched(name: str, report: Report, schedule: Schedule) -> list[str]:
    """Sites of the schedule that no graph has."""
    graphs = [graph for graph in report.graphs if graph.kind != "decode"]
    obstacles = []
    for kind, wanted in (("merge", schedule.merge), ("prune", schedule.prune)):
        count = sum(insertion.kind == kind for graph in graphs for insertion in graph.inserted)
        if wanted and count < len(wanted):
            obstacles.append(f"{name}: {count} of {len(wanted)} sites that {kind} are in the graphs")
    return obstacles


def eager_stages(name: str, calls: dict[str, int], runs: int) -> list[str]:
    """Stages of which not every run went through a compiled graph."""
    return [
        f"{name}: {calls.get(stage, 0)} compiled {stage} graphs ran in {runs} runs, so some ran eagerly"
        for stage in ("vision", "prefill")
        if calls.get(stage, 0) < runs
    ]


def recompiled(name: str, before: int, after: int) -> list[str]:
    """Graphs that were compiled while the clock ran."""
    return [f"{name}: {after - before} graphs were compiled while timing"] if after != before else []


def wrong_logits(name: str, got: Tensor, want: Tensor) -> list[str]:
    """Logits that differ from those of the same graphs without a compiler."""
    error = float(
        (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    )
    allowed = TOLERANCE[want.dtype]
    if error <= allowed:  # not with NaN
        return []
    return [f"{name}: the logits differ from eager by {error:.2g} of their RMS; allowed: {allowed:g}"]


def wrong_lengths(name: str, planned: Sequence[int], held: Sequence[int], text: int) -> list[str]:
    """A report whose tokens per layer are not those that the KV cache holds."""
    tokens = [length - text for length in held]
    if list(planned) == tokens:
        return []
    return [f"{name}: the report says {list(planned)} visual tokens per layer, the KV cache {tokens}"]
