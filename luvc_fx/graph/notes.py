"""What a rewrite notes on nodes for whoever watches the tokens while the graph runs.

Notes are plain data in `node.meta`: they change no graph and no key of a compiler's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYOUT = "luvc_fx.layout"
"""Key of a `Layout`, on the value that leaves the first encoder block of a graph that is rewritten."""
SHRUNK = "luvc_fx.shrunk"
"""Key of a `Merged` or `Pruned`, on the value with fewer tokens."""
ORIGINS = "luvc_fx.origins"
"""Key of `Layout.origins` as they are after the merges, on the placeholders of the features."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of an encoder lie on its images, and which of them become one feature.

    Attributes:
        frames: ``(count, (height, width))`` in patches: the images, tiles or frames in the order of the rows.
        lead: rows in front of each grid.
        unit: height and width, in patches, of the block that becomes one feature.
        blockwise: whether the patches of a block lie one behind the other; else rows are in raster order.
        origins: per feature the row of the patch that it is, counted over all frames without `lead`, or -1
            for a feature that no patch became; None where features are the blocks in order.
        pooled: whether features are resampled, so that `origins` names only one of several patches.
    """

    frames: tuple[tuple[int, tuple[int, int]], ...]
    lead: int
    unit: tuple[int, int]
    blockwise: bool
    origins: tuple[int, ...] | None
    pooled: bool


@dataclass(frozen=True, slots=True)
class Merged:
    """Tokens merged after encoder block `block`.

    Attributes:
        source: name of the value with all of the tokens; grids: of each of `Layout.frames`, in patches, now.
    """

    block: int
    source: str
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Visual tokens dropped before decoder layer `layer`.

    Attributes:
        source: name of the value with all of the rows.
        places: name of the int64 ``[batch, tokens]``, the visual rows of `source`.
        rows: name of the int64 ``[batch, rows]``, the rows of `source` that are left.
    """

    layer: int
    source: str
    places: str
    rows: str
