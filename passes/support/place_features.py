"""Say which placeholder of the prompt each image feature stands for."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, fx

from luvc_fx.anatomy.encoder import Encoder
from luvc_fx.anatomy.token_origins import SEPARATOR, token_origins
from luvc_fx.graph.emit import constant, emit
from luvc_fx.graph.nodes import shape
from luvc_fx.graph.notes import ORIGINS
from luvc_fx.passes.support.context import Context
from luvc_fx.plan import Grid
from luvc_fx.report import Reason, Refused


def place_features(
    context: Context, encoder: Encoder, representatives: tuple[fx.Node, ...], leaving: fx.Node
) -> None:
    """Set `context.representatives`: for each feature that is left its placeholder, numbered over all images.

    Args:
        representatives: int64 ``[n, H', W']`` for each of the encoder's frames, within each grid.
        leaving: the residual value that leaves the last block, merged if it is.
    """
    if encoder.packing is not None:
        context.representatives = _packed(context, encoder, representatives[0], leaving)
        return
    grids = tuple(frames.grid for frames in encoder.frames)
    sizes = [blocks[0] * blocks[1] for blocks in map(encoder.blocks_of, grids)]
    merged = [shape(part)[1] * shape(part)[2] for part in representatives]
    places, start = [], 0
    for size, left, frames in zip(sizes, merged, encoder.frames, strict=True):
        for frame in range(frames.count):
            places += [start + frame * size] * left
        start += size * frames.count
    _refuse_uneven_rows(context, encoder, places)

    def body(*parts: Tensor) -> Tensor:
        placed, start = [], 0
        for part, size, frames in zip(parts, sizes, encoder.frames, strict=True):
            # Not `frames.count`: a graph may be for any number of images.
            first = torch.arange(part.shape[0], device=part.device).reshape(-1, 1, 1) * size + start
            placed.append(part + first)
            start += size * frames.count
        if len(placed) == 1:
            return placed[0]
        return torch.cat([part.flatten() for part in placed]).reshape(1, 1, -1)

    (context.representatives,) = emit(context.graph, "placeholders", body, *representatives)


def _packed(context: Context, encoder: Encoder, representatives: fx.Node, leaving: fx.Node) -> fx.Node:
    """Follow the merged tokens to the features; the separators between lines keep their share."""
    packing = encoder.packing
    assert packing is not None
    tiles, height, width = shape(representatives)
    context.retarget.advance(encoder.features)
    rows = torch.full((tiles, encoder.lead + height * width), -2)
    rows[:, encoder.lead :] = torch.arange(tiles * height * width).reshape(tiles, -1)
    numbers = token_origins(context.graph, leaving, encoder.features, rows)
    if packing.pooled:
        shares = packing.shares(numbers, (height, width))
        _refuse_uneven_rows(context, encoder, shares)
        table = constant(context.graph, [[shares]], representatives)
        (placed,) = emit(context.graph, "placeholders", lambda x: x.clone(), table)
        return placed
    separators = packing.separators(numbers, height * width)
    tokens = [0 if number == SEPARATOR else number for number in numbers]
    per_tile, firsts = packing.grid[0] * packing.grid[1], packing.firsts()
    owners = [firsts[token // (height * width)] for token in tokens]
    pairs = zip(owners, separators, strict=True)
    _refuse_uneven_rows(context, encoder, [own if separator < 0 else separator for own, separator in pairs])
    tables = [
        constant(context.graph, table, representatives) for table in (tokens, separators, packing.places())
    ]

    def body(representatives: Tensor, tokens: Tensor, separators: Tensor, places: Tensor) -> Tensor:
        first = torch.arange(tiles, device=representatives.device).reshape(-1, 1, 1) * per_tile
        patch = (representatives + first).flatten().gather(0, tokens)
        return torch.where(separators >= 0, separators, places.gather(0, patch)).reshape(1, 1, -1)

    (placed,) = emit(context.graph, "placeholders", body, representatives, *tables)
    placed.meta[ORIGINS] = tuple(numbers)
    return placed


def _refuse_uneven_rows(context: Context, encoder: Encoder, places: list[int]) -> None:
    """Every row of a batch must keep as many tokens as the others.

    Args:
        places: per feature that is left, a captured feature of the same image.
    """
    decoder, marker = context.anatomy.decoder, encoder.representatives_marker
    rows = decoder.batch if decoder is not None else 1 if marker is None else marker.args[1]
    assert isinstance(rows, int)
    each = encoder.placeholders // rows
    counts = Counter(place // each for place in places)
    if len(set(counts.values())) > 1 or len(counts) != rows:
        left = [counts[row] for row in range(rows)]
        text = f"merging would leave {left} visual tokens in the rows of this batch: nothing is merged"
        raise Refused(Reason.UNEVEN_BATCH, text, encoder.features)


def answer_representatives(context: Context, encoder: Encoder) -> None:
    """Put the representatives where the front door asked for them; unmerged, each feature is its own."""
    marker, representatives = encoder.representatives_marker, context.representatives
    assert marker is not None
    if representatives is None:
        if encoder.grid is None or encoder.packing is not None:
            return
        grid: Grid = encoder.blocks_of(encoder.grid)
        images, tokens = encoder.images, encoder.placeholders
        if images * grid[0] * grid[1] != tokens:
            return

        symbolic = () if encoder.symbolic is None else encoder.symbolic.grid
        nodes = [side for side in symbolic if isinstance(side, fx.Node)]

        def body(x: Tensor, *sides: int) -> Tensor:
            given = iter(sides)
            height, width = (
                next(given) // each if isinstance(side, fx.Node) else known
                for side, each, known in zip(symbolic or grid, encoder.unit, grid, strict=True)
            )
            images = math.prod(x.shape[:-1]) // (height * width) if not symbolic else encoder.images
            numbers = torch.arange(images * height * width, device=x.device)
            return numbers.reshape(images, height, width).clone()

        (representatives,) = emit(context.graph, "placeholders", body, encoder.features, *nodes)
    context.retarget.advance(marker.prev)
    marker.replace_all_uses_with(representatives)
