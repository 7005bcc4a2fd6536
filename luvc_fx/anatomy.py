"""Recognise the parts of a vision-language model in a captured graph, by structure alone.

The attention call is the anchor. The fusion (`masked_scatter`) divides encoder from decoder. The
residual stream is the chain of dominators from the first tokens to the result: the values that every
path of the tokens runs through. The place before a layer is the last value of that chain that also
dominates the layer's attention. No module name or class is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from luvc_fx import extents as ex
from luvc_fx import markers
from luvc_fx.fx_util import (
    ancestors,
    descendants,
    is_tensor,
    live_nodes,
    op_name,
    order,
    output_node,
    shape,
    value,
)
from luvc_fx.report import Reason, Refusal, Refused
from luvc_fx.token_axes import ATTENTION, Join, TokenAxes, trace

MEND = (
    "the capture ended before the image features enter the text; run luvc_fx.prepare(model) or one "
    "eager forward before compiling, leave capture_scalar_outputs on, or use luvc_fx.compile(model)"
)


@dataclass(frozen=True, slots=True)
class Encoder:
    """The vision encoder of a graph.

    Attributes:
        leaving: per block, the residual value `[images, lead + height * width, channels]` leaving it.
        keys: per block, the keys of its attention, `[images, heads, lead + height * width, dim]`.
        features: what goes on to the text: `[images * N, dim]` at a fusion, `[images, N, dim]` at a marker.
        slots: the `markers.SLOTS` node, where the front door asked for representatives.
        grid: height and width of the patch grid, row-major along the token axis.
        unit: height and width, in patches, of the block that becomes one feature (pixel shuffle).
        lead: rows in front of the grid (CLS).
    """

    leaving: tuple[fx.Node, ...]
    keys: tuple[fx.Node, ...]
    features: fx.Node
    slots: fx.Node | None
    grid: tuple[int, int]
    unit: tuple[int, int]
    lead: int
    images: int
    axes: TokenAxes

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Height and width of one image's features."""
        return self.grid[0] // self.unit[0], self.grid[1] // self.unit[1]


@dataclass(frozen=True, slots=True)
class Decoder:
    """The text decoder of a graph that has a fusion.

    Attributes:
        entering: per layer, the residual value `[batch, rows, dim]` entering it.
        fusion: the `masked_scatter` node; `embeds`, `mask`, `features` are its inputs.
        visual: visual tokens of one row, as captured.
        images: images per row, or 1 where the graph does not tell.
        grid: height and width of one image's tokens, where known.
        rows_outputs: `markers.PROMPT_ROWS` nodes.
    """

    entering: tuple[fx.Node, ...]
    fusion: fx.Node
    embeds: fx.Node
    mask: fx.Node
    features: fx.Node
    batch: int
    visual: int
    grid: tuple[int, int] | None
    axes: TokenAxes
    rows_outputs: tuple[fx.Node, ...]


