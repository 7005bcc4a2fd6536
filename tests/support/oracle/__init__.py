"""The independent truth: a visual-token budget on a stock model in plain eager Python.

No FX, no compilation, nothing of the product but `luvc_fx.schedule`. The vision tower runs block by
block with the merges between its blocks (`oracle_vision`, `oracle_packed`, `oracle_tiles` by its kind;
`oracle_merge`), its tokens go to the rows of the prompt (`oracle_families`, `oracle_rows`), the decoder
layer by layer with the prunes between its layers (`oracle_decode`, `oracle_sequence`,
`oracle_positions`, `oracle_select`). The model's modules do the arithmetic between the sites; merging
and selecting are written here from the rules.
`oracle_strategies` draws schedules.
"""

from __future__ import annotations

from tests.support.oracle.crop import Tile, tiles_of
from tests.support.oracle.decode import (
    OracleResult,
    OracleState,
    oracle_continue,
    oracle_forward,
    oracle_generate,
    oracle_greedy,
    score_gap,
)
from tests.support.oracle.families import visual_rows
from tests.support.oracle.merge import Grid, choose, cosines, join, merge_grid
from tests.support.oracle.packed import Frame, encode_packed
from tests.support.oracle.positions import generate_positions
from tests.support.oracle.rows import VisualRows
from tests.support.oracle.select import energies, mix32, random_scores, select
from tests.support.oracle.strategies import schedules
from tests.support.oracle.tiles import newlines, tile_counts, tile_layout
from tests.support.oracle.vision import (
    VisualTokens,
    encode,
    encoder_blocks,
    from_blocks,
    target_blocks,
    to_blocks,
)

__all__ = [
    "Frame",
    "Grid",
    "OracleResult",
    "OracleState",
    "Tile",
    "VisualRows",
    "VisualTokens",
    "choose",
    "cosines",
    "encode",
    "encode_packed",
    "encoder_blocks",
    "energies",
    "from_blocks",
    "generate_positions",
    "join",
    "merge_grid",
    "mix32",
    "newlines",
    "oracle_continue",
    "oracle_forward",
    "oracle_generate",
    "oracle_greedy",
    "random_scores",
    "schedules",
    "score_gap",
    "select",
    "target_blocks",
    "tile_counts",
    "tile_layout",
    "tiles_of",
    "to_blocks",
    "visual_rows",
]
