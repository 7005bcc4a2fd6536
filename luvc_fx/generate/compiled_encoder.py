"""One compiled vision encoder a modality: pixels in, features and what the prompt must know out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate import constants
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


EncoderBody = Callable[..., tuple[Tensor, Tensor, list[int], bool, dict[str, list[Tensor]]]]
"""``(pixels, options, text_options, layout)`` to

- the features of all images or videos ``[N, D]``;
- int64 ``[n, H', W']`` or ``[1, 1, N]``: the placeholder that each feature stands for (its representative);
- how many placeholders each image or video has;
- whether the model's own encoder stacks its features in one tensor ``[images, n, D]`` (else it returns one
  tensor for each image);
- features that enter the decoder late, by their attribute.
"""

Compile = Callable[[EncoderBody, bool], EncoderBody]
"""``(body, whether it merges) -> compiled body``."""


@dataclass(frozen=True)
class CompiledEncoder:
    """The encoder of one modality of one model; made by `compile_encoder`. A call changes nothing of it.

    Attributes:
        base: the model whose method the encoder is.
        signature: of that method.
        merging, unmerged: the compiled encoder, with the merges of the schedule and without.
    """

    base: Any
    modality: Modality
    signature: inspect.Signature
    merging: EncoderBody
    unmerged: EncoderBody

    def options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of a forward's keyword arguments those that the encoder takes, without its pixels."""
        names = set(self.signature.parameters) - {self.modality.pixels, "kwargs", "return_dict"}
        return {name: kwargs[name] for name in names if kwargs.get(name) is not None}

    def __call__(self, pixels: Tensor, options: dict[str, Any], merge: bool, rows: int) -> Any:
        """The encoder's output as the model gives it, and what the prefill must know about it.

        Args:
            options: of the model's own encoder, beside the pixels.
            rows: of the prompt that have images; each has as many placeholders as the others.

        Returns:
            An output with `pooler_output`, the features: ``[images, n, D]``, or a sequence of ``[n, D]``;
            after a merge ``[1, N', D]``, or a sequence of one ``[N', D]``. Its `luvc_representatives` are the
            placeholders of the features that are left, int64 ``[n, H', W']`` where they lie on grids and
            ``[1, 1, N']`` else, and `luvc_placeholders` is how many placeholders there are.
        """
        plain, text = constants.constants(self.base, self.modality.name, options)
        layout = {"rows": str(rows)}
        grids = text.get(f"{self.modality.name}_grid_thw")
        if grids is not None:
            layout |= {"unit": str(self.base.visual.config.spatial_merge_size), "grids": grids}
        run = self.merging if merge else self.unmerged
        flat, representatives, lengths, features_are_stacked, late = run(pixels, plain, text, layout)
        total = sum(lengths)
        features: Any = flat.unsqueeze(0) if features_are_stacked else (flat,)
        if flat.shape[0] == total:
            features = flat.unflatten(0, (len(lengths), -1)) if features_are_stacked else flat.split(lengths)
        output = _compat.encoder_output(features, late)
        output.luvc_representatives, output.luvc_placeholders = representatives, total
        return output


def compile_encoder(
    model: Any, modality: Modality, encode: Callable[..., Any], compile: Compile
) -> CompiledEncoder:
    """The encoder of one modality of a model.

    Args:
        encode: the model's own method.
        compile: compiles a body, with the merges of the schedule or without.
    """
    merging, unmerged = (compile(_body(modality.pixels, encode), merges) for merges in (True, False))
    return CompiledEncoder(model.base_model, modality, inspect.signature(encode), merging, unmerged)


def _body(pixels_name: str, encode: Callable[..., Any]) -> EncoderBody:
    def body(
        pixels: Tensor, plain: dict[str, Any], text: dict[str, str], layout: dict[str, str]
    ) -> tuple[Tensor, Tensor, list[int], bool, dict[str, list[Tensor]]]:
        options = {**plain, **{name: constants.from_text(name, value) for name, value in text.items()}}
        if "grids" in layout:
            # A packed encoder gets the patches of all images in a row, and no graph shows their grids.
            grids = [size for row in constants.rows_of(layout["grids"]) for size in row]
            pixels = markers.PATCHES(pixels, grids, int(layout["unit"]))
        output = encode(**{pixels_name: pixels}, return_dict=True, **options)
        features = output.pooler_output
        parts = list(features)
        features_are_stacked = isinstance(features, Tensor)
        flat = features.flatten(0, 1) if features_are_stacked else torch.cat(parts)
        # Dynamo takes these sizes for constants, so a merge does not change them: they count placeholders.
        lengths = [part.shape[0] for part in parts]
        representatives = markers.SLOTS(flat, int(layout["rows"]))
        return flat, representatives, lengths, features_are_stacked, _compat.extra_features(output)

    return _compat.with_own_code(body)
