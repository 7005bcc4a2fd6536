"""A graph run once more on made-up sizes: the state of that run, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from luvc_fx._compat import FakeTensorMode, tree_map
from luvc_fx.anatomy.axes.lengths import TOKENS, Axis, Counts
from luvc_fx.graph.nodes import concrete, run, shape, value

EXPANDING = {"expand", "broadcast_to"}
SIZED = {"view", "reshape", "_unsafe_view", *EXPANDING}
ALIGNED = {*SIZED, "flatten"}

_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157)


def probe_sizes(counts: Counts) -> Counts:
    """Made-up counts: primes, sides times what a model may divide them by.

    A grid of them has more tokens than any size in a model, and their square (attention scores that are
    written out) times all heads and images still has less bytes than fit 64 bits.
    """
    sides = [symbol for symbol in counts if symbol != TOKENS]
    rounds = len(_PRIMES)
    probed = {s: 64 * (_PRIMES[i % rounds] + 2 * 163 * (i // rounds)) for i, s in enumerate(sides)}
    return {symbol: probed.get(symbol, 1_000_003) for symbol in counts}


@dataclass(frozen=True, slots=True)
class Join:
    """`consumer` combines tokens with `follower`, whose `axes` must be cut like theirs."""

    consumer: fx.Node
    follower: fx.Node
    axes: tuple[int, ...]


@dataclass(slots=True)
class TokenAxes:
    """What `trace` found: the token axes of each node, and where other values join the tokens.

    `counts` are the sizes of the symbols in the capture. `pieces` are the token axes of what comes out of
    a split along the tokens, `crops` the slices that cut as much off the end as off the front, and
    `fillers` constants that are expanded to fit beside the tokens.
    """

    counts: Counts
    extents: dict[fx.Node, dict[int, Axis]] = field(default_factory=dict)
    joins: list[Join] = field(default_factory=list)
    pieces: dict[fx.Node, tuple[int, list[Axis]]] = field(default_factory=dict)
    crops: dict[fx.Node, dict[int, slice]] = field(default_factory=dict)
    fillers: list[fx.Node] = field(default_factory=list)

    def axis(self, node: fx.Node) -> int | None:
        """The only token axis of `node`, or None."""
        axes = self.extents.get(node, {})
        return next(iter(axes)) if len(axes) == 1 else None


def sizes_of(node: fx.Node) -> list[Any]:
    """The size arguments of a `SIZED` node, as a flat list of ints and nodes."""
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    return list(sizes)


def set_sizes(node: fx.Node, sizes: list[Any]) -> None:
    """Write the size arguments back in the one-tuple spelling, which every `SIZED` op takes."""
    node.args = (node.args[0], tuple(sizes))


class Probe:
    """One run of `luvc_fx.anatomy.axes.trace.trace`.

    Attributes:
        sizes: the made-up size of each symbol.
        base: values of the captured sizes; changed: values that came out with other sizes.
        known: token axes that an operation's own rule gave, so that they are not read off the sizes.
    """

    def __init__(self, counts: Counts) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.base: dict[fx.Node, Any] = {}
        self.changed: dict[fx.Node, Any] = {}
        self.result = TokenAxes(counts)
        self.sizes = probe_sizes(counts)
        self.known: dict[fx.Node, dict[int, Axis]] = {}

    def like(self, node: fx.Node, sizes: tuple[int, ...]) -> torch.Tensor:
        tensor = value(node)
        return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

    def resized(self, node: fx.Node, extents: Mapping[int, Axis]) -> torch.Tensor:
        sizes = list(shape(node))
        for axis, extent in extents.items():
            sizes[axis] = extent.length(self.sizes)
        return self.like(node, tuple(sizes))

    def of(self, node: fx.Node) -> Any:
        if node in self.changed:
            return self.changed[node]
        if node not in self.base:
            self.base[node] = tree_map(concrete, value(node))
        return self.base[node]

    def run(self, node: fx.Node, swaps: Mapping[fx.Node, Any]) -> Any:
        return run(node, lambda n: swaps[n] if n in swaps else self.of(n))
