"""What a selector is, and what it is told about the place at which it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luvc_fx.methods.registry import Method, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from luvc_fx.schedule import Prune


@dataclass(frozen=True, slots=True)
class Site:
    """The place at which a selector is asked.

    Attributes:
        layer: the decoder layer before which the prune happens, from 0.
        layers: how many decoder layers the model has.
        grid: ``(height, width)`` of each image's tokens while all of them are there in raster order;
            None after a prune, and where the grid is not known.
        images: images in each row, one whole grid after another; 1 where `grid` is None.
        last_query_attention: float32 ``[B, N]``: the attention that the last token of each row pays to each
            visual token in the decoder layer before, mean over the heads. Only for a selector that needs it
            (`Selector.needs_last_query_attention`, or registered with ``attention=True``).
        mean_query_attention: float32 ``[B, N]``: the attention that the mean of this layer's queries would
            pay to each visual token, without rotary positions, among all tokens up to the last visual one;
            mean over the heads. Only for a selector that needs it (`Selector.needs_keys`, or registered
            with ``keys=True``), as `keys`.
        keys: float32 ``[B, N, heads * dim]``: the keys of the visual tokens in this layer, after the rotary
            embedding.
        sizes: `Selector.sizes` by their names, where they are symbols of a graph for all numbers of tokens;
            empty in a graph for one, in which they are computed where they are needed.
    """

    layer: int
    layers: int
    grid: tuple[int, int] | None = None
    images: int = 1
    last_query_attention: Tensor | None = None
    mean_query_attention: Tensor | None = None
    keys: Tensor | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def paid(self) -> Tensor | None:
        """The earlier name of `last_query_attention`."""
        return self.last_query_attention

    @property
    def attended(self) -> Tensor | None:
        """The earlier name of `mean_query_attention`."""
        return self.mean_query_attention


@dataclass(frozen=True, slots=True)
class Selector(Method, ABC):
    """Chooses the visual tokens that stay before a decoder layer: a pure function on tensors.

    A selector of luvc_fx is one file in this folder: a frozen, slotted dataclass with a `name`, its
    parameters (each with a default, and checked in ``__post_init__``) and ``__call__``, under
    ``@SELECTORS.add``. Schedules, JSON files and commands then know it by its name.

    It is traced once into the graph that is compiled, so its work may depend on shapes but not on values:
    no `item`, no `nonzero`, no boolean indexing, and tensors that it needs are made inside. In a graph for
    all numbers of tokens, N and `count` are symbols: what follows from them by rounding or a root is asked
    beforehand (`sizes`), and what decides how the work is done, too (`settled`).

    Attributes:
        needs_last_query_attention: it reads `Site.last_query_attention`. That costs one row of the attention
            of the layer before, which is computed again; the layer itself stays fused.
        needs_keys: it reads `Site.keys` or `Site.mean_query_attention`. That costs the norm and the
            projections of the layer once more.
        per_image: it works on each image's tokens by themselves while all of them are there. (Where the
            token grid is not known it cannot, and the report says so.)
        positions_are_checked: a check that its positions are distinct and in range goes into the graph.
        reads_place: it reads `Site.layer` or `Site.layers`, so that layers cannot share what is compiled.
    """

    @property
    def needs_last_query_attention(self) -> bool:
        return False

    @property
    def needs_keys(self) -> bool:
        return False

    @property
    def per_image(self) -> bool:
        return False

    @property
    def positions_are_checked(self) -> bool:
        return False

    @property
    def reads_place(self) -> bool:
        return False

    def sizes(self, tokens: int, count: int, images: int) -> dict[str, int]:
        """Whole numbers that follow from the numbers of tokens and that its work needs as sizes, by name.

        Args:
            tokens: N of `__call__`.
            images: `Site.images`.
        """
        return {}

    def settled(self, x: Tensor, images: int) -> Selector:
        """This selector with a choice made that depends on the sizes or the device of `x` ``[B, N, D]``."""
        return self

    @property
    def needs_attention(self) -> bool:
        """Whether it reads something of attention, and so cannot be asked before decoder layer 0."""
        return self.needs_last_query_attention or self.needs_keys

    @abstractmethod
    def __call__(self, x: Tensor, count: int, site: Site) -> Tensor:
        """Rank the tokens, or pick them.

        Args:
            x: ``[B, N, D]``, the visual rows of the residual stream in sequence order.
            count: how many stay, in 1 .. N - 1.
            site: where it happens.

        Returns:
            Either floating scores ``[B, N]``, of which the `count` largest stay by the prune's coverage
            (NaN counts as minus infinity), or int64 positions ``[B, count]``, distinct and in 0 .. N - 1.
        """

    def answer(self, x: Tensor, prune: Prune, count: int, site: Site) -> Tensor:
        """What `choose` asks. `prune` is for functions of third parties, which read it; ours never do."""
        return self(x, count, site)


SELECTORS: Registry[Selector] = Registry("selector")
"""The selectors by name. `luvc_fx.selectors` fills it with the files of this folder."""
