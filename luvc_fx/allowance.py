"""What the front door may do with one call: shorten it, merge, or leave it alone, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luvc_fx.cache import unsupported
from luvc_fx.encoders import modalities
from luvc_fx.report import Reason, Refusal

PLAIN = (
    ("prefill_chunk_size", (None,)),
    ("assistant_model", (None,)),
    ("prompt_lookup_num_tokens", (None,)),
    ("cache_implementation", (None, "dynamic")),
    ("use_cache", (None, True)),
)
"""Options of `generate`, and the values with which tokens may go."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What one call may do, with a prompt of `rows` rows."""

    merge: bool
    shorten: bool
    rows: int = 1


ALL = Allowed(merge=True, shorten=True)
UNMERGED = Allowed(merge=False, shorten=True)
NOTHING = Allowed(merge=False, shorten=False)

Note = Callable[[Refusal], None]
"""Where limits are noted; it may raise."""


def for_generate(model: Any, kwargs: dict[str, Any], note: Note) -> Allowed:
    """What this `generate` call may do; each limit is noted."""
    config = kwargs.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    for name, plain_values in PLAIN:
        if option(name) not in plain_values:
            note(Refusal(Reason.INPUTS, f"{name}={option(name)!r}: all visual tokens stay"))
            return NOTHING
    if (option("num_beams") or 1) > 1 or (option("num_return_sequences") or 1) > 1:
        text = "num_beams or num_return_sequences above 1: transformers expands unmerged features only"
        note(Refusal(Reason.INPUTS, text + "; pruned, but not merged"))
        return UNMERGED
    allowed = for_images(model, kwargs, note)
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return dataclasses.replace(allowed, merge=False)
    return allowed


def pixels_in(kwargs: dict[str, Any]) -> list[str]:
    """The arguments that bring images or videos."""
    return [name for name, given in kwargs.items() if name.startswith("pixel_values") and given is not None]


def for_images(model: Any, kwargs: dict[str, Any], note: Note) -> Allowed:
    """Whether each row has the same number of visual tokens, and a prompt that can be cut."""
    ids, mask = kwargs.get("input_ids", kwargs.get("inputs")), kwargs.get("attention_mask")
    if ids is None:
        note(Refusal(Reason.INPUTS, "inputs_embeds without input_ids: all visual tokens stay"))
        return NOTHING
    kinds = modalities(model)
    for name in pixels_in(kwargs):
        if name not in {kind.pixels for kind in kinds}:
            # Encoded in the text graph, out of sight of what counts its tokens and adopts its cache.
            note(Refusal(Reason.INPUTS, f"{name} has no known encoder in this model: all visual tokens stay"))
            return NOTHING
    uneven = False
    for kind in kinds:
        counts = (ids == getattr(model.config, kind.token)).sum(1)
        uneven = uneven or int(counts.min()) != int(counts.max())
    if uneven:
        text = "rows with different numbers of visual tokens: all visual tokens stay"
        note(Refusal(Reason.UNEVEN_BATCH, text))
        return NOTHING
    if mask is not None and mask.dim() != 2:
        note(Refusal(Reason.INPUTS, "an attention_mask that is not 2-D: pruned, but not merged"))
        return dataclasses.replace(UNMERGED, rows=ids.shape[0])
    return dataclasses.replace(ALL, rows=ids.shape[0])


def refusal_of_forward(model: Any, cache: object) -> Refusal | None:
    """Why a forward must leave all visual tokens alone, or None."""
    refused = unsupported(cache)
    if refused is None and model.training:
        return Refusal(Reason.TRAINING, "the model is in training mode; call model.eval()")
    return refused
