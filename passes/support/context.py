"""What the passes over one graph share."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from luvc_fx.anatomy.recognise import Anatomy
from luvc_fx.passes.support.causal_mask import Causal
from luvc_fx.passes.support.retarget import Retarget
from luvc_fx.plan import Plan
from luvc_fx.report import GraphReport


@dataclass(slots=True)
class Context:
    """One graph on its way through the passes.

    Attributes:
        retarget: walks the graph behind the sites and makes it right for the new counts.
        representatives: those ``[images, H', W']`` of the last merge, once `merge_tokens` ran.
        places: int64 ``[batch, tokens]``, the rows of the visual tokens where the last site left off.
        rows: per `markers.PROMPT_ROWS` node its newest, shortened value.
        causal: what the masks are that a site made anew.
        site_compiler: the name under which sites that are operators find their compiler.
    """

    graph: fx.Graph
    anatomy: Anatomy
    plan: Plan
    report: GraphReport
    site_compiler: str = "eager"
    retarget: Retarget = field(init=False)
    representatives: fx.Node | None = None
    places: fx.Node | None = None
    rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    causal: dict[fx.Node, Causal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = (self.anatomy.encoder, self.anatomy.decoder)
        self.retarget = Retarget(self.graph, *(part.axes for part in parts if part is not None))
