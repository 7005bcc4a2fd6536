"""What luvc_fx must know of a model beyond its graphs: one class a family, a method for each difference.

Families are told apart by what a model has, never by its name. For a model of another kind write a subclass
of `Family`, override what is different, and put it into `FAMILIES`.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.constants import Grids, Lengths, as_text, rows_of

LISTS = ("image_sizes", "image_sizes_videos", "batch_num_images")
"""Arguments about the sizes of images that models take as lists as well."""
GRIDS = ("image_grid_thw", "video_grid_thw")
"""Rows of frames, height and width in patches; models call tensor methods on them."""
STEERING = (*GRIDS, *LISTS)
"""Arguments about the sizes of images, which steer Python code."""
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments with a number for each token, which a prompt may be lengthened or cut along with."""

LateFeatures = dict[str, list[Tensor]]
"""Features that enter the decoder late, by the attribute of the encoder's output; each level ``[N, D]``."""


@dataclass(frozen=True, slots=True)
class Modality:
    """What a model calls one kind of visual input.

    Attributes:
        pixels: the keyword argument of `forward` and of the encoder.
        token: the attribute of the config that holds the placeholder's id.
    """

    name: str
    pixels: str
    token: str

    @property
    def method(self) -> str:
        """The encoder, a method of the base model."""
        return f"get_{self.name}_features"


MODALITIES = (
    Modality("image", "pixel_values", "image_token_id"),
    Modality("video", "pixel_values_videos", "video_token_id"),
)


