"""A prune of visual tokens between decoder layers, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from luvc_fx.methods.checks import (
    ABOVE_ZERO,
    BELOW_ONE,
    check_choice,
    check_either,
    check_flag,
    check_whole,
    is_whole,
    refuse,
    set_integer,
    set_number,
)
from luvc_fx.ops.rounding import round_half_up
from luvc_fx.schedule.places import parameter_of, resolve_layer
from luvc_fx.selectors import SELECTORS, Selector

COVERAGES = ("block", "global")


@dataclass(frozen=True, slots=True, init=False)
class Prune:
    """Drop visual tokens before one decoder layer.

    ``Prune(keep=0.5, layer=2, cutoff=0.3)`` is the same as
    ``Prune(keep=0.5, layer=2, selector=Spectrum(cutoff=0.3))``, and a parameter of the selector can be read
    from the prune itself, as ``prune.cutoff``.

    Args:
        keep: fraction of the visual tokens *at the fusion* that is left; in [0, 1]. Or `tokens`.
        tokens: number of visual tokens left in each row, at least 0.
        layer: the decoder layer before which tokens go; negative counts from the end. Or `depth`.
        depth: fraction in (0, 1) of the decoder layers that run before the prune.
        selector: which tokens stay: the name of a selector, one that comes with luvc_fx (one file each in
            `luvc_fx.selectors`) or one given to `luvc_fx.register_selector`; or a selector. As an attribute
            it is the selector; ``prune.selector.name`` its name.
        coverage: how scores decide: ``"block"`` keeps the best of each block of neighbours, ``"global"`` the
            best of all. A selector that returns positions has decided already.
        absorb: each token that goes is averaged into the one that stays and is most like it (cosine of the
            hidden states), whatever the selector. That one keeps its place and position.
        parameters: of the selector, such as `cutoff` of `luvc_fx.selectors.spectrum.Spectrum` or `seed` of
            `luvc_fx.selectors.random.Random`.

    Raises:
        ValueError: naming the field, its value and what is allowed; for a parameter that the selector does
            not have, too.
    """

    keep: float | None
    tokens: int | None
    layer: int | None
    depth: float | None
    selector: Selector
    coverage: str
    absorb: bool

    def __init__(
        self,
        keep: float | None = None,
        tokens: int | None = None,
        layer: int | None = None,
        depth: float | None = None,
        selector: str | Selector = "spectrum",
        *,
        coverage: str = "block",
        absorb: bool = False,
        **parameters: Any,
    ) -> None:
        given = {"keep": keep, "tokens": tokens, "layer": layer, "depth": depth}
        for name, value in {**given, "coverage": coverage, "absorb": absorb}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "selector", SELECTORS.make("Prune", "selector", selector, parameters))
        check_either("Prune", ("keep", keep), ("tokens", tokens))
        check_either("Prune", ("layer", layer), ("depth", depth))
        check_choice("Prune", "coverage", coverage, COVERAGES)
        set_number(self, "keep", 0.0, 1.0, "a number in [0, 1]", optional=True)
        set_number(self, "depth", ABOVE_ZERO, BELOW_ONE, "a number in (0, 1)", optional=True)
        set_integer(self, "tokens", 0, "a whole number of at least 0", optional=True)
        set_integer(self, "layer", -(1 << 31), "a whole number", optional=True)
        check_flag(self, "absorb")

    def __getattr__(self, name: str) -> Any:
        return parameter_of(self, "selector", name)

    def with_selector(self, selector: str | Selector, **parameters: Any) -> Prune:
        """The same prune, but the tokens picked by another selector, or by one with other parameters.

        Raises:
            ValueError: as for a new prune.

        >>> Prune(keep=0.5, layer=2, absorb=True).with_selector("random", seed=3).selector
        Random(seed=3)
        """
        changed = SELECTORS.make("Prune", "selector", selector, parameters)
        return dataclasses.replace(self, selector=changed)

    def decoder_layer(self, layers: int) -> int:
        """The index of the decoder layer before which this prune happens, out of `layers`.

        Raises:
            ValueError: there is no such layer.
        """
        check_whole("Prune", "layers", layers, 1)
        if self.layer is not None:
            return resolve_layer("Prune", self.layer, layers, "decoder layers")
        assert self.depth is not None
        return min(round_half_up(self.depth * layers), layers - 1)

    def count(self, fused: int) -> int:
        """How many visual tokens a row keeps, when `fused` entered the text sequence.

        Raises:
            ValueError: this prune would keep more.
        """
        if not is_whole(fused):
            refuse("Prune", "fused", fused, "a whole number")
        if self.tokens is None:
            assert self.keep is not None
            return 0 if self.keep == 0.0 else max(1, round_half_up(self.keep * fused))
        if self.tokens > fused:
            refuse("Prune", "tokens", self.tokens, f"at most {fused}, the visual tokens at the fusion")
        return self.tokens
