"""One prefill graph for prompts of all sizes: what is marked as a symbol, and the numbers it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from luvc_fx.generate.cache import layers_of
from luvc_fx.generate.constants import rows_of
from luvc_fx.generate.encoder_outputs import LateFeatures, features_of, parts_of, with_features
from luvc_fx.generate.graphs import GraphFeatures, GraphSet
from luvc_fx.generate.marks import marked_axes
from luvc_fx.generate.prompt import PromptState
from luvc_fx.schedule import Schedule
from luvc_fx.schedule.row_counts import RowCounts

SizesOfCounts = tuple[str, list[Tensor]]
"""The form of a `RowCounts`, and its numbers as the sizes of empty tensors ``[number, 0]``.

Dynamo makes symbols of sizes that are marked, but of an integer only when it sees a second one, after another
compilation. No device is asked for any of these numbers."""


def with_sizes(
    model: Any,
    graphs: GraphSet,
    schedule: Schedule | None,
    prompt: PromptState,
    features: Mapping[str, GraphFeatures],
) -> tuple[PromptState, dict[str, GraphFeatures], SizesOfCounts | None]:
    """The prompt and its features with their sizes marked: as symbols, or as constants.

    Args:
        schedule: whose prunes say how many tokens stay, instead of that of `graphs`.

    Returns:
        Both, and what each prune leaves, where sizes are symbols and there are prunes.
    """
    if not graphs.symbolic or _needs_gradients(model) or not _are_known(features):
        keep_static(features)
        return prompt, dict(features), None
    late = graphs.family.late_features
    marked = {
        name: (_with_symbolic_number(output, late(output)), "") for name, (output, _) in features.items()
    }
    counts = None
    if graphs.prunes:
        try:
            counts = _row_counts(model, schedule or graphs.schedule, prompt, features, marked)
        except ValueError:  # this prompt is too short for the schedule: its own graph will say so
            keep_static(features)
            return prompt, dict(features), None
        graphs.report.saw((counts.visual, *counts.kept))
    return with_symbolic_length(prompt), marked, None if counts is None else _as_sizes(counts, prompt)


def _needs_gradients(model: Any) -> bool:
    """Whether somebody may ask for a gradient, which needs the prunes written out in the graph."""
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters())


def _are_known(features: Mapping[str, GraphFeatures]) -> bool:
    return all(features_of(output) is not None for output, _ in features.values())


def _row_counts(
    model: Any,
    schedule: Schedule,
    prompt: PromptState,
    features: Mapping[str, GraphFeatures],
    marked: Mapping[str, GraphFeatures],
) -> RowCounts:
    total = sum(part.shape[:-1].numel() for output, _ in marked.values() for part in _tensors(output))
    grids = {grid for _, grid in features.values() if grid}
    grid = None
    if len(features) == 1 and len(grids) == 1:
        ((height, width),) = rows_of(grids.pop())
        grid = (height, width)
    layers = model.config.get_text_config().num_hidden_layers
    return RowCounts.of(schedule, layers, total // prompt.ids.shape[0], grid)


def _as_sizes(counts: RowCounts, prompt: PromptState) -> SizesOfCounts:
    sizes = [torch.empty(number, 0) for number in counts.numbers(prompt.ids.shape[1])]
    for size in sizes:
        torch._dynamo.maybe_mark_dynamic(size, 0)
    return counts.form, sizes


def keep_static(features: Mapping[str, GraphFeatures]) -> None:
    """Without symbols features of each size are a plan of their own."""
    for output, _ in features.values():
        for part in _tensors(output):
            torch._dynamo.mark_static(part)


def _tensors(output: Any) -> list[Tensor]:
    features = features_of(output)
    if features is None:
        return []
    return [features] if isinstance(features, Tensor) else list(features)


def _with_symbolic_number(output: Any, late: LateFeatures) -> Any:
    features = output.pooler_output
    late = {name: [marked_axes(level, 0) for level in levels] for name, levels in late.items()}
    if isinstance(features, Tensor):
        return with_features(output, marked_axes(features, *range(features.dim() - 1)), late)
    # In one piece, or each number of images would be a graph.
    whole = features[0] if len(features) == 1 else torch.cat(parts_of(features))
    return with_features(output, (marked_axes(whole, 0),), late)


def with_symbolic_length(prompt: PromptState) -> PromptState:
    """The prompt whose length is a symbol, in each of the arguments that have an axis of it."""
    length = prompt.ids.shape[-1]

    def marked(given: Any) -> Any:
        along = isinstance(given, Tensor) and given.dim() >= 2 and given.shape[-1] == length
        return marked_axes(given, given.dim() - 1) if along else given

    fields = {name: marked(getattr(prompt, name)) for name in ("ids", "mask", "positions")}
    return replace(prompt, **fields, rest={name: marked(given) for name, given in prompt.rest.items()})


def with_symbolic_rows(cache: Any) -> None:
    """Let the first step over a new cache compile a graph for all numbers of rows, not for these.

    Dynamo would make symbols of them in the second conversation, in another graph.
    """
    if isinstance(cache, DynamicCache):
        for layer in layers_of(cache):
            for tensor in (layer.keys, layer.values):
                torch._dynamo.maybe_mark_dynamic(tensor, tensor.dim() - 2)
