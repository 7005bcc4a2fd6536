"""What the front door may do with one call: shorten it, merge, or leave it alone, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache

from luvc_fx import _compat
from luvc_fx.generate.cache import PrunedCache, PrunedRows, is_empty, to_be_filled, unsupported
from luvc_fx.generate.families import family_of, modalities, pixels_in
from luvc_fx.generate.kept_logits import refusal_of_kept_logits
from luvc_fx.generate.options import keeping_argument, keeping_option, merged
from luvc_fx.report import Reason, Refusal
from luvc_fx.schedule import Schedule


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one call may do.

    Attributes:
        merge: whether the encoder may merge visual tokens.
        shorten: whether visual tokens may go at all; without it the call runs with all of them.
        rows: of the prompt that have images.
        placeholders: how many the prompt has of each modality, by its name; empty where nobody counted.
        rows_without_images: the others, whose left padding has room for as many tokens as the images have.
        decode_mode: the Inductor mode that transformers would compile the decoding of this call with.
        schedule: whose prunes say how many tokens stay in this call, instead of the model's.
    """

    merge: bool
    shorten: bool
    rows: int = 1
    rows_without_images: tuple[int, ...] = ()
    decode_mode: str | None = None
    placeholders: Mapping[str, int] = dataclasses.field(default_factory=dict)
    schedule: Schedule | None = None


FULL = CallLimits(merge=True, shorten=True)
UNMERGED = CallLimits(merge=False, shorten=True)
UNTOUCHED = CallLimits(merge=False, shorten=False)

Note = Callable[[Refusal], None]
"""Called with the reason for each limit; it may raise."""


def for_generate(model: Any, kwargs: dict[str, Any], note: Note) -> CallLimits:
    """What this `generate` call may do; each limit is noted."""
    keeping = keeping_argument(kwargs)
    options = GenerationConfig() if keeping else merged(model, kwargs)
    keeping = keeping or keeping_option(options)
    if keeping:
        if pixels_in(kwargs):
            note(Refusal(Reason.INPUTS, f"{keeping}: all visual tokens stay"))
        return UNTOUCHED
    cache = kwargs.get("past_key_values")
    is_static = options.cache_implementation == "static" or isinstance(cache, StaticCache)
    refused = _refusal_of_attention(model)
    refused = refused or _refusal_of_recording(model, options.output_attentions, cache)
    if refused is None and is_static:
        refused = _refusal_of_static(model)
    if refused is not None:
        note(refused)
        return UNTOUCHED
    if pixels_in(kwargs) and not family_of(model).generates_by_forward():
        text = "generate() is this model's own and does not come through forward(): all visual tokens stay"
        note(Refusal(Reason.INPUTS, text))
        return UNTOUCHED
    limits = for_images(model, kwargs, note)
    several = max(options.num_beams or 1, options.num_return_sequences or 1) > 1
    if limits.shorten and several and pixels_in(kwargs):
        if limits.rows_without_images:
            text = "num_beams or num_return_sequences above 1 beside rows without images"
            note(Refusal(Reason.UNEVEN_BATCH, f"{text}: all visual tokens stay"))
            return UNTOUCHED
        text = "num_beams or num_return_sequences above 1: transformers expands unmerged features only"
        note(Refusal(Reason.INPUTS, text + "; pruned, but not merged"))
        return UNMERGED
    return dataclasses.replace(limits, decode_mode=_decode_mode(model, options) if is_static else None)


def _refusal_of_static(model: Any) -> Refusal | None:
    """Why visual tokens must stay over a static cache, or None."""
    if not _compat.is_flash(model.config.get_text_config()):
        return None
    text = "a static cache under FlashAttention, which would read its empty rows; use a DynamicCache"
    return Refusal(Reason.CACHE, f"{text}: all visual tokens stay")


def _refusal_of_attention(model: Any) -> Refusal | None:
    """Why the rows of this decoder's FlashAttention cannot be followed, or None."""
    config = model.config.get_text_config()
    if not _compat.is_flash(config):
        return None
    name = _compat.attention_name(config)
    if not _compat.calls_flash_attn(config):
        text = f"attn_implementation={name!r} is not a call of the package flash-attn (2.7 or later)"
    elif has_windows(config):
        text = "sliding windows under FlashAttention, which count rows"
    else:
        return None
    return Refusal(Reason.NO_ATTENTION, f"{text}: all visual tokens stay")


def _refusal_of_recording(model: Any, output_attentions: object, cache: object) -> Refusal | None:
    """Why visual tokens must stay where attention weights are asked for, or None.

    Raises:
        NotImplementedError: the cache misses some already.
    """
    name = _compat.attention_name(model.config.get_text_config())
    if not output_attentions or name == "eager":
        return None
    text = f"output_attentions=True, at which attn_implementation={name!r} ends the graph"
    if isinstance(cache, PrunedRows):
        raise NotImplementedError(f"luvc_fx: {text}, over a cache with dropped visual tokens")
    return Refusal(Reason.INPUTS, f"{text}: all visual tokens stay")


def has_windows(config: Any) -> bool:
    """Whether a decoder layer sees a window only."""
    everywhere = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return bool(everywhere) or "sliding_attention" in (getattr(config, "layer_types", None) or ())


def _decode_mode(model: Any, options: GenerationConfig) -> str | None:
    """Over a static cache transformers compiles decoding itself: on a GPU, or with a `CompileConfig`."""
    config = options.compile_config
    if options.disable_compile or (config is None and model.device.type != "cuda"):
        return None
    mode = (CompileConfig() if config is None else config).mode
    return None if mode == "default" else mode