@dataclass(slots=True)
class Anatomy:
    """What was recognised in one graph.

    `refusals` say why the decoder was not, `encoder_refusals` why nothing can be merged.
    """

    encoder: Encoder | None = None
    decoder: Decoder | None = None
    cache_attentions: tuple[fx.Node, ...] = ()
    queries: int = 0
    has_vision: bool = False
    refusals: list[Refusal] = field(default_factory=list)
    encoder_refusals: list[Refusal] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the graph is for; see `GraphReport.kind`."""
        if self.decoder is not None:
            return "whole" if self.encoder is not None else "prefill"
        if self.has_vision:
            return "vision"
        if self.cache_attentions or self.queries == 1:
            return "decode"
        return "text" if self.queries else "other"


def recognise(graph: fx.Graph) -> Anatomy:
    """Read a Dynamo graph; nothing is changed and nothing raised."""
    anatomy = Anatomy()
    live = live_nodes(graph)
    attentions = [n for n in graph.nodes if n in live and op_name(n) in ATTENTION]
    fusions = [n for n in graph.nodes if n in live and op_name(n) == "masked_scatter"]
    slots = [n for n in graph.nodes if n in live and markers.is_call(n, markers.SLOTS)]
    anatomy.cache_attentions = tuple(n for n in attentions if _uses_cache_mask(n))
    anatomy.queries = shape(attentions[0].all_input_nodes[0])[-2] if attentions else 0
    anatomy.has_vision = bool(slots) or any(_conv_above(graph, n) for n in attentions[:1])
    try:
        if len(fusions) > 1:
            raise Refused(
                Reason.NO_FUSION, "image features enter the text at more than one place", fusions[1]
            )
        if fusions:
            anatomy.encoder = _encoder(graph, live, fusions[0].args[2], None, fusions[0], anatomy)
            anatomy.decoder = _decoder(graph, live, attentions, fusions[0], anatomy.encoder)
        elif slots:
            anatomy.encoder = _encoder(graph, live, slots[0].args[0], slots[0], None, anatomy)
        elif anatomy.has_vision:
            anatomy.encoder_refusals.append(Refusal(Reason.CAPTURE_ENDED_BEFORE_FUSION, MEND))
    except Refused as refused:
        anatomy.refusals.append(refused.refusal)
    return anatomy


def _uses_cache_mask(attention: fx.Node) -> bool:
    mask = attention.kwargs.get("attn_mask")
    return isinstance(mask, fx.Node) and any(markers.is_call(n, markers.CACHE_MASK) for n in ancestors(mask))


def _conv_above(graph: fx.Graph, attention: fx.Node) -> fx.Node | None:
    above = ancestors(attention)
    convs = [n for n in graph.nodes if n in above and op_name(n) == "conv2d" and value(n).dim() == 4]
    return convs[-1] if convs else None


def _dominators(graph: fx.Graph, source: fx.Node, sinks: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The immediate dominator of each node between `source` and `sinks`, following tensors only."""
    below = descendants(source)
    above = ancestors(*sinks)
    place = order(graph)
    inside = [n for n in graph.nodes if n in below and n in above and (n is source or _flows(n))]
    idom: dict[fx.Node, fx.Node] = {source: source}
    for node in inside:
        if node is source:
            continue
        before = [n for n in node.all_input_nodes if n in idom]
        if not before:
            continue
        common = before[0]
        for other in before[1:]:
            while common is not other:
                if place[common] > place[other]:
                    common = idom[common]
                else:
                    other = idom[other]
        idom[node] = common
    return idom


def _flows(node: fx.Node) -> bool:
    return not isinstance(value(node), (int, float, bool, torch.SymInt, torch.SymBool, torch.SymFloat))


def _chain(idom: dict[fx.Node, fx.Node], source: fx.Node, sinks: list[fx.Node]) -> list[fx.Node]:
    """The nodes, in order, that every path from `source` to every one of `sinks` runs through."""
    paths = []
    for sink in sinks:
        path = [sink]
        while path[-1] is not source:
            path.append(idom[path[-1]])
        paths.append(path[::-1])
    common = set(paths[0]).intersection(*map(set, paths[1:]))
    return [n for n in paths[0] if n in common]


def _entering(idom: dict[fx.Node, fx.Node], chain: list[fx.Node], attention: fx.Node) -> fx.Node:
    on_chain = set(chain)
    node = attention
    while node not in on_chain:
        node = idom[node]
    return node


def _sites(
    idom: dict[fx.Node, fx.Node], chain: list[fx.Node], attentions: list[fx.Node]
) -> tuple[fx.Node, ...]:
    sites = tuple(_entering(idom, chain, attention) for attention in attentions)
    places = [chain.index(site) for site in sites]
    for before, after, attention in zip(places, places[1:], attentions[1:], strict=False):
        if after <= before:
            raise Refused(
                Reason.RESIDUAL_STREAM, "two attention calls read the same residual value", attention
            )
    return sites


