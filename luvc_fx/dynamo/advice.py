"""Where Dynamo ended the capture of a graph and what helps, for refusals that come of it."""

from __future__ import annotations

import dataclasses
import textwrap

from torch import fx

from luvc_fx import _compat
from luvc_fx.graph.nodes import op_name
from luvc_fx.report import Reason, Refusal

HOOKS = "output_capturing.py"
"""Where transformers installs its output hooks, in the middle of a fresh model's first forward."""
LONGEST = 100
"""Characters of Dynamo's own words that a refusal repeats."""
APART = "put images and videos into prompts of their own"


def with_advice(refusal: Refusal, gm: fx.GraphModule, front_door: bool) -> Refusal:
    """`refusal` of a graph, with the place where its capture ended, and what to do about it.

    Args:
        front_door: whether `luvc_fx.compile` has the graph captured, so that it is no advice.
    """
    if refusal.reason is Reason.NO_ATTENTION and not _compat.capture_end(gm)[1]:
        advice = "load the model with attn_implementation='sdpa'"
    elif refusal.reason in (Reason.NO_ATTENTION, Reason.CAPTURE_ENDED_BEFORE_FUSION):
        advice = _advice(gm, front_door)
    elif refusal.reason is Reason.TOKEN_AXIS and front_door and _has_two_modalities(gm):
        advice = APART
    else:
        return refusal
    return dataclasses.replace(refusal, text=f"{refusal.text}; {advice}")


def _advice(gm: fx.GraphModule, front_door: bool) -> str:
    place, why = _compat.capture_end(gm)
    ended = f"Dynamo ended this graph at {place}"
    if why:
        ended += f" ({textwrap.shorten(why, LONGEST)})"
    if front_door:
        return ended + (f"; {APART}" if _has_two_modalities(gm) else "")
    if place.startswith(HOOKS):
        return (
            f"{ended}, where the model's output hooks are installed; run luvc_fx.prepare(model) or one eager "
            "forward before compiling, or use luvc_fx.compile(model)"
        )
    if "capture_scalar_outputs" in why:
        return f"{ended}; leave torch._dynamo.config.capture_scalar_outputs on, or use luvc_fx.compile(model)"
    advice = "use luvc_fx.compile(model), which hands the sizes of images over as constants"
    return f"{ended}; {advice}" if why else advice


def _has_two_modalities(gm: fx.GraphModule) -> bool:
    return sum(op_name(node) == "masked_scatter" for node in gm.graph.nodes) > 1
