"""luvc_fx: a visual-token budget compiled into the graph of a stock vision-language model."""

from typing import TYPE_CHECKING, Any

from luvc_fx.dynamo.backend import LuvcBackend, LuvcWarning, NotRewritten, backend, prepare
from luvc_fx.exporting import export
from luvc_fx.generate.sizes.buckets import SizeBuckets
from luvc_fx.report import Reason, Refusal, Report
from luvc_fx.schedule import Merge, Prune, Schedule
from luvc_fx.selectors import register as register_selector

if TYPE_CHECKING:
    from luvc_fx.apps.picture import picture
    from luvc_fx.apps.tuning import tune
    from luvc_fx.generate.frontdoor import applied, compile, report_of, restore, set_budget
    from luvc_fx.generate.sizes.warming import warmup

__version__ = "0.1.0"  # the only place; pyproject.toml reads it here

__all__ = [
    "LuvcBackend",
    "LuvcWarning",
    "Merge",
    "NotRewritten",
    "Prune",
    "Reason",
    "Refusal",
    "Report",
    "Schedule",
    "SizeBuckets",
    "__version__",
    "applied",
    "backend",
    "compile",
    "export",
    "picture",
    "prepare",
    "register_selector",
    "report_of",
    "restore",
    "set_budget",
    "tune",
    "warmup",
]

_FRONT_DOOR = ("applied", "compile", "report_of", "restore", "set_budget")


def __getattr__(name: str) -> Any:
    # The backend alone needs no transformers; the front door does (extra "hf").
    if name == "warmup":
        from luvc_fx.generate.sizes.warming import warmup

        return warmup
    if name == "tune":
        from luvc_fx.apps.tuning import tune

        return tune
    if name == "picture":
        from luvc_fx.apps.picture import picture

        return picture
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from luvc_fx.generate import frontdoor

    return getattr(frontdoor, name)
