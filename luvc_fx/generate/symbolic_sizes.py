"""One prefill graph for prompts of all sizes: what is marked as a symbol, and the numbers that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luvc_fx.generate.constants import rows_of
from luvc_fx.generate.encoder_outputs import parts_of, with_features
from luvc_fx.generate.graphs import GraphFeatures, GraphSet
from luvc_fx.generate.prompt import PromptState
from luvc_fx.schedule.row_counts import RowCounts

SizesOfCounts = tuple[str, list[Tensor]]
"""The form of a `RowCounts`, and its numbers as the sizes of empty tensors ``[number, 0]``.

Dynamo makes symbols of sizes that are marked, but of an integer only when it sees a second one, after another
compilation. No device is asked for any of these numbers."""


def serves_all_sizes(model: Any, graphs: GraphSet) -> bool:
    """Whether this call may run through the graph for all sizes; a gradient needs prunes written out."""
    if not graphs.symbolic:
        return False
    return not (torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()))


def keep_static(features: Mapping[str, GraphFeatures]) -> None:
    """Without symbols features of each size are a plan of their own."""
    for output, _ in features.values():
        for part in _tensors(output):
            torch._dynamo.mark_static(part)


def with_symbols(
    model: Any, graphs: GraphSet, prompt: PromptState, features: Mapping[str, GraphFeatures]
) -> tuple[dict[str, GraphFeatures], SizesOfCounts | None]:
    """Features whose numbers are symbols, and what each prune leaves of them; None without prunes."""
    grids = {grid for _, grid in features.values() if grid}
    marked = {name: (_with_symbolic_number(output), "") for name, (output, _) in features.items()}
    if not graphs.prunes:
        return marked, None
    total = sum(part.shape[:-1].numel() for output, _ in marked.values() for part in _tensors(output))
    grid = None
    if len(features) == 1 and len(grids) == 1:
        ((height, width),) = rows_of(grids.pop())
        grid = (height, width)
    layers = model.config.get_text_config().num_hidden_layers
    counts = RowCounts.of(graphs.schedule, layers, total // prompt.ids.shape[0], grid)
    sizes = [torch.empty(number, 0) for number in counts.numbers(prompt.ids.shape[1])]
    for size in sizes:
        torch._dynamo.maybe_mark_dynamic(size, 0)
    return marked, (counts.form, sizes)


def _tensors(output: Any) -> list[Tensor]:
    features = output.pooler_output
    return [features] if isinstance(features, Tensor) else list(features)


def _with_symbolic_number(output: Any) -> Any:
    features = output.pooler_output
    if not isinstance(features, Tensor) and len(features) > 1:
        features = (torch.cat(parts_of(features)),)  # else each number of images would be a graph
    made = [_marked(part, *range(part.dim() - 1)) for part in _as_list(features)]
    return with_features(output, made[0] if isinstance(features, Tensor) else tuple(made), {})


def _as_list(features: Any) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def with_symbolic_length(prompt: PromptState) -> PromptState:
    """The prompt whose length is a symbol, in each of the arguments that have an axis of it."""
    length = prompt.ids.shape[-1]

    def marked(given: Any) -> Any:
        along = isinstance(given, Tensor) and given.dim() >= 2 and given.shape[-1] == length
        return _marked(given, given.dim() - 1) if along else given

    rest = {name: marked(given) if name != "labels" else given for name, given in prompt.rest.items()}
    fields = {name: marked(getattr(prompt, name)) for name in ("ids", "mask", "positions")}
    return replace(prompt, **fields, rest=rest)


def _marked(tensor: Tensor, *axes: int) -> Tensor:
    """An alias, as marks stay on a tensor, and this one may be the user's."""
    alias = tensor.view(tensor.shape)
    for axis in axes:
        torch._dynamo.maybe_mark_dynamic(alias, axis)
    return alias
