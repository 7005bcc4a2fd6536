"""The decoder side of the oracle: prefill, later turns and greedy generation.

The decoder runs layer by layer with the prunes between its layers; every layer gets its own rows, its
own rotary cos/sin, its own explicit mask and its own shorter KV cache.

Shapes: B prompts, S their length, V placeholders in each (of all its images and videos together), N
visual tokens in each row at the fusion (after merging), D channels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from luvc_fx.schedule import Schedule
from tests.support.oracle.families import visual_rows
from tests.support.oracle.looks import Look, absorbed, attended, look
from tests.support.oracle.positions import (
    generate_positions,
    has_three_axes,
    later_positions,
    next_position,
    prompt_positions,
    rotary,
)
from tests.support.oracle.rows import VisualRows, placeholders
from tests.support.oracle.select import Seen, select
from tests.support.oracle.sequence import Sequence, drop, fuse, visual_index


@dataclass
class OracleState:
    """What a later turn needs: each layer's own cache and which of its keys are real.

    Attributes:
        cache: one shorter or longer KV store per decoder layer.
        valid: per decoder layer [B, kv] bool, False on left padding.
        next_position: [B] int64, the last *original* position of each row plus one (M-RoPE: the
            largest of any token and axis plus one).
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
        position_ids: [B, S_out] int64; [3, B, S_out] for M-RoPE.
        kept: per decoder layer with a prune, [B, k] int64: positions among the visual tokens that
            reached it.
        layer_rows: per decoder layer [B, S_l] int64: as `rows`, of the rows that enter the layer.
        kv_lengths: per decoder layer, the entries of its cache after this prefill.
        tokens_per_layer: per decoder layer, the visual tokens in a row that the layer sees.
        features: [B, N, D], what went into the text sequence; None without images.
        slots: [B, N] int64, each one's representative among its row's placeholders (0 .. V - 1).
        grid: (h, w) of every image (tile, frame) at the fusion; None where they differ or are no grids.
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
    seq: Sequence,
    state: OracleState,
    tokens: VisualRows | None,
    gaps: list[float],
) -> tuple[Sequence, Tensor, dict[int, Tensor], list[Tensor], list[int]]:
    """All decoder layers over `seq`; extends `state.cache` and `state.valid`.

    Deepstack features (`tokens.deep`) are added after each of the first layers to the visual rows
    that are still there.
    """
    decoder = model.model.language_model
    layers = decoder.layers[: decoder.config.num_hidden_layers]
    fused = 0 if tokens is None else tokens.features.shape[1]
    prunes = dict(schedule.prunes_at(len(layers), fused)) if fused else {}
    alive = torch.arange(fused, device=seq.hidden.device).expand(len(seq.hidden), fused)  # of the N
    kept: dict[int, Tensor] = {}
    layer_rows: list[Tensor] = []
    tokens_per_layer: list[int] = []
    count = fused
    paid: Look | None = None

    def looked(index: int) -> Look:
        mask = _mask(state.valid[index], seq.valid, "eager", seq.hidden.dtype)
        turn = rotary(decoder, seq.hidden, seq.position_ids)
        return look(decoder, index, seq.hidden, state.cache, mask, turn)

    for index, layer in enumerate(layers):
        if index in prunes:
            keep = prunes[index].count(fused)
            places = visual_index(seq.visual, count)
            at = torch.arange(len(places), device=places.device)[:, None]
            whole = tokens.grid if tokens is not None and count == fused else None
            seen = Seen()
            if paid is not None:
                weights = paid.weights[:, :, -1, -seq.hidden.shape[1] :].mean(dim=1)
                seen.paid = weights[at, places].double().cpu().numpy()
            if prunes[index].selector.name == "pact":
                here = looked(index)
                seen.attended = attended(here, seq.valid, places, layer.self_attn.scaling)
                seen.keys = here.turned.transpose(1, 2).flatten(2)[at, places].double().cpu().numpy()
            visual = seq.hidden[at, places]
            kept[index] = select(visual, prunes[index], keep, index, whole, gaps, seen)
            if prunes[index].absorb and 0 < keep < count:
                hidden = seq.hidden.clone()
                hidden[at, places.gather(1, kept[index])] = absorbed(visual, kept[index], gaps)
                seq = dataclasses.replace(seq, hidden=hidden)
            seq = drop(seq, places, kept[index])
            alive = alive.gather(1, kept[index])
            count = keep
        asks = index + 1 in prunes and prunes[index + 1].selector.name == "fastv"
        paid = looked(index) if asks else None
        layer_rows.append(seq.rows)
        tokens_per_layer.append(count)
        mask = _mask(state.valid[index], seq.valid, decoder.config._attn_implementation, seq.hidden.dtype)
        hidden = layer(
            seq.hidden,
            attention_mask=mask,
            past_key_values=state.cache,
            use_cache=True,
            position_embeddings=rotary(decoder, seq.hidden, seq.position_ids),
        )
        if tokens is not None and index < len(tokens.deep):
            at = torch.arange(len(alive), device=alive.device)[:, None]
            hidden = hidden.clone()
            hidden[at, visual_index(seq.visual, count)] += tokens.deep[index][at, alive].to(hidden.dtype)
        seq = dataclasses.replace(seq, hidden=hidden)
        state.valid[index] = torch.cat([state.valid[index], seq.valid], dim=1)
    logits = model.lm_head(decoder.norm(seq.hidden))
    return seq, logits, kept, layer_rows, tokens_per_layer


