"""What happened to each graph, as data: reasons, refusals and reports."""

from luvc_fx.report.report import (
    GraphReport,
    LuvcWarning,
    NotRewritten,
    Reason,
    Refusal,
    Refused,
    Report,
    unwrapped,
)

__all__ = [
    "GraphReport",
    "LuvcWarning",
    "NotRewritten",
    "Reason",
    "Refusal",
    "Refused",
    "Report",
    "unwrapped",
]
