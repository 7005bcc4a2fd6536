"""Which axes follow the token count: reshapes against real views, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import CONSTANT, HEIGHT, TOKENS, WIDTH, Extent, Factor, align, axis_of
from luvc_fx.anatomy.axes.probe import Join
from luvc_fx.anatomy.axes.trace import trace
from luvc_fx.graph.nodes import op_name, output_node, value
from luvc_fx.report import Reason, Refused
from tests.support.replay import capture

NODE = fx.Graph().placeholder("x")
ROWS = axis_of(TOKENS)
GRID = axis_of(HEIGHT, WIDTH)


def part(symbol: str, scale: float) -> Factor:
    return Factor(symbol, Fraction(scale))


def times(number: int, extent: Extent = ROWS) -> Extent:
    return extent.times(number, outer=True)


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
        found = align(old, {axis: axis_of(TOKENS, rows_before=lead)}, new, {TOKENS: tokens}, NODE)
    except Refused as refused:
        assert refused.refusal.reason is Reason.TOKEN_AXIS
        # A whole axis that stays whole is never unclear.
        assert not (old[axis] in new and old == new)
        return
    (only,) = found
    assert found[only].length({TOKENS: tokens}) == new[only]
    assert only in axes_that_follow(old, axis, new)


@given(reshapes(), st.integers(2, 9))
def test_align_makes_a_view_of_any_other_count(
    case: tuple[tuple[int, ...], int, tuple[int, ...]], tokens: int
) -> None:
    """With the resized axis, a real view of labelled rows keeps each row's label in its place."""
    old, axis, new = case
    try:
        found = align(old, {axis: ROWS}, new, {TOKENS: old[axis]}, NODE)
    except Refused:
        assume(False)
    longer = [tokens if i == axis else size for i, size in enumerate(old)]
    sizes = [found[i].length({TOKENS: tokens}) if i in found else size for i, size in enumerate(new)]
    labels = torch.arange(tokens).reshape([-1 if i == axis else 1 for i in range(len(old))]).expand(longer)
    view = labels.reshape(sizes)  # raises where the sizes do not fit
    for other in range(len(sizes)):
        if other not in found and sizes[other] > 1:
            # no other axis tells tokens apart, so cutting the found one cuts whole tokens
            assert (view.diff(dim=other) == 0).all()


Case = tuple[tuple[int, ...], dict[int, Extent], tuple[int, ...], dict[int, Extent]]

EXACT: dict[str, Case] = {
    "heads out of hidden": ((2, 16, 16), {1: ROWS}, (2, 16, 4, 4), {1: ROWS}),
    "hidden out of heads": ((2, 16, 4, 4), {1: ROWS}, (2, 16, 16), {1: ROWS}),
    "all sizes equal": ((4, 4, 4), {1: ROWS}, (4, 4, 2, 2), {1: ROWS}),
    "flattened with the batch": ((2, 9, 5), {1: ROWS}, (18, 5), {0: times(2)}),
    "with a lead": (
        (3, 17, 8),
        {1: axis_of(TOKENS, rows_before=1)},
        (3, 17, 2, 4),
        {1: axis_of(TOKENS, rows_before=1)},
    ),
    "lead flattened with the batch": (
        (3, 17, 8),
        {1: axis_of(TOKENS, rows_before=1)},
        (51, 8),
        {0: times(3, axis_of(TOKENS, rows_before=1))},
    ),
    "ones come and go": ((1, 6, 1, 8), {1: ROWS}, (6, 1, 8), {0: ROWS}),
    "no token axis": ((2, 6), {}, (12,), {}),
    "group out of tokens": ((1, 12, 8), {1: ROWS.times(4, outer=False)}, (1, 3, 32), {1: ROWS}),
    "into a grid": ((2, 12, 5), {1: GRID}, (2, 3, 4, 5), {1: axis_of(HEIGHT), 2: axis_of(WIDTH)}),
    "into a square grid": ((4, 16, 4), {1: GRID}, (4, 4, 4, 4), {1: axis_of(HEIGHT), 2: axis_of(WIDTH)}),
    "out of a grid": ((2, 3, 4, 5), {1: axis_of(HEIGHT), 2: axis_of(WIDTH)}, (2, 12, 5), {1: GRID}),
    "half a side to the channels": (
        (1, 8, 8, 64),
        {1: axis_of(HEIGHT), 2: axis_of(WIDTH)},
        (1, 8, 4, 128),
        {1: axis_of(HEIGHT), 2: Extent((part(WIDTH, 0.5),))},
    ),
    "half a side, sizes equal": (
        (1, 4, 4, 4),
        {1: axis_of(HEIGHT), 2: axis_of(WIDTH)},
        (1, 4, 2, 8),
        {1: axis_of(HEIGHT), 2: Extent((part(WIDTH, 0.5),))},
    ),
    "blocks": (
        (1, 12, 8),
        {1: GRID},
        (1, 3, 2, 2, 8),
        {1: axis_of(HEIGHT), 2: Extent((part(WIDTH, 0.5),))},
    ),
    "blocks joined": (
        (1, 3, 2, 4, 8),
        {1: axis_of(HEIGHT), 2: Extent((part(WIDTH, 0.5),))},
        (1, 6, 32),
        {1: Extent((part(HEIGHT, 1), part(WIDTH, 0.5)))},
    ),
    "a grid flattened with its images": (
        (3, 6, 8),
        {1: GRID},
        (18, 8),
        {0: Extent((part(CONSTANT, 3), *GRID.factors))},
    ),
}
SIDES = {
    "into a square grid": (4, 4),
    "half a side to the channels": (8, 8),
    "half a side, sizes equal": (4, 4),
    "a grid flattened with its images": (2, 3),
}


