"""Recognise the parts of a vision-language model in a captured graph, by structure alone.

The attention call is the anchor. The fusion (`masked_scatter`) divides encoder from decoder. The
residual stream is the chain of dominators from the first tokens to the result: the values that every
path of the tokens runs through. The place before a layer is the last value of that chain that also
dominates the layer's attention. No module name or class is read.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import fx

from luvc_fx._compat import hint
from luvc_fx.anatomy.attention import Attention, attentions
from luvc_fx.anatomy.axes.lengths import TOKENS, axis_of
from luvc_fx.anatomy.axes.probe import Join, TokenAxes
from luvc_fx.anatomy.axes.trace import trace
from luvc_fx.anatomy.encoder import Encoder, find_encoder, patch_convolution
from luvc_fx.anatomy.residual_stream import chain_to, dominators, entering
from luvc_fx.graph import markers
from luvc_fx.graph.nodes import (
    ancestors,
    as_size,
    descendants,
    is_tensor,
    live_nodes,
    op_name,
    output_node,
    shape,
    size_seen,
    value,
)
from luvc_fx.report import Reason, Refusal, Refused

CAPTURE_ENDED = "the capture ended before the image features enter the text"
ENCODER_ELSEWHERE = "the encoder of the image features is not in this graph: nothing is merged"

UNSUPPORTED = "no supported attention (SDPA, FlashAttention 2, matmul-softmax-matmul)"


@dataclass(frozen=True, slots=True)
class SymbolicCounts:
    """What a `markers.ROW_COUNTS` says: nodes of sizes, or numbers where they are 0 or 1.

    Attributes:
        visual: visual tokens of one row; grid: height and width of each image's tokens, zeros where unknown.
        form, rest: what each prune does, and its counts; see `luvc_fx.schedule.row_counts.RowCounts`.
    """

    visual: fx.Node | int
    grid: tuple[fx.Node | int, fx.Node | int]
    form: str
    rest: tuple[fx.Node | int, ...]


@dataclass(frozen=True, slots=True)
class Decoder:
    """The text decoder of a graph that has a fusion.

    Attributes:
        entering: per layer, the residual value `[batch, rows, dim]` entering it.
        calls: per layer, its attention.
        fusion: the `masked_scatter` node, the last one where there is one a modality.
        embeds: the text embeddings, which the first fusion fills; masks, features: what each fusion fills
            in, and where.
        batch: rows of the prompt; visual: visual tokens of one row, as captured.
        grid: height and width of one image's tokens, where known.
        rows_outputs: `markers.PROMPT_ROWS` nodes.
        row_counts: what a graph for all numbers of tokens is told; `visual` and `grid` are then those seen
            while tracing. None in a graph for one number.
    """

    entering: tuple[fx.Node, ...]
    calls: tuple[Attention, ...]
    fusion: fx.Node
    embeds: fx.Node
    masks: tuple[fx.Node, ...]
    features: tuple[fx.Node, ...]
    batch: int
    visual: int
    grid: tuple[int, int] | None
    axes: TokenAxes
    rows_outputs: tuple[fx.Node, ...]
    row_counts: SymbolicCounts | None = None


@dataclass(slots=True)
class Anatomy:
    """What was recognised in one graph.

    Attributes:
        cache_attentions: attention calls under a `markers.CACHE_MASK`.
        queries: rows of the first attention call's queries, 0 without one.
        has_vision: whether patches of an image are in the graph.
        refusals: why there is no decoder; encoder_refusals: why nothing can be merged.
    """

    encoder: Encoder | None = None
    decoder: Decoder | None = None
    cache_attentions: tuple[Attention, ...] = ()
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
    calls = attentions(graph, live)
    fusions = [n for n in graph.nodes if n in live and op_name(n) == "masked_scatter"]
    asked = [n for n in graph.nodes if n in live and markers.is_call(n, markers.REPRESENTATIVES)]
    anatomy.cache_attentions = tuple(call for call in calls if _uses_cache_mask(call))
    anatomy.queries = shape(calls[0].queries)[-2] if calls else 0
    anatomy.has_vision = bool(asked) or any(patch_convolution(graph, call.node) for call in calls[:1])
    try:
        if fusions:
            _check_fusions(fusions)
            if len(fusions) == 1:
                anatomy.encoder = _encoder(graph, live, fusions[0].args[2], None, fusions[0], anatomy)
            elif anatomy.has_vision:
                text = "features enter the text at more than one place: tokens are pruned, but not merged"
                anatomy.encoder_refusals.append(Refusal(Reason.NO_FUSION, text, str(fusions[1])))
            else:
                anatomy.encoder_refusals.append(_encoder_elsewhere(fusions[0]))
            anatomy.decoder = _decoder(graph, live, calls, fusions, anatomy.encoder)
        elif asked:
            anatomy.encoder = _encoder(graph, live, asked[0].args[0], asked[0], None, anatomy)
        elif anatomy.has_vision:
            anatomy.encoder_refusals.append(Refusal(Reason.CAPTURE_ENDED_BEFORE_FUSION, CAPTURE_ENDED))
    except Refused as refused:
        anatomy.refusals.append(refused.refusal)
    return anatomy


def _check_fusions(fusions: list[fx.Node]) -> None:
    """Several are fine where nothing but casts lies between, and each has placeholders of its own."""
    seen = [_placeholder(fusion) for fusion in fusions]
    for number, (before, after) in enumerate(itertools.pairwise(fusions), 1):
        node = after.args[0]
        while isinstance(node, fx.Node) and node is not before and op_name(node) in ("to", "clone"):
            node = node.args[0]
        if node is not before or seen[number] is None or seen[number] in seen[:number]:
            text = "image features enter the text at more than one place"
            raise Refused(Reason.NO_FUSION, text, after)


def _placeholder(fusion: fx.Node) -> object:
    """The token id whose rows `fusion` fills, or None where the graph does not tell."""
    node = fusion.args[1]
    while isinstance(node, fx.Node) and op_name(node) != "eq":
        node = node.args[0] if node.op.startswith("call_") and node.args else None
    return node.args[1] if isinstance(node, fx.Node) and isinstance(node.args[1], int) else None


def _encoder(
    graph: fx.Graph,
    live: set[fx.Node],
    features: object,
    marker: fx.Node | None,
    fusion: fx.Node | None,
    anatomy: Anatomy,
) -> Encoder | None:
    """The encoder above `features`, or None, with a reason noted where there is one but not for merging."""
    assert isinstance(features, fx.Node)
    if not attentions(graph, ancestors(features)):
        if marker is not None:
            text = f"{UNSUPPORTED} before the features"
            anatomy.encoder_refusals.append(Refusal(Reason.NO_ATTENTION, text, str(marker)))
        else:
            anatomy.encoder_refusals.append(_encoder_elsewhere(fusion))
        return None
    try:
        return find_encoder(graph, live, features, marker, fusion)
    except Refused as refused:
        anatomy.encoder_refusals.append(refused.refusal)
        return None


def _encoder_elsewhere(fusion: fx.Node | None) -> Refusal:
    return Refusal(Reason.CAPTURE_ENDED_BEFORE_FUSION, ENCODER_ELSEWHERE, str(fusion))


def _uses_cache_mask(call: Attention) -> bool:
    return call.mask is not None and any(markers.is_call(n, markers.CACHE_MASK) for n in ancestors(call.mask))


def _decoder(
    graph: fx.Graph,
    live: set[fx.Node],
    calls: list[Attention],
    fusions: list[fx.Node],
    encoder: Encoder | None,
) -> Decoder:
    fusion, embeds = fusions[-1], fusions[0].args[0]
    masks, features = (tuple(_argument(n, i) for n in fusions) for i in (1, 2))
    assert isinstance(embeds, fx.Node)
    below = descendants(fusion)
    layers = {call.node: call for call in calls if call.node in below}
    if not layers:
        raise Refused(Reason.NO_ATTENTION, f"{UNSUPPORTED} after the fusion", fusion)
    after_last = descendants([*layers][-1])
    sinks = [n for n in output_node(graph).all_input_nodes if n in after_last]
    idom = dominators(graph, fusion, [*sinks, *layers])
    sites = entering(idom, chain_to(idom, fusion, sinks), [[layer] for layer in layers])
    counts = _symbolic_counts(features)
    batch, visual = _visual_tokens(fusion, features, encoder, counts is not None)
    length = {TOKENS: shape(fusion)[1]}
    labels = _labels(graph, live & below, fusion)
    seeds = {node: {1: axis_of(TOKENS)} for node in (fusion, *labels)}
    axes = trace(graph, seeds, length, live & (below | descendants(*labels)))
    axes.joins += [Join(user, node, (1,)) for node in labels for user in node.users if user in live]
    for layer, (site, (attention, call)) in enumerate(zip(sites, layers.items(), strict=True)):
        if axes.axis(site) != 1 or value(site).dim() != 3:
            raise Refused(Reason.RESIDUAL_STREAM, f"no [batch, rows, dim] value enters layer {layer}", site)
        later = any(extent.rows_before for extent in axes.extents.get(call.keys, {}).values())
        if later and not _uses_cache_mask(call):
            text = "the cache already holds rows before this prompt, and its mask is the model's"
            raise Refused(Reason.PAST_NOT_EMPTY, text, attention)
    rows = tuple(n for n in graph.nodes if n in live and markers.is_call(n, markers.PROMPT_ROWS))
    if counts is None:
        grid = _marked_grid(features[0]) if len(features) == 1 else None
    else:
        height, width = map(size_seen, counts.grid)
        grid = (height, width) if height and width else None
    if encoder is not None:
        plain = encoder.grid is not None and encoder.packing is None
        grid = encoder.blocks_of(encoder.grid) if plain and encoder.grid is not None else None
    if grid is not None and visual % (grid[0] * grid[1]):
        grid = None
    return Decoder(
        sites,
        tuple(layers.values()),
        fusion,
        embeds,
        masks,
        features,
        batch,
        visual,
        grid,
        axes,
        rows,
        counts,
    )


def _argument(node: fx.Node, place: int) -> fx.Node:
    argument = node.args[place]
    assert isinstance(argument, fx.Node)
    return argument


def _labels(graph: fx.Graph, inside: set[fx.Node], fusion: fx.Node) -> list[fx.Node]:
    """The `[batch, rows]` values that a loss compares the rows with, before they are shifted."""
    all_labels = []
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
        if labels is not None and labels not in all_labels:
            all_labels.append(labels)
    return all_labels


def _visual_tokens(
    fusion: fx.Node, features: tuple[fx.Node, ...], encoder: Encoder | None, for_all_numbers: bool
) -> tuple[int, int]:
    batch, total = shape(fusion)[0], 0
    for one_modality in features:
        rows = 1
        for size in value(one_modality).shape[:-1]:
            # A plan for one number of tokens makes a guard of a symbolic one.
            rows *= hint(size) if for_all_numbers else int(size)
        images = 0 if encoder is None or encoder.blockwise else encoder.images
        if rows % batch or images % batch:
            what = f"{images} images" if images % batch else f"{rows} image features"
            text = f"{what} cannot be the same number in each of {batch} rows"
            raise Refused(Reason.UNEVEN_BATCH, text, fusion)
        total += rows // batch
    return batch, total


def _symbolic_counts(features: tuple[fx.Node, ...]) -> SymbolicCounts | None:
    for node in ancestors(*features):
        if markers.is_call(node, markers.ROW_COUNTS):
            _, form, numbers = node.args
            assert isinstance(form, str) and isinstance(numbers, (list, tuple))
            visual, height, width, *rest = map(as_size, numbers)
            return SymbolicCounts(visual, (height, width), form, tuple(rest))
    return None


def _marked_grid(features: fx.Node) -> tuple[int, int] | None:
    grids = {n.args[1:3] for n in ancestors(features) if markers.is_call(n, markers.IMAGE_GRID)}
    if len(grids) != 1:
        return None
    height, width = grids.pop()
    assert isinstance(height, int) and isinstance(width, int)
    return height, width
