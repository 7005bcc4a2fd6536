"""Prunes and merges as operators: their compiled bodies are the eager ones, compiled once for all sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luvc_fx import Merge, Prune, Schedule
from luvc_fx.dynamo.compiled_site import site_compiler
from luvc_fx.graph.merge_operator import MERGE
from luvc_fx.graph.site_operator import PRUNE, as_text
from luvc_fx.selectors import SELECTORS, SHIPPED
from tests.support.cases import slow_unless

SIZES = (  # visual tokens, how many stay, grid
    (144, 72, (12, 12)),
    (144, 36, (12, 12)),
    (100, 30, (10, 10)),
    (64, 16, (4, 8)),
    (81, 40, (9, 9)),
    (64, 0, (0, 0)),
    (90, 0, (0, 0)),
    (50, 50, (0, 0)),
)
FORMS = 5
"""Some stay, in runs or in 2 x 2 squares; none; all; and one more where a selector reads the grid."""

BLIND = [name for name in SHIPPED if not SELECTORS.get(name).needs_attention]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def close(compiled: Tensor, eager: Tensor) -> bool:
    if not compiled.is_floating_point():
        return torch.equal(compiled, eager)
    return torch.allclose(compiled, eager, atol=1e-5)


@pytest.mark.parametrize("coverage", ["block", "global"])
@pytest.mark.parametrize("selector", slow_unless(BLIND, ["distinct", "random"]))
def test_a_prune_is_compiled_once_for_all_sizes(selector: str, coverage: str) -> None:
    prune = as_text(Prune(keep=0.5, layer=1, selector=selector, coverage=coverage, absorb=True))
    compiler = site_compiler("aot_eager", None, {})
    for tokens, count, grid in SIZES:
        rows = tokens + 20
        x, places = torch.randn(2, rows, 16), torch.arange(5, 5 + tokens).repeat(2, 1)
        numbers = (count, rows - tokens + count, *grid)
        attention = (None, None, None)
        compiled = PRUNE(x, places, *numbers, prune, 1, 4, compiler, *attention)
        eager = PRUNE(x, places, *numbers, prune, 1, 4, "eager", *attention)
        assert all(map(close, compiled, eager)), (tokens, count)
    assert 1 < graphs() <= FORMS


def test_prunes_that_differ_in_amount_and_layer_share_a_body() -> None:
    compiler = site_compiler("aot_eager", None, {})
    x, places = torch.randn(1, 60, 8), torch.arange(4, 52).unsqueeze(0)
    for layer, keep, count in ((1, 0.5, 24), (3, 0.25, 10), (7, 0.125, 6)):
        prune = as_text(Prune(keep=keep, layer=layer, selector="distinct"))
        PRUNE(x, places, count, 12 + count, 0, 0, prune, layer, 8, compiler, None, None, None)
    assert graphs() == 1


@pytest.mark.parametrize("angles", [True, False], ids=["with angles", "without"])
def test_a_merge_is_compiled_once_for_all_sizes(angles: bool) -> None:
    merges = Schedule(
        merge=(Merge("width", keep=0.75, layer=0, pairing="shared"), Merge("height", keep=0.5, layer=0))
    ).to_json()
    compiler = site_compiler("aot_eager", None, {})
    for height, width in ((8, 8), (8, 16), (12, 20), (16, 12)):
        x = torch.randn(height * width, 16)
        table = torch.randn(height * width, 4) if angles else None
        sides = [height, width, 2 * round(width * 0.75 / 2 + 1e-9), height // 4 * 2]
        compiled = MERGE(x, table, [], [], sides, merges, 1, 2, compiler)
        eager = MERGE(x, table, [], [], sides, merges, 1, 2, "eager")
        assert len(compiled) == 3 + angles and all(map(close, compiled, eager))
        assert compiled[0].shape == (sides[2] * sides[3], 16)
    assert graphs() == 1


def test_the_shapes_of_an_operator_are_those_that_it_gives() -> None:
    prune = as_text(Prune(keep=0.5, layer=1))
    merges = Schedule(merge=Merge("width", keep=0.5, layer=0)).to_json()
    x, places = torch.randn(1, 30, 8), torch.arange(2, 22).unsqueeze(0)
    pruned = (x, places, 10, 20, 4, 5, prune, 1, 4, "eager", None, None, None)
    merged = (torch.randn(64, 8), torch.randn(64, 3), [], [], [8, 8, 4], merges, 1, 2, "eager")
    for operator, arguments in ((PRUNE, pruned), (MERGE, merged)):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
