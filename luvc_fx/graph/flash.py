"""Calls of the package flash-attn in a graph.

Its tensors are ``[batch, rows, heads, dim]``, or ``[batch * rows, heads, dim]`` beside bounds of segments.
Dynamo looks into ``flash_attn_func`` and ``flash_attn_varlen_func`` (2.7 - 2.8) and keeps the operators
``flash_attn::_flash_attn_forward`` and ``_flash_attn_varlen_forward``, of whose results the first counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from luvc_fx._compat import OpOverload, OpOverloadPacket, argument_names
from luvc_fx.graph import markers
from luvc_fx.graph.emit import inserted
from luvc_fx.graph.nodes import is_tensor, op_name, shape

NAMES = {"_flash_attn_forward", "_flash_attn_varlen_forward"}

BOUNDS = ("cu_seqlens_q", "cu_seqlens_k")
LONGEST = ("max_seqlen_q", "max_seqlen_k")

_UNKNOWN = ("alibi_slopes", "block_table", "leftpad_k", "seqused_k")
"""Arguments by which other rows attend to each other; a call that has one is not followed."""

_BETWEEN = {"reshape", "view", "contiguous", "to", "detach", "pad"}
"""What may lie between ``[batch, rows, heads, dim]`` and the operator."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name; empty where it is none of FlashAttention."""
    target = node.target
    if isinstance(target, OpOverloadPacket) and op_name(node) in NAMES:
        target = target.default
    if not isinstance(target, OpOverload) or op_name(node) not in NAMES:
        return {}
    names = argument_names(target)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def segments(bounds: Tensor, length: int) -> dict[str, Any]:
    """Keyword arguments of a forward by which each decoder layer calls FlashAttention on segments.

    Without them transformers (5.17 - 5.24) takes padding out, or reads in each layer whether the positions
    of a single row have gaps: a wait for the device, and the end of a graph.
    """
    both = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
    return {"attention_mask": None, **both}


def write(node: fx.Node, given: dict[str, Any]) -> None:
    """Let a call have these arguments."""
    rest = dict(given)
    node.args = tuple(rest.pop(name) for name in ("q", "k", "v"))
    node.kwargs = rest


def is_followed(given: dict[str, Any]) -> bool:
    """Whether rows can be dropped from a call without changing how the others attend.

    Not with a sliding window, which counts rows, and not with segments that are not ours.
    """
    if not given or any(given.get(name) is not None for name in _UNKNOWN):
        return False
    if given.get("window_size_left", -1) != -1 or given.get("window_size_right", -1) not in (-1, 0):
        return False
    bounds = [given.get(name) for name in BOUNDS]
    return bounds == [None, None] or all(isinstance(n, fx.Node) and _are_ours(n) for n in bounds)


def _are_ours(bounds: fx.Node) -> bool:
    """Whether the front door asked for these bounds, or a pass wrote them already."""
    return markers.is_call(bounds, markers.CACHE_MASK) or inserted(bounds)


def heads_first(node: object, packed: bool) -> fx.Node | None:
    """The ``[batch, heads, rows, dim]`` that `node` is a transpose of, or None.

    Args:
        packed: whether the rows of a batch lie one behind the other.
    """
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    sizes = shape(node)
    while op_name(node) in _BETWEEN and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if op_name(node) != "transpose" or node.args[1:] not in ((1, 2), (2, 1)):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source) or len(shape(source)) != 4:
        return None
    batch, heads, rows, _ = shape(source)
    return source if sizes[:-1] == ((batch * rows, heads) if packed else (batch, rows, heads)) else None