class Family:
    """A model whose images have one size, or come as tiles of one size (LLaVA, LLaVA-NeXT, InternVL).

    Each method is a point where a family may differ.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Any = getattr(model, "base_model", None)

    @classmethod
    def recognises(cls, model: Any) -> bool:
        """Whether a model is of this family; the first of `FAMILIES` that says so counts."""
        return True

    # -- encoders --------------------------------------------------------------------------------

    def modalities(self) -> tuple[Modality, ...]:
        """Those that this model encodes by a method of its own and has a placeholder for."""
        return tuple(
            modality
            for modality in MODALITIES
            if callable(getattr(self.base, modality.method, None))
            and modality.pixels in inspect.signature(getattr(self.base, modality.method)).parameters
            and isinstance(getattr(self.model.config, modality.token, None), int)
        )

    def encoder_constants(
        self, modality: Modality, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Options of an encoder: those that stay as they are, and those that become text.

        See `luvc_fx.generate.constants`.
        """
        plain = {name: option for name, option in options.items() if name not in STEERING}
        return plain, {name: as_text(options[name]) for name in STEERING if name in options}

    @staticmethod
    def option_of(name: str, text: str) -> Any:
        """What the encoder is given for the option `name` that became `text`. Dynamo traces this."""
        rows = rows_of(text)
        if name in GRIDS:
            return Grids(rows)
        if name.endswith("_seqlens"):
            return Lengths(rows[0])
        return [row[0] for row in rows] if name == "batch_num_images" else rows

    def patch_layout(self, modality: Modality, text: Mapping[str, str]) -> dict[str, str]:
        """Where an encoder gets the patches of all images in a row: their ``grids`` and ``unit``, as text.

        The grids are rows of frames, height and width in patches; blocks of unit x unit patches become one
        feature. Empty where each image is an entry of the pixels.
        """
        return {}

    def traceable_methods(self) -> dict[str, Callable[..., Any]]:
        """Methods to put on the base model in place of its own, which Dynamo cannot trace.

        Here `pack_image_features`, which asks numpy for the product of a shape: Dynamo makes a tensor of the
        answer, and the comparison behind it ends the graph. The copy asks `math`. It has globals of its own,
        so class and module stay as they are, and so does a method that somebody put on the instance.
        """
        methods: dict[str, Callable[..., Any]] = {}
        for name in ("pack_image_features",):
            function = None if name in vars(self.base) else getattr(type(self.base), name, None)
            if isinstance(function, types.FunctionType) and function.__globals__.get("np") is numpy:
                shim = types.SimpleNamespace(prod=math.prod, ndarray=numpy.ndarray)
                own = types.FunctionType(
                    function.__code__,
                    {**function.__globals__, "np": shim},
                    function.__name__,
                    function.__defaults__,
                    function.__closure__,
                )
                own.__kwdefaults__ = function.__kwdefaults__
                methods[name] = functools.partial(own, self.base)
        return methods

    # -- features into the decoder ---------------------------------------------------------------

    @staticmethod
    def late_features(output: Any) -> LateFeatures:
        """Of an encoder's output what enters the decoder behind its first layers. Dynamo traces this."""
        levels = getattr(output, "deepstack_features", None)  # transformers 5.17 - 5.23
        return {} if levels is None else {"deepstack_features": [torch.cat(list(level)) for level in levels]}

    def feature_entry(self) -> Callable[..., dict[str, Any]]:
        """How encoded features get into a forward: ``(kwargs, modality, features, late) -> kwargs``.

        Dynamo traces what this returns, once for each modality of a prompt.
        """
        if "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters:
            return as_encoder_outputs
        return in_place_of_pixels  # transformers 5.17

    # -- text ------------------------------------------------------------------------------------

    def positions(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The `position_ids` that the model computes from a whole prompt, and could not from a cut one.

        Args:
            kwargs: of a forward.
        """
        return None

    def makes_own_masks(self) -> bool:
        """Whether masks are made outside of the decoder, before it has a cache (Gemma 3, PaliGemma, Molmo2).

        Their images' tokens see each other.
        """
        return hasattr(type(self.model), "create_masks_for_generate")

    # -- sizes -----------------------------------------------------------------------------------

    def granularity(self) -> int | None:
        """Pixels of which image sides are multiples; None where the config does not tell."""
        vision = getattr(getattr(self.model, "config", None), "vision_config", None)
        patch, merge = (getattr(vision, name, None) for name in ("patch_size", "spatial_merge_size"))
        return patch * merge if isinstance(patch, int) and isinstance(merge, int) else None

    def preferred_size(self, image_processor: Any) -> tuple[int, int] | None:
        """Height and width of an image that needs the least resizing; None where nothing tells."""
        crop = getattr(image_processor, "crop_size", None)
        cropped = crop if getattr(image_processor, "do_center_crop", None) else None
        for size in (cropped, getattr(image_processor, "size", None)):
            given = dict(size) if size else {}
            if "height" in given and "width" in given:
                return int(given["height"]), int(given["width"])
            edge = given.get("shortest_edge") or given.get("longest_edge")
            # Processors of the Qwen family write numbers of pixels there.
            if edge and "max_pixels" not in given and given.get("longest_edge", 0) < 10_000:
                return int(edge), int(edge)
        side = getattr(getattr(self.model.config, "vision_config", None), "image_size", None)
        if isinstance(side, (list, tuple)):
            return int(side[0]), int(side[1])
        return (int(side), int(side)) if side else None

    def patch_grid(self) -> dict[str, int] | None:
        """Patches along `height` and `width` of each image or tile; None where the config does not tell."""
        vision = getattr(self.model.config, "vision_config", None)
        sizes = []
        for size in (getattr(vision, "image_size", None), getattr(vision, "patch_size", None)):
            pair = (size, size) if isinstance(size, int) else size
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                return None
            sizes.append(pair)
        (height, width), (high, wide) = sizes
        return {"height": height // high, "width": width // wide}

    def encoder_blocks(self) -> int | None:
        """Encoder blocks in front of the features; None where the config does not tell."""
        vision = getattr(self.model.config, "vision_config", None)
        layer = getattr(self.model.config, "vision_feature_layer", None)
        if vision is None or not isinstance(layer, int):
            return None
        return int(vision.num_hidden_layers) + 1 + layer if layer < 0 else layer

    def takes_any_size(self, image_processor: Any) -> bool:
        """Whether an image of fewer pixels has fewer visual tokens (Qwen2-VL)."""
        vision = self.model.config.vision_config
        return hasattr(vision, "spatial_merge_size") and hasattr(image_processor, "merge_size")

    def takes_squares(self, image_processor: Any) -> bool:
        """Whether an image is one square grid of patches, of positions that can be interpolated (LLaVA)."""
        tower = getattr(self.base, "vision_tower", None)
        if tower is None or "interpolate_pos_encoding" not in inspect.signature(tower.forward).parameters:
            return False
        tiled = hasattr(self.model.config, "image_grid_pinpoints")
        tiled = tiled or hasattr(image_processor, "crop_to_patches")
        return not tiled and isinstance(self.model.config.vision_config.image_size, int)


class PackedFamily(Family):
    """A model whose encoder gets the patches of all images in a row, and their grids (Qwen2-VL and later)."""

    @classmethod
    def recognises(cls, model: Any) -> bool:
        """By the grids that its encoder takes."""
        encode = getattr(getattr(model, "base_model", None), "get_image_features", None)
        return callable(encode) and "image_grid_thw" in inspect.signature(encode).parameters

    def encoder_constants(
        self, modality: Modality, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Beside the grids, the tables that an encoder would compute from them with dynamic sizes."""
        plain, text = super().encoder_constants(modality, options)
        grid = options.get(f"{modality.name}_grid_thw")
        if not isinstance(grid, Tensor):
            return plain, text
        # Flash attention takes the bounds of images as a tensor, other kinds split by them in Python.
        bounds_are_text = not _compat.is_flash(getattr(self.base.visual, "config", None))
        for name, table in self._tables(grid).items():
            key = f"{modality.name}_{name}"
            if key in options:
                continue
            if name.endswith("_seqlens") and bounds_are_text:
                text[key] = ",".join(map(str, table.tolist()))
            else:
                plain[key] = table
        return plain, text

    def _tables(self, grid: Tensor) -> dict[str, Tensor]:
        """What a packed vision encoder computes from `grid` ``[images, 3]`` by operations that break graphs.

        Keyed as its precomputed keyword arguments, without the modality (transformers 5.17 - 5.23, from
        whose `vision_utils` the functions are).
        """
        from transformers import vision_utils

        encoder = self.base.visual
        merge = int(encoder.config.spatial_merge_size)
        tables = {
            "position_ids": vision_utils.get_vision_position_ids(grid, merge),
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        }
        if hasattr(encoder, "window_size"):
            tables["window_index"], tables["cu_window_seqlens"] = vision_utils.get_vision_window_index(
                grid, merge, encoder.window_size, encoder.patch_size
            )
        if hasattr(encoder, "num_grid_per_side"):
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=encoder.num_grid_per_side,
                mode=encoder.interpolation_mode,
                align_corners=encoder.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            tables |= {"interp_indices": indices, "interp_weights": weights}
        return tables

    def patch_layout(self, modality: Modality, text: Mapping[str, str]) -> dict[str, str]:
        """The grids that the encoder is given."""
        grids = text.get(f"{modality.name}_grid_thw")
        if grids is None:
            return {}
        return {"unit": str(self.base.visual.config.spatial_merge_size), "grids": grids}

    def positions(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Those of several axes (M-RoPE), from the grids. The model remembers where the text goes on."""
        compute = getattr(self.base, "compute_3d_position_ids", None)
        if compute is None or all(kwargs.get(name) is None for name in GRIDS):
            return None
        names, cache_name = inspect.signature(compute).parameters, _compat.cache_argument(compute)
        given = {name: kwargs.get("past_key_values" if name == cache_name else name) for name in names}
        if "inputs_embeds" in names and given["inputs_embeds"] is None:
            given["inputs_embeds"] = self.model.get_input_embeddings()(kwargs["input_ids"])
        positions: Tensor | None = compute(**given)
        return positions


FAMILIES: tuple[type[Family], ...] = (PackedFamily, Family)
"""All families; the last is for every model that no other one recognises."""


def family_of(model: Any) -> Family:
    """What is known of a model."""
    return next(family for family in FAMILIES if family.recognises(model))(model)


def modalities(model: Any) -> tuple[Modality, ...]:
    """Those that a model encodes by a method of its own and has a placeholder for."""
    return family_of(model).modalities()


def placeholders(model: Any, ids: Tensor) -> Tensor:
    """Which of ``ids`` ``[batch, rows]`` stand for visual tokens: bool ``[batch, rows]``."""
    visual = torch.zeros_like(ids, dtype=torch.bool)
    for modality in modalities(model):
        visual = visual | (ids == getattr(model.config, modality.token))
    return visual


def pixels_in(kwargs: Mapping[str, Any]) -> list[str]:
    """The arguments of a call that bring images or videos."""
    return [name for name, given in kwargs.items() if name.startswith("pixel_values") and given is not None]


# ---------------------------------------------------------------------- ways of features into a forward


def encoder_output(features: Any, late: LateFeatures | None = None) -> Any:
    """Features as an encoder of transformers returns them, and as `generate` passes them to `forward`.

    Args:
        features: ``[N, D]`` each, or ``[images, n, D]``.
        late: see `Family.late_features`.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(pooler_output=features)
    for name, levels in (late or {}).items():
        setattr(output, name, [(level,) for level in levels])
    return output


class FeaturesInPlaceOfPixels(list[Tensor]):
    """Features for a forward that takes none (5.17): it asks for those of its pixels, and has them back."""

    def __init__(self, features: Any, late: LateFeatures) -> None:
        super().__init__([features] if isinstance(features, Tensor) else features)
        self.features_are_stacked = isinstance(features, Tensor)
        self.late = late

    def size(self, axis: int) -> int:
        """How many; LLaVA-NeXT asks whether there are any images."""
        return len(self)

    def encoder_output(self) -> Any:
        """What the forward gets when it asks."""
        return encoder_output(self[0] if self.features_are_stacked else [*self], self.late)


def as_encoder_outputs(
    kwargs: dict[str, Any], modality: Modality, features: Any, late: LateFeatures
) -> dict[str, Any]:
    """A `Family.feature_entry`: by an argument of the forward for what its encoders returned."""
    outputs = {**kwargs.get("mm_encoder_outputs", {}), modality.name: encoder_output(features, late)}
    return {**kwargs, "mm_encoder_outputs": outputs}


def in_place_of_pixels(
    kwargs: dict[str, Any], modality: Modality, features: Any, late: LateFeatures
) -> dict[str, Any]:
    """A `Family.feature_entry`: as pixels, of which the hook on the encoder returns the features."""
    return {**kwargs, modality.pixels: FeaturesInPlaceOfPixels(features, late)}
