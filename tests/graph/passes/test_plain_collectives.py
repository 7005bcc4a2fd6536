"""Sums over processes that are written back in place, as Dynamo captures `all_reduce`."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from luvc_fx.graph.nodes import op_name
from luvc_fx.passes.prepare.plain_collectives import plain_collectives
from luvc_fx.schedule import Merge, Prune, Schedule

REDUCE = torch.ops._c10d_functional.all_reduce
WAIT = torch.ops._c10d_functional.wait_tensor


def text(graph: fx.Graph) -> list[str | None]:
    return [node.format_node() for node in graph.nodes]


def graph_of(product: object = torch._C._nn.linear, view: bool = False, foreign: bool = False) -> fx.Graph:
    """``x = product(a, b); x.copy_(all_reduce(x)); return a + x``.

    Args:
        view: a view of `x` is taken before the copy and read after it.
        foreign: what is copied is the sum of another tensor.
    """
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    x = graph.call_function(product, (a, b))
    seen = graph.call_method("view", (x, -1)) if view else x
    total = graph.call_function(WAIT, (graph.call_function(REDUCE, (a if foreign else x, "sum", "0")),))
    graph.call_method("copy_", (x, total))
    after = graph.call_function(operator.add, (a, x))
    graph.output((after, graph.call_function(torch.neg, (seen,))))
    return graph


@pytest.mark.parametrize(
    "schedule", [Schedule(prune=Prune(keep=0.5, layer=1)), Schedule(merge=Merge("width", keep=0.5, layer=0))]
)
def test_the_sum_is_read_in_place_of_what_it_was_copied_into(schedule: Schedule) -> None:
    graph = graph_of()
    before = text(graph)
    edit = plain_collectives(graph, schedule)
    assert edit is not None
    assert text(graph) == before, "nothing changes until the runner says so"
    edit()
    graph.lint()
    names = [op_name(node) for node in graph.nodes if node.op.startswith("call")]
    assert names == ["linear", "all_reduce", "wait_tensor", "add", "neg"]
    (total,) = (node for node in graph.nodes if op_name(node) == "wait_tensor")
    assert [op_name(user) for user in total.users] == ["add", "neg"]
    assert plain_collectives(graph, schedule) is None


def test_what_another_name_could_see_stays_in_place() -> None:
    for graph in (graph_of(view=True), graph_of(product=torch.transpose), graph_of(foreign=True)):
        before = text(graph)
        assert plain_collectives(graph, Schedule(prune=Prune(keep=0.5, layer=1))) is None
        assert text(graph) == before


def test_a_schedule_that_does_nothing_needs_none() -> None:
    assert plain_collectives(graph_of(), Schedule()) is None
