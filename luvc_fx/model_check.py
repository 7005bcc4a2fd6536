"""Errors that can be seen before anything compiles: the model's kind, and a schedule it cannot follow."""

from __future__ import annotations

import inspect
from typing import Any

from luvc_fx.schedule import Schedule


def check_supported(model: Any) -> None:
    """Raise `ValueError` unless `luvc_fx.compile` knows how this model generates."""
    base = getattr(model, "base_model", None)
    missing = [
        what
        for what, there in (
            ("generate()", hasattr(model, "generate")),
            ("get_image_features()", hasattr(base, "get_image_features")),
            ("forward(pixel_values=...)", _takes_images(model)),
            ("config.image_token_id", hasattr(getattr(model, "config", None), "image_token_id")),
        )
        if not there
    ]
    if missing:
        raise ValueError(
            f"luvc_fx.compile cannot wire {type(model).__name__}: it has no {', '.join(missing)}. "
            "For forward calls use torch.compile(model, backend=luvc_fx.backend(schedule))."
        )


def _takes_images(model: Any) -> bool:
    return "pixel_values" in inspect.signature(model.forward).parameters


def check_schedule(model: Any, schedule: Schedule) -> None:
    """Raise `ValueError` for a layer or a length that the model's config shows to be impossible.

    Only sizes that the config states are checked; the graph has the last word.
    """
    config = model.config
    text = config.get_text_config()
    schedule.prunes_at(text.num_hidden_layers)
    vision = getattr(config, "vision_config", None)
    tap = getattr(config, "vision_feature_layer", None)
    if vision is None or not isinstance(tap, int):
        return
    blocks = vision.num_hidden_layers + 1 + tap if tap < 0 else tap
    sites = schedule.merges_at(blocks)
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        return
    side = vision.image_size // vision.patch_size
    grid = {"height": side, "width": side}
    for _, merge in sites:
        grid[merge.axis] = merge.target(grid[merge.axis])
    schedule.prunes_at(text.num_hidden_layers, grid["height"] * grid["width"])
