"""The cache of a prompt that was shortened: shorter than the conversation, and honest about it."""

from __future__ import annotations

from transformers import Cache, DynamicCache

from luvc_fx.report import Reason, Refusal


class PrunedCache(DynamicCache):
    """A `DynamicCache` whose layers hold fewer rows than the prompt had.

    `get_seq_length` counts the dropped rows too, so that position ids and the slicing of a second turn
    continue where the conversation is; each layer's own keys and values say what it really holds.
    """

    dropped_rows: int = 0
    """Rows of the conversation that are missing in layer 0: those merged away."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows of the conversation so far, dropped ones included."""
        return super().get_seq_length() + self.dropped_rows

    def crop(self, *args: object, **kwargs: object) -> None:
        """Raises `NotImplementedError`: which rows a length means differs from layer to layer."""
        raise NotImplementedError("luvc_fx: a cache with dropped visual tokens cannot be cropped")


def adopt(cache: object, rows: int) -> None:
    """Turn the cache that a shortened prompt of `rows` rows filled into a `PrunedCache`, in place."""
    if type(cache) is not DynamicCache:
        return
    lengths = [DynamicCache.get_seq_length(cache, number) for number in range(len(cache.layers))]
    if any(length < rows for length in lengths):
        cache.__class__ = PrunedCache
        cache.dropped_rows = rows - lengths[0]  # type: ignore[attr-defined]


def unsupported(cache: object) -> Refusal | None:
    """Why visual tokens must stay when this cache is filled, or None."""
    if cache is None or isinstance(cache, PrunedCache):
        return None
    kinds = {type(layer).__name__ for layer in cache.layers} if isinstance(cache, Cache) else set()
    if type(cache) is DynamicCache and kinds <= {"DynamicLayer"}:
        return None
    names = ", ".join(sorted(kinds)) or "no layers yet"
    return Refusal(
        Reason.CACHE, f"{type(cache).__name__} ({names}) needs the same rows in every layer; use DynamicCache"
    )
