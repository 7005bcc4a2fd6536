"""What a prepare step and a pass have to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import fx

from luvc_fx.passes.support.context import Context
from luvc_fx.schedule import Schedule

Edit = Callable[[], None]


class PrepareStep(Protocol):
    """Looks for operations through which tokens cannot be followed, before anything is recognised.

    It only reads the graph, and returns the rewrite as a function, or None where there is nothing to
    rewrite (or where `schedule` asks for nothing that would need it): a graph is copied for the way back
    only when a step has found something. The rewritten graph computes the same values, and nodes that the
    step inserts carry no mark of ours, so they count as the model's own.
    """

    __name__: str

    def __call__(self, graph: fx.Graph, schedule: Schedule) -> Edit | None: ...


class Pass(Protocol):
    """Rewrites the graph of `context` in place, as its plan says.

    It matches first and edits second, leaves a graph that `fx.Graph.lint` accepts, and inserts nodes by
    `luvc_fx.graph.emit.emit`. What it cannot do it raises as `Refused`, with the reason and the node.
    It finds nothing to do in a graph that has none of what it rewrites, and then changes nothing.
    """

    __name__: str

    def __call__(self, context: Context) -> None: ...
