"""``torch.compile(model, backend="luvc_fx", options={...})``: the backend by its name.

Imported by torch when somebody asks for that name (entry point group ``torch_dynamo_backends``). As there
is no object to ask for a report, a `Report` of your own may be given to be filled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from luvc_fx import _compat
from luvc_fx.dynamo.backend import LuvcBackend, backend
from luvc_fx.report import Report
from luvc_fx.schedule import Schedule

PREFIX = "luvc."
ALLOWED = ("schedule", "inner", "strict", "on_no_match", "report")

# No object is made before the first graph is captured, and then it is too late: see `backend`.
_compat.enable_scalar_capture()


def luvc_fx(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one graph as `luvc_fx.dynamo.backend` would with the arguments that `options` name.

    Args:
        options: ``"luvc.schedule"`` (a `Schedule`, the name of a preset or JSON text), ``"luvc.inner"``,
            ``"luvc.strict"``, ``"luvc.on_no_match"`` and ``"luvc.report"``; every other key is Inductor's.

    Raises:
        ValueError: for a key or a value that is not allowed.
    """
    return from_options(mode, options)(gm, example_inputs)


def from_options(mode: str | None, options: dict[str, Any] | None) -> LuvcBackend:
    """The backend that `options` describe; equal options give equal backends.

    Raises:
        ValueError: for a key or a value that is not allowed.
    """
    given = dict(options or {})
    ours = {key.removeprefix(PREFIX): given.pop(key) for key in list(given) if key.startswith(PREFIX)}
    unknown = sorted(set(ours) - set(ALLOWED))
    if unknown:
        allowed = ", ".join(PREFIX + key for key in ALLOWED)
        raise ValueError(f"unknown options {[PREFIX + key for key in unknown]}; allowed: {allowed}")
    report = ours.pop("report", None)
    if report is not None and not isinstance(report, Report):
        raise ValueError(f"luvc.report is {report!r}; allowed: a luvc_fx.Report")
    schedule = ours.get("schedule")
    if isinstance(schedule, str) and schedule.lstrip().startswith("{"):
        ours["schedule"] = Schedule.from_json(schedule)
    made = backend(**ours, mode=mode, options=given)
    if report is not None:
        made.report = report
    return made


luvc_fx.from_options = from_options  # type: ignore[attr-defined]
