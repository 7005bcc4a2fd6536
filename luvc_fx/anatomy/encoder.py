"""The vision encoder in a graph: its blocks, its token grids and what becomes of them as features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from luvc_fx._compat import hint
from luvc_fx.anatomy.attention import attentions
from luvc_fx.anatomy.axes.lengths import (
    CONSTANT,
    HEIGHT,
    WIDTH,
    Axis,
    Counts,
    Extent,
    axis_of,
    axis_of_blocks,
    concatenated,
)
from luvc_fx.anatomy.axes.probe import TokenAxes
from luvc_fx.anatomy.axes.trace import trace
from luvc_fx.anatomy.residual_stream import by_layer, chain_to, dominators, entering, last_residual
from luvc_fx.anatomy.tiles import Packing
from luvc_fx.anatomy.token_origins import token_origins
from luvc_fx.graph import markers
from luvc_fx.graph.nodes import (
    ancestors,
    as_size,
    descendants,
    is_tensor,
    op_name,
    output_node,
    shape,
    size_seen,
    value,
)
from luvc_fx.graph.notes import Layout
from luvc_fx.report import Reason, Refused


@dataclass(frozen=True, slots=True)
class Frames:
    """`count` grids of equal size, one behind the other.

    Attributes:
        grid: height and width in patches; sides: the symbols of both in `TokenAxes`.
    """

    count: int
    grid: tuple[int, int]
    sides: tuple[str, str]


@dataclass(frozen=True, slots=True)
class SymbolicSides:
    """The sides of the one grid of a graph for all sizes, in patches: nodes, or numbers where they are small.

    Attributes:
        grid: height and width before any merge.
        form, merged: what each merge does, and the sides that they leave; see `MergedSides`.
    """

    grid: tuple[fx.Node | int, fx.Node | int]
    form: str
    merged: tuple[fx.Node | int, ...]


@dataclass(frozen=True, slots=True)
class Encoder:
    """The vision encoder of a graph.

    Attributes:
        leaving: per block, the residual value that leaves it: ``[images, lead + height * width,
            channels]``, or ``[patches, channels]`` of all images in a row.
        keys: per block, the keys of each of its attention calls, ``[images, heads, rows, dim]``.
        features: what goes on to the text, ``[N, dim]`` or ``[images, N, dim]``.
        representatives_marker: the `markers.REPRESENTATIVES` node, where the front door asked for them.
        frames: the grids of patches in the order of the rows; images of one batch are frames alike.
        unit: height and width, in patches, of the block that becomes one feature (pixel shuffle).
        blockwise: whether the patches of such a block lie one behind the other.
        lead: rows in front of each grid (CLS).
        packing: how patches became features, where those are not the grids row by row.
        last: the last block after which tokens may merge; later ones would not reach features that
            leave the encoder early (deepstack).
        symbolic: the sides of the grid as nodes, in a graph for all sizes; `frames` has those seen while
            tracing. None in a graph for one size.
    """

    leaving: tuple[fx.Node, ...]
    keys: tuple[tuple[fx.Node, ...], ...]
    features: fx.Node
    representatives_marker: fx.Node | None
    frames: tuple[Frames, ...]
    unit: tuple[int, int]
    blockwise: bool
    lead: int
    packing: Packing | None
    last: int
    axes: TokenAxes
    symbolic: SymbolicSides | None = None

    @property
    def images(self) -> int:
        """Grids in all: images, tiles or frames of a video."""
        return sum(frames.count for frames in self.frames)

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width in patches, where all grids are alike."""
        return self.frames[0].grid if len(self.frames) == 1 else None

    @property
    def placeholders(self) -> int:
        """Features in all, as captured: what the prompt has placeholders for."""
        return self.count(self.axes.counts)

    @property
    def layout(self) -> Layout:
        """How the rows lie on the images."""
        frames = tuple((each.count, each.grid) for each in self.frames)
        origins = None if self.packing is None else self.packing.numbers
        pooled = self.packing is not None and self.packing.pooled
        return Layout(frames, self.lead, self.unit, self.blockwise, origins, pooled)

    def count(self, counts: Counts) -> int:
        """Features in all, where the grids have these sides."""
        total, extents = 1, self.axes.extents[self.features]
        for axis, size in enumerate(shape(self.features)[:-1]):
            total *= extents[axis].length(counts) if axis in extents else size
        return total

    def blocks_of(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of `grid` in blocks."""
        return grid[0] // self.unit[0], grid[1] // self.unit[1]


def find_encoder(
    graph: fx.Graph, live: set[fx.Node], features: fx.Node, marker: fx.Node | None, fusion: fx.Node | None
) -> Encoder:
    """The encoder above `features`.

    Raises:
        Refused: what keeps tokens from being merged, with the node that it is about.
    """
    above = ancestors(features)
    calls = {call.node: call for call in attentions(graph, above)}
    stop = {n for n in (fusion, marker) if n is not None}
    patch_markers = [n for n in graph.nodes if n in above and markers.is_call(n, markers.PATCHES)]
    if patch_markers:
        first, axis, frames, unit = _grids_from_marker(patch_markers[0])
        blockwise = True
    else:
        first, axis, frames = _grid_from_convolution(graph, next(iter(calls)))
        unit, blockwise = (1, 1), False
    if not blockwise and frames[0].grid == (1, 1):
        # As of HunYuan-VL, whose patches come cut and in a row, of which nothing in the graph says the grid.
        text = (
            "the patch convolution makes one patch of each input: small images, or patches without their grid"
        )
        raise Refused(Reason.NO_GRID, text, first)
    if all(each.grid == unit for each in frames):
        text = f"grid too small to merge along width or height: {unit[0]} x {unit[1]} patches, one feature"
        raise Refused(Reason.SCHEDULE, text, first)
    sides = {side: size for each in frames for side, size in zip(each.sides, each.grid, strict=True)}
    rows = value(first).dim() - 1 if not patch_markers else 0
    axes = trace(graph, {first: {rows: axis}}, sides, live & descendants(first) - descendants(*stop), stop)
    packing = None
    idom = dominators(graph, first, [features])
    chain = chain_to(idom, first, [features])
    layers = by_layer(idom, chain, [*calls]) if patch_markers else [[call] for call in calls]
    sites = entering(idom, chain, layers)
    leaving = (*sites[1:], last_residual(chain, sites[-1]))
    lead = _lead(axes, leaving, axis, features)
    if not patch_markers:
        unit, packing = _layout(graph, axes, features, leaving[-1], frames[0], lead)
    elif not _whole_blocks(axes, features, axis, unit):
        raise Refused(Reason.NO_GRID, "the image features do not follow the blocks of the patches", features)
    keys = tuple(tuple(calls[node].keys for node in layer) for layer in layers)
    last = len(leaving) - 1 if marker is None else _last_block(graph, axes, leaving, features, marker)
    symbolic = _symbolic_sides(patch_markers[0]) if patch_markers else None
    return Encoder(
        leaving, keys, features, marker, frames, unit, blockwise, lead, packing, last, axes, symbolic
    )


def _last_block(
    graph: fx.Graph, axes: TokenAxes, leaving: tuple[fx.Node, ...], features: fx.Node, marker: fx.Node
) -> int:
    """The first block whose tokens leave the graph by another way than as `features`."""
    late = descendants(features, marker)
    last = len(leaving) - 1
    for node in output_node(graph).all_input_nodes:
        if node in axes.extents and node not in late:
            above = ancestors(node)
            last = min(last, max((i for i, site in enumerate(leaving) if site in above), default=last))
    return last


def patch_convolution(graph: fx.Graph, attention: fx.Node) -> fx.Node | None:
    """The convolution that makes a grid of patches above the first attention call, or None."""
    above = ancestors(attention)
    convs = [n for n in graph.nodes if n in above and op_name(n) == "conv2d" and value(n).dim() == 4]
    return convs[-1] if convs else None


def _grid_from_convolution(graph: fx.Graph, attention: fx.Node) -> tuple[fx.Node, Axis, tuple[Frames, ...]]:
    """The grid of a patch convolution."""
    conv = patch_convolution(graph, attention)
    if conv is None:
        raise Refused(Reason.NO_GRID, "no patch convolution before the first encoder block", attention)
    images, _, height, width = value(conv).shape
    # In a graph for any number of images each is a row of the batch by itself: no prompt shares them out.
    several = any(markers.is_call(n, markers.REPRESENTATIVES) and n.args[1] == 1 for n in graph.nodes)
    images = hint(images) if several else int(images)
    height, width = int(height), int(width)  # guards, where symbolic
    frames = (Frames(images, (height, width), (HEIGHT, WIDTH)),)
    return _flattened(conv), axis_of(HEIGHT, WIDTH), frames


def _grids_from_marker(marker: fx.Node) -> tuple[fx.Node, Axis, tuple[Frames, ...], tuple[int, int]]:
    """The grids of patches, image after image, which the front door named."""
    _, numbers, unit, *_ = marker.args
    assert isinstance(numbers, (list, tuple)) and isinstance(unit, int)
    frames: list[Frames] = []
    for place in range(0, len(numbers), 3):
        count, height, width = (size_seen(as_size(number)) for number in numbers[place : place + 3])
        sides = (f"{HEIGHT} {height}x{width}", f"{WIDTH} {height}x{width}")
        if frames and frames[-1].grid == (height, width):
            count += frames.pop().count
        frames.append(Frames(count, (height, width), sides))
    blocks = [axis_of_blocks(each.count, each.sides, unit) for each in frames]
    return marker, concatenated(blocks), tuple(frames), (unit, unit)


def _symbolic_sides(marker: fx.Node) -> SymbolicSides | None:
    _, numbers, _, *rest = marker.args
    assert isinstance(numbers, (list, tuple))
    if not any(isinstance(number, fx.Node) for number in numbers):
        return None
    form, merged = rest
    assert isinstance(form, str) and isinstance(merged, (list, tuple))
    _, height, width = map(as_size, numbers)
    return SymbolicSides((height, width), form, tuple(map(as_size, merged)))


def _flattened(conv: fx.Node) -> fx.Node:
    """The value `[images, channels, height * width]` made of the patch convolution's output."""
    images, channels, height, width = shape(conv)
    node = conv
    while True:
        users = [n for n in node.users if is_tensor(n)]
        if len(users) != 1:
            raise Refused(Reason.NO_GRID, "the patch grid is read more than once", node)
        node = users[0]
        if shape(node) == (images, channels, height * width):
            return node
        if shape(node) != (images, channels, height, width) or op_name(node) not in ("to", "contiguous"):
            raise Refused(Reason.NO_GRID, "the patch grid is not flattened row by row", node)


def _lead(axes: TokenAxes, leaving: tuple[fx.Node, ...], axis: Axis, features: fx.Node) -> int:
    """Rows in front of the grid, the same at every site."""
    leads = set()
    for site in leaving:
        rank = value(site).dim()
        extent = axes.extents.get(site, {}).get(rank - 2)
        plain = isinstance(extent, Extent) and not extent.rows_after
        tokens = Extent(extent.factors) if plain else extent  # type: ignore[union-attr]
        if axes.axis(site) != rank - 2 or rank not in (2, 3) or tokens != axis or extent is None:
            raise Refused(Reason.RESIDUAL_STREAM, "no [images, tokens, channels] value here", site)
        leads.add(extent.rows_before)
    if len(leads) != 1:
        raise Refused(Reason.RESIDUAL_STREAM, "the rows before the grid change between blocks", features)
    return leads.pop()


def _whole_blocks(axes: TokenAxes, features: fx.Node, axis: Axis, unit: tuple[int, int]) -> bool:
    extents = axes.extents.get(features, {})
    return len(extents) == 1 and next(iter(extents.values())) == axis.without_inner(unit[0] * unit[1])


def _layout(
    graph: fx.Graph, axes: TokenAxes, features: fx.Node, last: fx.Node, frames: Frames, lead: int
) -> tuple[tuple[int, int], Packing | None]:
    """Rows and columns of patches in one feature, and the `Packing` where features are no plain grid."""
    extents = axes.extents.get(features, {})
    if not extents:
        raise Refused(Reason.NO_GRID, "the image features do not follow the patch grid", features)
    extent = next(iter(extents.values()))
    sides = tuple(extent.symbols())
    plain = len(extents) == 1 and extent.splits and sides == (HEIGHT, WIDTH)
    unit = _unit(axes, extent, features) if plain and isinstance(extent, Extent) else (1, 1)
    if not plain and len(shape(features)) != 2:
        raise Refused(Reason.NO_GRID, "the image features are not one grid, row by row", features)
    numbers = torch.full((frames.count, shape(last)[1]), -2)
    patches = frames.grid[0] * frames.grid[1]
    numbers[:, lead:] = torch.arange(frames.count * patches).reshape(frames.count, patches)
    between = descendants(last) & ancestors(features)
    try:
        origins = tuple(token_origins(graph, last, features, numbers))
    except Refused:
        # Lengths cannot show that tokens change places; these operations do.
        moves = next((n for n in graph.nodes if n in between and op_name(n) in _REORDERING), None)
        if plain and moves is None:
            return unit, None
        raise
    if origins == tuple(range(frames.count * patches)):
        return unit, None
    if unit != (1, 1):
        raise Refused(Reason.NO_GRID, "the image features are not one grid, row by row", features)
    pooled = any(op_name(n) == "interpolate" for n in between)
    return unit, Packing(origins, frames.count, frames.grid, pooled)


_REORDERING = {"flip", "fliplr", "flipud", "rot90", "roll", "sort", "gather", "index_select", "take", "index"}


def _unit(axes: TokenAxes, extent: Extent, features: fx.Node) -> tuple[int, int]:
    unit = 1 / extent.scale_of(HEIGHT), 1 / extent.scale_of(WIDTH)
    inside = extent.factors[-1].symbol == CONSTANT
    if inside or any(side.denominator != 1 for side in unit):
        raise Refused(Reason.NO_GRID, "the image features are not one grid, row by row", features)
    blocks = {
        (1 / e.scale_of(HEIGHT), 1 / e.scale_of(WIDTH))
        for by_axis in axes.extents.values()
        for e in by_axis.values()
        if isinstance(e, Extent)
    }
    if any(unit[0] % height or unit[1] % width for height, width in blocks):
        raise Refused(
            Reason.NO_GRID, "the encoder reads larger blocks of the grid than features have", features
        )
    return int(unit[0]), int(unit[1])
