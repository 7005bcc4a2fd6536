"""Write a pure function on tensors into a graph, as the ATen nodes it consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from luvc_fx._compat import FakeTensor, fake_run, make_fx
from luvc_fx.graph.nodes import order, value

MARK = "luvc_fx"
"""Key in `node.meta` that every inserted node carries, with the name of its site."""


def inserted(node: fx.Node) -> bool:
    """Whether a pass of ours put this node there."""
    return MARK in node.meta


def constant(graph: fx.Graph, numbers: Any, like: fx.Node) -> fx.Node:
    """Insert integers, nested lists or tuples of them, as an int64 tensor beside `like`."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    with graph.inserting_after(like):
        settings = {"dtype": torch.int64, "device": value(like).device}
        node = graph.call_function(torch.tensor, (tensor.tolist(),), settings)
    with fake_run([value(like)]):
        fake = torch.empty(tensor.shape, **settings)
    node.meta = {"example_value": fake, MARK: "constant"}
    return node


def emit(
    graph: fx.Graph, site: str, body: Callable[..., Any], *args: fx.Node, after: fx.Node | None = None
) -> tuple[fx.Node, ...]:
    """Insert ``body(*args)`` behind the last of `args` (or behind `after`, if that is later).

    `body` is traced on the fake values of `args`, so it may read shapes, and it runs no more at run
    time: what is inserted are OpOverloads with literal arguments, which compiler caches can hash.

    Returns:
        One node per tensor that `body` returns, each with its fake value.
    """
    fakes = [value(arg) for arg in args]
    with fake_run([fake for fake in fakes if isinstance(fake, FakeTensor)]):
        traced = make_fx(lambda *xs: body(*xs))(*fakes)
    traced.graph.eliminate_dead_code()
    place = order(graph)
    last = max((*args, *([after] if after is not None else [])), key=place.__getitem__)
    env: dict[fx.Node, fx.Node] = {}
    given = iter(args)
    results: Any = ()
    with graph.inserting_after(last):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                results = node.args[0]
            else:
                if node.op == "get_attr":
                    raise AssertionError(f"{site} closes over a constant; build it from its arguments")
                copy = graph.node_copy(node, env.__getitem__)
                copy.meta = {"example_value": node.meta.get("val"), MARK: site}
                env[node] = copy
                graph.inserting_after(copy)
    flat = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(env[node] for node in flat)