def _decoder(
    graph: fx.Graph,
    live: set[fx.Node],
    attentions: list[fx.Node],
    fusion: fx.Node,
    encoder: Encoder | None,
) -> Decoder:
    embeds, mask, features = (arg for arg in fusion.args[:3])
    assert isinstance(embeds, fx.Node) and isinstance(mask, fx.Node) and isinstance(features, fx.Node)
    below = descendants(fusion)
    layers = [n for n in attentions if n in below]
    if not layers:
        raise Refused(Reason.NO_ATTENTION, "no scaled_dot_product_attention after the fusion", fusion)
    after_last = descendants(layers[-1])
    sinks = [n for n in output_node(graph).all_input_nodes if n in after_last]
    idom = _dominators(graph, fusion, [*sinks, *layers])
    entering = _sites(idom, _chain(idom, fusion, sinks), layers)
    batch, visual = _visual_tokens(fusion, features, encoder)
    length = {ex.TOKENS: shape(fusion)[1]}
    labels = _labels(graph, live & below, fusion)
    seeds = {node: {1: ex.of(ex.TOKENS)} for node in (fusion, *labels)}
    axes = trace(graph, seeds, length, live & (below | descendants(*labels)))
    axes.joins += [Join(user, node, (1,)) for node in labels for user in node.users if user in live]
    for layer, (site, attention) in enumerate(zip(entering, layers, strict=True)):
        if axes.axis(site) != 1 or value(site).dim() != 3:
            raise Refused(Reason.RESIDUAL_STREAM, f"no [batch, rows, dim] value enters layer {layer}", site)
        keys = attention.args[1]
        if any(extent.plus for extent in axes.extents.get(keys, {}).values()):  # type: ignore[arg-type]
            raise Refused(Reason.PAST_NOT_EMPTY, "the cache already holds rows before this prompt", attention)
    rows = tuple(n for n in graph.nodes if n in live and markers.is_call(n, markers.PROMPT_ROWS))
    grid = encoder.feature_grid if encoder is not None else _marked_grid(features)
    if grid is not None and visual % (grid[0] * grid[1]):
        grid = None
    return Decoder(entering, fusion, embeds, mask, features, batch, visual, grid, axes, rows)


def _labels(graph: fx.Graph, inside: set[fx.Node], fusion: fx.Node) -> list[fx.Node]:
    """The `[batch, rows]` values that a loss compares the rows with, before they are shifted."""
    found = []
    for loss in graph.nodes:
        if loss not in inside or op_name(loss) != "cross_entropy":
            continue
        node = loss.args[1] if len(loss.args) > 1 else loss.kwargs.get("target")
        labels = None
        while isinstance(node, fx.Node):
            if shape(node) == shape(fusion)[:2]:
                labels = node
            above = [n for n in node.all_input_nodes if is_tensor(n)]
            node = above[0] if len(above) == 1 else None
        if labels is not None and labels not in found:
            found.append(labels)
    return found


def _visual_tokens(fusion: fx.Node, features: fx.Node, encoder: Encoder | None) -> tuple[int, int]:
    batch = shape(fusion)[0]
    rows = 1
    for size in shape(features)[:-1]:
        rows *= size
    if rows % batch or (encoder is not None and encoder.images % batch):
        what = f"{rows} image features" if encoder is None else f"{encoder.images} images"
        text = f"{what} cannot be the same number in each of {batch} rows"
        raise Refused(Reason.UNEVEN_BATCH, text, fusion)
    return batch, rows // batch


def _marked_grid(features: fx.Node) -> tuple[int, int] | None:
    grids = {n.args[1:3] for n in ancestors(features) if markers.is_call(n, markers.IMAGE_GRID)}
    if len(grids) != 1:
        return None
    height, width = grids.pop()
    assert isinstance(height, int) and isinstance(width, int)
    return height, width


