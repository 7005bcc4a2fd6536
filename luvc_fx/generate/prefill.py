"""The prefill of a prompt whose images are encoded: cut the prompt, run the graph, account for the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from luvc_fx import _compat
from luvc_fx.generate.cache import (
    adopt,
    as_pruned,
    fill,
    is_empty,
    note_rows_without_images,
    unsupported,
    uses_cache,
)
from luvc_fx.generate.constants import as_text
from luvc_fx.generate.encoder_outputs import features_of, with_features
from luvc_fx.generate.families import Modality, family_of
from luvc_fx.generate.graphs import GraphFeatures, GraphSet
from luvc_fx.generate.kept_logits import is_cut_afterwards, keep_asked, with_all_logits
from luvc_fx.generate.masks import left_padding, over_pruned_cache, takes_segments, without_full_mask
from luvc_fx.generate.prompt import Encoded, PromptState, compact, treat_padding_as_visual
from luvc_fx.generate.symbolic_sizes import with_sizes, with_symbolic_rows
from luvc_fx.schedule import Schedule


def prefill(
    model: Any,
    graphs: GraphSet,
    prompt: PromptState,
    encoder_outputs: Mapping[str, Any],
    rows_without_images: tuple[int, ...],
    wants_row_index: bool,
    schedule: Schedule | None = None,
) -> Any:
    """Run the forward of a prompt with encoded images; the cache it filled counts the rows that went, too.

    Args:
        prompt: the whole prompt; its cache is None or what `luvc_fx.generate.limits` lets through.
        encoder_outputs: by the modality's name: of a `CompiledEncoder`, whose merged placeholders leave the
            prompt, or anybody else's.
        rows_without_images: of the batch, where other rows have some.
        wants_row_index: give the output `row_index` ``[B, S']``, the old number of each row of its logits.
        schedule: whose prunes say how many tokens stay, instead of that of `graphs`.
    """
    given_cache, rows = prompt.cache, prompt.ids.shape[1]
    asked, as_tuple = prompt.rest.get("logits_to_keep"), wants_tuple(model, prompt)
    prompt = with_all_logits(with_named_outputs(prompt) if as_tuple else prompt)
    wants_row_index = wants_row_index or isinstance(asked, Tensor)
    prompt, past = choose_cache(model, prompt)
    prompt, padding, needs_mask = choose_mask(model, prompt, given_cache, past)
    prompt, features, old_rows = cut_prompt(
        model, graphs, prompt, encoder_outputs, rows_without_images, needs_mask, past
    )
    prompt, sized, row_counts = with_sizes(model, graphs, schedule, prompt, features)
    if padding is None and takes_segments(model):
        prompt, padding = padding_for_mask(prompt, rows_without_images)
    run = graphs.prefill if old_rows is None else graphs.prefill_of_merged
    output, kept_rows = run(
        prompt.as_kwargs(),
        padding,
        sized,
        wants_row_index,
        wants_last_logits=not is_cut_afterwards(asked) and asked == 1,
        row_counts=row_counts,
        late_features=prunes_late(graphs, features),
    )
    hand_back_cache(output, given_cache, past, rows, rows_without_images)
    if row_counts is not None:
        with_symbolic_rows(_compat.cache_of(output))
    if kept_rows is not None and old_rows is not None:
        kept_rows = old_rows.gather(1, kept_rows)
    row_index = keep_asked(output, kept_rows, asked, rows)
    if row_index is not None:
        output.row_index = row_index
    return output.to_tuple() if as_tuple else output


def wants_tuple(model: Any, prompt: PromptState) -> bool:
    """Whether the forward is to return a tuple: as the call says, or else as the config does."""
    given = prompt.rest.get("return_dict")
    return not (getattr(model.config, "return_dict", True) if given is None else given)


def with_named_outputs(prompt: PromptState) -> PromptState:
    """The prompt of a forward whose outputs have names."""
    return replace(prompt, rest={**prompt.rest, "return_dict": True})


def choose_cache(model: Any, prompt: PromptState) -> tuple[PromptState, int]:
    """The prompt with the cache that the graph is to fill, and how many rows of the conversation it holds."""
    cache = prompt.cache
    if isinstance(cache, StaticCache):
        # How many rows each layer keeps is known afterwards: `hand_back_cache` writes them to the static one.
        return replace(prompt, cache=DynamicCache(config=model.config.get_text_config())), 0
    if cache is not None and not is_empty(cache):
        past = cache.get_seq_length()
        as_pruned(cache)
        return prompt, past
    if cache is None and family_of(model).makes_own_masks() and uses_cache(model, prompt.rest):
        # Its decoder would make the same one, but only after the masks.
        fresh = DynamicCache(config=model.config.get_text_config())
        return replace(prompt, cache=fresh if unsupported(fresh) is None else None), 0
    return prompt, 0


def choose_mask(
    model: Any, prompt: PromptState, cache: object, past: int
) -> tuple[PromptState, Tensor | None, bool]:
    """The prompt with its mask, or with padding in the mask's place; and whether there has to be a mask.

    Args:
        cache: that was given, full or empty.

    Returns:
        The prompt; its padding as of `over_pruned_cache`; whether a prompt that gets shorter needs a mask.
    """
    prompt, padding = over_pruned_cache(model, prompt, cache)
    segments = padding is None and takes_segments(model)
    # Without mask and cache transformers takes gaps in the position ids for the bounds of packed rows.
    bare = family_of(model).makes_own_masks() or not uses_cache(model, prompt.rest)
    reads_gaps = prompt.cache is None and bare
    needs_mask = reads_gaps and not segments
    if past == 0 and not needs_mask:
        prompt = without_full_mask(prompt)
    return prompt, padding, needs_mask


def cut_prompt(
    model: Any,
    graphs: GraphSet,
    prompt: PromptState,
    encoder_outputs: Mapping[str, Any],
    rows_without_images: tuple[int, ...],
    needs_mask: bool,
    past: int,
) -> tuple[PromptState, dict[str, GraphFeatures], Tensor | None]:
    """The prompt without the placeholders that were merged away, one modality after the other.

    Returns:
        The shorter prompt, the features of each modality for the graph, and int64 ``[B, S']``: each row's old
        number, or None where none went.
    """
    features: dict[str, GraphFeatures] = {}
    old_rows: Tensor | None = None
    padding_used = 0
    for name, encoder in graphs.encoders.items():
        output = encoder_outputs.get(name)
        if output is None:
            continue
        late = graphs.family.late_features(output)
        representatives = getattr(output, "luvc_representatives", None)
        if representatives is None:  # not of a `CompiledEncoder`, or no features that it knows
            known = features_of(output)
            features[name] = (output if known is None else with_features(output, known, late), "")
            continue
        encoded = Encoded(output.pooler_output, representatives, output.luvc_placeholders, late)
        if rows_without_images:
            prompt, encoded = with_padding_as_visual(
                model, encoder.modality, prompt, encoded, rows_without_images, padding_used
            )
            padding_used += encoded.placeholders // prompt.ids.shape[0]
        features[name] = graph_features(output, encoded)
        if encoded.representatives.numel() < encoded.placeholders:
            visual = prompt.ids == getattr(model.config, encoder.modality.token)
            representatives, count = encoded.representatives, encoded.placeholders
            prompt, rows = compact(prompt, visual, representatives, count, needs_mask, past)
            old_rows = rows if old_rows is None else old_rows.gather(1, rows)
    return prompt, features, old_rows


def with_padding_as_visual(
    model: Any,
    modality: Modality,
    prompt: PromptState,
    encoded: Encoded,
    rows_without_images: tuple[int, ...],
    padding_used: int,
) -> tuple[PromptState, Encoded]:
    """The prompt in which each row has as many placeholders: see `treat_padding_as_visual`."""
    token = getattr(model.config, modality.token)
    ids, encoded = treat_padding_as_visual(prompt.ids, padding_used, token, encoded, rows_without_images)
    return replace(prompt, ids=ids), encoded


def graph_features(output: Any, encoded: Encoded) -> GraphFeatures:
    """The output as the graph takes it."""
    features = encoded.features
    count, *grid = encoded.representatives.shape
    text = as_text([grid]) if count > 1 or (count > 0 and grid[0] > 1) else ""
    return with_features(output, features, encoded.late), text


def padding_for_mask(prompt: PromptState, rows_without_images: tuple[int, ...]) -> tuple[PromptState, Tensor]:
    """The prompt without its mask, and its padding, of which the graph makes segments of rows."""
    padding = left_padding(prompt.ids, prompt.mask, rows_without_images)
    return replace(prompt, mask=None), padding


def prunes_late(graphs: GraphSet, features: Mapping[str, GraphFeatures]) -> bool:
    """Whether features that enter the decoder late are pruned, too.

    Their additions by a mask are written anew where one modality has some; of two, they end the graph.
    """
    late = any(graphs.family.late_features(output) for output, _ in features.values())
    return graphs.prunes and len(features) == 1 and late


def hand_back_cache(
    output: Any, given: Cache | None, past: int, rows: int, rows_without_images: tuple[int, ...]
) -> None:
    """Let the cache of `output` be the one that was given, and count the rows that went.

    Args:
        past, rows: rows of the conversation before this prompt, and of the whole prompt.
    """
    if isinstance(given, StaticCache):
        fill(given, _compat.cache_of(output), rows)
        _compat.set_cache(output, given)
    cache = _compat.cache_of(output)
    adopt(cache, past + rows)
    note_rows_without_images(cache, rows_without_images)
