"""What to do at which site: a `Schedule` is data, not code.

A schedule names merges (OIM, inside the vision encoder) and prunes (SPU or a control, between decoder
layers). It is frozen, hashable, equal by value and serialisable, so it can be part of a cache key.
The method is LUVC (arXiv 2512.09010); its full text was not available to us, so every number in a preset
is ours, chosen by measurement, and `Schedule.luvc` is our literal reading of the abstract.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luvc_fx.ops.lowpass import REALIZATIONS
from luvc_fx.ops.oim import AXES, PAIRINGS
from luvc_fx.ops.rounding import round_half_up
from luvc_fx.ops.spu import ENERGIES, NORMALIZATIONS
from luvc_fx.registry import registered
from luvc_fx.schedule.checks import (
    ABOVE_ZERO,
    BELOW_ONE,
    check_choice,
    check_either,
    check_flag,
    refuse,
    set_integer,
    set_number,
)

JSON_VERSION = 1

FEATURES = ("hidden", "keys")
METHODS = ("oim", "tome")
SELECTORS = (
    "spectrum",
    "random",
    "random-block",
    "uniform",
    "norm",
    "fastv",
    "diversity",
    "distinct",
    "pact",
)
"""Those that come with luvc_fx; `luvc_fx.selectors.register` adds to them."""
COVERAGES = ("block", "global")
KINDS = ("image", "video", "document")


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge visual tokens along one axis of their grid, after one encoder block (an OIM step).

    ``method="tome"`` is a control in its place. It leaves as many tokens, on a grid of the same shape, but
    merges the most similar pairs of the whole grid, whatever the axis, and its tokens come in ToMe's order:
    where that grid is read afterwards, neighbours on it are none in the picture.

    Args:
        axis: ``"width"`` or ``"height"``: the axis that gets shorter.
        keep: fraction of that axis, as it then is, that is left; in (0, 1]. Or `length`.
        length: number of positions left on that axis, at least 1.
        layer: the encoder block after which tokens merge; negative counts from the end. Or `depth`.
        depth: fraction in (0, 1) of the encoder blocks that run before the merge.
        pairing: ``"line"`` lets each line along the axis choose its own pairs; ``"shared"`` chooses
            on the similarity averaged over an image's lines, so that whole columns (or rows) merge.
        feature: what similarity compares, ``"hidden"`` states or the ``"keys"`` of the same block (for
            ToMe, their mean over the heads, which is what its authors compare).
        method: ``"oim"``, or ``"tome"``, for which `pairing` plays no part. ToMe's proportional attention
            is left out in both: later blocks do not weigh a token by its size.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    axis: str
    keep: float | None = None
    length: int | None = None
    layer: int | None = None
    depth: float | None = None
    pairing: str = "line"
    feature: str = "hidden"
    method: str = "oim"

    def __post_init__(self) -> None:
        check_choice("Merge", "axis", self.axis, AXES)
        check_choice("Merge", "pairing", self.pairing, PAIRINGS)
        check_choice("Merge", "feature", self.feature, FEATURES)
        check_choice("Merge", "method", self.method, METHODS)
        check_either("Merge", ("keep", self.keep), ("length", self.length))
        check_either("Merge", ("layer", self.layer), ("depth", self.depth))
        set_number(self, "keep", ABOVE_ZERO, 1.0, "a number in (0, 1]", optional=True)
        set_number(self, "depth", ABOVE_ZERO, BELOW_ONE, "a number in (0, 1)", optional=True)
        set_integer(self, "length", 1, "a whole number of at least 1", optional=True)
        set_integer(self, "layer", -(1 << 31), "a whole number", optional=True)

    def block(self, blocks: int) -> int:
        """The index of the encoder block after which this merge happens, out of `blocks`."""
        if self.layer is not None:
            return _resolve("Merge", self.layer, blocks, "encoder blocks")
        assert self.depth is not None
        return min(max(round_half_up(self.depth * blocks) - 1, 0), blocks - 1)

    def target(self, length: int) -> int:
        """The length of the axis after the merge, when it is `length` before it."""
        if self.length is None:
            assert self.keep is not None
            return max(1, round_half_up(self.keep * length))
        if self.length > length:
            refuse("Merge", "length", self.length, f"at most {length}, the {self.axis} of the grid there")
        return self.length


@dataclass(frozen=True, slots=True)
class Prune:
    """Drop visual tokens before one decoder layer (an SPU step, or a control in its place).

    Args:
        keep: fraction of the visual tokens *at the fusion* that is left; in [0, 1]. Or `tokens`.
        tokens: number of visual tokens left in each row, at least 0.
        layer: the decoder layer before which tokens go; negative counts from the end. Or `depth`.
        depth: fraction in (0, 1) of the decoder layers that run before the prune.
        selector: ``"spectrum"`` (SPU), ``"random"``, ``"random-block"`` (random scores, under `coverage`),
            ``"uniform"``, ``"norm"`` (the largest sum of squares), ``"fastv"`` (the most attention of the
            last token in the layer before), ``"diversity"`` (the least like a few pivots), ``"distinct"``
            (the spectrum times the diversity), ``"pact"`` (centres of clusters), or a name given to
            `luvc_fx.selectors.register`.
        energy: what the spectrum ranks by: ``"residual"`` (what the low-pass cannot rebuild),
            ``"lowpass"`` or ``"ratio"`` (lowpass over total).
        coverage: ``"block"`` keeps the best of each block of neighbours, ``"global"`` the best of all.
        cutoff: sigma in (0, 1], the fraction of the frequency bins that the low-pass lets through.
        seed: of the random selectors.
        normalize: what happens to the tokens before the spectrum's filter. ``"mean"`` subtracts each
            channel's mean over the tokens that are filtered together, ``"rms"`` divides each token by
            the root of its mean square over the channels.
        per_image: the spectrum filters each image's tokens by themselves while all of them are there.
        realization: how the spectrum's filter is computed: ``"fft"``, ``"basis"`` (the same as two
            thin matrix products), ``"fir"`` (a short convolution) or ``"auto"``.
        absorb: each token that goes is averaged into the one that stays and is most like it (cosine of the
            hidden states), whatever the selector. That one keeps its place and position.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    keep: float | None = None
    tokens: int | None = None
    layer: int | None = None
    depth: float | None = None
    selector: str = "spectrum"
    energy: str = "residual"
    coverage: str = "block"
    cutoff: float = 0.25
    seed: int = 0
    normalize: str = "none"
    per_image: bool = False
    realization: str = "auto"
    absorb: bool = False

    def __post_init__(self) -> None:
        check_either("Prune", ("keep", self.keep), ("tokens", self.tokens))
        check_either("Prune", ("layer", self.layer), ("depth", self.depth))
        set_number(self, "keep", 0.0, 1.0, "a number in [0, 1]", optional=True)
        set_number(self, "depth", ABOVE_ZERO, BELOW_ONE, "a number in (0, 1)", optional=True)
        set_integer(self, "tokens", 0, "a whole number of at least 0", optional=True)
        set_integer(self, "layer", -(1 << 31), "a whole number", optional=True)
        names = dict.fromkeys((*SELECTORS, *registered()))  # ours first, and before they are registered
        check_choice("Prune", "selector", self.selector, tuple(names))
        check_choice("Prune", "energy", self.energy, ENERGIES)
        check_choice("Prune", "coverage", self.coverage, COVERAGES)
        set_number(self, "cutoff", ABOVE_ZERO, 1.0, "a number in (0, 1]")
        set_integer(self, "seed", 0, "a whole number of at least 0")
        check_choice("Prune", "normalize", self.normalize, NORMALIZATIONS)
        check_flag(self, "per_image")
        check_choice("Prune", "realization", self.realization, REALIZATIONS)
        check_flag(self, "absorb")

    def decoder_layer(self, layers: int) -> int:
        """The index of the decoder layer before which this prune happens, out of `layers`."""
        if self.layer is not None:
            return _resolve("Prune", self.layer, layers, "decoder layers")
        assert self.depth is not None
        return min(round_half_up(self.depth * layers), layers - 1)

    def count(self, fused: int) -> int:
        """How many visual tokens a row keeps, when `fused` entered the text sequence."""
        if self.tokens is None:
            assert self.keep is not None
            return 0 if self.keep == 0.0 else max(1, round_half_up(self.keep * fused))
        if self.tokens > fused:
            refuse("Prune", "tokens", self.tokens, f"at most {fused}, the visual tokens at the fusion")
        return self.tokens


