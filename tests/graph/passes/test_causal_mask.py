"""Masks of pruned layers: made of what they say, never cut out of a long one, and bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import luvc_fx
from luvc_fx.graph.nodes import op_name, output_node, value
from luvc_fx.passes.support.causal_mask import Causal, read_causal
from luvc_fx.schedule import Prune, Schedule
from tests.support.replay import capture, whole


def square_gathers(graph: fx.Graph) -> int:
    """How many nodes pick rows of a boolean with two of them."""
    nodes = [n for n in graph.nodes if op_name(n) == "gather"]
    return sum(value(n).dtype == torch.bool and value(n).dim() == 4 for n in nodes)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_no_layer_cuts_a_long_mask(dynamic: bool) -> None:
    captured = whole(dynamic=dynamic, batch=2, padding=(3, 0))
    schedule = Schedule(prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2)))
    _, gm, report = captured.rewritten(luvc_fx.backend(schedule, inner="eager", strict=True))
    assert len(report.inserted) == 2
    assert square_gathers(gm.graph) == 0


def causal(mask: Tensor) -> Tensor:
    """As transformers writes it."""
    batch, length = mask.shape
    rows = torch.arange(length) + 0
    keys = (torch.arange(length) + 0)[None, None, None, :]
    before = keys <= rows[None, None, :, None]
    seen = mask[torch.arange(batch)[:, None, None, None], keys]
    return (before & seen).expand(batch, -1, length, length)


def added(mask: Tensor) -> Tensor:
    return torch.where(causal(mask), torch.zeros((), dtype=torch.float32), torch.finfo(torch.float32).min)


def backwards(mask: Tensor) -> Tensor:
    batch, length = mask.shape
    keys = torch.arange(length)[None, None, None, :]
    before = keys >= torch.arange(length)[None, None, :, None]
    return before.expand(batch, -1, length, length) & mask[:, None, None]


def other_rows(mask: Tensor) -> Tensor:
    length = mask.shape[1]
    keys = torch.arange(1, length + 1)[None, None, None, :]
    return (keys <= torch.arange(length)[None, None, :, None]).expand(len(mask), -1, length, length)


def images_together(mask: Tensor) -> Tensor:
    """As Gemma 3: tokens of an image see each other."""
    return causal(mask) | (mask[:, None, None] & mask[:, None, :, None])


def read(write: Callable[[Tensor], Tensor], mask: Tensor) -> Causal | None:
    graph = capture(write, mask=mask).gm.graph
    (node,) = output_node(graph).all_input_nodes
    return read_causal(node)


MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
"""Left padding, a hole, and nothing hidden."""


@pytest.mark.parametrize("write", [causal, added])
def test_the_short_mask_is_what_is_left_of_the_long_one(write: Callable[[Tensor], Tensor]) -> None:
    known = read(write, MASK)
    assert known is not None
    assert known.added == (None if write is causal else torch.float32)
    rows = torch.tensor([[0, 2, 3, 5], [1, 2, 4, 5], [0, 1, 4, 5]])
    short, keys = known.shortened()(rows, MASK)
    want = torch.stack([whole[:, r][..., r] for whole, r in zip(write(MASK), rows, strict=True)])
    assert torch.equal(short, want)
    assert torch.equal(keys, MASK.gather(1, rows))


@pytest.mark.parametrize("write", [backwards, other_rows, images_together])
def test_other_masks_are_not_taken_for_causal_ones(write: Callable[[Tensor], Tensor]) -> None:
    assert read(write, MASK) is None
