"""Attention calls in a graph: one fused operator, or the products and the softmax that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from luvc_fx.graph import flash
from luvc_fx.graph.nodes import is_tensor, op_name, shape, value

FUSED = {"scaled_dot_product_attention"}

_BETWEEN = {"to", "dropout", "type_as", "float", "contiguous"}
"""What may lie between the softmax and the product with the values."""


@dataclass(frozen=True, slots=True)
class Attention:
    """``softmax(queries @ keys.T + mask) @ values`` over ``[batch, heads, rows, dim]``.

    Attributes:
        node: the result.
        masked: the node that reads `mask`: the fused operator, or the sum of scores and mask; None
            where there is no mask.
        fused: whether one operator does it all; its mask may then be boolean, and of FlashAttention it is
            the bounds of segments.
        scale: what the products are multiplied with; None where that is no constant of the graph.
    """

    node: fx.Node
    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    masked: fx.Node | None
    fused: bool
    scale: float | None

    @property
    def mask(self) -> fx.Node | None:
        """The mask as it is now: a pass may have put another one there."""
        if self.masked is None:
            return None
        if self.is_flash:
            bounds: fx.Node | None = flash.arguments(self.masked)[flash.BOUNDS[0]]
            return bounds
        return operand(self.masked, 3, "attn_mask") if self.fused else operand(self.masked, 1, "other")

    @property
    def is_flash(self) -> bool:
        """Whether it is a call of the package flash-attn."""
        return op_name(self.node) in flash.NAMES

    def unmask(self) -> None:
        """Let a fused call see everything. Keys that several heads share are then read, not repeated first.

        Under a mask transformers (5.17 - 5.24) repeats them, as the kernels that take both are slow.
        """
        node = self.node
        shared = [_unrepeated(self.keys), _unrepeated(self.values)]
        both = {**dict(zip(_OPERANDS, node.args, strict=False)), **node.kwargs, "attn_mask": None}
        if None not in shared and shape(self.keys)[-1] == shape(self.values)[-1] <= 256:
            both |= {"key": shared[0], "value": shared[1], "enable_gqa": True}
        node.args = tuple(both.pop(name) for name in _OPERANDS[:3])
        node.kwargs = both


def attentions(graph: fx.Graph, inside: set[fx.Node]) -> list[Attention]:
    """The attention calls among the nodes `inside`, in order."""
    calls = []
    for node in graph.nodes:
        if node in inside and node.op.startswith("call_"):
            name = op_name(node)
            call = read_flash(node) if name in flash.NAMES else None
            call = call or (_fused(node) if name in FUSED else _written_out(node))
            if call is not None:
                calls.append(call)
    return calls


def operand(node: fx.Node, position: int, name: str) -> fx.Node | None:
    """An argument by its position or name, where it is a value of the graph."""
    argument = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    return argument if isinstance(argument, fx.Node) else None


def _fused(node: fx.Node) -> Attention | None:
    queries, keys, values = (operand(node, i, name) for i, name in enumerate(("query", "key", "value")))
    if queries is None or keys is None or values is None:
        return None
    masked = None if operand(node, 3, "attn_mask") is None else node
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = shape(queries)[-1] ** -0.5
    return Attention(node, queries, keys, values, masked, True, scale if isinstance(scale, float) else None)


def read_flash(node: fx.Node) -> Attention | None:
    """`node` as a call of FlashAttention in which rows may go, or None."""
    given = flash.arguments(node)
    if not flash.is_followed(given):
        return None
    packed = given.get(flash.BOUNDS[0]) is not None
    queries, keys, values = (flash.heads_first(given[name], packed) for name in ("q", "k", "v"))
    if queries is None or keys is None or values is None:
        return None
    scale = given.get("softmax_scale") if not given.get("softcap") else None
    masked = node if packed else None
    return Attention(node, queries, keys, values, masked, True, scale if isinstance(scale, float) else None)


_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
"""The arguments of the fused operator that may be given by position."""


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """The ``[batch, groups, rows, dim]`` of which `node` has each group several times in a row."""
    spread = _first(node)
    single = None if spread is None else _first(spread)
    source = None if single is None else _first(single)
    if spread is None or single is None or source is None or op_name(node) not in ("reshape", "view"):
        return None
    every = slice(None)
    added = op_name(single) == "getitem" and single.args[1] == (every, every, None, every, every)
    batch, groups, *rest = shape(source)
    times = shape(node)[1] // groups
    repeats = op_name(spread) == "expand" and shape(spread) == (batch, groups, times, *rest)
    return source if added and repeats and shape(node) == (batch, groups * times, *rest) else None


def _written_out(node: fx.Node) -> Attention | None:
    """`node` as the last product of an attention that is written out, as transformers' "eager" one."""
    weights, values = operand(node, 0, "input"), operand(node, 1, "other")
    if op_name(node) not in _PRODUCTS or weights is None or values is None:
        return None
    while op_name(weights) in _BETWEEN:
        weights = _first(weights)
        if weights is None:
            return None
    dim = weights.kwargs.get("dim", weights.args[1] if len(weights.args) > 1 else None)
    if op_name(weights) != "softmax" or dim not in (-1, value(weights).dim() - 1):
        return None
    scores, masked, scale = _first(weights), None, 1.0
    while scores is not None and op_name(scores) not in _PRODUCTS:
        if op_name(scores) in ("add", "iadd"):
            if masked is not None:
                return None
            if operand(scores, 1, "other") is None:
                return None
            masked = scores
        elif op_name(scores) in ("mul", "imul", "div", "truediv"):
            factor = scores.args[1]
            if not isinstance(factor, (int, float)):
                return None
            scale = scale * factor if "mul" in op_name(scores) else scale / factor
        elif op_name(scores) not in ("to", "float"):
            return None
        scores = _first(scores)
    if scores is None:
        return None
    queries, across = operand(scores, 0, "input"), operand(scores, 1, "other")
    keys = None if across is None else _untransposed(across)
    if queries is None or keys is None:
        return None
    return Attention(node, queries, keys, values, masked, False, scale)


_PRODUCTS = {"matmul", "bmm"}


def _first(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) and is_tensor(source) else None


def _untransposed(node: fx.Node) -> fx.Node | None:
    """What `node` is with its last two axes swapped."""
    source = _first(node)
    if op_name(node) not in ("transpose", "permute", "swapaxes") or source is None:
        return None
    *outer, dim, rows = shape(node)
    return source if shape(source) == (*outer, rows, dim) else None
