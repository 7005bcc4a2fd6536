"""What the last token of a row pays to its visual tokens in one decoder layer, which stays fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from luvc_fx import markers
from luvc_fx.attention import Attention
from luvc_fx.fx_util import ancestors
from luvc_fx.report import Reason, Refused


def last_query(call: Attention) -> tuple[list[fx.Node], Callable[..., Tensor]]:
    """The inputs of one row of attention weights, and the function that computes it.

    Returns:
        Nodes, and a function of an int64 ``[B, N]`` of rows and their values, which gives float32
        ``[B, N]``: the weights of those rows for the last query, mean over the heads.

    Raises:
        Refused: the products are scaled by something that is no constant.
    """
    scale, nodes = call.scale, [call.queries, call.keys]
    if scale is None:
        raise Refused(Reason.NO_ATTENTION, "attention is scaled by something that is no constant", call.node)
    padding = None
    if call.mask is not None:
        padding = next((n for n in ancestors(call.mask) if markers.is_call(n, markers.CACHE_MASK)), None)
        seen = call.mask if padding is None else padding.args[0]
        assert isinstance(seen, fx.Node)
        nodes.append(seen)
    over_cache = padding is not None

    def paid(places: Tensor, queries: Tensor, keys: Tensor, seen: Tensor | None = None) -> Tensor:
        groups = keys.shape[1]
        query = queries[:, :, -1].float().unflatten(1, (groups, -1)) * scale
        scores = (query.unsqueeze(3) * keys.float().unsqueeze(2)).sum(-1)  # [B, groups, share, rows]
        if seen is not None:
            scores = _masked(scores, seen, over_cache)
        weights = scores.softmax(-1).flatten(1, 2).mean(1)
        return weights.gather(1, places + (keys.shape[2] - queries.shape[2]))

    return nodes, paid


def _masked(scores: Tensor, seen: Tensor, over_cache: bool) -> Tensor:
    """Scores without the keys that the last query does not see."""
    if over_cache:  # `seen` is each row's padding in front
        row = torch.arange(scores.shape[-1], device=scores.device)
        seen = torch.where(seen < 0, scores.shape[-1] + seen, seen)  # counted from the end
        return scores.masked_fill((row < seen.unsqueeze(1))[:, None, None], -torch.inf)
    last = seen[:, :, -1]
    last = last.unsqueeze(1) if last.shape[1] == 1 else last.unflatten(1, scores.shape[1:3])
    return scores.masked_fill(~last, -torch.inf) if seen.dtype == torch.bool else scores + last
