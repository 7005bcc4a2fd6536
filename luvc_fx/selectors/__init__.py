"""Which visual tokens a prune keeps: one selector a file, each with its parameters, found by its name."""

from __future__ import annotations

from luvc_fx.selectors.base import SELECTORS, Selector, Site
from luvc_fx.selectors.choose import choose, choose_mask
from luvc_fx.selectors.own import (
    OwnSelector,
    SelectorFunction,
    register,
    selector_fingerprint,
    unregister,
)

SELECTORS.discover(__name__, __path__)

SHIPPED = SELECTORS.names()
"""The names of the selectors that come with luvc_fx: `register` adds others."""


def registered() -> tuple[str, ...]:
    """All names that a schedule may give, those that come with luvc_fx first."""
    return SELECTORS.names()


__all__ = [
    "SELECTORS",
    "SHIPPED",
    "OwnSelector",
    "Selector",
    "SelectorFunction",
    "Site",
    "choose",
    "choose_mask",
    "register",
    "registered",
    "selector_fingerprint",
    "unregister",
]
