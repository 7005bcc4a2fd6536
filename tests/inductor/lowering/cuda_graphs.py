"""Graphs that the passes wrote for a CUDA device, whole or cut to one site, one layer, one block."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import luvc_fx
from luvc_fx.graph.emit import MARK
from luvc_fx.graph.nodes import ancestors, descendants, value
from luvc_fx.report import GraphReport
from luvc_fx.schedule import Schedule
from tests.inductor.lowering.fake_cuda import fake, install_guard
from tests.support.replay import Captured

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class OnCuda:
    """A graph with fake values on a CUDA device, and the inputs to compile it with."""

    gm: fx.GraphModule
    inputs: list[Any]


def on_cuda(captured: Captured) -> OnCuda:
    """A copy of a graph captured on the CPU as it would have been captured on a CUDA device."""
    install_guard()
    gm = captured.copy()
    mode = _mode(gm)
    with mode:
        for node in gm.graph.nodes:
            node.args, node.kwargs = _moved((node.args, node.kwargs), DEVICE)
            found = node.meta.get("example_value")
            if _made_from_nothing(node) and "device" not in node.kwargs:
                node.kwargs = {**node.kwargs, "device": DEVICE}
            if node.target is torch.tensor and node.args == ([],):  # copied from the host, else
                node.target, node.args = torch.empty, (0,)
            node.meta = {**node.meta, "example_value": tree_map_only(Tensor, fake, found)}
        inputs = [fake(x) if isinstance(x, Tensor) else x for x in captured.example_inputs]
    gm.recompile()
    return OnCuda(gm, inputs)


def _mode(gm: fx.GraphModule) -> FakeTensorMode:
    for node in gm.graph.nodes:
        for leaf in tree_leaves(value(node)):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    raise AssertionError("the graph has no tensors")


def _moved(arguments: Any, to: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        device = leaf == "cpu" if isinstance(leaf, str) else isinstance(leaf, torch.device)
        return to if device else leaf

    return fx.node.map_aggregate(arguments, moved)


def _made_from_nothing(node: fx.Node) -> bool:
    made = isinstance(node.meta.get("example_value"), Tensor) and node.op == "call_function"
    return made and not any(isinstance(value(n), Tensor) for n in node.all_input_nodes)


def rewritten(captured: Captured, schedule: Schedule) -> tuple[OnCuda, GraphReport]:
    """The graph after the passes, as the backend hands it to its inner compiler."""
    graph = on_cuda(captured)
    backend = luvc_fx.backend(schedule, inner=lambda gm, inputs: gm.forward, strict=True)
    backend(graph.gm, list(graph.inputs))
    return graph, backend.report.graphs[-1]


def site(graph: OnCuda, name: str) -> OnCuda:
    """What the passes inserted for one site, as a graph of its own."""
    nodes = [node for node in graph.gm.graph.nodes if node.meta.get(MARK, "").startswith(name)]
    assert nodes, f"nothing was inserted for {name!r}"
    return _cut(graph, nodes)


def between(graph: OnCuda, before: str, after: str) -> OnCuda:
    """Everything that leads to one node and is not known at another, as a graph of its own."""
    named = {node.name: node for node in graph.gm.graph.nodes}
    inside = ancestors(named[after]) & descendants(named[before]) - {named[before]}
    return _cut(graph, [node for node in graph.gm.graph.nodes if node in inside])


def _cut(graph: OnCuda, inside: list[fx.Node]) -> OnCuda:
    """These nodes as a graph: what they read is its inputs, what others read of them its outputs."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inside:
        for source in node.all_input_nodes:
            if source not in inside and source not in env:
                env[source] = new.placeholder(source.name)
    inputs = [value(source) for source in env]
    for node in inside:
        env[node] = new.node_copy(node, env.__getitem__)
    new.output(tuple(env[node] for node in inside if any(user not in inside for user in node.users)))
    new.lint()
    return OnCuda(fx.GraphModule(graph.gm, new), inputs)


def on_the_host(graph: OnCuda) -> fx.GraphModule:
    """The same calls on the CPU."""
    gm = copy.deepcopy(graph.gm)
    for node in gm.graph.nodes:
        node.args, node.kwargs = _moved((node.args, node.kwargs), torch.device("cpu"))
    gm.recompile()
    return gm


def inputs_of(part: OnCuda, graph: OnCuda, captured: Captured) -> list[Tensor]:
    """What `part` of `graph` gets when all of it runs on the captured inputs, on the CPU."""
    wanted = {node.name: None for node in part.gm.graph.nodes if node.op == "placeholder"}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node.name in wanted:
                wanted[node.name] = result
            return result

    with torch.no_grad():
        Watch(on_the_host(graph)).run(*captured.values)
    return [found.clone() if found.is_contiguous() else found for found in wanted.values()]
