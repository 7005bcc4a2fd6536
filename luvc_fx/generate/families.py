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
from transformers import GenerationMixin

from luvc_fx import _compat
from luvc_fx.generate.constants import as_constant, as_text
from luvc_fx.generate.encoder_outputs import LateFeatures, flat_level, parts_of
from luvc_fx.generate.unspoken import with_unspoken_numbers
from luvc_fx.generate.vision_tables import POSITION_IDS, calls_of, makes, tower_of, vision_tables

GRIDS = ("image_grid_thw", "video_grid_thw")
"""Rows of frames, height and width in patches."""
LISTS = ("image_sizes", "image_sizes_videos", "batch_num_images")
"""Arguments about the sizes of images that models take as lists as well, and compute with in Python."""
STEERING = (
    *GRIDS,
    *LISTS,
    "image_merge_sizes",
    "video_merge_sizes",
    "image_grid_hw",
    "image_grids",
    "target_sizes",
    "target_sizes_videos",
    "spatial_shapes",
    "num_local_patches",
    "patches_grid",
)
"""Arguments about the sizes of images, which steer Python code."""
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Arguments with a number for each token, which a prompt may be lengthened or cut along with."""


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


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """What of an encoder's inputs may be symbols.

    Attributes:
        grid: height and width in patches of the one image there is, whose patches come in a row; None where
            each image is an entry of the pixels, and only their number is a symbol.
        unit: patches on the side of a feature.
        grid_argument, bounds_argument: of the encoder, for ``[1, 3]`` frames, height and width, and for where
            the images begin and end; None where nobody is told.
    """

    grid: tuple[int, int] | None = None
    unit: int = 1
    grid_argument: str = ""
    bounds_argument: str | None = None


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
        given = {name: options[name] for name in STEERING if name in options}
        for name in LISTS:
            if isinstance(given.get(name), Tensor):
                given[name] = given[name].tolist()
        text = {name: as_constant(option) for name, option in given.items()}
        constants = {name: constant for name, constant in text.items() if constant is not None}
        return {name: option for name, option in options.items() if name not in constants}, constants

    def patch_layout(self, modality: Modality, options: Mapping[str, Any]) -> dict[str, str]:
        """Where an encoder gets the patches of all images in a row: their ``grids`` and ``unit``, as text.

        The grids are rows of frames, height and width in patches; blocks of unit x unit patches become one
        feature. Empty where each image is an entry of the pixels.
        """
        return {}

    def symbolic_layout(
        self, modality: Modality, options: Mapping[str, Any], text: Mapping[str, str]
    ) -> ImageSizes | None:
        """The sizes of these images, where one graph can serve all sizes; None where each has its own graph.

        Here images or tiles of one size, of which there may be any number.

        Args:
            text: the constants of `encoder_constants`.
        """
        return None if text else ImageSizes()

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

    def symbolic_methods(self) -> dict[str, Callable[..., Any]]:
        """Methods to put on the base model where its graphs are to serve all sizes.

        Here `get_placeholder_mask`, whose error message makes a constant of the number of features.
        """
        check = getattr(self.base, "get_placeholder_mask", None)
        return {"get_placeholder_mask": with_unspoken_numbers(check)} if callable(check) else {}

    # -- features into the decoder ---------------------------------------------------------------

    @staticmethod
    def late_features(output: Any) -> LateFeatures:
        """Of an encoder's output what enters the decoder behind its first layers. Dynamo traces this."""
        levels = getattr(output, "deepstack_features", None)  # transformers 5.17 - 5.23
        if levels is None or any(isinstance(level, tuple) and isinstance(level[0], int) for level in levels):
            return {}  # Granite 4 Vision has its features there, each with the number of a layer
        return {"deepstack_features": [flat_level(level) for level in levels]}

    def feature_entry(self) -> Callable[..., dict[str, Any]]:
        """How encoded features get into a forward: ``(kwargs, modality, output of the encoder) -> kwargs``.

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

    def generates_by_forward(self) -> bool:
        """Whether `generate` is transformers', or hands on to it; BLIP-2's asks its language model."""
        own = inspect.unwrap(type(self.model).generate)
        if own is inspect.unwrap(GenerationMixin.generate):
            return True
        return not {"super", "GenerationMixin"}.isdisjoint(own.__code__.co_names)

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
        depth = getattr(vision, "depth", None)
        if isinstance(depth, int):
            return depth
        layer, blocks = (
            getattr(config, name, None)
            for config, name in (
                (self.model.config, "vision_feature_layer"),
                (vision, "num_hidden_layers"),
            )
        )
        if not isinstance(layer, int) or not isinstance(blocks, int):
            return None
        return blocks + 1 + layer if layer < 0 else layer

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
        if not isinstance(grid, Tensor) or self._tower is None:
            return plain, text
        # Flash attention takes the bounds of images as a tensor, other kinds split by them in Python.
        bounds_are_text = not _compat.is_flash(getattr(self._tower, "config", None))
        for name, table in vision_tables(self._tower, self._calls, grid).items():
            key = f"{modality.name}_{name}"
            if key in options:
                continue
            constant = as_constant(table) if name.endswith("_seqlens") and bounds_are_text else None
            if constant is not None:
                text[key] = constant
            else:
                plain[key] = table
        return plain, text

    @functools.cached_property
    def _tower(self) -> Any:
        return tower_of(self.base)

    @functools.cached_property
    def _calls(self) -> str:
        return calls_of(self._tower)

    def patch_layout(self, modality: Modality, options: Mapping[str, Any]) -> dict[str, str]:
        """The grids that the encoder is given, where its tower takes the patches block by block."""
        grids = options.get(f"{modality.name}_grid_thw")
        if grids is None or self._tower is None or not makes(self._calls, POSITION_IDS):
            return {}
        return {"unit": str(self._tower.spatial_merge_size), "grids": as_text(grids)}

    def symbolic_layout(
        self, modality: Modality, options: Mapping[str, Any], text: Mapping[str, str]
    ) -> ImageSizes | None:
        """The grid of one image, where all else that its tower reads of it is known, too.

        A tower that attends within windows has as many of them as the image is large: other graphs.
        """
        grid_name, bounds = f"{modality.name}_grid_thw", f"{modality.name}_cu_seqlens"
        grid = options.get(grid_name)
        known = grid_name in text and set(text) <= {grid_name, bounds}
        if not known or not self.patch_layout(modality, options) or not isinstance(grid, Tensor):
            return None
        rows, unit = grid.tolist(), int(self._tower.spatial_merge_size)
        if len(rows) != 1 or rows[0][0] != 1 or rows[0][1] % unit or rows[0][2] % unit:
            return None
        return ImageSizes((rows[0][1], rows[0][2]), unit, grid_name, bounds if bounds in text else None)

    def positions(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Those of several axes (M-RoPE), from the grids. The model remembers where the text goes on."""
        compute = getattr(self.base, "compute_3d_position_ids", None)
        if compute is None or all(kwargs.get(name) is None for name in GRIDS):
            return None
        names, cache_name = inspect.signature(compute).parameters, _compat.cache_argument(compute)
        given = {name: kwargs.get("past_key_values" if name == cache_name else name) for name in names}
        if "inputs_embeds" in names and given["inputs_embeds"] is None:
            given["inputs_embeds"] = self.model.get_input_embeddings()(kwargs["input_ids"])
        sounds = kwargs.get("feature_attention_mask")
        if "audio_feature_lengths" in names and sounds is not None:  # as the forward of Qwen-Omni has them
            given["audio_feature_lengths"] = sounds.sum(dim=1)
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


class FeaturesInPlaceOfPixels(list[Tensor]):
    """Features for a forward that takes none (5.17): it asks for those of its pixels, and has them back."""

    def __init__(self, output: Any) -> None:
        super().__init__(parts_of(output.pooler_output))
        self.encoder_output = output

    def size(self, axis: int) -> int:
        """How many; LLaVA-NeXT asks whether there are any images."""
        return len(self)


def as_encoder_outputs(kwargs: dict[str, Any], modality: Modality, output: Any) -> dict[str, Any]:
    """A `Family.feature_entry`: by an argument of the forward for what its encoders returned."""
    return {**kwargs, "mm_encoder_outputs": {**kwargs.get("mm_encoder_outputs", {}), modality.name: output}}


def in_place_of_pixels(kwargs: dict[str, Any], modality: Modality, output: Any) -> dict[str, Any]:
    """A `Family.feature_entry`: as pixels, of which the hook on the encoder returns the output."""
    return {**kwargs, modality.pixels: FeaturesInPlaceOfPixels(output)}
