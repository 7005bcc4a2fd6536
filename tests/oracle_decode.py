"""The decoder side of the oracle: prefill, later turns and greedy generation.

The decoder runs layer by layer with the prunes between its layers; every layer gets its own rows, its
own rotary cos/sin, its own explicit mask and its own shorter KV cache.

Shapes: B prompts, S their length, V placeholders in each (all images of a row together), N visual
tokens in each row at the fusion (after merging), D channels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from oracle_select import select
from oracle_vision import VisualTokens, encode
from torch import Tensor, nn
from transformers import DynamicCache

from luvc_fx.schedule import Schedule


@dataclass
class OracleState:
    """What a later turn needs: each layer's own cache and which of its keys are real.

    Attributes:
        cache: one shorter or longer KV store per decoder layer.
        valid: per decoder layer [B, kv] bool, False on left padding.
        next_position: [B] int64, the last *original* position of each row plus one.
    """

    cache: DynamicCache
    valid: list[Tensor]
    next_position: Tensor

    def clone(self) -> OracleState:
        """A copy that can be continued without touching this one."""
        return copy.deepcopy(self)


@dataclass
class OracleResult:
    """One prefill.

    Attributes:
        logits: [B, S_out, vocabulary], for every row that reaches the end.
        rows: [B, S_out] int64, the prompt row each of them was: a visual token's is the placeholder
            of its representative, so this need not ascend after merges.
        mask: [B, S_out] bool, False on the rows that are left padding (their logits mean nothing).
        visual: [B, S_out] bool, True on rows of visual tokens.
        position_ids: [B, S_out] int64.
        kept: per decoder layer with a prune, [B, k] int64: positions among the visual tokens that
            reached it.
        layer_rows: per decoder layer [B, S_l] int64: as `rows`, of the rows that enter the layer.
        kv_lengths: per decoder layer, the entries of its cache after this prefill.
        tokens_per_layer: per decoder layer, the visual tokens in a row that the layer sees.
        features: [B, N, D], what went into the text sequence; None without images.
        slots: [B, N] int64, each one's representative among its row's placeholders (0 .. V - 1).
        grid: (h, w) of one image at the fusion.
        state: for `oracle_continue`. `cache` is its DynamicCache.
        gap: the smallest relative distance of any decision from its runner-up: cosines as they are,
            energies over the scale at which float32 rounds them (the geometric mean of the largest
            score and the largest token's energy). Infinite where nothing was decided by a score.
    """

    logits: Tensor
    rows: Tensor
    mask: Tensor
    visual: Tensor
    position_ids: Tensor
    kept: dict[int, Tensor]
    layer_rows: list[Tensor]
    kv_lengths: list[int]
    tokens_per_layer: list[int]
    features: Tensor | None
    slots: Tensor | None
    grid: tuple[int, int] | None
    state: OracleState
    gap: float

    @property
    def cache(self) -> DynamicCache:
        """Each layer's own KV store."""
        return self.state.cache


@dataclass
class _Sequence:
    """The rows that enter a decoder layer; every field has [B, S_l] first."""

    hidden: Tensor
    position_ids: Tensor
    valid: Tensor
    visual: Tensor
    rows: Tensor

    def take(self, index: Tensor) -> _Sequence:
        """Rows `index` [B, S'] of each."""
        at = torch.arange(len(index), device=index.device)[:, None]
        return _Sequence(*(getattr(self, f.name)[at, index] for f in dataclasses.fields(self)))


def _visual_index(visual: Tensor, count: int) -> Tensor:
    """[B, count] int64: the places of the visual rows, `visual` is [B, S] bool."""
    if not bool((visual.sum(dim=1) == count).all()):
        raise ValueError(f"every row needs {count} visual rows, got {visual.sum(dim=1).tolist()}")
    return visual.nonzero()[:, 1].reshape(len(visual), count)


def _drop(seq: _Sequence, places: Tensor, kept: Tensor) -> _Sequence:
    """Without the visual rows, at `places` [B, N], that are not in `kept` [B, k] of N."""
    stays = ~seq.visual
    stays.scatter_(1, places.gather(1, kept), True)
    return seq.take(stays.nonzero()[:, 1].reshape(len(stays), -1))


def _mask(past: Tensor, valid: Tensor, attn: str, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, P + S]: causal in sequence order over real keys; bool for SDPA, additive for eager.

    Args:
        past: [B, P] bool, the keys that are there already; valid: [B, S] bool, the new ones.
    """
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    allowed = torch.cat([past[:, None, :].expand(-1, length, -1), causal & valid[:, None, :]], dim=2)
    allowed = allowed[:, None]
    if attn == "sdpa":
        return allowed
    if attn != "eager":
        raise NotImplementedError(f"the oracle has no mask for {attn!r} attention")
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill(~allowed, lowest)


def _decode(
    model: nn.Module,
    schedule: Schedule,
    seq: _Sequence,
    state: OracleState,
    fused: int,
    grid: tuple[int, int] | None,
    gaps: list[float],
) -> tuple[_Sequence, Tensor, dict[int, Tensor], list[Tensor], list[int]]:
    """All decoder layers over `seq`; extends `state.cache` and `state.valid`."""
    decoder = model.model.language_model
    layers = decoder.layers[: decoder.config.num_hidden_layers]
    prunes = dict(schedule.prunes_at(len(layers), fused)) if fused else {}
    kept: dict[int, Tensor] = {}
    layer_rows: list[Tensor] = []
    tokens_per_layer: list[int] = []
    count = fused
    for index, layer in enumerate(layers):
        if index in prunes:
            keep = prunes[index].count(fused)
            places = _visual_index(seq.visual, count)
            at = torch.arange(len(places), device=places.device)[:, None]
            whole = grid if count == fused else None
            kept[index] = select(seq.hidden[at, places], prunes[index], keep, index, whole, gaps)
            seq = _drop(seq, places, kept[index])
            count = keep
        layer_rows.append(seq.rows)
        tokens_per_layer.append(count)
        mask = _mask(state.valid[index], seq.valid, decoder.config._attn_implementation, seq.hidden.dtype)
        hidden = layer(
            seq.hidden,
            attention_mask=mask,
            position_ids=seq.position_ids,
            past_key_values=state.cache,
            use_cache=True,
            position_embeddings=decoder.rotary_emb(seq.hidden, position_ids=seq.position_ids),
        )
        seq = dataclasses.replace(seq, hidden=hidden)
        state.valid[index] = torch.cat([state.valid[index], seq.valid], dim=1)
    logits = model.lm_head(decoder.norm(seq.hidden))
    return seq, logits, kept, layer_rows, tokens_per_layer


def generate_positions(attention_mask: Tensor) -> Tensor:
    """[B, S] position ids as `generate` makes them: real tokens count from 0, padding gets 0."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)


@torch.no_grad()
def oracle_forward(
    model: nn.Module,
    schedule: Schedule,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    position_ids: Tensor | None = None,
    past: OracleState | None = None,
) -> OracleResult:
    """The prefill of `model` under `schedule`.

    Args:
        input_ids: [B, S] with V placeholders in each row.
        attention_mask: [B, S], 0 on left padding; of the new tokens only, also with `past`.
        pixel_values: [I, 3, size, size], I a multiple of B, a row's images one after another.
            Without it the schedule does nothing.
        position_ids: [B, S] or [1, S], before compaction. Default as in the stock forward: 0 ..
            S - 1 whatever the padding (`generate` passes `generate_positions`); after `past`,
            counted on from its original positions.
        past: an earlier turn, left as it is.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    decoder = model.model.language_model
    layers = decoder.config.num_hidden_layers
    gaps: list[float] = []
    if past is None:
        empty = torch.ones(batch, 0, dtype=torch.bool, device=device)
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        state = OracleState(DynamicCache(config=decoder.config), [empty] * layers, start)
    else:
        state = past.clone()
    if position_ids is None:
        position_ids = state.next_position[:, None] + torch.arange(length, device=device)
    position_ids = position_ids.expand(batch, length)
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        valid = attention_mask.bool()
    rows = torch.arange(length, device=device).expand(batch, length)
    hidden = model.get_input_embeddings()(input_ids)
    visual = torch.zeros(batch, length, dtype=torch.bool, device=device)
    seq = _Sequence(hidden, position_ids, valid, visual, rows)
    features = slots = grid = None
    fused = 0
    if pixel_values is not None:
        tokens = encode(model, schedule, pixel_values, gaps)
        seq, features, slots = _fuse(seq, input_ids == model.config.image_token_id, tokens)
        grid, fused = tokens.grid, features.shape[1]
    seq, logits, kept, layer_rows, counts = _decode(model, schedule, seq, state, fused, grid, gaps)
    state.next_position = position_ids[:, -1] + 1
    return OracleResult(
        logits=logits,
        rows=seq.rows,
        mask=seq.valid,
        visual=seq.visual,
        position_ids=seq.position_ids,
        kept=kept,
        layer_rows=layer_rows,
        kv_lengths=[layer.keys.shape[-2] for layer in state.cache.layers],
        tokens_per_layer=counts,
        features=features,
        slots=slots,
        grid=grid,
        state=state,
        gap=min(gaps, default=math.inf),
    )


def _fuse(seq: _Sequence, placeholders: Tensor, tokens: VisualTokens) -> tuple[_Sequence, Tensor, Tensor]:
    """Put the features into the prompt and take out the placeholders that lost their token.

    Args:
        seq: the prompt, [B, S]; placeholders: [B, S] bool.

    Returns:
        The shorter sequence, features [B, N, D] and slots [B, N] (among the row's V placeholders).
    """
    batch = len(placeholders)
    images, count, channels = tokens.features.shape
    if images % batch:
        raise ValueError(f"{images} images do not share out to {batch} rows")
    each = images // batch
    features = tokens.features.reshape(batch, each * count, channels).to(seq.hidden.dtype)
    offsets = torch.arange(each, device=features.device)[:, None] * tokens.placeholders
    slots = (tokens.slots.reshape(batch, each, count) + offsets).reshape(batch, each * count)
    places = _visual_index(placeholders, each * tokens.placeholders)  # [B, V]
    full = dataclasses.replace(seq, visual=placeholders)
    short = _drop(full, places, slots)
    # The j-th feature at the j-th visual place, with the position id and row of its representative.
    target = _visual_index(short.visual, each * count)
    at = torch.arange(batch, device=target.device)[:, None]
    representative = places.gather(1, slots)
    hidden, position_ids, rows = (
        short.hidden.clone(),
        short.position_ids.clone(),
        short.rows.clone(),
    )
    hidden[at, target] = features
    position_ids[at, target] = seq.position_ids.gather(1, representative)
    rows[at, target] = representative
    fused = dataclasses.replace(short, hidden=hidden, position_ids=position_ids, rows=rows)
    return fused, features, slots


@torch.no_grad()
def oracle_continue(model: nn.Module, state: OracleState, input_ids: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of text tokens `input_ids` [B, T] after `state`, which grows."""
    batch, length = input_ids.shape
    device = input_ids.device
    hidden = model.get_input_embeddings()(input_ids)
    position_ids = state.next_position[:, None] + torch.arange(length, device=device)
    no = torch.zeros(batch, length, dtype=torch.bool, device=device)
    seq = _Sequence(hidden, position_ids, ~no, no, torch.arange(length, device=device).expand(batch, -1))
    _, logits, _, _, _ = _decode(model, Schedule(), seq, state, 0, None, [])
    state.next_position = state.next_position + length
    return logits


@torch.no_grad()
def oracle_greedy(model: nn.Module, result: OracleResult, max_new_tokens: int) -> Tensor:
    """[B, max_new_tokens] int64: the greedy tokens after `result`, whose state grows.

    As after `generate`, the last token is not in the cache: a next turn starts with it. No token
    ends a row early.
    """
    logits = result.logits
    tokens = []
    for step in range(max_new_tokens):
        tokens.append(logits[:, -1].float().argmax(dim=-1))
        if step + 1 < max_new_tokens:
            logits = oracle_continue(model, result.state, tokens[-1][:, None])
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def oracle_generate(
    model: nn.Module,
    schedule: Schedule,
    max_new_tokens: int,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """[B, S + max_new_tokens]: what a greedy `generate` returns, the whole prompt in front.

    Positions are `generate`'s: given ones, else counted from the attention mask.
    """
    if position_ids is None and attention_mask is not None:
        position_ids = generate_positions(attention_mask)
    result = oracle_forward(
        model,
        schedule,
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values,
        position_ids=position_ids,
    )
    return torch.cat([input_ids, oracle_greedy(model, result, max_new_tokens)], dim=1)


def score_gap(model: nn.Module, schedule: Schedule, **inputs: Any) -> float:
    """`OracleResult.gap` of a prefill: below a tolerance, other arithmetic may choose otherwise."""
    return oracle_forward(model, schedule, **inputs).gap
