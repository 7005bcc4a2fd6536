"""A prune as one operator in a graph for all image sizes; its body is compiled by itself.

In a graph for one image size a prune is written out, and compiled with everything else: for each size again.
Its code is a third of all that a compiler gets. As an operator it is compiled once for all layers, sizes and
graphs that prune alike, by the compiler that the graph goes to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from luvc_fx._compat import without_autograd
from luvc_fx.ops.select import in_squares, longest_run
from luvc_fx.schedule import Prune, Schedule
from luvc_fx.selectors import Selector, Site
from luvc_fx.selectors.cut import cut

_LIBRARY = torch.library.Library("luvc_fx", "FRAGMENT")
_LIBRARY.define(
    "prune(Tensor x, Tensor places, SymInt count, SymInt rows, SymInt height, SymInt width, str prune,"
    " int layer, int layers, str compiler, Tensor? last_query_attention, Tensor? mean_query_attention,"
    " Tensor? keys) -> (Tensor, Tensor, Tensor)"
)

PRUNE = torch.ops.luvc_fx.prune
"""`prune(x [B, S, D], places [B, N], count, rows, ...) -> [B, rows, D], [B, rows], [B, count]`.

What `luvc_fx.selectors.cut.cut` does. `height` and `width` are of each image's grid while all tokens are
there, and 0 elsewhere; `prune` is the JSON of a schedule of that prune, `compiler` a name in `COMPILERS`."""


Numbers = dict[str, int]


class CompiledCut(Protocol):
    """`cut` with one settled prune (see `Selector.settled`), for all numbers of tokens."""

    def __call__(
        self, x: Tensor, places: Tensor, numbers: Numbers, attention: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run it.

        Args:
            x, places: as of `cut`.
            numbers: `count` and `rows`; `images`, and `height` and `width` of a grid, where it reads them;
                `longest`, of runs (see `luvc_fx.ops.select.longest_run`); and `Selector.sizes`.
            attention: what the selector reads of it, in the order of the fields of `Site`.
        """
        ...


COMPILERS: dict[str, Callable[[Prune, int, int, Tensor], CompiledCut]] = {}
"""Who compiles the body of a site, by the name that stands in the graph; without an entry it runs eagerly.

Called with the settled prune, the layer and number of layers that it reads (or zeros), and an example of `x`;
it has to remember what it made."""


def site_of(
    layer: int,
    layers: int,
    grid: tuple[int, int] | None,
    images: int,
    attention: Sequence[Tensor | None],
    sizes: Numbers,
) -> Site:
    """What the selector is told, from the arguments of a `CompiledCut`."""
    last_query, mean_query, keys = attention
    return Site(layer, layers, grid, images, last_query, mean_query, keys, sizes)


@functools.lru_cache(1024)
def _parsed(prune: str) -> Prune:
    return Schedule.from_json(prune).prune[0]


def as_text(prune: Prune) -> str:
    """A prune as it stands in a graph."""
    return Schedule(prune=(prune,)).to_json()


def _prune(
    x: Tensor,
    places: Tensor,
    count: int,
    rows: int,
    height: int,
    width: int,
    prune: str,
    layer: int,
    layers: int,
    compiler: str,
    *attention: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    asked, tokens = _parsed(prune), places.shape[1]
    grid = (height, width) if height and tokens % (height * width) == 0 else None
    images = 1 if grid is None else tokens // (height * width)
    compile = COMPILERS.get(compiler)
    with without_autograd():
        if compile is None:
            return cut(x, places, asked, count, rows, site_of(layer, layers, grid, images, attention, {}))
        selector = asked.selector.settled(x, images)
        place = (layer, layers) if selector.reads_place else (0, 0)
        numbers = {"count": count, "rows": rows}
        if 0 < count < tokens:
            numbers |= _numbers_to_choose(asked, selector, tokens, count, grid, images)
        return compile(_without_amount(asked, selector), *place, x)(x, places, numbers, attention)


def _numbers_to_choose(
    asked: Prune, selector: Selector, tokens: int, count: int, grid: tuple[int, int] | None, images: int
) -> Numbers:
    """What beside `count` and `rows` a `CompiledCut` needs, where some of the tokens stay."""
    numbers = selector.sizes(tokens, count, images)
    if selector.per_image or selector.reads_place:
        numbers["images"] = images
    in_blocks = asked.coverage == "block"
    squares = in_blocks and grid is not None and in_squares(tokens, count, grid)
    if grid is not None and (squares or selector.reads_place):
        numbers |= {"height": grid[0], "width": grid[1]}
    if in_blocks and not squares:
        numbers["longest"] = longest_run(tokens, count)
    return numbers


@functools.lru_cache(1024)
def _without_amount(asked: Prune, selector: Selector) -> Prune:
    """What prunes of different amounts before different layers have in common, if the selector lets them."""
    if selector.reads_place:
        return asked.with_selector(selector)
    return Prune(keep=0.5, layer=0, selector=selector, coverage=asked.coverage, absorb=asked.absorb)


def _prune_shapes(
    x: Tensor, places: Tensor, count: int, rows: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    return x.new_empty(batch, rows, x.shape[2]), places.new_empty(batch, rows), places.new_empty(batch, count)


_LIBRARY.impl("prune", _prune, "CompositeExplicitAutograd")
torch.library.register_fake("luvc_fx::prune", _prune_shapes, lib=_LIBRARY)
