"""The cache of a prompt that was shortened: it holds fewer rows than the conversation, and counts all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from luvc_fx.report import Reason, Refusal


class PrunedRows:
    """A cache whose layers hold fewer rows than the conversation has.

    `get_seq_length` counts the dropped rows too, so that position ids and the slicing of a second turn
    continue where the conversation is. Each layer's own keys and values say how many rows it holds.

    Operations on the rows of the batch (`reorder_cache`, `batch_select_indices`, `batch_repeat_interleave`),
    copies and pickles take along what is known of each row; `reset` makes the stock cache of it again. What
    needs the same rows in every layer is refused by name.
    """

    dropped_rows: int = 0
    """Rows of the conversation that are missing in layer 0: those merged away."""

    without_images: tuple[bool, ...] = ()
    """For each row of the batch whether it has no images, beside others that have: it lost left padding where
    those lost visual tokens. Empty where no row is such a one."""

    is_croppable = False

    @property
    def rows_without_images(self) -> tuple[int, ...]:
        """Those of the batch, as numbers."""
        return tuple(row for row, without in enumerate(self.without_images) if without)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Rows of the conversation so far, dropped ones included: an int, of a static cache a tensor."""
        held: Any = super().get_seq_length()  # type: ignore[misc]
        return held + self.dropped_rows if self.dropped_rows else held

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the batch be the rows `beam_idx` ``[B']`` of it; waits for them if some have no images."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows `indices` of the batch; waits for them if some have no images."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row of the batch `repeats` times, one behind the other."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.without_images = tuple(without for without in self.without_images for _ in range(repeats))

    def _take(self, rows: Any) -> None:
        if self.without_images:
            rows = rows.cpu() if isinstance(rows, Tensor) else rows
            kept = torch.tensor(self.without_images)[rows].tolist()
            self.without_images = tuple(kept) if any(kept) else ()

    def reset(self) -> None:
        """Empty it for another conversation."""
        super().reset()  # type: ignore[misc]
        vars(self).pop("dropped_rows", None)
        vars(self).pop("without_images", None)

    def crop(self, *args: object, **kwargs: object) -> None:
        """Raises `NotImplementedError`: which rows a length means differs from layer to layer."""
        raise NotImplementedError("luvc_fx: a cache with dropped visual tokens cannot be cropped")


class PrunedCache(PrunedRows, DynamicCache):
    """A `DynamicCache` whose layers hold fewer rows than the conversation has."""

    def __iter__(self) -> Iterator[Any]:
        """Raises `NotImplementedError`: keys and values alone do not tell how many rows were dropped."""
        raise NotImplementedError(
            "luvc_fx: a cache with dropped visual tokens cannot be made anew from its keys and values; "
            "copy it with copy.deepcopy"
        )

    def reset(self) -> None:
        """Empty it for another conversation; it is a `DynamicCache` again."""
        super().reset()
        self.__class__ = DynamicCache  # type: ignore[assignment]


class PrunedStaticCache(PrunedRows, StaticCache):
    """A `StaticCache` whose layers hold fewer rows than the conversation has.

    Each layer has less room than was asked for, by as many rows as were dropped before it.
    """

    def reset(self) -> None:
        """Empty it for another conversation, which may need the room that the first one did not.

        It is a `StaticCache` again.
        """
        super().reset()
        for layer in layers_of(self):
            layer.max_cache_len += vars(layer).pop("luvc_dropped", 0)
            layer.is_initialized = False
        self.__class__ = StaticCache  # type: ignore[assignment]


def adopt(cache: object, rows: int) -> None:
    """Turn a cache that holds fewer than the `rows` of its conversation into a `PrunedCache`, in place.

    One with layers of other kinds stays as it is: no prompt is shortened that fills one.
    """
    if not isinstance(cache, DynamicCache) or not cache.layers or unsupported(cache) is not None:
        return
    lengths = [layer.get_seq_length() for layer in layers_of(cache)]
    if any(length < rows for length in lengths):
        as_pruned(cache).dropped_rows = rows - lengths[0]
    elif isinstance(cache, PrunedCache):
        cache.__class__ = DynamicCache  # type: ignore[assignment]


def note_rows_without_images(cache: object, rows: tuple[int, ...]) -> None:
    """Let a shortened cache know these rows of its batch, which have no images where others have some."""
    if rows and isinstance(cache, PrunedRows):
        batch = layers_of(cache)[0].keys.shape[0]  # type: ignore[arg-type]
        cache.without_images = tuple(row in rows for row in range(batch))


def as_pruned(cache: DynamicCache) -> PrunedCache:
    """Turn a cache into a `PrunedCache` in place, whether or not it has dropped any rows yet."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = PrunedCache
    return cache  # type: ignore[return-value]


def fill(cache: StaticCache, filled: DynamicCache, rows: int) -> None:
    """Write what a prompt of `rows` rows left in `filled` to an empty static cache, in place.

    A layer that has no memory yet gets less of it, by as many rows as were dropped before it.
    """
    dropped = [rows - layer.keys.shape[-2] for layer in layers_of(filled)]
    for layer, source, fewer in zip(layers_of(cache), layers_of(filled), dropped, strict=True):
        if fewer and not layer.is_initialized:
            layer.max_cache_len -= fewer
            layer.luvc_dropped = fewer
        layer.update(source.keys, source.values)
    if any(dropped):
        cache.__class__ = PrunedStaticCache
        cache.dropped_rows = dropped[0]  # type: ignore[attr-defined]


def layers_of(cache: Cache) -> list[Any]:
    """Its layers, of one of the kinds that `unsupported` lets through."""
    return list(cache.layers)


def is_empty(cache: Any) -> bool:
    """Whether a cache holds nothing yet; asking a static one that has its memory waits for the device."""
    if cache is None:
        return True
    if isinstance(cache, StaticCache) and not any(layer.is_initialized for layer in layers_of(cache)):
        return True
    return bool(cache.get_seq_length() == 0)


def to_be_filled(model: Any, kwargs: dict[str, Any]) -> Cache | None:
    """The cache that a forward fills: the given one, or one like its decoder makes; None where it keeps none.

    Args:
        kwargs: of the forward.
    """
    given: Cache | None = kwargs.get("past_key_values")
    config = model.config.get_text_config(decoder=True)
    if given is not None or not uses_cache(model, kwargs) or config.is_encoder_decoder:
        return given
    return DynamicCache(config=config)


def uses_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the decoder keeps keys and values: as the call says, or else as the config does."""
    given = kwargs.get("use_cache")
    return bool(getattr(model.config.get_text_config(), "use_cache", False) if given is None else given)


_KNOWN = {DynamicCache: {"DynamicLayer"}, StaticCache: {"StaticLayer"}}


def unsupported(cache: object) -> Refusal | None:
    """Why visual tokens must stay when this cache is filled, or None."""
    if cache is None or isinstance(cache, PrunedRows):
        return None
    kinds = {type(layer).__name__ for layer in cache.layers} if isinstance(cache, Cache) else set()
    known = kinds <= _KNOWN.get(type(cache), set()) and (kinds or type(cache) is DynamicCache)
    if known and not getattr(cache, "offloading", False):
        return None
    names = ", ".join(sorted(kinds)) or "no layers yet"
    names = f"offloaded, {names}" if getattr(cache, "offloading", False) else names
    return Refusal(
        Reason.CACHE,
        f"{type(cache).__name__} ({names}) needs the same rows in every layer; use a DynamicCache or "
        "StaticCache of full attention layers",
    )
