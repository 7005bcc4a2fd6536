"""One compiled vision encoder a modality: pixels in, its output and what the prompt must know out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.constants import constant_of, rows_of
from luvc_fx.generate.encoder_outputs import features_of, parts_of, with_features
from luvc_fx.generate.families import Family, ImageSizes, Modality
from luvc_fx.generate.symbolic_images import (
    SymbolicEncoder,
    in_one_piece,
    numbers_of_placeholders,
    symbolic_inputs,
    with_symbolic_grid,
)
from luvc_fx.graph import markers
from luvc_fx.report.errors import brief
from luvc_fx.schedule import Schedule

EncoderBody = Callable[..., tuple[Any, Tensor | None, list[int], str]]
"""``(pixels, options, text_options, layout)`` to

- the encoder's output, without the states of its tower; from a body that may merge, its features and each
  level of late features are ``[N, D]``;
- int64 ``[n, H', W']`` or ``[1, 1, N]``: the placeholder that each feature stands for (its representative),
  or None where the output has no features of a form that we know, and is returned as it is;
- how many placeholders each image or video has;
- how the model's own encoder gives its features: ``"stacked"`` ``[images, n, D]``, ``"flat"`` ``[N, D]``, or
  ``"parts"``, one tensor for each image.
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
        symbolic: whether and how one graph serves all sizes.
    """

    family: Family
    modality: Modality
    signature: inspect.Signature
    merging: EncoderBody
    unmerged: EncoderBody
    symbolic: SymbolicEncoder

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
            An output of the encoder's own class, with features of the form that the encoder gives them; after
            a merge ``[1, N', D]``, ``[N', D]``, or a sequence of one ``[N', D]``. Its `luvc_representatives`
            are the placeholders of the features that are left, int64 ``[n, H', W']`` where they lie on grids
            and ``[1, 1, N']`` else, and `luvc_placeholders` is how many placeholders there are. An output
            without known features has neither.
        """
        plain, text = self.family.encoder_constants(self.modality, options)
        layout = {"rows": str(rows), **self.family.patch_layout(self.modality, options)}
        run = self.merging if merge else self.unmerged
        sizes = None
        if self.symbolic.wanted and rows == 1:
            sizes = self.family.symbolic_layout(self.modality, options, text)
        answer = None if sizes is None else self._for_all_sizes(run, pixels, plain, layout, sizes, merge)
        if answer is None:
            with _compat.known_constants():
                answer = run(pixels, plain, text, layout)
        output, representatives, lengths, form = answer
        if representatives is None:
            return output
        if merge:
            _give_back_form(output, lengths, form)
        output.luvc_representatives, output.luvc_placeholders = representatives, sum(lengths)
        return output

    def _for_all_sizes(
        self,
        run: EncoderBody,
        pixels: Tensor,
        plain: dict[str, Any],
        layout: dict[str, str],
        sizes: ImageSizes,
        merge: bool,
    ) -> tuple[Any, Tensor | None, list[int], str] | None:
        """What `run` answers by its graph for all sizes, or None where it has none.

        Images whose graph failed once are given one for their size from then on, and the report says why.
        """
        schedule = self.symbolic.schedule if merge else Schedule()
        symbolic = symbolic_inputs(schedule, self.family, pixels, plain, layout, sizes)
        if symbolic is None or self.symbolic.failed:
            return None
        try:
            with _compat.known_constants():
                output, representatives, each, form = run(*symbolic)
        except Exception as error:
            self.symbolic.failed = True
            self.symbolic.note(
                f"the {self.modality.name} encoder cannot be one graph for all sizes: {brief(error)}"
            )
            return None
        return output, representatives, numbers_of_placeholders(sizes, pixels, each), form


def compile_encoder(
    family: Family,
    modality: Modality,
    encode: Callable[..., Any],
    compile: Compile,
    symbolic: SymbolicEncoder,
) -> CompiledEncoder:
    """The encoder of one modality of a model.

    Args:
        encode: the model's own method.
        compile: compiles a body, with the merges of the schedule or without.
    """
    merging, unmerged = (compile(_body(family, modality, encode, merges), merges) for merges in (True, False))
    return CompiledEncoder(family, modality, inspect.signature(encode), merging, unmerged, symbolic)


def _give_back_form(output: Any, lengths: list[int], form: str) -> None:
    """Let features ``[N, D]`` be of the form that the encoder gives them, if none was merged away."""
    flat = output.pooler_output
    whole = flat.shape[0] == sum(lengths)
    if form == "stacked":
        output.pooler_output = flat.unflatten(0, (len(lengths), -1)) if whole else flat.unsqueeze(0)
    elif form == "parts":
        output.pooler_output = flat.split(lengths) if whole else (flat,)


def _body(family: Family, modality: Modality, encode: Callable[..., Any], merges: bool) -> EncoderBody:
    pixels_name, late_features = modality.pixels, family.late_features

    def body(
        pixels: Tensor,
        plain: dict[str, Any],
        text: dict[str, str],
        layout: dict[str, str],
        sides: list[Tensor] | None = None,
    ) -> tuple[Any, Tensor | None, list[int], str]:
        options = {**plain, **{name: constant_of(value) for name, value in text.items()}}
        if sides is not None:
            pixels, stand_ins = with_symbolic_grid(pixels, layout, sides)
            options = {**options, **stand_ins}
        elif "grids" in layout:
            # A packed encoder gets the patches of all images in a row, and no graph shows their grids.
            grids = [size for row in rows_of(layout["grids"]) for size in row]
            pixels = markers.PATCHES(pixels, grids, int(layout["unit"]))
        output = encode(**{pixels_name: pixels}, return_dict=True, **options)
        features = features_of(output)
        if features is None:
            return output, None, [], ""
        if "symbolic" in layout:
            form, flat, lengths = in_one_piece(features, pixels)
            representatives = markers.REPRESENTATIVES(flat, 1)
            late = late_features(output) if merges else {}
            kept = flat if merges else features
            return with_features(output, kept, late), representatives, lengths, form
        parts = parts_of(features)
        if not isinstance(features, Tensor):
            form, flat = "parts", torch.cat(parts)
        else:
            form, flat = ("stacked", features.flatten(0, 1)) if features.dim() == 3 else ("flat", features)
        # Dynamo takes these sizes for constants, so a merge does not change them: they count placeholders.
        lengths = [part.shape[0] for part in parts]
        representatives = markers.REPRESENTATIVES(flat, int(layout["rows"]))
        late = late_features(output) if merges else {}
        return with_features(output, flat if merges else features, late), representatives, lengths, form

    return _compat.with_own_code(body)
