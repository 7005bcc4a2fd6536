"""Crops, splits between frames, grids in a row and constants beside them: followed, and made to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from luvc_fx.anatomy.axes.lengths import CONSTANT, HEIGHT, WIDTH, Axis, Extent, Factor, axis_of, concatenated
from luvc_fx.anatomy.axes.probe import TokenAxes, probe_sizes
from luvc_fx.anatomy.axes.trace import trace
from luvc_fx.graph.emit import emit
from luvc_fx.graph.nodes import op_name, output_node, shape
from luvc_fx.passes.support.retarget import Retarget
from luvc_fx.report import Reason, Refused
from tests.support.replay import capture, examples

C = 8
GRID = axis_of(HEIGHT, WIDTH)
LARGE, SMALL = ("h large", "w large"), ("h small", "w small")
FRAMES = concatenated([axis_of(*LARGE).times(2, outer=True), axis_of(*SMALL)])
"""Two frames of one size and one of another, row by row."""

Body = Callable[..., Any]
Counts = Mapping[str, int]


@dataclass(frozen=True)
class Follow:
    """``body(x, counts, *others)`` for tokens `axis` on axis `dim` of an `x` of `sizes`."""

    body: Body
    axis: Axis
    counts: Counts
    sizes: tuple[int, ...]
    dim: int = 1
    others: tuple[tuple[int, ...], ...] = ()

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        found = {"x": torch.randn(self.sizes, generator=generator)}
        for number, sizes in enumerate(self.others):
            found[f"y{number}"] = torch.randn(sizes, generator=generator)
        return found


def traced(case: Follow) -> tuple[fx.GraphModule, fx.Node, TokenAxes]:
    def call(x: Tensor, **more: Tensor) -> Any:
        return case.body(x + 0.0, case.counts, *more.values())

    gm = capture(call, **case.inputs()).copy()
    site = next(n for n in gm.graph.nodes if op_name(n) == "add")
    assert case.axis.length(case.counts) == case.sizes[case.dim]
    return gm, site, trace(gm.graph, {site: {case.dim: case.axis}}, case.counts, set(gm.graph.nodes))


def shortened(case: Follow, counts: Counts) -> tuple[Tensor, Tensor]:
    """What the captured graph gives when its tokens become those of `counts`, and what the body gives."""
    gm, site, axes = traced(case)
    length = case.axis.length(counts)
    retarget = Retarget(gm.graph, axes)
    retarget.advance(site)
    (short,) = emit(gm.graph, "site", lambda a: a.narrow(case.dim, 0, length).contiguous(), site)
    retarget.replace(site, short, counts)
    for filler in axes.fillers:
        retarget.fill(filler, counts)
    retarget.advance()
    gm.graph.lint()
    gm.recompile()
    given = case.inputs()
    (got,) = gm.forward(*given.values())
    x = given.pop("x").narrow(case.dim, 0, length).contiguous()
    return got, case.body(x, counts, *given.values())


def per_frame(x: Tensor, counts: Counts) -> Tensor:
    large, small = (counts[h] * counts[w] for h, w in (LARGE, SMALL))
    parts = x.split([large, large, small])
    return torch.cat([part.softmax(0) * (number + 1) for number, part in enumerate(parts)])


def two_at_once(x: Tensor, counts: Counts) -> Tensor:
    large, small = (counts[h] * counts[w] for h, w in (LARGE, SMALL))
    both, last = torch.split(x, [2 * large, small], dim=0)
    return torch.cat([last.exp(), both.view(2, large, C).mean(1), last])


def attention_in_frames(x: Tensor, counts: Counts) -> Tensor:
    large, small = (counts[h] * counts[w] for h, w in (LARGE, SMALL))
    heads = x.view(-1, 2, C // 2).transpose(0, 1).unsqueeze(0)
    parts = heads.split([large, large, small], dim=2)
    out = [torch.nn.functional.scaled_dot_product_attention(p, p, p) for p in parts]
    return torch.cat(out, dim=2).squeeze(0).transpose(0, 1).reshape(-1, C)


def without_a_border(x: Tensor, counts: Counts) -> Tensor:
    grid = x.view(-1, counts[HEIGHT], counts[WIDTH], C)
    return grid[:, 1 : counts[HEIGHT] - 1].flatten(1, 2)


def without_borders(x: Tensor, counts: Counts) -> Tensor:
    grid = x.view(-1, counts[HEIGHT], counts[WIDTH], C)
    grid = grid[..., 1 : counts[WIDTH] - 1, :]
    return grid[:, 1 : counts[HEIGHT] - 1, :, :].reshape(len(x), -1, C).sin()


def lines_with_separators(x: Tensor, counts: Counts, newline: Tensor) -> Tensor:
    grid = x.view(-1, counts[HEIGHT], counts[WIDTH], C).permute(3, 0, 1, 2).flatten(1, 2)
    ends = newline[:, None, None].expand(*grid.shape[:-1], 1).to(grid.dtype)
    return torch.cat((grid, ends), dim=-1).flatten(1, 2).transpose(0, 1)


def cropped_lines_with_separators(x: Tensor, counts: Counts, newline: Tensor) -> Tensor:
    grid = x.view(-1, counts[HEIGHT], counts[WIDTH], C)[0, :, :, :].permute(2, 0, 1)
    grid = grid[:, 1 : counts[HEIGHT] - 1, :]
    ends = newline[:, None, None].expand(C, counts[HEIGHT] - 2, 1)
    lines = torch.cat((grid, ends), dim=-1).flatten(1, 2).transpose(0, 1)
    return torch.cat((x[1], lines))


def a_row_of_two_grids(x: Tensor, counts: Counts, separator: Tensor) -> Tensor:
    tiles = x.view(2, counts[HEIGHT], counts[WIDTH], C)
    side = torch.cat([tiles[0], tiles[1]], dim=1)
    return torch.cat([separator, side.flatten(0, 1), x[0]])


COUNTS = {HEIGHT: 4, WIDTH: 5}
KINDS = dict(zip((*LARGE, *SMALL), (4, 3, 2, 5), strict=True))
CASES: dict[str, Follow] = {
    f.__name__: Follow(f, FRAMES, KINDS, (34, C), 0) for f in (per_frame, two_at_once, attention_in_frames)
} | {
    "without_a_border": Follow(without_a_border, GRID, COUNTS, (3, 20, C)),
    "without_borders": Follow(without_borders, GRID, COUNTS, (3, 20, C)),
    "lines_with_separators": Follow(lines_with_separators, GRID, COUNTS, (3, 20, C), others=((C,),)),
    "cropped_lines": Follow(cropped_lines_with_separators, GRID, COUNTS, (2, 20, C), others=((C,),)),
    "two_grids": Follow(a_row_of_two_grids, GRID, COUNTS, (2, 20, C), others=((1, C),)),
}
FEWER: dict[str, Counts] = {
    name: (
        {HEIGHT: 3, WIDTH: 5} if case.axis is GRID else dict(zip((*LARGE, *SMALL), (2, 3, 2, 1), strict=True))
    )
    for name, case in CASES.items()
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_body_on_smaller_grids(name: str) -> None:
    got, want = shortened(CASES[name], FEWER[name])
    assert got.shape == want.shape
    assert torch.equal(got, want)


@settings(max_examples=examples(6))
@given(st.sampled_from(sorted(CASES)), st.data())
def test_any_counts(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    counts = {symbol: data.draw(st.integers(min(3, n), n)) for symbol, n in case.counts.items()}
    got, want = shortened(case, counts)
    assert torch.equal(got, want)


# ------------------------------------------------------------------------------------- exact axes


def extents_of(case: Follow) -> tuple[list[dict[int, Axis]], TokenAxes]:
    gm, _, axes = traced(case)
    outputs = output_node(gm.graph).args[0]
    return [axes.extents.get(node, {}) for node in outputs], axes  # type: ignore[union-attr, arg-type]


def test_the_parts_of_a_split_have_axes_of_their_own() -> None:
    large, small = axis_of(*LARGE), axis_of(*SMALL)
    found, axes = extents_of(Follow(lambda x, _: x.split([12, 12, 10]), FRAMES, KINDS, (34, C), 0))
    assert found == [{0: large}, {0: large}, {0: small}]
    ((_, (dim, parts)),) = axes.pieces.items()
    assert (dim, parts) == (0, [large, large, small])
    found, _ = extents_of(Follow(lambda x, _: x.split([24, 10]), FRAMES, KINDS, (34, C), 0))
    assert found == [{0: large.times(2, outer=True)}, {0: small}]
    found, _ = extents_of(Follow(lambda x, _: torch.cat(x.split([12, 12, 10])), FRAMES, KINDS, (34, C), 0))
    assert found == [{0: FRAMES}]


def test_a_split_of_channels_is_no_split_of_tokens() -> None:
    found, axes = extents_of(Follow(lambda x, _: x.split([2, 6], dim=1), FRAMES, KINDS, (34, C), 0))
    assert found == [{0: FRAMES}] * 2
    assert axes.pieces == {}


def test_a_crop_is_noted_with_its_axis() -> None:
    case = Follow(lambda x, _: x.view(3, 4, 5, C)[:, :, 1:4], GRID, COUNTS, (3, 20, C))
    found, axes = extents_of(case)
    assert found == [{1: axis_of(HEIGHT), 2: Extent((Factor(WIDTH),), -1, -1)}]
    assert list(axes.crops.values()) == [{2: slice(1, 4)}]
    # A slice that takes nothing off is none of it.
    found, axes = extents_of(Follow(lambda x, _: x.view(3, 4, 5, C)[:, 0:4], GRID, COUNTS, (3, 20, C)))
    assert found == [{1: axis_of(HEIGHT), 2: axis_of(WIDTH)}]


def test_separators_are_a_filler_and_a_longer_line() -> None:
    found, axes = extents_of(CASES["lines_with_separators"])
    lines = Extent((Factor(CONSTANT, Fraction(3)), Factor(HEIGHT), Extent((Factor(WIDTH),), rows_after=1)))
    assert found == [{0: lines}]
    (filler,) = axes.fillers
    assert op_name(filler) == "expand" and shape(filler) == (C, 12, 1)


def test_grids_one_behind_the_other() -> None:
    """Of one kind they are a multiple, of two a row, and rows in front lie before the first."""
    found, _ = extents_of(Follow(lambda x, _: torch.cat([x[0], x[1]]), GRID, COUNTS, (2, 20, C)))
    assert found == [{0: GRID.times(2, outer=True)}]

    def mixed(x: Tensor, _: Counts, lead: Tensor) -> Tensor:
        large, _other, small = x.split([12, 12, 10])
        return torch.cat([lead, small, large])

    found, _ = extents_of(Follow(mixed, FRAMES, KINDS, (34, C), 0, ((2, C),)))
    assert found == [{0: concatenated([axis_of(*SMALL, rows_before=2), axis_of(*LARGE)])}]


def test_made_up_sizes_of_many_sides_are_distinct() -> None:
    """Thirty image sizes in one batch: no two sides may be taken for each other."""
    made = probe_sizes({f"side {number}": 2 for number in range(60)})
    assert len(set(made.values())) == 60
    assert all(size % 64 == 0 for size in made.values())
    sides = iter(made.values())
    assert len({height * width for height, width in zip(sides, sides, strict=True)}) == 30


def test_made_up_sizes_are_large_and_their_scores_have_a_size() -> None:
    height, width = probe_sizes({"height": 2, "width": 2}).values()
    assert height * width > 40_000_000, "more than any size in a model"
    assert 64 * 16 * (height * width) ** 2 * torch.float32.itemsize < 2**63, "64 images, 16 heads"


# ---------------------------------------------------------------------------------------- refusals


def view(x: Tensor) -> Tensor:
    return x.view(-1, 4, 5, C)


FIXED = "a constant of a fixed size lies beside the tokens"
REFUSED: dict[str, tuple[Body, tuple[tuple[int, ...], ...], str]] = {
    "only off the front": (lambda x, _: view(x)[:, 1:], (), "cut at a fixed place, slice(1, None"),
    "only off the end": (lambda x, _: view(x)[:, :3], (), "cut at a fixed place"),
    "more off the front": (lambda x, _: view(x)[:, 2:3], (), "cut at a fixed place"),
    "every other": (lambda x, _: view(x)[:, ::2], (), "cut at a fixed place"),
    "and a row": (lambda x, _: view(x)[0, 1:3], (), "a crop that also drops an axis"),
    "and an axis more": (lambda x, _: view(x)[:, 1:3, None, 1:4], (), "a crop that also drops an axis"),
    "a whole constant": (lambda x, _, y: torch.cat([view(x), y], 2), ((2, 4, 1, C),), FIXED),
    "a constant that has the tokens' axis": (
        lambda x, _, y: torch.cat([view(x), y.expand(2, 4, 1, C)], 2),
        ((1, 4, 1, C),),
        FIXED,
    ),
    "a constant made of two": (
        lambda x, _, y, z: torch.cat([view(x), y.expand(2, 4, 1, C) + z], 2),
        ((C,), (2, 4, 1, C)),
        FIXED,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_another_grid_would_break_is_refused(name: str) -> None:
    body, others, words = REFUSED[name]
    with pytest.raises(Refused) as caught:
        traced(Follow(body, GRID, COUNTS, (2, 20, C), others=others))
    assert caught.value.refusal.reason is Reason.TOKEN_AXIS
    assert words in caught.value.refusal.text
    assert caught.value.refusal.node


@pytest.mark.parametrize("lengths", [[10, 14, 10], [12, 22], [34], [6] * 5 + [4]], ids=str)
def test_a_split_inside_a_frame_is_refused(lengths: list[int]) -> None:
    case = Follow(lambda x, _: x.split(lengths)[0].sin(), FRAMES, KINDS, (34, C), 0)
    if lengths in ([12, 22], [34]):
        traced(case)  # between frames, whatever their kind
        return
    with pytest.raises(Refused) as caught:
        traced(case)
    assert "cut at a fixed place by split" in caught.value.refusal.text


def test_a_crop_of_more_than_is_left_is_refused() -> None:
    """Three of five columns stay; of one that is left fewer than none would."""
    case = Follow(lambda x, c: x.view(3, 4, c[WIDTH], C)[:, :, 1 : c[WIDTH] - 1], GRID, COUNTS, (3, 20, C))
    with pytest.raises(Refused, match="getitem gives"):
        shortened(case, {HEIGHT: 4, WIDTH: 1})
