"""What to do at which site: a `Schedule` is data, not code.

A schedule names merges (OIM, inside the vision encoder) and prunes (SPU or another selector, between
decoder layers). It is frozen, hashable, equal by value and serialisable, so it can be part of a cache key.
The method is LUVC (arXiv 2512.09010); its full text was not available to us, so every number in a preset
is ours, chosen by measurement, and `Schedule.luvc` is our literal reading of the abstract.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luvc_fx.methods.checks import check_choice, check_whole, is_number, refuse
from luvc_fx.schedule.as_json import check_keys, read_items, write_item
from luvc_fx.schedule.budget import rescaled, share_bounds
from luvc_fx.schedule.json_text import parse
from luvc_fx.schedule.merge import Merge
from luvc_fx.schedule.presets import LUVC, PRESETS, cascaded
from luvc_fx.schedule.prune import Prune

JSON_VERSION = 1

MOST_LAYERS = 1 << 16
"""Of a decoder for which `Schedule.at_budget` looks for a cascade."""

KINDS = ("image", "video", "document")
"""The inputs for which there are presets."""


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
        methods = {merge.method.name for merge in self.merge}
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
        return cls(**PRESETS[name])

    @classmethod
    def at_budget(cls, budget: float, layers: int) -> Schedule:
        """The cascade of that mean budget with the presets' pick: the default of `luvc-fx eval`.

        Args:
            budget: mean over the decoder layers of the visual tokens that enter, over the original.
            layers: of the decoder, at most 65536: ``model.config.get_text_config().num_hidden_layers``.

        Raises:
            ValueError: for a budget that no cascade to zero has in so many layers, or what is no number.

        >>> [(prune.layer, prune.keep) for prune in Schedule.at_budget(0.25, 16).prune]
        [(1, 0.5), (3, 0.25), (7, 0.125), (15, 0.0)]
        """
        check_whole("Schedule", "layers", layers, 1)
        if layers > MOST_LAYERS:
            refuse("Schedule", "layers", layers, f"at most {MOST_LAYERS}")
        prunes = cascaded(budget, layers) if is_number(budget) else None
        if prunes is None:
            most = (layers - 1) / layers if layers > 1 else 0
            allowed = f"above 0 and at most {most:g}, as no token enters the last of {layers} layers"
            refuse("Schedule", "budget", budget, allowed)
        return cls(prune=prunes)

    def with_budget(self, budget: float, layers: int) -> Schedule:
        """The same merges and prunes, but every `keep` of the prunes multiplied so that the budget is this.

        Args:
            budget: mean over the decoder layers of the visual tokens that enter, over the original.
            layers: of the decoder: ``model.config.get_text_config().num_hidden_layers``.

        Raises:
            ValueError: no factor gives that budget, prunes or merges count tokens instead of shares, or there
                are no prunes.

        >>> [prune.keep for prune in Schedule.at_budget(0.25, 16).with_budget(0.2, 16).prune]
        [0.366..., 0.183..., 0.091..., 0.0]
        """
        check_whole("Schedule", "layers", layers, 1)
        sites = self.prunes_at(layers)
        places = [(layer, prune.keep) for layer, prune in sites if prune.keep is not None]
        shares = [merge.keep for merge in self.merge if merge.keep is not None]
        if not sites or len(places) < len(sites) or len(shares) < len(self.merge):
            allowed = "for a schedule whose prunes and merges keep shares (`keep`), with one prune at least"
            refuse("Schedule", "budget", budget, allowed)
        merged = math.prod(shares)
        keeps = rescaled(places, layers, budget / merged) if is_number(budget) else None
        if keeps is None:
            least, most = (merged * share for share in share_bounds(places, layers))
            refuse(
                "Schedule", "budget", budget, f"above {least:.3g} and at most {most:.3g} for this schedule"
            )
        changed = [
            dataclasses.replace(prune, keep=keep) for (_, prune), keep in zip(sites, keeps, strict=True)
        ]
        return dataclasses.replace(self, prune=tuple(changed))

    @classmethod
    def luvc(cls, name: str) -> Schedule:
        """LUVC read literally: low-pass energy, global top-k, a cascade to zero visual tokens.

        Layers and ratios are not given by the abstract; these are our guesses, kept for comparison.
        """
        check_choice("Schedule", "luvc", name, KINDS)
        return cls(**LUVC[name])

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
            body[field] = [write_item(item) for item in getattr(self, field)]
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, an unknown version, an unknown key, or a value that is not allowed.
        """
        if not isinstance(text, (str, bytes, bytearray)):
            refuse("Schedule", "JSON", text, "a text")
        try:
            body = parse(text)
        except ValueError as error:
            raise ValueError(f"a schedule must be JSON: {error}") from None
        if not isinstance(body, Mapping):
            refuse("Schedule", "JSON", body, "an object with version, merge and prune")
        version = body.get("version")
        if type(version) is not int or version != JSON_VERSION:
            refuse("Schedule", "version", version, str(JSON_VERSION))
        check_keys("Schedule", body, {"version", "merge", "prune"})
        return cls(
            merge=read_items("merge", Merge, body.get("merge", [])),
            prune=read_items("prune", Prune, body.get("prune", [])),
        )

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule from a JSON file. Raises `OSError` or `ValueError`."""
        if not isinstance(path, (str, os.PathLike)):
            refuse("Schedule", "path", path, "a path")
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _amount(prune: Prune) -> str:
    return f"tokens={prune.tokens}" if prune.keep is None else f"keep={prune.keep}"