@pytest.mark.parametrize("name", EXACT)
def test_align_exactly(name: str) -> None:
    old, extents, new, want = EXACT[name]
    height, width = SIDES.get(name, (3, 4))
    counts = {HEIGHT: height, WIDTH: width}
    for axis, extent in extents.items():
        if extent.symbols() == [TOKENS]:
            counts[TOKENS] = (old[axis] - extent.rows_before) // (
                extent.length({TOKENS: 1}) - extent.rows_before
            )
        assert extent.length(counts) == old[axis]
    assert align(old, extents, new, counts, NODE) == want


REFUSED: dict[str, tuple[tuple[int, ...], dict[int, Extent], tuple[int, ...], str]] = {
    "split into a grid": ((2, 16, 8), {1: ROWS}, (2, 4, 4, 8), "splits the token axis"),
    "two token axes joined": ((6, 6), {0: ROWS, 1: ROWS}, (36,), "joins two token axes"),
    "a lead in a grid": (
        (1, 16, 8),
        {1: axis_of(HEIGHT, WIDTH, rows_before=1)},
        (1, 4, 4, 8),
        "splits the token axis",
    ),
    "across the rows": ((1, 15, 8), {1: GRID}, (1, 5, 3, 8), "splits the token axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_align_refuses_what_is_not_clear(name: str) -> None:
    old, extents, new, words = REFUSED[name]
    counts = {HEIGHT: 3, WIDTH: 5, TOKENS: old[1]}
    with pytest.raises(Refused) as caught:
        align(old, extents, new, counts, NODE)
    assert caught.value.refusal.reason is Reason.TOKEN_AXIS
    assert words in caught.value.refusal.text


def test_a_length_that_does_not_divide_raises() -> None:
    half = Extent((part(WIDTH, 0.5),))
    assert half.length({WIDTH: 6}) == 3
    with pytest.raises(ValueError, match="do not divide"):
        half.length({WIDTH: 5})


# ------------------------------------------------------------------------------------------- tracing


def traced(body: Callable[..., Any], x: Tensor, *others: Tensor, axis: int = 1, lead: int = 0) -> Any:
    """The graph of ``body(x + 0, *others)``, and the axes found when `axis` of ``x + 0`` holds tokens."""
    names = [f"y{i}" for i in range(len(others))]

    def call(x: Tensor, **more: Tensor) -> Any:
        return body(x + 0.0, *(more[name] for name in names))

    captured = capture(call, x=x, **dict(zip(names, others, strict=True)))
    graph = captured.gm.graph
    seed = next(n for n in graph.nodes if op_name(n) == "add")
    counts = {TOKENS: x.shape[axis] - lead}
    axes = trace(graph, {seed: {axis: axis_of(TOKENS, rows_before=lead)}}, counts, set(graph.nodes))
    return axes, output_node(graph).args[0]


FOLLOWED: dict[str, tuple[Callable[..., Any], tuple[int, ...], list[dict[int, Extent]]]] = {
    "transpose": (lambda x: x.transpose(1, 2), (4, 4, 4), [{2: ROWS}]),
    "heads": (lambda x: x.view(2, 16, 4, 4).transpose(1, 2), (2, 16, 16), [{2: ROWS}]),
    "scores": (lambda x: x @ x.mT, (2, 8, 8), [{1: ROWS, 2: ROWS}]),
    "mean over tokens": (lambda x: x.mean(1), (2, 8, 8), [{}]),
    "channel chunk": (lambda x: x.chunk(2, dim=-1)[1], (2, 8, 8), [{1: ROWS}]),
    "doubled": (lambda x: torch.cat([x, x], dim=1), (2, 8, 8), [{1: times(2)}]),
    "a row in front": (
        lambda x: torch.cat([x.new_zeros(2, 1, 8), x], dim=1),
        (2, 8, 8),
        [{1: axis_of(TOKENS, rows_before=1)}],
    ),
    "repeat of heads": (
        lambda x: x[:, :, None, :].expand(2, 8, 3, 8).reshape(2, 8, 24),
        (2, 8, 8),
        [{1: ROWS}],
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
    assert axes.extents[outputs[0]] == {2: ROWS}


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
    assert [axes.extents.get(node, {}) for node in outputs] == [{1: ROWS}, {}]


def test_a_value_made_of_the_number_of_rows_is_refused() -> None:
    """Rows numbered anew after a merge: no join would bring the old numbers back."""
    captured = capture(
        lambda x: (x + 0.0) * torch.arange(x.shape[1])[None, :, None], True, x=torch.ones(2, 5, 3)
    )
    graph = captured.copy().graph
    site, numbers = (next(n for n in graph.nodes if op_name(n) == name) for name in ("add", "arange"))
    with graph.inserting_after(site):
        size = graph.call_method("size", (site, 1))
    size.meta["example_value"] = value(site).shape[1]
    numbers.args = (size,)
    size.append(numbers)
    with pytest.raises(Refused) as caught:
        trace(graph, {site: {1: ROWS}}, {TOKENS: value(site).shape[1]}, set(graph.nodes))
    assert caught.value.refusal.reason is Reason.TOKEN_AXIS
    assert caught.value.refusal.text == "a value is made of the number of rows alone"
