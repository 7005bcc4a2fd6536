"""What a graph costs: its multiplications and the cache that it fills, read off the shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import fx

from luvc_fx.anatomy.attention import FUSED, attentions, read_flash
from luvc_fx.graph import flash
from luvc_fx.graph.nodes import is_tensor, live_nodes, op_name, output_node, shape, value


def flops(graph: fx.Graph) -> int:
    """Floating-point operations in matrix products, convolutions and attention of the live nodes.

    A product with an inner size of K counts 2 K for each number in its result. Attention counts as two
    products over all keys, whatever its mask, as `torch.utils.flop_counter` does. Everything else
    (norms, activations, what our own sites rank and gather) counts nothing: it is bound by memory.
    Symbolic sizes count as those seen while tracing.
    """
    live = live_nodes(graph)
    calls = [n for n in graph.nodes if n in live and n.op.startswith("call_")]
    return sum(_FORMULAS[op_name(n)](n) for n in calls if op_name(n) in _FORMULAS)


def kv_bytes(graph: fx.Graph) -> list[int]:
    """Bytes of keys and values that each decoder layer leaves behind in a cache; empty without one.

    A layer stores what its attention call reads as keys and values, or what those are copies of (groups
    of heads that share keys), where the graph returns it.
    """
    returned = set(output_node(graph).all_input_nodes)
    live = live_nodes(graph)
    layers = []
    for call in attentions(graph, live):
        stored = [_stored(node, returned) for node in (call.keys, call.values)]
        if None not in stored:
            layers.append(sum(_bytes(n) for n in stored if n is not None))
    return layers


def _stored(node: fx.Node, returned: set[fx.Node]) -> fx.Node | None:
    while node not in returned:
        sources = [n for n in node.all_input_nodes if is_tensor(n)]
        if len(sources) != 1:
            return None
        node = sources[0]
    return node


def _operand(node: fx.Node, position: int, name: str) -> fx.Node:
    argument = node.args[position] if len(node.args) > position else node.kwargs[name]
    assert isinstance(argument, fx.Node)
    return argument


def _bytes(node: fx.Node) -> int:
    return math.prod(shape(node)) * value(node).element_size()


def _product(left: int, name: str) -> Callable[[fx.Node], int]:
    """The formula of a product whose left factor is argument `left`."""

    def count(node: fx.Node) -> int:
        return 2 * math.prod(shape(node)) * shape(_operand(node, left, name))[-1]

    return count


def _convolution(node: fx.Node) -> int:
    return 2 * math.prod(shape(node)) * math.prod(shape(_operand(node, 1, "weight"))[1:])


def _attention(node: fx.Node) -> int:
    queries, keys, values = (
        shape(_operand(node, *spot)) for spot in ((0, "query"), (1, "key"), (2, "value"))
    )
    return _both_products(queries, keys, values)


def _flash_attention(node: fx.Node) -> int:
    """Of what is no plain call, nothing: how long its segments are is not in the graph."""
    call = read_flash(node)
    return 0 if call is None else _both_products(*map(shape, (call.queries, call.keys, call.values)))


def _both_products(queries: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...]) -> int:
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _formulas(names: Iterable[str], formula: Callable[[fx.Node], int]) -> dict[str, Callable[[fx.Node], int]]:
    return dict.fromkeys(names, formula)


_FORMULAS = {
    **_formulas(("linear", "matmul", "bmm", "mm"), _product(0, "input")),
    **_formulas(("addmm", "baddbmm"), _product(1, "mat1")),
    **_formulas(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **_formulas(FUSED, _attention),
    **_formulas(flash.NAMES, _flash_attention),
}
