"""The independent truth: a visual-token budget on a stock LLaVA in plain eager Python.

No FX, no compilation, nothing of the product but `luvc_fx.schedule`. The vision tower runs block by
block with the merges between its blocks, the decoder layer by layer with the prunes between its
layers; every layer gets its own rows, its own rotary cos/sin, its own explicit mask and its own
shorter KV cache. The model's modules do the arithmetic between the sites; merging and selecting are
written here from the rules.

Shapes: B prompts, S their length, V placeholders in each (all images of a row together), N visual
tokens in each row at the fusion (after merging), D channels.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from luvc_fx.schedule import (
    AXES,
    COVERAGES,
    ENERGIES,
    SELECTORS,
    Merge,
    Prune,
    Schedule,
    round_half_up,
)

_MOD = 1 << 32


# ------------------------------------------------------------------------------------------ merging


def _note(gaps: list[float], gap: float) -> None:
    if not math.isnan(gap):
        gaps.append(abs(gap))


def merge_line(
    tokens: np.ndarray, sizes: np.ndarray, slots: np.ndarray, merged: int, gaps: list[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One round on one line: `merged` even positions go into an odd neighbour.

    Args:
        tokens: [n, C] float32; sizes: [n] float32; slots: [n] int64.
        gaps: gets the distance of every decision from its runner-up, in cosine.

    Returns:
        The three, of length n - merged.
    """
    n = len(tokens)
    norms = np.sqrt((tokens * tokens).sum(axis=-1, keepdims=True))
    units = tokens / np.maximum(norms, np.float32(1e-12))
    similarity = (units[:-1] * units[1:]).sum(axis=-1)  # [n - 1], of j and j + 1
    proposals = []  # (score, even position, the odd one it goes to, margin over the other one)
    for even in range(0, n, 2):
        left = similarity[even - 1] if even > 0 else None
        right = similarity[even] if even + 1 < n else None
        if right is None or (left is not None and left > right):
            assert left is not None
            margin = math.inf if right is None else float(left - right)
            proposals.append((float(left), even, even - 1, margin))
        else:
            margin = math.inf if left is None else float(right - left)
            proposals.append((float(right), even, even + 1, margin))
    ranked = sorted(proposals, key=lambda p: (-p[0], p[1]))
    happen = ranked[:merged]
    if merged < len(ranked):
        _note(gaps, ranked[merged - 1][0] - ranked[merged][0])
    for proposal in happen:
        _note(gaps, proposal[3])
    sources: dict[int, list[int]] = {}
    for _, even, odd, _ in happen:
        sources.setdefault(odd, []).append(even)
    gone = {even for _, even, _, _ in happen}
    rest = [i for i in range(n) if i not in gone]
    out_tokens, out_sizes = tokens[rest], sizes[rest]
    for place, i in enumerate(rest):
        if i in sources:
            group = sorted([i, *sources[i]])
            weights = sizes[group]
            out_tokens[place] = (weights[:, None] * tokens[group]).sum(axis=0) / weights.sum()
            out_sizes[place] = weights.sum()
    return out_tokens, out_sizes, slots[rest]


