"""What happened to each graph, as data: insertions, reasons, refusals and reports."""

from luvc_fx.report.insertions import Insertion, MergeStep
from luvc_fx.report.reasons import LuvcWarning, NotRewritten, Reason, Refusal, Refused, unwrapped
from luvc_fx.report.reports import GraphReport, Report

__all__ = [
    "GraphReport",
    "Insertion",
    "LuvcWarning",
    "MergeStep",
    "NotRewritten",
    "Reason",
    "Refusal",
    "Refused",
    "Report",
    "unwrapped",
]