def _encoder(
    graph: fx.Graph,
    live: set[fx.Node],
    features: object,
    slots: fx.Node | None,
    fusion: fx.Node | None,
    anatomy: Anatomy,
) -> Encoder | None:
    """The encoder above `features`, or None (with a reason noted) where merging cannot be done."""
    assert isinstance(features, fx.Node)
    above = ancestors(features)
    blocks = [n for n in graph.nodes if n in above and op_name(n) in ATTENTION]
    if not blocks:
        if slots is not None:
            anatomy.refusals.append(
                Refusal(
                    Reason.NO_ATTENTION, "no scaled_dot_product_attention before the features", str(slots)
                )
            )
        return None
    try:
        conv = _conv_above(graph, blocks[0])
        if conv is None:
            raise Refused(Reason.NO_GRID, "no patch convolution before the first encoder block", blocks[0])
        images, _, height, width = shape(conv)
        flat = _flattened(conv)
        stop = {n for n in (fusion, slots) if n is not None}
        patches, sides = ex.of(ex.HEIGHT, ex.WIDTH), {ex.HEIGHT: height, ex.WIDTH: width}
        inside = live & descendants(flat) - descendants(*stop)
        axes = trace(graph, {flat: {2: patches}}, sides, inside, stop)
        unit = _unit(axes, features)
        idom = _dominators(graph, flat, [features])
        chain = _chain(idom, flat, [features])
        entering = _sites(idom, chain, blocks)
        leaving = (*entering[1:], _last_residual(chain, entering[-1]))
        leads = set()
        for site in leaving:
            extent = axes.extents.get(site, {}).get(1)
            if (
                axes.axis(site) != 1
                or value(site).dim() != 3
                or extent is None
                or extent.factors != patches.factors
            ):
                raise Refused(Reason.RESIDUAL_STREAM, "no [images, tokens, channels] value here", site)
            leads.add(extent.plus)
        if len(leads) != 1:
            raise Refused(Reason.RESIDUAL_STREAM, "the rows before the grid change between blocks", features)
        keys = tuple(block.args[1] for block in blocks)
        return Encoder(leaving, keys, features, slots, (height, width), unit, leads.pop(), images, axes)
    except Refused as refused:
        anatomy.encoder_refusals.append(refused.refusal)
        return None


def _unit(axes: TokenAxes, features: fx.Node) -> tuple[int, int]:
    """How many rows and columns of patches make one feature."""
    extents = axes.extents.get(features, {})
    if not extents:
        raise Refused(Reason.NO_GRID, "the image features do not follow the patch grid", features)
    extent = next(iter(extents.values()))
    unit = 1 / extent.scale_of(ex.HEIGHT), 1 / extent.scale_of(ex.WIDTH)
    sides = tuple(f.symbol for f in extent.factors if f.symbol != ex.CONSTANT)
    inside = extent.factors and extent.factors[-1].symbol == ex.CONSTANT
    whole = all(side.denominator == 1 for side in unit)
    if len(extents) > 1 or extent.plus or sides != (ex.HEIGHT, ex.WIDTH) or inside or not whole:
        raise Refused(Reason.NO_GRID, "the image features are not one grid, row by row", features)
    blocks = {
        (1 / e.scale_of(ex.HEIGHT), 1 / e.scale_of(ex.WIDTH))
        for found in axes.extents.values()
        for e in found.values()
    }
    if any(unit[0] % height or unit[1] % width for height, width in blocks):
        raise Refused(
            Reason.NO_GRID, "the encoder reads larger blocks of the grid than features have", features
        )
    return int(unit[0]), int(unit[1])


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


def _last_residual(chain: list[fx.Node], entering: fx.Node) -> fx.Node:
    """The residual value that leaves the last block: the last sum of two values made of its stream.

    Both are as wide as the stream. That one of them is the sum before it must not be asked: a norm or
    a factor may lie between (`norm(x + f(x))`, `a * x + f(x)`).
    """
    below = descendants(entering)
    width = shape(entering)[-1]
    for node in reversed(chain[chain.index(entering) + 1 :]):
        terms = [n for n in node.all_input_nodes if n in below and is_tensor(n)]
        if op_name(node) in ("add", "iadd") and len(terms) == 2 and {shape(n)[-1] for n in terms} == {width}:
            return node
    raise Refused(Reason.RESIDUAL_STREAM, "nothing is added after the last encoder block", entering)