def merge_grid(
    x: Tensor, sizes: Tensor, slots: Tensor, axis: str, target: int, gaps: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """An OIM step: the lines along `axis` go down to `target` tokens each, in rounds.

    Args:
        x: [B, H, W, C]; sizes: [B, H, W] float32; slots: [B, H, W] int64.

    Returns:
        The same three, shorter along the axis.
    """
    if axis == "height":
        x, sizes, slots = merge_grid(
            x.transpose(1, 2), sizes.transpose(1, 2), slots.transpose(1, 2), "width", target, gaps
        )
        return x.transpose(1, 2), sizes.transpose(1, 2), slots.transpose(1, 2)
    batch, height, length, channels = x.shape
    dtype, device = x.dtype, x.device
    while length > target:
        merged = min(length // 2, length - target)
        tokens_in = x.float().cpu().reshape(-1, length, channels).numpy()
        sizes_in = sizes.cpu().reshape(-1, length).numpy()
        slots_in = slots.cpu().reshape(-1, length).numpy()
        lines = [merge_line(*line, merged, gaps) for line in zip(tokens_in, sizes_in, slots_in, strict=True)]
        length -= merged
        shape = (batch, height, length)
        x = torch.from_numpy(np.stack([line[0] for line in lines]))
        x = x.reshape(*shape, channels).to(device=device, dtype=dtype)
        sizes = torch.from_numpy(np.stack([line[1] for line in lines])).reshape(shape).to(device)
        slots = torch.from_numpy(np.stack([line[2] for line in lines])).reshape(shape).to(device)
    return x, sizes, slots


@dataclass
class VisualTokens:
    """What the tower and the projector made of the images.

    Attributes:
        features: [I, h * w, D], one row per image.
        slots: [I, h * w] int64, each token's representative: its raster index on the unmerged grid.
        sizes: [I, h * w] float32, how many patches each token stands for.
        grid: (h, w) after the merges; patches: H0 * W0 before them.
    """

    features: Tensor
    slots: Tensor
    sizes: Tensor
    grid: tuple[int, int]
    patches: int


def encoder_blocks(model: LlavaForConditionalGeneration) -> int:
    """How many encoder blocks feed the features."""
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise NotImplementedError("the oracle takes one vision feature layer")
    states = model.config.vision_config.num_hidden_layers + 1
    return layer if layer >= 0 else states + layer


def encode(
    model: LlavaForConditionalGeneration,
    schedule: Schedule,
    pixel_values: Tensor,
    gaps: list[float],
) -> VisualTokens:
    """The tower block by block with the merges, then the projector.

    Args:
        pixel_values: [I, 3, size, size].
    """
    if model.config.vision_feature_select_strategy != "default":
        raise NotImplementedError("the oracle takes the features without CLS")
    tower = model.model.vision_tower
    blocks = encoder_blocks(model)
    merges = schedule.merges_at(blocks)
    patch = tower.config.patch_size
    height, width = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    images, _, channels = hidden.shape
    slots = torch.arange(height * width, device=hidden.device).reshape(1, height, width)
    slots = slots.repeat(images, 1, 1)
    sizes = torch.ones(images, height, width, device=hidden.device)
    patches = height * width
    for index, block in enumerate(tower.encoder.layers[:blocks]):
        hidden = block(hidden, None)
        for _, merge in (site for site in merges if site[0] == index):
            prefix, grid = hidden[:, :1], hidden[:, 1:].reshape(images, height, width, channels)
            target = merge.target(width if merge.axis == "width" else height)
            grid, sizes, slots = merge_grid(grid, sizes, slots, merge.axis, target, gaps)
            height, width = grid.shape[1:3]
            hidden = torch.cat([prefix, grid.reshape(images, height * width, channels)], dim=1)
    features = model.model.multi_modal_projector(hidden[:, 1:])
    count = height * width
    return VisualTokens(
        features,
        slots.reshape(images, count),
        sizes.reshape(images, count),
        (height, width),
        patches,
    )


# ---------------------------------------------------------------------------------------- selecting


def energies(x: Tensor, energy: str, cutoff: float) -> np.ndarray:
    """The spectrum's score of each token, [B, N] float64. `x` is [B, N, D], N >= 1.

    The rules say float32; double precision is their exact value, so whoever computes in float32 may
    differ where `OracleResult.gap` is at rounding level, and nowhere else.
    """
    values = x.detach().double().cpu().numpy()
    count = values.shape[1]
    bins = count // 2 + 1
    passing = max(1, round_half_up(cutoff * bins))
    window = np.zeros(bins)
    for f in range(min(passing, bins)):
        window[f] = 0.54 + 0.46 * math.cos(math.pi * f / passing)
    low = np.fft.irfft(np.fft.rfft(values, axis=1) * window[None, :, None], n=count, axis=1)
    lowpass = (low**2).sum(axis=-1)
    if energy == "lowpass":
        return lowpass
    if energy == "residual":
        return ((values - low) ** 2).sum(axis=-1)
    return lowpass / np.maximum((values**2).sum(axis=-1), 1e-12)


def mix32(x: int) -> int:
    """murmur3's finaliser, modulo 2^32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % _MOD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % _MOD
    return x ^ (x >> 16)


def random_scores(count: int, seed: int, layer: int) -> list[int]:
    """The random selector's score of each of `count` tokens before decoder layer `layer`."""
    stream = 0x9E3779B9 * (seed * 1000003 + layer + 1) % _MOD
    return [mix32((i + stream) % _MOD) for i in range(count)]


def _largest(scores: np.ndarray, keep: int, gaps: list[float]) -> list[int]:
    """The `keep` largest, ties to the lower index, as ascending positions; notes the gap."""
    order = np.argsort(-scores, kind="stable")
    if 0 < keep < len(scores):
        scale = max(float(np.abs(scores).max()), 1e-300)
        _note(gaps, float(scores[order[keep - 1]] - scores[order[keep]]) / scale)
    return sorted(int(i) for i in order[:keep])


def _blocks(count: int, keep: int, grid: tuple[int, int] | None) -> list[list[int]]:
    """The tokens of each block of the block coverage; [keep] lists."""
    if grid is not None and count == 4 * keep and grid[0] % 2 == 0 and grid[1] % 2 == 0:
        width = grid[1]
        corners = [
            row * width + column for row in range(0, count // width, 2) for column in range(0, width, 2)
        ]
        return [[c, c + 1, c + width, c + width + 1] for c in corners]
    blocks: list[list[int]] = [[] for _ in range(keep)]
    for i in range(count):
        blocks[i * keep // count].append(i)
    return blocks


def select(
    x: Tensor, prune: Prune, keep: int, layer: int, grid: tuple[int, int] | None, gaps: list[float]
) -> Tensor:
    """The SPU step (or a control): which `keep` of the visual rows `x` [B, N, D] stay, ascending.

    Args:
        layer: the resolved decoder layer.
        grid: (h, w) of one image where the N tokens are whole row-major grids, stacked; else None.

    Returns:
        [B, keep] int64.
    """
    batch, count = x.shape[:2]
    if keep == count:
        chosen = [list(range(count))] * batch
    elif keep == 0:
        chosen = [[] for _ in range(batch)]
    elif prune.selector == "uniform":
        chosen = [[(2 * i + 1) * count // (2 * keep) for i in range(keep)]] * batch
    elif prune.selector == "random":
        scores = random_scores(count, prune.seed, layer)
        order = sorted(range(count), key=lambda i: (-scores[i], i))
        chosen = [sorted(order[:keep])] * batch
    else:
        chosen = []
        for row in energies(x, prune.energy, prune.cutoff):
            if prune.coverage == "global":
                chosen.append(_largest(row, keep, gaps))
                continue
            scale = max(float(np.abs(row).max()), 1e-300)
            winners = []
            for block in _blocks(count, keep, grid):
                ranked = sorted(block, key=lambda i: (-row[i], i))
                winners.append(ranked[0])
                if len(ranked) > 1:
                    _note(gaps, float(row[ranked[0]] - row[ranked[1]]) / scale)
            chosen.append(sorted(winners))
    return torch.tensor(chosen, dtype=torch.int64, device=x.device).reshape(batch, keep)


# ------------------------------------------------------------------------------- prefill and decode


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
            energies over the largest of their row. Infinite where nothing was decided by a score.
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
    model: LlavaForConditionalGeneration,
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
    model: LlavaForConditionalGeneration,
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
    offsets = torch.arange(each, device=features.device)[:, None] * tokens.patches
    slots = (tokens.slots.reshape(batch, each, count) + offsets).reshape(batch, each * count)
    places = _visual_index(placeholders, each * tokens.patches)  # [B, V]
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
def oracle_continue(model: LlavaForConditionalGeneration, state: OracleState, input_ids: Tensor) -> Tensor:
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
def oracle_greedy(model: LlavaForConditionalGeneration, result: OracleResult, max_new_tokens: int) -> Tensor:
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
    model: LlavaForConditionalGeneration,
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


def score_gap(model: LlavaForConditionalGeneration, schedule: Schedule, **inputs: Any) -> float:
    """`OracleResult.gap` of a prefill: below a tolerance, other arithmetic may choose otherwise."""
    return oracle_forward(model, schedule, **inputs).gap


# --------------------------------------------------------------------------------------- strategies

_FRACTIONS = st.one_of(st.sampled_from([0.1, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0]), st.floats(0.02, 1.0))


@st.composite
def _merge_items(
    draw: st.DrawFn, blocks: int, grid: tuple[int, int], most: int
) -> tuple[tuple[Merge, ...], tuple[int, int]]:
    place = st.tuples(st.integers(0, blocks - 1), st.sampled_from(AXES))
    places = draw(st.lists(place, unique=True, max_size=most)) if blocks else []
    sides = {"height": grid[0], "width": grid[1]}
    items: dict[int, Merge] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][0]):
        block, axis = places[i]
        if draw(st.booleans()):
            amount: dict[str, Any] = {"keep": draw(_FRACTIONS)}
        else:
            amount = {"length": draw(st.integers(1, sides[axis]))}
        depth = (block + 1 + draw(st.sampled_from([-0.25, 0.0, 0.25]))) / blocks
        how = draw(st.sampled_from(["layer", "negative", "depth"]))
        if how == "depth" and 0 < depth < 1 and Merge(axis, keep=1.0, depth=depth).block(blocks) == block:
            where: dict[str, Any] = {"depth": depth}
        else:
            where = {"layer": block - blocks if how == "negative" else block}
        items[i] = Merge(axis=axis, **amount, **where)
        sides[axis] = items[i].target(sides[axis])
    return tuple(items[i] for i in range(len(places))), (sides["height"], sides["width"])


@st.composite
def _prune_items(draw: st.DrawFn, layers: int, fused: int, most: int) -> tuple[Prune, ...]:
    places = draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=most))
    items: dict[int, Prune] = {}
    left, most_keep = fused, 1.0
    for layer in sorted(places):
        # one fraction decides both, so that nothing left is an option and not the rule
        fraction = 0.0 if draw(st.integers(0, 7)) == 7 else draw(_FRACTIONS)
        keep = fraction * most_keep
        amount: dict[str, Any] = {"keep": keep}
        if draw(st.booleans()) or Prune(keep=keep, layer=0).count(fused) > left:
            amount = {"tokens": round_half_up(fraction * left)}
        depth = (layer + draw(st.sampled_from([-0.25, 0.0, 0.25]))) / layers
        how = draw(st.sampled_from(["layer", "negative", "depth"]))
        if how == "depth" and 0 < depth < 1 and Prune(1.0, depth=depth).decoder_layer(layers) == layer:
            where: dict[str, Any] = {"depth": depth}
        else:
            where = {"layer": layer - layers if how == "negative" else layer}
        items[layer] = Prune(
            **amount,
            **where,
            selector=draw(st.sampled_from((SELECTORS[0], *SELECTORS))),
            energy=draw(st.sampled_from(ENERGIES)),
            coverage=draw(st.sampled_from(COVERAGES)),
            cutoff=draw(st.one_of(st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.floats(0.01, 1.0))),
            seed=draw(st.integers(0, 5)),
        )
        left = items[layer].count(fused)
        most_keep = keep if "keep" in amount else most_keep
    return tuple(items[layer] for layer in places)


@st.composite
def schedules(
    draw: st.DrawFn,
    blocks: int = 3,
    grid: tuple[int, int] = (8, 8),
    layers: int = 4,
    *,
    images: int = 1,
    merges: int = 3,
    prunes: int = 3,
) -> Schedule:
    """Valid schedules for a model.

    Args:
        blocks: encoder blocks that feed the features (`encoder_blocks`); layers: of the decoder.
        grid: patches (height, width) of one image; images: images in each row.
        merges, prunes: how many of each at most.
    """
    merge, (height, width) = draw(_merge_items(blocks, grid, merges))
    fused = images * height * width
    prune = draw(_prune_items(layers, fused, prunes))
    schedule = Schedule(merge=merge, prune=prune)
    schedule.merges_at(blocks)
    schedule.prunes_at(layers)
    schedule.prunes_at(layers, fused)
    return schedule


__all__ = [
    "OracleResult",
    "OracleState",
    "VisualTokens",
    "encode",
    "encoder_blocks",
    "energies",
    "generate_positions",
    "merge_grid",
    "merge_line",
    "oracle_continue",
    "oracle_forward",
    "oracle_generate",
    "oracle_greedy",
    "random_scores",
    "schedules",
    "score_gap",
    "select",
]
