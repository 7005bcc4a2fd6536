"""Give every layer the mask that fits its own cache."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from luvc_fx import markers
from luvc_fx.fx_util import ancestors, value
from luvc_fx.passes.context import Context
from luvc_fx.passes.emit import emit


def rebuild_masks(context: Context) -> None:
    """Replace each mask that stands for "causal over this layer's cache" by the real one.

    Pruned layers hold fewer rows than layer 0, by whose length transformers sizes all masks. Visual
    tokens are never padding, so the leading padding of a row is as long in every layer.
    """
    made: dict[object, fx.Node] = {}
    for attention in context.anatomy.cache_attentions:
        queries, keys = attention.args[0], attention.args[1]
        mask = attention.kwargs["attn_mask"]
        assert isinstance(queries, fx.Node) and isinstance(keys, fx.Node) and isinstance(mask, fx.Node)
        marker = next(n for n in ancestors(mask) if markers.is_call(n, markers.CACHE_MASK))
        padding = marker.args[0]
        assert isinstance(padding, fx.Node)
        length = str(value(keys).shape[-2])
        if length not in made:
            (made[length],) = emit(context.graph, "cache mask", _mask_body, queries, keys, padding)
        attention.kwargs = {**attention.kwargs, "attn_mask": made[length]}
        context.report.masks_rebuilt += 1


def _mask_body(queries: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
    """Bool ``[batch, 1, Q, K]``: the last Q of K rows see what lies before them, but no padding."""
    asked, held = queries.shape[-2], keys.shape[-2]
    key = torch.arange(held, device=keys.device)
    query = torch.arange(asked, device=keys.device) + (held - asked)
    causal = key.reshape(1, 1, 1, -1) <= query.reshape(1, 1, -1, 1)
    return causal.logical_and(key.reshape(1, 1, 1, -1) >= padding.reshape(-1, 1, 1, 1))
