"""Behind a site every literal size follows the new token count, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import TOKENS, axis_of
from luvc_fx.anatomy.axes.probe import set_sizes, sizes_of
from luvc_fx.anatomy.axes.trace import trace
from luvc_fx.graph.emit import emit, inserted
from luvc_fx.graph.nodes import op_name, shape, value
from luvc_fx.passes.support.retarget import Retarget
from luvc_fx.report import Reason, Refused
from tests.support.replay import Captured, capture, examples

LEFT = 5


def heads(x: Tensor) -> Tensor:
    return x.view(2, x.shape[1], 2, 4).transpose(1, 2).reshape(2, 2 * x.shape[1], 4)


def literal_view(x: Tensor) -> Tensor:
    return x.view(x.shape[0] * x.shape[1], 8).view(2, -1, 8)


def attention(x: Tensor) -> Tensor:
    h = x.view(2, x.shape[1], 2, 4).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(h, h, h)
    return out.transpose(1, 2).reshape(2, x.shape[1], 8) + x


def expanded(x: Tensor) -> Tensor:
    return (x[:, :, None, :].expand(2, x.shape[1], 3, 8).reshape(2, x.shape[1], 24)).softmax(-1)


def scores(x: Tensor) -> Tensor:
    return (x @ x.transpose(1, 2)).view(2, 1, x.shape[1], x.shape[1]).expand(2, 3, -1, -1)


def with_a_lead(x: Tensor) -> Tensor:
    h = torch.cat([x.new_ones(2, 1, 8), x], dim=1)
    return h.view(2, x.shape[1] + 1, 4, 2).flatten(2)[:, 1:]


BODIES: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (heads, literal_view, attention, expanded, scores, with_a_lead)
}


def shorten(
    body: Callable[[Tensor], Any], x: Tensor, left: int, dynamic: bool = False
) -> tuple[Captured, fx.GraphModule]:
    """`body(x + 0)` as captured, and a copy in which only `left` tokens come out of the sum."""
    captured = capture(lambda x: body(x + 0.0), dynamic, x=x)
    gm = captured.copy()
    graph = gm.graph
    site = next(n for n in graph.nodes if op_name(n) == "add")
    axes = trace(graph, {site: {1: axis_of(TOKENS)}}, {TOKENS: value(site).shape[1]}, set(graph.nodes))
    retarget = Retarget(graph, axes)
    retarget.advance(site)
    (short,) = emit(graph, "site", lambda a: a.narrow(1, 0, left).contiguous(), site)
    retarget.replace(site, short, {TOKENS: left})
    retarget.advance()
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return captured, gm


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in BODIES), ("literal_view", True), ("attention", True)],
)
def test_it_is_the_body_on_fewer_tokens(name: str, dynamic: bool) -> None:
    body, x = BODIES[name], torch.randn(2, 12, 8)
    captured, gm = shorten(body, x, LEFT, dynamic)
    (got,) = gm.forward(*captured.values)
    assert torch.equal(got, body(x[:, :LEFT].contiguous()))
    assert torch.equal(captured.plain()[0], body(x)), "the original must not change"
    for node in gm.graph.nodes:
        if isinstance(value(node), Tensor) and node.op.startswith("call_") and not dynamic:
            assert 12 not in shape(node) or not any(inserted(n) for n in node.all_input_nodes)


@settings(max_examples=examples(8))
@given(
    tokens=st.integers(2, 20),
    data=st.data(),
    name=st.sampled_from(sorted(BODIES)),
)
def test_any_count(tokens: int, data: st.DataObject, name: str) -> None:
    left = data.draw(st.integers(1, tokens))
    x = torch.randn(2, tokens, 8)
    captured, gm = shorten(BODIES[name], x, left)
    assert torch.equal(gm.forward(*captured.values)[0], BODIES[name](x[:, :left].contiguous()))


def test_what_does_not_follow_the_tokens_is_not_touched() -> None:
    def body(x: Tensor) -> Tensor:
        table = torch.arange(24.0).view(2, 12)
        return x.sum(1) + table.view(12, 2).sum()

    captured, gm = shorten(body, torch.randn(2, 12, 8), LEFT)
    views = [n.args for n in gm.graph.nodes if op_name(n) == "view"]
    assert [a[1:] for a in views] == [n.args[1:] for n in captured.gm.graph.nodes if op_name(n) == "view"]


def test_values_with_different_counts_do_not_meet() -> None:
    """Two cuts of one stream, added again: no count is right for the sum."""
    captured = capture(lambda x: (x + 0.0).sin() + (x + 0.0).cos(), x=torch.randn(2, 12, 8))
    graph = captured.copy().graph
    sums = [n for n in graph.nodes if op_name(n) == "add"][:2]
    axes = trace(graph, {n: {1: axis_of(TOKENS)} for n in sums}, {TOKENS: 8}, set(graph.nodes))
    retarget = Retarget(graph, axes)
    with pytest.raises(Refused) as caught:
        for node, left in zip(sums, (5, 7), strict=True):
            retarget.advance(node)
            (short,) = emit(graph, "site", lambda a, left=left: a.narrow(1, 0, left), node)
            retarget.replace(node, short, {TOKENS: left})
        retarget.advance()
    assert caught.value.refusal.reason is Reason.TOKEN_AXIS


def test_the_walk_does_not_turn_back() -> None:
    captured = capture(lambda x: (x + 0.0).sin(), x=torch.randn(2, 12, 8))
    graph = captured.copy().graph
    site = next(n for n in graph.nodes if op_name(n) == "add")
    axes = trace(graph, {site: {1: axis_of(TOKENS)}}, {TOKENS: value(site).shape[1]}, set(graph.nodes))
    retarget = Retarget(graph, axes)
    retarget.advance()
    with pytest.raises(AssertionError, match="lies behind the walk"):
        retarget.advance(site)


@pytest.mark.parametrize("sizes", [(2, 3), ((2, 3),), ([2, 3],)], ids=["plain", "tuple", "list"])
def test_sizes_are_read_in_every_spelling(sizes: Any) -> None:
    graph = fx.Graph()
    node = graph.call_method("view", (graph.placeholder("x"), *sizes))
    assert sizes_of(node) == [2, 3]
    set_sizes(node, [4, 3])
    assert sizes_of(node) == [4, 3]
    assert node.args[1] == (4, 3)
