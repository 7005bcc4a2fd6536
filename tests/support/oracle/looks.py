"""What a decoder layer attends to, and its queries and keys: the stock layer, run aside on the same rows.

Attention is written out for it ("eager"), so that the layer gives its own weights; queries and keys are
read off its projections (and their norms), turned keys off its cache.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from tests.support.oracle.merge import note


@dataclass
class Look:
    """One layer on S rows over P of a cache, of H heads and G groups of them that share keys.

    Attributes:
        weights: [B, H, S, P + S]; queries: [B, H, S, d]; keys, turned: [B, G, S, d], without and with
            rotary positions.
    """

    weights: Tensor
    queries: Tensor
    keys: Tensor
    turned: Tensor


def look(decoder: nn.Module, index: int, hidden: Tensor, cache: Cache, mask: Tensor, turn: Any) -> Look:
    """Run decoder layer `index` on `hidden` [B, S, D], and leave model and cache as they are.

    Args:
        mask: [B, 1, S, P + S], to be added to the scores; turn: the layer's cos and sin.
    """
    layer, aside = decoder.layers[index], copy.deepcopy(cache)
    attention, found = layer.self_attn, {}
    watched = {
        "weights": attention,
        "queries": getattr(attention, "q_norm", attention.q_proj),
        "keys": getattr(attention, "k_norm", attention.k_proj),
    }

    def keep(name: str) -> Any:
        return lambda module, given, out: found.__setitem__(name, out)

    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    try:
        layer(hidden, attention_mask=mask, past_key_values=aside, use_cache=True, position_embeddings=turn)
    finally:
        decoder.config._attn_implementation = before
        for hook in hooks:
            hook.remove()
    batch, rows, _ = hidden.shape
    shape = (batch, rows, -1, attention.head_dim)
    queries, keys = (found[name].reshape(shape).transpose(1, 2) for name in ("queries", "keys"))
    turned = aside.layers[index].keys[:, :, -rows:]
    return Look(found["weights"][1], queries, keys, turned)


def attended(seen: Look, valid: Tensor, places: Tensor, scaling: float) -> np.ndarray:
    """[B, N] float64: what the mean query pays to each visual token, as PACT has it.

    Args:
        valid: [B, S] bool, False on left padding; places: [B, N], the rows of the visual tokens.
    """
    queries, keys = seen.queries.double().cpu().numpy(), seen.keys.double().cpu().numpy()
    batch, heads = queries.shape[:2]
    out = np.zeros(places.shape)
    for b in range(batch):
        rows = [row for row in range(int(places[b].max()) + 1) if valid[b, row]]
        for head in range(heads):
            group = head * keys.shape[1] // heads
            query = queries[b, head, rows].mean(axis=0)
            scores = np.array([keys[b, group, row] @ query * scaling for row in rows])
            weights = np.exp(scores - scores.max())
            paid = dict(zip(rows, weights / weights.sum(), strict=True))
            out[b] += [paid[int(place)] / heads for place in places[b]]
    return out


def centres(keys: np.ndarray, keep: int, gaps: list[float]) -> list[int]:
    """The `keep` places of `keys` [m, C] farthest from any denser one, ascending."""
    units = keys / np.maximum(np.sqrt((keys**2).sum(-1, keepdims=True)), 1e-12)
    m = len(units)
    apart = [[1.0 - float(units[i] @ units[j]) for j in range(m)] for i in range(m)]
    density = [sum(float(np.exp(-((d / 2) ** 2))) for d in row) for row in apart]
    for before, after in zip(sorted(density), sorted(density)[1:], strict=False):
        note(gaps, after - before)
    delta = []
    for i in range(m):
        denser = [apart[i][j] for j in range(m) if (-density[j], j) < (-density[i], i)]
        delta.append(min(denser, default=np.inf))
    order = sorted(range(m), key=lambda i: (-delta[i], i))
    if keep < m:
        note(gaps, delta[order[keep - 1]] - delta[order[keep]])
    return sorted(order[:keep])


def absorbed(x: Tensor, kept: Tensor, gaps: list[float]) -> Tensor:
    """[B, k, D]: the tokens `kept` [B, k] of `x` [B, N, D], with those that go averaged into them."""
    out = []
    for row, stay in zip(x.double().cpu().numpy(), kept.tolist(), strict=True):
        units = row / np.maximum(np.sqrt((row**2).sum(-1, keepdims=True)), 1e-12)
        groups = {place: [place] for place in stay}
        for token in (i for i in range(len(row)) if i not in groups):
            likeness = [float(units[token] @ units[place]) for place in stay]
            best = max(range(len(stay)), key=lambda i: (likeness[i], -i))
            if len(stay) > 1:
                note(gaps, likeness[best] - max(likeness[:best] + likeness[best + 1 :]))
            groups[stay[best]].append(token)
        out.append(np.stack([row[groups[place]].mean(axis=0) for place in stay]))
    return torch.from_numpy(np.stack(out)).to(device=x.device, dtype=x.dtype)
