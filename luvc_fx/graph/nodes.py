"""Small readers of FX nodes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from luvc_fx._compat import OpOverload, hint, is_concrete_int, tree_leaves


def value(node: fx.Node) -> Any:
    """The fake value of a node, in Dynamo's or ATen's spelling."""
    example = node.meta.get("example_value")
    return node.meta.get("val") if example is None else example


def is_tensor(node: object) -> bool:
    """Whether `node` is a node that holds one tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def as_size(argument: object) -> fx.Node | int:
    """An argument that is a size: a node, or a number. Raises `TypeError` for anything else."""
    if isinstance(argument, (fx.Node, int)):
        return argument
    raise TypeError(f"{argument!r} is no size")


def size_seen(size: fx.Node | int) -> int:
    """A size as seen while tracing."""
    return hint(value(size)) if isinstance(size, fx.Node) else size


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a tensor node, sizes as seen while tracing."""
    return tuple(hint(size) for size in value(node).shape)


def carries_tensor(node: fx.Node) -> bool:
    """Whether tensors flow out of `node`, alone or in a tuple."""
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value(node)))


def concrete(leaf: Any) -> Any:
    """A tensor of the sizes seen while tracing, made in the ambient fake mode; ints for symbolic ones."""
    if isinstance(leaf, torch.Tensor):
        return torch.empty([hint(s) for s in leaf.shape], dtype=leaf.dtype, device=leaf.device)
    return hint(leaf) if isinstance(leaf, torch.SymInt) else leaf


def run(node: fx.Node, lookup: Callable[[fx.Node], Any]) -> Any:
    """Call what `node` calls, on what `lookup` gives for each of its inputs."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lookup)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


_OPERATORS = {name for name in dir(operator) if name.startswith("__") and callable(getattr(operator, name))}
"""Methods of an operator's name: ``"__eq__"``, which is `operator.eq`."""


def op_name(node: fx.Node) -> str:
    """The bare name of what a node calls: ``"view"``, ``"add"``, ``"scaled_dot_product_attention"``."""
    target = node.target
    if node.op == "call_method":
        # Dynamo of torch 2.11 writes `a == b` as a method, later ones as a function.
        method = str(target)
        return getattr(operator, method).__name__ if method in _OPERATORS else method
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def order(graph: fx.Graph) -> dict[fx.Node, int]:
    """The position of each node."""
    return {node: position for position, node in enumerate(graph.nodes)}


def output_node(graph: fx.Graph) -> fx.Node:
    """The output node of a graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def reach(starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Everything that `step` leads to from `starts`, themselves included."""
    seen = set(starts)
    stack = list(seen)
    while stack:
        for other in step(stack.pop()):
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return seen


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes that `nodes` are computed from, themselves included."""
    return reach(nodes, lambda node: node.all_input_nodes)


def descendants(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes computed from `nodes`, themselves included."""
    return reach(nodes, lambda node: node.users)


def writes(node: fx.Node) -> bool:
    """Whether a node changes one of its inputs in place, so that it counts without any user."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.target is operator.setitem


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """What the outputs and the in-place writes of a graph are computed from, themselves included."""
    return ancestors(output_node(graph), *filter(writes, graph.nodes))


def drop_dead(graph: fx.Graph) -> None:
    """Remove what is not live; torch's own notion of impure misses in-place methods."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or writes(node))


def settled_size(node: fx.Node) -> int | None:
    """The number, where `node` reads a size that turned out to be constant only later in the capture.

    Dynamo writes constant sizes as numbers, except those that were symbolic when they were read.
    """
    source = node.args[0] if node.op.startswith("call_") and node.args else None
    reads = op_name(node) in ("size", "sym_size")
    if node.target is operator.getitem and isinstance(source, fx.Node):
        reads = op_name(source) == "size"
    size = value(node)
    return int(size) if reads and isinstance(size, int | torch.SymInt) and is_concrete_int(size) else None


def _known_or_itself(known: dict[fx.Node, int], node: fx.Node) -> Any:
    return known.get(node, node)


def fold_sizes(graph: fx.Graph) -> None:
    """Replace settled sizes by their numbers, as Dynamo writes every other constant size."""
    for node in graph.nodes:
        number = settled_size(node)
        if number is not None:
            known: dict[fx.Node, int] = {node: number}
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg(
                    (user.args, user.kwargs), functools.partial(_known_or_itself, known)
                )