@torch.no_grad()
def oracle_forward(
    model: nn.Module,
    schedule: Schedule,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past: OracleState | None = None,
    **vision: Tensor | None,
) -> OracleResult:
    """The prefill of `model` under `schedule`.

    Args:
        input_ids: [B, S] with the placeholders of each row's images and videos.
        attention_mask: [B, S], 0 on left padding; of the new tokens only, also with `past`.
        position_ids: [B, S] or [1, S] (M-RoPE: also [3, B, S] or [4, B, S]), before compaction.
            Default as in the stock forward: 0 .. S - 1 whatever the padding (`generate` passes
            `generate_positions`), and M-RoPE's own with images or videos; after `past`, counted on
            from its original positions.
        past: an earlier turn, left as it is.
        vision: what the stock forward takes beside the text: ``pixel_values`` ([I, 3, size, size], a
            row's images one after another, or as the family's processor shapes it),
            ``image_grid_thw``, ``image_sizes``, ``pixel_values_videos`` and so on. Without pixels
            the schedule does nothing.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    decoder = model.model.language_model
    layers = decoder.config.num_hidden_layers
    given = {name: value for name, value in vision.items() if value is not None}
    gaps: list[float] = []
    if past is None:
        empty = torch.ones(batch, 0, dtype=torch.bool, device=device)
        start = torch.zeros(batch, dtype=torch.int64, device=device)
        state = OracleState(DynamicCache(config=decoder.config), [empty] * layers, start)
    else:
        state = past.clone()
    positions = prompt_positions(model, input_ids, attention_mask, position_ids, state.next_position, given)
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        valid = attention_mask.bool()
    rows = torch.arange(length, device=device).expand(batch, length)
    hidden = model.get_input_embeddings()(input_ids)
    visual = torch.zeros(batch, length, dtype=torch.bool, device=device)
    seq = Sequence(hidden, positions, valid, visual, rows)
    tokens = visual_rows(model, schedule, input_ids, given, gaps)
    if tokens is not None:
        seq = fuse(seq, placeholders(model, input_ids), tokens)
    seq, logits, kept, layer_rows, counts = _decode(model, schedule, seq, state, tokens, gaps)
    state.next_position = next_position(positions)
    return OracleResult(
        logits=logits,
        rows=seq.rows,
        mask=seq.valid,
        visual=seq.visual,
        position_ids=seq.position_ids.permute(2, 0, 1) if has_three_axes(model) else seq.position_ids,
        kept=kept,
        layer_rows=layer_rows,
        kv_lengths=[layer.keys.shape[-2] for layer in state.cache.layers],
        tokens_per_layer=counts,
        features=None if tokens is None else tokens.features,
        slots=None if tokens is None else tokens.slots,
        grid=None if tokens is None else tokens.grid,
        state=state,
        gap=min(gaps, default=math.inf),
    )


@torch.no_grad()
def oracle_continue(model: nn.Module, state: OracleState, input_ids: Tensor) -> Tensor:
    """Logits [B, T, vocabulary] of text tokens `input_ids` [B, T] after `state`, which grows."""
    batch, length = input_ids.shape
    device = input_ids.device
    hidden = model.get_input_embeddings()(input_ids)
    position_ids = later_positions(model, state.next_position, length)
    no = torch.zeros(batch, length, dtype=torch.bool, device=device)
    seq = Sequence(hidden, position_ids, ~no, no, torch.arange(length, device=device).expand(batch, -1))
    _, logits, _, _, _ = _decode(model, Schedule(), seq, state, None, [])
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
    position_ids: Tensor | None = None,
    **vision: Tensor | None,
) -> Tensor:
    """[B, S + max_new_tokens]: what a greedy `generate` returns, the whole prompt in front.

    Positions are `generate`'s: given ones, else counted from the attention mask; M-RoPE's with images
    or videos are those of the forward.
    """
    own = any(vision.get(name) is not None for name in ("image_grid_thw", "video_grid_thw"))
    if position_ids is None and attention_mask is not None and not own:
        position_ids = generate_positions(attention_mask)
    result = oracle_forward(
        model,
        schedule,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **vision,
    )
    return torch.cat([input_ids, oracle_greedy(model, result, max_new_tokens)], dim=1)


def score_gap(model: nn.Module, schedule: Schedule, **inputs: Any) -> float:
    """`OracleResult.gap` of a prefill: below a tolerance, other arithmetic may choose otherwise."""
    return oracle_forward(model, schedule, **inputs).gap
