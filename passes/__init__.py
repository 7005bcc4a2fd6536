"""Graph to graph: what is rewritten in a captured graph, in the order in which it runs.

A new pass is one file here and one entry in a tuple. The runner (`luvc_fx.dynamo.rewrite`) copies the graph
before the first change, times each step, checks and recompiles the result, and goes back to the copy where
anything raises; steps do none of that.
"""

from __future__ import annotations

from luvc_fx.passes.merge_tokens import merge_tokens
from luvc_fx.passes.prepare.plain_collectives import plain_collectives
from luvc_fx.passes.prepare.spread_deepstack import spread_deepstack
from luvc_fx.passes.prune_tokens import prune_tokens
from luvc_fx.passes.rebuild_masks import rebuild_masks
from luvc_fx.passes.retarget import retarget
from luvc_fx.passes.shrink_fusion import shrink_fusion
from luvc_fx.passes.support.context import Context
from luvc_fx.passes.support.contract import Pass, PrepareStep

PREPARE: tuple[PrepareStep, ...] = (plain_collectives, spread_deepstack)
"""Before recognition: the model's own operations in a spelling through which tokens can be followed."""

PASSES: tuple[Pass, ...] = (merge_tokens, shrink_fusion, prune_tokens, rebuild_masks, retarget)
"""After recognition: what the plan asks for."""

__all__ = ["PASSES", "PREPARE", "Context", "Pass", "PrepareStep"]
