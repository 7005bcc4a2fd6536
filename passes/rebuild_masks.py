"""Give every layer the mask that fits its own cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.attention import Attention
from luvc_fx.graph import flash, markers
from luvc_fx.graph.emit import MARK, emit
from luvc_fx.graph.nodes import ancestors, is_tensor, live_nodes, op_name, shape, value
from luvc_fx.passes.support.context import Context
from luvc_fx.report import Reason, Refused


def rebuild_masks(context: Context) -> None:
    """Replace each mask that stands for "causal over this layer's cache" by the real one.

    Pruned layers hold fewer rows than layer 0, by whose length transformers sizes all masks. In a row with
    images these are visual tokens, so its padding is as long in every layer; in one without, its text is.
    One query of a row without padding sees all that its layer holds, and gets no mask.

    For one query over the 13 rows that a layer holds::

        %mask : [2, 1, 1, 1] = luvc_fx.cache_mask(%padding, 1)
        %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%mask)

    becomes::

        %key : [1, 1, 1, 13] = view(arange(13), ...)
        %query : [1, 1, 1, 1] = view(add(arange(1), 12), ...)
        %causal : [1, 1, 1, 13] = le(%key, %query)
        %seen : [2, 1, 1, 13] = logical_and(%causal, ge(%key, view(%padding, ...)))
        %out = scaled_dot_product_attention(%q, %k, %v, attn_mask=%seen)

    Raises:
        Refused: CACHE where something else than attention reads such a mask.
    """
    if context.anatomy.cache_attentions:
        context.retarget.advance()  # a prompt over a cache may have been pruned: masks are for what is left
    rebuilt: dict[object, Any] = {}
    for call in context.anatomy.cache_attentions:
        assert call.mask is not None and call.masked is not None
        marker = next(n for n in ancestors(call.mask) if markers.is_call(n, markers.CACHE_MASK))
        padding = marker.args[0]
        assert isinstance(padding, fx.Node)
        added = None if call.fused else value(call.masked).dtype
        context.report.masks_rebuilt += 1
        if call.is_flash:
            _bound(context.graph, call, padding, rebuilt)
            continue
        written = _written_rows(call.keys)
        one = shape(call.queries)[-2] == 1
        if call.fused and written is None and shape(padding)[0] == 0 and one:
            call.unmask()
            continue
        like = (str(value(call.keys).shape[-2]), added, written)
        if like not in rebuilt:
            rows = () if written is None else (written,)
            (rebuilt[like],) = emit(
                context.graph, "cache mask", _mask_body(added), call.queries, call.keys, padding, *rows
            )
        call.masked.replace_input_with(call.mask, rebuilt[like])
    if any(markers.is_call(node, markers.CACHE_MASK) for node in live_nodes(context.graph)):
        raise Refused(Reason.CACHE, "a mask over a shortened cache is used outside of attention")


def _bound(graph: fx.Graph, call: Attention, padding: fx.Node, rebuilt: dict[object, Any]) -> None:
    """Give a call of FlashAttention the bounds of its own segments."""
    sizes = [value(node).shape[-2] for node in (call.queries, call.keys)]
    like = tuple(map(str, sizes))
    if like not in rebuilt:
        bounds = emit(graph, "cache mask", _segments, call.queries, call.keys, padding)
        longest = []
        for node, size in zip((call.queries, call.keys), sizes, strict=True):
            if isinstance(size, torch.SymInt):
                with graph.inserting_after(node):
                    read = graph.call_function(torch.ops.aten.sym_size.int, (node, 2))
                read.meta = {"example_value": size, MARK: "cache mask"}
                longest.append(read)
            else:
                longest.append(size)
        rebuilt[like] = {
            **dict(zip(flash.BOUNDS, bounds, strict=True)),
            **dict(zip(flash.LONGEST, longest, strict=True)),
        }
    flash.write(call.node, {**flash.arguments(call.node), **rebuilt[like]})


def _segments(queries: Tensor, keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Int32 ``[2 batch + 1]`` each: where the segments of queries and of keys begin, and where they end.

    Each row of the batch is two of them: its padding, and what is behind it. The last query of a segment
    lies beside its last key, and each sees what lies before it, as FlashAttention does from 2.1 on.
    """
    asked, held = queries.shape[-2], keys.shape[-2]
    padding = torch.where(padding < 0, held + padding, padding)  # counted from the end
    row = torch.arange(padding.shape[0], device=padding.device)
    bounds = []
    for length in (asked, held):
        hidden = (padding - (held - length)).clamp(min=0)
        ends = torch.stack([row * length + hidden, (row + 1) * length], dim=1).flatten()
        bounds.append(torch.nn.functional.pad(ends, (1, 0)).to(torch.int32))
    return bounds[0], bounds[1]


def _written_rows(keys: fx.Node) -> fx.Node | None:
    """The numbers of the rows of a static cache that the queries were written to; None of a dynamic one."""
    node = keys
    while True:
        for call in (node, *node.users):
            if op_name(call) == "index_copy_" and isinstance(call.args[2], fx.Node):
                return call.args[2]
        sources = [n for n in node.all_input_nodes if is_tensor(n)]
        if len(sources) != 1:
            return None
        node = sources[0]


def _mask_body(added: torch.dtype | None) -> Any:
    """The mask for a fused attention, or what is `added` to the scores of one that is written out."""

    def body(queries: Tensor, keys: Tensor, padding: Tensor, written: Tensor | None = None) -> Tensor:
        seen = _visible_keys(queries, keys, padding, written)
        if added is None:
            return seen
        return torch.zeros_like(seen, dtype=added).masked_fill(~seen, torch.finfo(added).min)

    return body


def _visible_keys(queries: Tensor, keys: Tensor, padding: Tensor, written: Tensor | None) -> Tensor:
    """Bool ``[batch or 1, 1, Q, K]``: each query sees what lies before it, but no padding.

    The queries are the last Q of K rows; of a static cache, whose last rows are empty, those `written`.
    Negative padding is counted from the end: minus how many rows are none. Of shape ``[0]`` there is none.
    """
    asked, held = queries.shape[-2], keys.shape[-2]
    key = torch.arange(held, device=keys.device)
    query = torch.arange(asked, device=keys.device) + (held - asked) if written is None else written
    causal = key.reshape(1, 1, 1, -1) <= query.reshape(1, 1, -1, 1)
    if padding.shape[0] == 0:
        return causal
    end = held if written is None else written[-1] + 1
    padding = torch.where(padding < 0, end + padding, padding)  # counted from the end
    return causal.logical_and(key.reshape(1, 1, 1, -1) >= padding.reshape(-1, 1, 1, 1))