def _resolve(owner: str, layer: int, count: int, what: str) -> int:
    if not -count <= layer < count:
        refuse(owner, "layer", layer, f"{-count} to {count - 1}, as the model has {count} {what}")
    return layer % count


@dataclass(frozen=True, slots=True)
class Schedule:
    """Merges and prunes, each in the order in which they happen.

    >>> Schedule(prune=(Prune(keep=0.5, layer=2), Prune(keep=0.0, layer=-1)))  # doctest: +ELLIPSIS
    Schedule(merge=(), prune=(Prune(keep=0.5, ...

    Raises:
        ValueError: for items of the wrong kind, merges of different methods, two items at one place, or a
            keep that grows.
    """

    merge: tuple[Merge, ...] = ()
    prune: tuple[Prune, ...] = ()

    def __post_init__(self) -> None:
        for field, kind in (("merge", Merge), ("prune", Prune)):
            items = getattr(self, field)
            if isinstance(items, kind):
                items = (items,)
            if not isinstance(items, (tuple, list)) or not all(isinstance(i, kind) for i in items):
                refuse("Schedule", field, items, f"a tuple of {kind.__name__}")
            object.__setattr__(self, field, tuple(items))
        methods = {merge.method for merge in self.merge}
        if len(methods) > 1:
            refuse("Schedule", "merge", sorted(methods), "one Merge.method for all merges")

    def merges_at(self, blocks: int) -> tuple[tuple[int, Merge], ...]:
        """``(encoder block, merge)`` pairs, by block and then as listed.

        Raises:
            ValueError: a block that is not there, or one axis twice after one block.
        """
        sites = sorted(((m.block(blocks), m) for m in self.merge), key=lambda site: site[0])
        seen: set[tuple[int, str]] = set()
        for block, merge in sites:
            if (block, merge.axis) in seen:
                raise ValueError(
                    f"Schedule.merge has {merge.axis} twice after encoder block {block}; "
                    "allowed: each axis once after a block"
                )
            seen.add((block, merge.axis))
        return tuple(sites)

    def prunes_at(self, layers: int, fused: int | None = None) -> tuple[tuple[int, Prune], ...]:
        """``(decoder layer, prune)`` pairs by layer; with `fused` visual tokens, counts are checked.

        Raises:
            ValueError: a layer that is not there, two prunes at one layer, or a count that grows.
        """
        sites = sorted(((p.decoder_layer(layers), p) for p in self.prune), key=lambda site: site[0])
        for (before, first), (after, second) in itertools.pairwise(sites):
            if before == after:
                raise ValueError(
                    f"Schedule.prune has two items before decoder layer {after}; allowed: one a layer"
                )
            grows = first.keep is not None and second.keep is not None and second.keep > first.keep
            if fused is not None:
                grows = second.count(fused) > first.count(fused)
            if grows:
                raise ValueError(
                    f"Schedule.prune keeps more before decoder layer {after} ({_amount(second)}) than is "
                    f"left from layer {before} ({_amount(first)}); allowed: counts that never grow"
                )
        if fused is not None and sites:
            sites[0][1].count(fused)
        return tuple(sites)

    @classmethod
    def preset(cls, name: str) -> Schedule:
        """Our own schedule for ``"image"``, ``"video"`` or ``"document"`` input."""
        check_choice("Schedule", "preset", name, KINDS)
        from luvc_fx.schedule.presets import PRESETS  # they are schedules themselves

        return PRESETS[name]

    @classmethod
    def at_budget(cls, budget: float, layers: int) -> Schedule:
        """The cascade of that mean budget with the presets' pick: the default of `luvc-fx eval`.

        Args:
            budget: mean over the decoder layers of the visual tokens that enter, over the original.
            layers: of the decoder, ``model.config.get_text_config().num_hidden_layers``.

        Raises:
            ValueError: for a budget that no cascade to zero has in so many layers.

        >>> [(prune.layer, prune.keep) for prune in Schedule.at_budget(0.25, 16).prune]
        [(1, 0.5), (3, 0.25), (7, 0.125), (15, 0.0)]
        """
        from luvc_fx.schedule.presets import cascaded

        schedule = cascaded(budget, layers)
        if schedule is None:
            most = (layers - 1) / layers if layers > 1 else 0
            allowed = f"above 0 and at most {most:g}, as no token enters the last of {layers} layers"
            refuse("Schedule", "budget", budget, allowed)
        return schedule

    @classmethod
    def luvc(cls, name: str) -> Schedule:
        """LUVC read literally: low-pass energy, global top-k, a cascade to zero visual tokens.

        Layers and ratios are not given by the abstract; these are our guesses, kept for comparison.
        """
        check_choice("Schedule", "luvc", name, KINDS)
        from luvc_fx.schedule.presets import LUVC

        return LUVC[name]

    @classmethod
    def of(cls, value: Schedule | str) -> Schedule:
        """`value` itself, or the preset of that name.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            refuse("luvc_fx", "schedule", value, "a Schedule or the name of a preset")
        return cls.preset(value)

    def to_json(self) -> str:
        """One JSON object with a version; `from_json` gives an equal schedule back."""
        body: dict[str, Any] = {"version": JSON_VERSION}
        for field in ("merge", "prune"):
            body[field] = [
                {k: v for k, v in dataclasses.asdict(item).items() if v is not None}
                for item in getattr(self, field)
            ]
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, an unknown version, an unknown key, or a value that is not allowed.
        """
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a schedule must be JSON: {error}") from None
        if not isinstance(body, Mapping):
            refuse("Schedule", "JSON", body, "an object with version, merge and prune")
        version = body.get("version")
        if type(version) is not int or version != JSON_VERSION:
            refuse("Schedule", "version", version, str(JSON_VERSION))
        _check_keys("Schedule", body, {"version", "merge", "prune"})
        return cls(
            merge=_read_items("merge", Merge, body.get("merge", [])),
            prune=_read_items("prune", Prune, body.get("prune", [])),
        )

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule from a JSON file. Raises `OSError` or `ValueError`."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _amount(prune: Prune) -> str:
    return f"tokens={prune.tokens}" if prune.keep is None else f"keep={prune.keep}"


def _check_keys(owner: str, body: Mapping[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(body) - allowed)
    if unknown:
        raise ValueError(f"{owner} has unknown keys {unknown}; allowed: {sorted(allowed)}")


def _read_items(field: str, kind: type, items: object) -> tuple[Any, ...]:
    if not isinstance(items, list) or not all(isinstance(i, Mapping) for i in items):
        refuse("Schedule", field, items, "a list of objects")
    for item in items:
        _check_keys(kind.__name__, item, {f.name for f in dataclasses.fields(kind)})
        if kind is Merge and "axis" not in item:
            refuse("Merge", "axis", None, ", ".join(repr(a) for a in AXES))
    return tuple(kind(**item) for item in items)
