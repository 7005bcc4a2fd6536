"""One compiled vision encoder a modality: pixels in, features and what the prompt must know out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.constants import rows_of
from luvc_fx.generate.families import Family, LateFeatures, Modality, encoder_output
from luvc_fx.graph import markers

EncoderBody = Callable[..., tuple[Tensor, Tensor, list[int], bool, LateFeatures]]
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
        family: what is known of the model.
        signature: of the model's own encoder, the method that `modality` names.
        merging, unmerged: the compiled encoder, with the merges of the schedule and without.
    """

    family: Family
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
        plain, text = self.family.encoder_constants(self.modality, options)
        layout = {"rows": str(rows), **self.family.patch_layout(self.modality, text)}
        run = self.merging if merge else self.unmerged
        flat, representatives, lengths, features_are_stacked, late = run(pixels, plain, text, layout)
        total = sum(lengths)
        features: Any = flat.unsqueeze(0) if features_are_stacked else (flat,)
        if flat.shape[0] == total:
            features = flat.unflatten(0, (len(lengths), -1)) if features_are_stacked else flat.split(lengths)
        output = encoder_output(features, late)
        output.luvc_representatives, output.luvc_placeholders = representatives, total
        return output


def compile_encoder(
    family: Family, modality: Modality, encode: Callable[..., Any], compile: Compile
) -> CompiledEncoder:
    """The encoder of one modality of a model.

    Args:
        encode: the model's own method.
        compile: compiles a body, with the merges of the schedule or without.
    """
    merging, unmerged = (compile(_body(family, modality, encode), merges) for merges in (True, False))
    return CompiledEncoder(family, modality, inspect.signature(encode), merging, unmerged)


def _body(family: Family, modality: Modality, encode: Callable[..., Any]) -> EncoderBody:
    pixels_name, option_of, late_features = modality.pixels, family.option_of, family.late_features

    def body(
        pixels: Tensor, plain: dict[str, Any], text: dict[str, str], layout: dict[str, str]
    ) -> tuple[Tensor, Tensor, list[int], bool, LateFeatures]:
        options = {**plain, **{name: option_of(name, value) for name, value in text.items()}}
        if "grids" in layout:
            # A packed encoder gets the patches of all images in a row, and no graph shows their grids.
            grids = [size for row in rows_of(layout["grids"]) for size in row]
            pixels = markers.PATCHES(pixels, grids, int(layout["unit"]))
        output = encode(**{pixels_name: pixels}, return_dict=True, **options)
        features = output.pooler_output
        parts = list(features)
        features_are_stacked = isinstance(features, Tensor)
        flat = features.flatten(0, 1) if features_are_stacked else torch.cat(parts)
        # Dynamo takes these sizes for constants, so a merge does not change them: they count placeholders.
        lengths = [part.shape[0] for part in parts]
        representatives = markers.REPRESENTATIVES(flat, int(layout["rows"]))
        return flat, representatives, lengths, features_are_stacked, late_features(output)

    return _compat.with_own_code(body)
