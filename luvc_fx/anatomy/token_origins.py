"""Which token each image feature was, where a model packs tiles, crops them and adds rows of its own.

The graph between the encoder and the features runs once more, on the tokens' numbers in place of their
channels: what it does to tokens it does to their numbers. That happens while a graph is rewritten; what
it finds does not depend on any input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from luvc_fx._compat import hint
from luvc_fx.anatomy.axes.probe import ALIGNED, EXPANDING
from luvc_fx.graph.nodes import ancestors, descendants, is_tensor, op_name, run, shape, value
from luvc_fx.report import Reason, Refused

SEPARATOR = -1
"""Number of a row that no token became: a separator between the lines of an image."""

_CHANNELWISE = {
    *("linear", "layer_norm", "rms_norm", "gelu", "silu", "relu", "dropout", "add", "iadd", "mul", "imul"),
    *("to", "type", "float", "contiguous", "clone", "detach"),
}
_MOVING = {"permute", "transpose", "getitem", "split", "unsqueeze", "squeeze", "movedim"}


def token_origins(graph: fx.Graph, start: fx.Node, features: fx.Node, numbers: Tensor) -> list[int]:
    """The number in each row of `features`.

    Args:
        start: a value ``[images, rows, channels]`` as it is now.
        features: a value ``[N, dim]`` made of it.
        numbers: int64 ``[images, rows]``.

    Raises:
        Refused: TOKEN_AXIS with the first node that does more than move tokens.
    """
    between = descendants(start) & ancestors(features)
    numbered: dict[fx.Node, _Numbered] = {start: _Numbered(numbers.unsqueeze(-1), 2)}
    for node in graph.nodes:
        if node not in between or node is start or not (is_tensor(node) or op_name(node) == "split"):
            continue
        if op_name(node) == "to" and node.args[0] not in numbered:
            continue  # a constant that asks the tokens for their dtype and device only
        numbered[node] = _step(node, numbered)
    last = numbered[features]
    return [int(number) for number in last.numbers.flatten()]


class _Numbered:
    """Numbers shaped like a value, but with one channel on axis `channels`; or a tuple of such."""

    def __init__(self, numbers: Any, channels: int) -> None:
        self.numbers, self.channels = numbers, channels


def _step(node: fx.Node, numbered: dict[fx.Node, _Numbered]) -> _Numbered:
    name = op_name(node)
    sources = [n for n in node.all_input_nodes if n in numbered]
    if not sources:
        raise Refused(Reason.TOKEN_AXIS, f"{name} reads no tokens that can be followed", node)
    first = numbered[sources[0]]
    if name in ALIGNED and name not in EXPANDING:
        return _reshaped(node, sources[0], first)
    if name == "cat":
        return _joined(node, sources[0], numbered)
    if name == "interpolate" and first.channels == 1:
        return _sampled(node, first)
    if len(sources) == 1 and name in _MOVING:
        channels = _channels_after(node, sources[0], first.channels)
        return _Numbered(run(node, lambda _: first.numbers), channels)
    if len(sources) == 1 and name in _CHANNELWISE and _keeps_all_axes_but(node, sources[0], first.channels):
        return first
    raise Refused(Reason.TOKEN_AXIS, f"features are made by {name}, which mixes or resamples tokens", node)


def _reshaped(node: fx.Node, source: fx.Node, given: _Numbered) -> _Numbered:
    rank, new = value(source).dim(), list(shape(node))
    if given.channels not in (0, rank - 1):
        raise Refused(Reason.TOKEN_AXIS, "a reshape with the channels in the middle", node)
    channels = 0 if given.channels == 0 else len(new) - 1
    if new[channels] != shape(source)[given.channels]:
        raise Refused(Reason.TOKEN_AXIS, "a reshape moves tokens into the channels", node)
    new[channels] = 1
    return _Numbered(given.numbers.reshape(new), channels)


def _joined(node: fx.Node, source: fx.Node, numbered: dict[fx.Node, _Numbered]) -> _Numbered:
    channels = numbered[source].channels

    def numbers(part: fx.Node) -> Tensor:
        if part in numbered:
            return numbered[part].numbers
        sizes = list(shape(part))
        sizes[channels] = 1
        return torch.full(sizes, SEPARATOR)

    return _Numbered(run(node, numbers), channels)


def _sampled(node: fx.Node, given: _Numbered) -> _Numbered:
    """Of the tokens that a resampled one is made of, the first."""
    numbers = given.numbers
    for axis in (2, 3):
        old, new = numbers.shape[axis], shape(node)[axis]
        places = ((torch.arange(new) + 0.5) * old / new - 0.5).floor().clamp(min=0).long()
        numbers = numbers.index_select(axis, places)
    return _Numbered(numbers, 1)


def _channels_after(node: fx.Node, source: fx.Node, channels: int) -> int:
    """Where the channels come out: the axis that is longer when they are more."""
    if op_name(node) == "getitem" and not is_tensor(source):
        return channels
    sizes = list(shape(source))
    sizes[channels] += 1
    longer = run(node, lambda _: torch.empty(sizes, device="meta"))
    if isinstance(longer, tuple):
        longer, plain = longer[0], value(node)[0]
    else:
        plain = value(node)
    pairs = zip(longer.shape, map(hint, plain.shape), strict=True)
    return next(axis for axis, (new, old) in enumerate(pairs) if new != old)


def _keeps_all_axes_but(node: fx.Node, source: fx.Node, channels: int) -> bool:
    new, old = list(shape(node)), list(shape(source))
    if len(new) != len(old):
        return False
    new[channels] = old[channels]
    return new == old
