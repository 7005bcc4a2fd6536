"""Graph to graph: the passes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from luvc_fx.passes.merge_tokens import merge_tokens
from luvc_fx.passes.prune_tokens import prune_tokens
from luvc_fx.passes.rebuild_masks import rebuild_masks
from luvc_fx.passes.shrink_fusion import shrink_fusion
from luvc_fx.passes.support.context import Context

PASSES: tuple[Callable[[Context], None], ...] = (merge_tokens, shrink_fusion, prune_tokens, rebuild_masks)

__all__ = ["PASSES", "Context"]
