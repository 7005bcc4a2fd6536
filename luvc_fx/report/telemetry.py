"""Publish each graph's report where torch's own tools look: logs, the structured trace, counters.

Logs are the standard library's under the package's names, so ``TORCH_LOGS="luvc_fx"`` shows a report per
graph and ``TORCH_LOGS="+luvc_fx"`` the graphs as well. With ``TORCH_TRACE`` set, `tlparse` lists the
report and the rewritten graph as artifacts. Counters are in ``torch._dynamo.utils.counters["luvc_fx"]``.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import fx

from luvc_fx import _compat
from luvc_fx.report import GraphReport, Refusal

log = logging.getLogger(__name__)


def log_graph(title: str, gm: fx.GraphModule) -> None:
    """The graph at DEBUG, as it is now: a handler may format the message after the passes have run."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", title, _text(gm))


def publish(gm: fx.GraphModule, report: GraphReport) -> None:
    """Log, trace and count one graph that went through the backend."""
    log.info("%s", report)
    _artifact("luvc_fx_report", "json", report.to_dict)
    counters = _compat.counters()
    counters["graphs"] += 1
    count_refusals(report.refusals)
    if not report.rewritten:
        return
    log_graph("rewritten graph", gm)
    _artifact("luvc_fx_rewritten_graph", "string", lambda: _text(gm))
    counters["rewritten"] += 1
    counters["masks rebuilt"] += report.masks_rebuilt
    for insertion in report.inserted:
        counters[f"{insertion.kind}s"] += 1


def count_refusals(refusals: list[Refusal]) -> None:
    """Count refusals by their reason."""
    for refusal in refusals:
        _compat.counters()[f"refused: {refusal.reason.value}"] += 1


def _text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


def _artifact(name: str, encoding: str, payload: Any) -> None:
    _compat.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )
