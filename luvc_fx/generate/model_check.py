"""Errors that can be seen before anything compiles: the model's kind, and a schedule it cannot follow."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from luvc_fx import _compat
from luvc_fx.generate.families import family_of
from luvc_fx.report.errors import brief
from luvc_fx.schedule import Schedule

INSTEAD = "For forward calls use torch.compile(model, backend=luvc_fx.backend(schedule))."


@contextlib.contextmanager
def wiring(model: Any) -> Iterator[None]:
    """Raise `ValueError` for whatever goes wrong in the block, where a model is looked at."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        name = type(model).__name__
        raise ValueError(f"luvc_fx.compile cannot wire {name}: {brief(error)}. {INSTEAD}") from error


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
            f"luvc_fx.compile cannot wire {type(model).__name__}: it has no {', '.join(missing)}. {INSTEAD}"
        )
    hooked = [name for name, module in model.named_modules() if _compat.is_dispatched(module)]
    if hooked:
        raise ValueError(
            f"{hooked[0] or type(model).__name__} was dispatched by accelerate (device_map over several "
            "devices, or offloading); its hooks end Dynamo's graphs in every layer. Load it on one device."
        )


def _takes_images(model: Any) -> bool:
    return "pixel_values" in inspect.signature(model.forward).parameters


def check_schedule(model: Any, schedule: Schedule) -> None:
    """Raise `ValueError` for a layer or a length that the model's config shows to be impossible.

    Only sizes that the config states are checked; the graph has the last word. How many visual tokens
    there are it does not state: a row may hold several images. Nor does it state what an earlier merge
    leaves of a grid: whole blocks of patches merge, and how large those are is seen in the graph.
    """
    schedule.prunes_at(model.config.get_text_config().num_hidden_layers)
    family = family_of(model)
    blocks, grid = family.encoder_blocks(), family.patch_grid()
    if blocks is None:
        return
    merges = schedule.merges_at(blocks)
    if grid is None:
        return
    for _, merge in merges:
        merge.target(grid[merge.axis])
