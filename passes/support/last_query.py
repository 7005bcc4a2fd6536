"""Attention weights of a row's last token, computed beside a decoder layer whose own call stays fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.attention import Attention
from luvc_fx.graph import markers
from luvc_fx.graph.nodes import ancestors
from luvc_fx.report import Reason, Refused


def last_query(call: Attention) -> tuple[list[fx.Node], Callable[..., Tensor]]:
    """The inputs of one row of attention weights, and the function that computes it.

    Returns:
        Nodes, and a function of an int64 ``[B, N]`` of rows and their values, which gives float32
        ``[B, N]``: the weights of those rows for the last query, mean over the heads.

    Raises:
        Refused: the products are scaled by something that is no constant.
    """
    scale = constant_scale(call)
    masks, over_cache = last_mask(call)

    def last_query_attention(
        places: Tensor, queries: Tensor, keys: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        groups = keys.shape[1]
        query = queries[:, :, -1].float().unflatten(1, (groups, -1)) * scale
        scores = (query.unsqueeze(3) * keys.float().unsqueeze(2)).sum(-1)  # [B, groups, share, rows]
        if seen is not None:
            scores = _masked(scores, seen, over_cache)
        weights = scores.softmax(-1).flatten(1, 2).mean(1)
        return weights.gather(1, places + (keys.shape[2] - queries.shape[2]))

    return [call.queries, call.keys, *masks], last_query_attention


def constant_scale(call: Attention) -> float:
    """What the products of queries and keys are multiplied with.

    Raises:
        Refused: it is no constant.
    """
    if call.scale is None:
        raise Refused(Reason.NO_ATTENTION, "attention is scaled by something that is no constant", call.node)
    return call.scale


def last_mask(call: Attention) -> tuple[list[fx.Node], bool]:
    """What tells which keys the last query sees: no node or one, and whether it is padding over a cache.

    Over a cache the node is ``[B]``, the padding in front of each row, or ``[0]`` where there is none;
    else it is the mask of the call.
    """
    if call.mask is None:
        return [], False
    padding = next((n for n in ancestors(call.mask) if markers.is_call(n, markers.CACHE_MASK)), None)
    seen = call.mask if padding is None else padding.args[0]
    assert isinstance(seen, fx.Node)
    return [seen], padding is not None


def visible(seen: Tensor, over_cache: bool, keys: int | torch.SymInt, rows: int | torch.SymInt) -> Tensor:
    """Bool ``[B or 1, rows]``: which of the last `rows` of all `keys` the last query sees.

    Args:
        seen, over_cache: as `last_mask` says.
    """
    if over_cache:
        return _behind_padding(seen, keys).narrow(1, keys - rows, rows)
    last = seen[:, 0, -1].narrow(1, keys - rows, rows)
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def _behind_padding(padding: Tensor, keys: int | torch.SymInt) -> Tensor:
    """Bool ``[B or 1, keys]``, from each row's padding as `last_mask` has it, maybe counted from the end."""
    if padding.shape[0] == 0:
        padding = padding.new_zeros(1)
    padding = torch.where(padding < 0, padding + keys, padding)  # type: ignore[arg-type]
    row = torch.arange(keys, device=padding.device)  # type: ignore[arg-type]
    return row >= padding.unsqueeze(1)


def _masked(scores: Tensor, seen: Tensor, over_cache: bool) -> Tensor:
    """Scores without the keys that the last query does not see."""
    if over_cache:
        hidden = _behind_padding(seen, scores.shape[-1]).logical_not()
        return scores.masked_fill(hidden[:, None, None], -torch.inf)
    last = seen[:, :, -1]
    last = last.unsqueeze(1) if last.shape[1] == 1 else last.unflatten(1, scores.shape[1:3])
    return scores.masked_fill(~last, -torch.inf) if seen.dtype == torch.bool else scores + last
