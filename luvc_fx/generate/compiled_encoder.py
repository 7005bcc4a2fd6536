"""The vision side of the front door: one compiled encoder a modality, for `generate` and `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate import constants as controls
from luvc_fx.graph import markers


@dataclass(frozen=True, slots=True)
class Modality:
    """What a model calls one kind of visual input.

    Attributes:
        pixels: the keyword argument of `forward` and of the encoder.
        token: the attribute of the config that holds the placeholder's id.
        method: the encoder, a method of the base model.
    """

    name: str
    pixels: str
    token: str

    @property
    def method(self) -> str:
        """The encoder, a method of the base model."""
        return f"get_{self.name}_features"


ALL = (
    Modality("image", "pixel_values", "image_token_id"),
    Modality("video", "pixel_values_videos", "video_token_id"),
)


def modalities(model: Any) -> tuple[Modality, ...]:
    """Those that this model encodes by a method of its own and has a placeholder for."""
    return tuple(
        kind
        for kind in ALL
        if callable(getattr(model.base_model, kind.method, None))
        and kind.pixels in inspect.signature(getattr(model.base_model, kind.method)).parameters
        and isinstance(getattr(model.config, kind.token, None), int)
    )


def placeholders(model: Any, ids: Tensor) -> Tensor:
    """Which of ``ids`` ``[batch, rows]`` stand for visual tokens: bool ``[batch, rows]``."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for kind in modalities(model):
        found = found | (ids == getattr(model.config, kind.token))
    return found


Compile = Callable[[Callable[..., Any], bool], Callable[..., Any]]
"""``(body, whether it merges) -> compiled body``."""


class Encoder:
    """One compiled encoder; made for a modality of one model.

    Args:
        encode: the model's own method.
        compile: compiles a body, with the merges of the schedule or without.
    """

    def __init__(self, model: Any, kind: Modality, encode: Callable[..., Any], compile: Compile) -> None:
        self.base = model.base_model
        self.kind = kind
        self.whole = False  # whether the model's own gives one tensor for all images, not a list
        self.signature = inspect.signature(encode)
        self.merging = compile(self._body(encode), True)
        self.plain = compile(self._body(encode), False)

    def options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of a forward's keyword arguments those that the encoder takes, without its pixels."""
        names = set(self.signature.parameters) - {self.kind.pixels, "kwargs", "return_dict"}
        return {name: kwargs[name] for name in names if kwargs.get(name) is not None}

    def __call__(self, pixels: Tensor, options: dict[str, Any], merge: bool, rows: int) -> Any:
        """The encoder's output, and what the prefill must know about it.

        The images belong to `rows` rows of a prompt, with as many placeholders in each.

        `luvc_slots` are the placeholders of the tokens that are left, ``[n, H', W']`` where they are
        grids and ``[1, 1, N']`` else; `luvc_placeholders` is how many there were.
        """
        plain, text = controls.constants(self.base, self.kind.name, options)
        grid = text.get(f"{self.kind.name}_grid_thw")
        told = {"rows": str(rows)}
        if grid is not None:
            told |= {"unit": str(self.base.visual.config.spatial_merge_size), "grids": grid}
        run = self.merging if merge else self.plain
        flat, slots, lengths, self.whole, extra = run(pixels, plain, text, told)
        total = sum(lengths)
        features: Any = flat.unsqueeze(0) if self.whole else (flat,)
        if flat.shape[0] == total:
            features = flat.unflatten(0, (len(lengths), -1)) if self.whole else flat.split(lengths)
        output = _compat.encoder_output(features, extra)
        output.luvc_slots, output.luvc_placeholders = slots, total
        return output

    def _body(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        pixels_name = self.kind.pixels

        def body(
            pixels: Tensor, plain: dict[str, Any], text: dict[str, str], told: dict[str, str]
        ) -> tuple[Tensor, Tensor, list[int], bool, dict[str, Any]]:
            options = {**plain, **{name: controls.from_text(name, value) for name, value in text.items()}}
            if "grids" in told:
                # A packed encoder gets patches in a row: only the front door knows their grids.
                grids = [size for row in controls.rows_of(told["grids"]) for size in row]
                pixels = markers.PATCHES(pixels, grids, int(told["unit"]))
            output = encode(**{pixels_name: pixels}, return_dict=True, **options)
            found = output.pooler_output
            parts = list(found)
            flat = found.flatten(0, 1) if isinstance(found, Tensor) else torch.cat(parts)
            # Dynamo takes these sizes for constants, so a merge does not change them: the placeholders.
            lengths = [part.shape[0] for part in parts]
            return (
                flat,
                markers.SLOTS(flat, int(told["rows"])),
                lengths,
                isinstance(found, Tensor),
                _compat.extra_features(output),
            )

        return _compat.with_own_code(body)
