"""LLaVA-OneVision videos, whose features are pooled from merged grids: the product is the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.cases import GAP
from tests.support.models_anyres import VIDEO as TOKEN
from tests.support.models_anyres import anyres_inputs, tiny_onevision
from tests.support.oracle import oracle_forward, oracle_generate

TWO = Schedule(
    merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.6, layer=1)),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=-1, energy="ratio")),
)
SHARED_KEYS = Schedule(
    merge=(
        Merge("height", keep=0.5, layer=0, feature="keys"),
        Merge("width", keep=0.7, layer=1, pairing="shared"),
    ),
    prune=(Prune(keep=0.5, layer=0, coverage="block"), Prune(keep=0.0, layer=-1)),
)
SHARED = Schedule(
    merge=Merge("height", length=1, layer=-1, feature="keys", pairing="shared"),
    prune=Prune(keep=0.4, layer=1, coverage="global"),
)
TWO_ROWS = [[3, ("video", 2), 4], [5, ("video", 2), 2]]  # as long as each other
PADDED = [[3, ("video", 2), 4], [1, ("video", 2), 2]]  # the second padded on the left


def with_image(grid: int) -> list[list[Any]]:
    """An image of 1 x 2 tiles, a quarter of whose height is padding, and a video."""
    return [[3, ("image", 3 * grid, 8 * grid), 2, ("video", 2), 4]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "rows", "schedule", "generated"),
    [
        (7, TWO_ROWS, TWO, True),
        (6, PADDED, SHARED, False),
        (6, with_image(6), TWO, False),
        (7, with_image(7), SHARED_KEYS, True),
    ],
    ids=["two rows, odd grids", "one merge, shared", "with an image", "with an image, odd grids"],
)
@torch.no_grad()
def test_a_video_with_merges_is_the_oracle(
    grid: int, rows: Sequence[Sequence[Any]], schedule: Schedule, generated: bool
) -> None:
    model = tiny_onevision(decoder_layers=3, encoder_layers=2, grid=grid)
    batch = anyres_inputs(model, rows)
    want = oracle_forward(model, schedule, **batch)
    assert want.gap >= GAP
    placeholders = torch.isin(batch["input_ids"], torch.tensor([model.config.image_token_id, TOKEN]))
    assert want.features.shape[1] < int(placeholders[0].sum())
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        out = model(**batch)
        assert torch.equal(out.row_index, want.rows)
        assert float((out.logits - want.logits)[want.mask].abs().max()) < 1e-4
        assert luvc_fx.report_of(model).tokens_per_layer() == want.tokens_per_layer
        if generated:
            tokens = model.generate(**batch, max_new_tokens=5, do_sample=False)
            assert torch.equal(tokens, oracle_generate(model, schedule, 5, **batch))


@torch.no_grad()
def test_padding_of_an_image_does_not_raise_the_target_of_a_video() -> None:
    model = tiny_onevision(decoder_layers=1, encoder_layers=1, grid=7)
    batch = anyres_inputs(model, with_image(7))
    schedule = Schedule(merge=Merge("height", length=1, layer=0))
    want = oracle_forward(model, schedule, **batch)
    with luvc_fx.applied(model, schedule, inner="eager", on_no_match="ignore"):
        out = model(**batch)
        refusals = [str(refusal) for graph in luvc_fx.report_of(model).graphs for refusal in graph.refusals]
    assert len(refusals) == 1 and "Merge.length 1 became 3" in refusals[0]
    assert want.tokens_per_layer == [3 * 7 + 1 * (14 + 1) + 2 * 1 * 4 + 1]
    assert torch.equal(out.row_index, want.rows)
    assert float((out.logits - want.logits).abs().max()) < 1e-4
