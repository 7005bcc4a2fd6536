"""How visual tokens merge in the encoder: one merger a file, each with its parameters, found by its name."""

from __future__ import annotations

from luvc_fx.mergers.base import FEATURES, MERGERS, Merger, PatchGrid, Shortening

MERGERS.discover(__name__, __path__)

__all__ = ["FEATURES", "MERGERS", "Merger", "PatchGrid", "Shortening"]
