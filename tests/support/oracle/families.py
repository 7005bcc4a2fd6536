"""Which tower a model has, and its visual tokens row by row."""

from __future__ import annotations

from torch import Tensor, nn

from luvc_fx.schedule import Schedule
from tests.support.oracle import packed as oracle_packed
from tests.support.oracle import tiles as oracle_tiles
from tests.support.oracle.rows import Piece, VisualRows, assemble, placeholders, shared_out
from tests.support.oracle.vision import encode


def visual_rows(
    model: nn.Module, schedule: Schedule, input_ids: Tensor, vision: dict[str, Tensor], gaps: list[float]
) -> VisualRows | None:
    """The visual tokens of each row, or None without images and videos.

    Args:
        input_ids: [B, S], with the placeholders.
        vision: ``pixel_values`` and whatever else the stock forward takes beside the text.
        gaps: gets the distance of every decision from its runner-up.
    """
    if "pixel_values" not in vision and "pixel_values_videos" not in vision:
        return None
    if isinstance(model, oracle_packed.FAMILIES):
        return oracle_packed.packed_rows(model, schedule, input_ids, vision, gaps)
    if isinstance(model, oracle_tiles.FAMILIES):
        return oracle_tiles.tile_rows(model, schedule, input_ids, vision, gaps)
    tokens = encode(model, schedule, vision["pixel_values"], gaps)
    visual = placeholders(model, input_ids)
    owners = shared_out(visual, visual, [tokens.placeholders] * len(tokens.features))
    pieces = [
        (row, Piece(tokens.features[image], places[tokens.slots[image]], tokens.sizes[image], tokens.grid))
        for image, (row, places) in enumerate(owners)
    ]
    return assemble(len(input_ids), pieces)
