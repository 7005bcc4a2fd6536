"""Which axes follow the token count: reshapes against real views, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from replay import capture
from torch import Tensor, fx

from luvc_fx.fx_util import op_name, output_node
from luvc_fx.report import Reason, Refused
from luvc_fx.token_axes import PROBE, Extent, Join, align, trace

NODE = fx.Graph().placeholder("x")


def axes_that_follow(old: tuple[int, ...], axis: int, new: tuple[int, ...]) -> set[int]:
    """The axes of a view along which the index on `axis` of the original changes."""
    shape = [1] * len(old)
    shape[axis] = old[axis]
    labels = torch.arange(old[axis]).reshape(shape).expand(old).reshape(new)
    return {i for i in range(len(new)) if new[i] > 1 and not (labels.diff(dim=i) == 0).all()}


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Sizes (with collisions: few primes), a token axis longer than one, and sizes of the same product.

    Only reshapes that merge or split whole factors, as models do.
    """
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 4]), min_size=2, max_size=5))

    def grouped() -> tuple[int, ...]:
        cuts = sorted(draw(st.sets(st.integers(1, len(factors) - 1))))
        sizes = [math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
        for place in sorted(draw(st.lists(st.integers(0, len(sizes)), max_size=2))):
            sizes.insert(place, 1)
        return tuple(sizes)

    old = grouped()
    axis = draw(st.sampled_from([i for i, size in enumerate(old) if size > 1]))
    return old, axis, grouped()


@given(reshapes(), st.integers(0, 1))
def test_align_finds_axes_that_a_real_view_follows(
    case: tuple[tuple[int, ...], int, tuple[int, ...]], lead: int
) -> None:
    old, axis, new = case
    tokens = old[axis] - lead
    try:
        found = align("view", old, {axis: Extent(1, lead)}, new, NODE)
    except Refused as refused:
        assert refused.refusal.reason is Reason.TOKEN_AXIS
        # A whole axis that stays whole is never unclear.
        assert not (old[axis] in new and old == new)
        return
    (only,) = found
    assert found[only].length(tokens) == new[only]
    assert only in axes_that_follow(old, axis, new)


@given(reshapes(), st.integers(2, 9))
def test_align_makes_a_view_of_any_other_count(
    case: tuple[tuple[int, ...], int, tuple[int, ...]], tokens: int
) -> None:
    """With the resized axis, a real view of labelled rows keeps each row's label in its place."""
    old, axis, new = case
    try:
        found = align("view", old, {axis: Extent(1, 0)}, new, NODE)
    except Refused:
        assume(False)
    longer = [tokens if i == axis else size for i, size in enumerate(old)]
    sizes = [found[i].length(tokens) if i in found else size for i, size in enumerate(new)]
    labels = torch.arange(tokens).reshape([-1 if i == axis else 1 for i in range(len(old))]).expand(longer)
    view = labels.reshape(sizes)  # raises where the sizes do not fit
    for other in range(len(sizes)):
        if other not in found and sizes[other] > 1:
            # no other axis tells tokens apart, so cutting the found one cuts whole tokens
            assert (view.diff(dim=other) == 0).all()


EXACT: dict[str, tuple[str, tuple[int, ...], dict[int, Extent], tuple[int, ...], dict[int, Extent]]] = {
    "heads out of hidden": ("view", (2, 16, 16), {1: Extent(1, 0)}, (2, 16, 4, 4), {1: Extent(1, 0)}),
    "hidden out of heads": ("reshape", (2, 16, 4, 4), {1: Extent(1, 0)}, (2, 16, 16), {1: Extent(1, 0)}),
    "all sizes equal": ("view", (4, 4, 4), {1: Extent(1, 0)}, (4, 4, 2, 2), {1: Extent(1, 0)}),
    "flattened with the batch": ("view", (2, 9, 5), {1: Extent(1, 0)}, (18, 5), {0: Extent(2, 0)}),
    "with a lead": ("view", (3, 17, 8), {1: Extent(1, 1)}, (3, 17, 2, 4), {1: Extent(1, 1)}),
    "lead flattened with the batch": ("view", (3, 17, 8), {1: Extent(1, 1)}, (51, 8), {0: Extent(3, 3)}),
    "expand adds axes": ("expand", (1, 7, 1), {1: Extent(1, 0)}, (2, 3, 7, 4), {2: Extent(1, 0)}),
    "ones come and go": ("view", (1, 6, 1, 8), {1: Extent(1, 0)}, (6, 1, 8), {0: Extent(1, 0)}),
    "no token axis": ("view", (2, 6), {}, (12,), {}),
    "group out of tokens": ("view", (1, 12, 8), {1: Extent(4, 0)}, (1, 3, 32), {1: Extent(1, 0)}),
}


@pytest.mark.parametrize("name", EXACT)
def test_align_exactly(name: str) -> None:
    op, old, extents, new, want = EXACT[name]
    assert align(op, old, extents, new, NODE) == want


REFUSED: dict[str, tuple[tuple[int, ...], dict[int, Extent], tuple[int, ...], str]] = {
    "split into a grid": ((2, 16, 8), {1: Extent(1, 0)}, (2, 4, 4, 8), "splits the token axis"),
    "two token axes joined": ((6, 6), {0: Extent(1, 0), 1: Extent(1, 0)}, (36,), "joins two token axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_align_refuses_what_is_not_clear(name: str) -> None:
    old, extents, new, words = REFUSED[name]
    with pytest.raises(Refused) as caught:
        align("view", old, extents, new, NODE)
    assert caught.value.refusal.reason is Reason.TOKEN_AXIS
    assert words in caught.value.refusal.text


# ------------------------------------------------------------------------------------------- tracing


def traced(body: Callable[..., Any], x: Tensor, *others: Tensor, axis: int = 1, lead: int = 0) -> Any:
    """The graph of ``body(x + 0, *others)``, and the axes found when `axis` of ``x + 0`` holds tokens."""
    names = [f"y{i}" for i in range(len(others))]

    def call(x: Tensor, **more: Tensor) -> Any:
        return body(x + 0.0, *(more[name] for name in names))

    captured = capture(call, x=x, **dict(zip(names, others, strict=True)))
    graph = captured.gm.graph
    seed = next(n for n in graph.nodes if op_name(n) == "add")
    axes = trace(graph, {seed: {axis: PROBE + lead}}, set(graph.nodes))
    return axes, output_node(graph).args[0]


FOLLOWED: dict[str, tuple[Callable[..., Any], tuple[int, ...], list[dict[int, Extent]]]] = {
    "transpose": (lambda x: x.transpose(1, 2), (4, 4, 4), [{2: Extent(1, 0)}]),
    "heads": (lambda x: x.view(2, 16, 4, 4).transpose(1, 2), (2, 16, 16), [{2: Extent(1, 0)}]),
    "scores": (lambda x: x @ x.mT, (2, 8, 8), [{1: Extent(1, 0), 2: Extent(1, 0)}]),
    "mean over tokens": (lambda x: x.mean(1), (2, 8, 8), [{}]),
    "channel chunk": (lambda x: x.chunk(2, dim=-1)[1], (2, 8, 8), [{1: Extent(1, 0)}]),
    "doubled": (lambda x: torch.cat([x, x], dim=1), (2, 8, 8), [{1: Extent(2, 0)}]),
    "a row in front": (
        lambda x: torch.cat([x.new_zeros(2, 1, 8), x], dim=1),
        (2, 8, 8),
        [{1: Extent(1, 1)}],
    ),
    "repeat of heads": (
        lambda x: x[:, :, None, :].expand(2, 8, 3, 8).reshape(2, 8, 24),
        (2, 8, 8),
        [{1: Extent(1, 0)}],
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_token_axis_is_followed(name: str) -> None:
    body, sizes, want = FOLLOWED[name]
    axes, outputs = traced(body, torch.randn(sizes))
    assert [axes.extents.get(node, {}) for node in outputs] == want
    assert axes.joins == []


def test_a_foreign_value_of_that_length_is_a_join() -> None:
    axes, outputs = traced(lambda x, table: x * table, torch.randn(2, 8, 8), torch.randn(1, 8, 8))
    (join,) = axes.joins
    assert isinstance(join, Join)
    assert (join.consumer, join.axes) == (outputs[0], (1,))
    assert join.follower.op == "placeholder"


def test_a_value_that_only_broadcasts_is_no_join() -> None:
    axes, _ = traced(lambda x, scale: x * scale, torch.randn(2, 8, 8), torch.randn(8))
    assert axes.joins == []


def test_the_mask_of_an_attention_call_is_a_join_on_both_axes() -> None:
    def body(x: Tensor, mask: Tensor) -> Tensor:
        h = x.view(2, 8, 2, 4).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=mask)

    axes, outputs = traced(body, torch.randn(2, 8, 8), torch.ones(2, 1, 8, 8, dtype=torch.bool))
    (join,) = axes.joins
    assert join.axes == (2, 3)
    assert axes.extents[outputs[0]] == {2: Extent(1, 0)}


def drops_in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y.mul_(2.0)
    return y


CUTS: dict[str, tuple[Callable[..., Any], str]] = {
    "slice": (lambda x: x[:, 2:5], "fixed place"),
    "one row": (lambda x: x[:, 3], "fixed place"),
    "narrow": (lambda x: x.narrow(1, 2, 3), "fixed place by narrow"),
    "select": (lambda x: x.select(1, 2), "fixed place by select"),
    "split": (lambda x: x.split(4, dim=1)[0], "fixed place by split"),
    "unbind": (lambda x: x.unbind(1)[0], "fixed place by unbind"),
    "index": (lambda x: x[:, torch.tensor([0, 2])], ""),
    "in place": (drops_in_place, "changed in place by mul_"),
    "rows behind": (lambda x: torch.cat([x, x.new_zeros(2, 2, 8)], dim=1), "appended behind"),
    "batch by number": (lambda x: x.view(2, 2, 4, 8), "splits the token axis"),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_another_count_would_break_is_refused(name: str) -> None:
    body, words = CUTS[name]
    with pytest.raises(Refused) as caught:
        traced(body, torch.randn(2, 8, 8))
    assert caught.value.refusal.reason is Reason.TOKEN_AXIS
    assert words in caught.value.refusal.text
    assert caught.value.refusal.node


def test_rows_in_front_may_be_cut_off() -> None:
    axes, outputs = traced(lambda x: (x[:, 1:], x[:, :1]), torch.randn(2, 9, 8), lead=1)
    assert [axes.extents.get(node, {}) for node in outputs] == [{1: Extent(1, 0)}, {}]
