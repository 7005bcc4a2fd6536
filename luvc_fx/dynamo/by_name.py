"""``torch.compile(model, backend="luvc_fx", options={...})``: the backend by its name.

torch finds it by the entry point ``luvc_fx.dynamo.by_name:luvc_fx``. As there is no object to ask for a
report, a `Report` of your own may be given to be filled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from luvc_fx.dynamo.backend import LuvcBackend, set_up_dynamo
from luvc_fx.report import Report
from luvc_fx.schedule import Schedule

PREFIX = "luvc."
ALLOWED = ("schedule", "inner", "strict", "on_no_match", "report")


def __getattr__(name: str) -> Any:
    """The attribute `luvc_fx`, which torch reads when a process first compiles with that name.

    By this look-up Dynamo is set up as `luvc_fx.backend()` does. It has to be then: torch makes no object
    of ours before the first graph is captured, and by that time Dynamo has ended that graph at the model's
    check of the image tokens. torch remembers what it read, so a thread that starts later has its own
    Dynamo settings (from torch 2.13 on): call ``luvc_fx.backend()`` there once, or merging is refused in
    its first graph.
    """
    if name != "luvc_fx":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    set_up_dynamo()
    return compile_graph


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one graph as `luvc_fx.backend` would with the arguments that `options` name.

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
    schedule = ours.pop("schedule", "image")
    if isinstance(schedule, str) and schedule.lstrip().startswith("{"):
        schedule = Schedule.from_json(schedule)
    named = LuvcBackend(Schedule.of(schedule), mode=mode, options=given, report=report, **ours)
    set_up_dynamo()
    return named


# What `luvc_fx.dynamo.backend` asks when Dynamo gives a function up that was compiled by name.
compile_graph.from_options = from_options  # type: ignore[attr-defined]
