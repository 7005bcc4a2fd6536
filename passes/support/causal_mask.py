"""Causal masks that may also hide whole keys: recognised in a graph, and built anew for fewer rows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from luvc_fx.graph.nodes import is_tensor, op_name, shape, value
from luvc_fx.ops import gather_rows


@dataclass(frozen=True, slots=True)
class Causal:
    """A mask ``[batch, 1, rows, rows]`` by which each row sees what lies before it, and itself.

    Attributes:
        keys: bool ``[batch, rows]``, which rows are seen at all; None where all are.
        added: None of a boolean mask; else the dtype in which it is added to scores, 0 for what is seen
            and the smallest number for what is not.
    """

    keys: fx.Node | None
    added: torch.dtype | None

    def shortened(self) -> Callable[..., tuple[Tensor, ...]]:
        """A function of the rows that stay, int64 ``[batch, rows']`` ascending, and `keys`.

        It gives the mask of those rows, bit for bit what cutting both axes of the long one gives, and their
        keys. As the rows ascend, one lies before another just where its new number does, so nothing of the
        size of a mask is read.
        """

        def body(rows: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
            short = tuple(gather_rows(seen, rows, 1) for seen in keys)
            row = torch.arange(rows.shape[1], device=rows.device)
            mask = (row.unsqueeze(0) <= row.unsqueeze(1))[None, None]
            for seen in short:
                mask = mask.logical_and(seen[:, None, None])
            if self.added is not None:
                hidden = torch.finfo(self.added).min
                mask = torch.zeros_like(mask, dtype=self.added).masked_fill(mask.logical_not(), hidden)
            return mask.expand(rows.shape[0], -1, -1, -1), *short

        return body


def read_causal(mask: fx.Node) -> Causal | None:
    """`mask` as a `Causal`, if its nodes are those of a causal mask of transformers 5.17 - 5.24, or None."""
    added = None
    if op_name(mask) == "where":
        if not _is_hiding(mask):
            return None
        added, mask = value(mask).dtype, mask.args[0]  # type: ignore[assignment]
    while op_name(mask) in ("expand", "contiguous"):
        mask = mask.args[0]  # type: ignore[assignment]
    sizes = shape(mask)
    if value(mask).dtype != torch.bool or len(sizes) != 4 or sizes[1] != 1 or sizes[2] != sizes[3]:
        return None
    causal, keys = False, None
    for part in _conjuncts(mask):
        if _is_true(part):
            continue
        if _is_before(part):
            causal = True
        elif keys is None and (looked_up := _seen_keys(part)) is not None:
            keys = looked_up
        else:
            return None
    return Causal(keys, added) if causal else None


def _is_hiding(node: fx.Node) -> bool:
    """Whether it is ``where(seen, 0, the smallest number)``."""
    if len(node.args) != 3 or not isinstance(node.args[0], fx.Node) or not isinstance(node.args[1], fx.Node):
        return False
    shown = node.args[1]
    dtype = value(node).dtype
    zero = op_name(shown) == "zeros" and value(shown).numel() == 1
    return bool(zero and dtype.is_floating_point and node.args[2] == torch.finfo(dtype).min)


def _conjuncts(node: fx.Node) -> list[fx.Node]:
    """What `node` is the conjunction of."""
    if op_name(node) == "and_" and node.target is operator.and_:
        return [part for side in node.all_input_nodes for part in _conjuncts(side)]
    source = node.args[0] if op_name(node) == "to" else None
    if isinstance(source, fx.Node) and value(source).dtype == torch.bool:
        return _conjuncts(source)
    return [node]


def _is_true(node: fx.Node) -> bool:
    return op_name(node) == "new_ones" and value(node).numel() == 1


def _is_before(node: fx.Node) -> bool:
    """Whether it says that the key, on the last axis, is not behind the query, on the axis before."""
    key, query = (node.args[0], node.args[1]) if op_name(node) == "le" else (None, None)
    return _numbers(key, 3) and _numbers(query, 2)


def _numbers(node: object, axis: int) -> bool:
    """Whether `node` holds 0, 1, 2, ... along one of its four axes."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return False
    index = tuple(slice(None) if place == axis else None for place in range(4))
    source = node.args[0]
    if node.args[1] != index or not isinstance(source, fx.Node):
        return False
    if op_name(source) == "add" and source.args[1] == 0 and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return op_name(source) == "arange" and len(source.args) == 1 and not {"start", "step"} & {*source.kwargs}


def _seen_keys(node: fx.Node) -> fx.Node | None:
    """The ``[batch, rows]`` that `node` looks up for each row of the batch and each key."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple) or len(node.args[1]) != 2:
        return None
    source, (row, key) = node.args[0], node.args[1]
    if not is_tensor(source) or not _numbers(row, 0) or not _numbers(key, 3):
        return None
    assert isinstance(source, fx.Node)
    held, asked = value(source), value(node)
    fits = held.dtype == torch.bool and shape(source) == (shape(node)[0], shape(node)[3])
    return source if fits and held.device == asked.device else None