def for_images(model: Any, kwargs: dict[str, Any], note: Note) -> CallLimits:
    """What a call may do as far as its images and rows tell; each limit is noted.

    Args:
        kwargs: of `forward` or `generate`.
    """
    ids, mask = kwargs.get("input_ids", kwargs.get("inputs")), kwargs.get("attention_mask")
    if ids is None:
        note(Refusal(Reason.INPUTS, "inputs_embeds without input_ids: all visual tokens stay"))
        return UNTOUCHED
    known = modalities(model)
    for name in pixels_in(kwargs):
        if name not in {modality.pixels for modality in known}:
            # The forward encodes them itself, and nobody here would learn how many tokens they are.
            note(Refusal(Reason.INPUTS, f"{name} has no known encoder in this model: all visual tokens stay"))
            return UNTOUCHED
    if not pixels_in(kwargs):
        return dataclasses.replace(FULL, rows=ids.shape[0])
    counts = torch.stack(
        [(ids == getattr(model.config, modality.token)).sum(1) for modality in known], dim=1
    ).tolist()
    without_images = tuple(row for row, count in enumerate(counts) if not any(count))
    if len(without_images) == len(counts):  # the prompt is wrong, which its forward will say
        without_images = ()
    uneven = _why_uneven(kwargs, counts, without_images)
    if uneven:
        note(Refusal(Reason.UNEVEN_BATCH, f"{uneven}: all visual tokens stay"))
        return UNTOUCHED
    refused = refusal_of_kept_logits(model, kwargs)
    if refused is not None:
        note(refused)
        return UNTOUCHED
    later = refusal_of_later_images(model, kwargs)
    if later is not None:
        note(later)
        return dataclasses.replace(UNMERGED, rows=ids.shape[0])
    if mask is not None and mask.dim() != 2:
        note(Refusal(Reason.INPUTS, "an attention_mask that is not 2-D: pruned, but not merged"))
        return dataclasses.replace(UNMERGED, rows=ids.shape[0])
    if mask is not None and _compat.is_flash(model.config.get_text_config()):
        seen = mask != 0
        if bool((seen[:, 1:] < seen[:, :-1]).any()):
            text = (
                "an attention_mask with more than left padding, under FlashAttention: all visual tokens stay"
            )
            note(Refusal(Reason.INPUTS, text))
            return UNTOUCHED
    placeholders = {
        modality.name: sum(count) for modality, count in zip(known, zip(*counts, strict=True), strict=True)
    }
    return dataclasses.replace(
        FULL,
        rows=ids.shape[0] - len(without_images),
        rows_without_images=without_images,
        # Over a cache the ids may hold those of earlier turns, too.
        placeholders=placeholders if is_empty(kwargs.get("past_key_values")) else {},
    )


def _why_uneven(kwargs: dict[str, Any], counts: list[list[int]], without_images: tuple[int, ...]) -> str:
    """Why the rows of a batch cannot get shorter by the same number of rows, or nothing.

    Args:
        counts: of each row the visual tokens of each modality.
        without_images: the rows without any.
    """
    if any(count != max(counts) for row, count in enumerate(counts) if row not in without_images):
        return "rows with different numbers of visual tokens"
    if not without_images or len(without_images) == len(counts):
        return ""
    mask = kwargs.get("attention_mask")
    if not is_empty(kwargs.get("past_key_values")) or (mask is not None and mask.dim() != 2):
        return "rows without images beside others, over a cache or under a mask that is not 2-D"
    padding = 0 if mask is None else int((mask[list(without_images)].cumsum(1) == 0).sum(1).min())
    tokens = sum(max(counts))
    if padding < tokens:
        return (
            f"a row without images, with left padding of {padding} where the images of other rows have "
            f"{tokens} tokens (padding goes where they go)"
        )
    return ""


def refusal_of_later_images(model: Any, kwargs: dict[str, Any]) -> Refusal | None:
    """Why images of a later turn keep all their tokens, or None.

    Raises:
        NotImplementedError: the cache misses rows already, and the mask that the model would make over it
            is not the causal one (Gemma 3 and PaliGemma let an image's tokens see each other).
    """
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if is_empty(cache):
        return None
    own_masks = family_of(model).makes_own_masks()
    if own_masks and isinstance(cache, PrunedRows):
        raise NotImplementedError(
            f"luvc_fx: {type(model).__name__} makes attention masks of its own, and an image of a later turn "
            "would need one over a cache with dropped visual tokens"
        )
    if isinstance(cache, StaticCache):
        what = "a static cache"
    elif own_masks:
        what = "attention masks of the model's own and a cache"
    elif not isinstance(cache, PrunedCache) and isinstance(mask, Tensor) and mask.dim() != 2:
        what = f"a {mask.dim()}-D attention_mask and a cache"
    else:
        return None
    text = f"images of a later turn, over {what} that holds rows already: all their tokens stay"
    return Refusal(Reason.PAST_NOT_EMPTY, text)


def refusal_of_forward(model: Any, kwargs: dict[str, Any]) -> Refusal | None:
    """Why a forward must leave all visual tokens alone, or None.

    Args:
        kwargs: of the forward.
    """
    cache = kwargs.get("past_key_values")
    has_images = pixels_in(kwargs) or kwargs.get("mm_encoder_outputs")
    filled = to_be_filled(model, kwargs) if has_images else cache
    refused = unsupported(filled) or _refusal_of_attention(model)
    if refused is None:
        refused = _refusal_of_recording(model, kwargs.get("output_attentions"), cache)
    if refused is None and isinstance(cache, StaticCache):
        refused = _refusal_of_static(model)
    if refused is None and model.training:
        return Refusal(Reason.TRAINING, "the model is in training mode; call model.eval()")
    return refused
