"""Models of real sizes with random weights, and prompts for them: nothing is downloaded.

The sizes are those of the published checkpoints. Time does not depend on what weights hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat

FIRST_TEXT = 1000
"""Token ids below are left out: a random prompt must not hold special ones by chance."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Visual:
    """Images or frames of one row of a prompt.

    Attributes:
        count: how many; `video`: they are frames of one video.
        side: pixels on the side of each, where the model takes several sizes.
    """

    count: int = 1
    video: bool = False
    side: int = 448

    def __str__(self) -> str:
        if self.video:
            return f"{self.count} frames"
        return "1 image" if self.count == 1 else f"{self.count} images"


@dataclass(frozen=True, slots=True)
class Shape:
    """One checkpoint's sizes.

    Attributes:
        config: makes the config for a number of decoder layers (None: all of them).
        model: the name of the class in transformers.
        pixels: makes the visual inputs of a batch, and says how many placeholders a row has.
        parameters: roughly, in billions; float32 takes four times as many GB.
        frames: of a video in the full run.
    """

    name: str
    model: str
    config: Callable[[int | None], Any]
    pixels: Callable[[Any, Visual, int], tuple[Inputs, int]]
    parameters: float
    frames: int = 32

    def build(self, layers: int | None, device: torch.device, dtype: torch.dtype) -> Any:
        """The model in evaluation mode, its weights created on `device`; its `generate` never stops early."""
        import transformers

        config = self.config(layers)
        _compat.set_attention(config, "sdpa")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(transformers, self.model)(config)
        finally:
            torch.set_default_dtype(before)
        settings = model.generation_config
        settings.eos_token_id = settings.bos_token_id = None
        settings.pad_token_id, settings.do_sample = 0, False
        return model.eval().requires_grad_(False)

    def inputs(self, model: Any, visual: Visual, text: int, batch: int) -> Inputs:
        """A prompt of `text` text tokens with the visual input in front of most of them."""
        numbers = torch.Generator().manual_seed(0)
        pixels, placeholders = self.pixels(model.config, visual, batch)
        token = model.config.video_token_id if visual.video and _takes_video(model) else None
        token = model.config.image_token_id if token is None else token
        words = torch.randint(FIRST_TEXT, 2 * FIRST_TEXT, (batch, text), generator=numbers)
        front = min(4, text)
        middle = torch.full((batch, placeholders), token)
        ids = torch.cat([words[:, :front], middle, words[:, front:]], dim=1)
        if "image_grid_thw" in pixels or "video_grid_thw" in pixels:
            pixels["mm_token_type_ids"] = (ids == token).int() * (2 if visual.video else 1)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in tensors.items()
        }


def _takes_video(model: Any) -> bool:
    return hasattr(model.base_model, "get_video_features")


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def _at_most(layers: int | None, depth: int) -> int:
    return depth if layers is None else min(depth, layers)


def _text(hidden: int, inner: int, depth: int, heads: int, kv: int, vocab: int) -> Callable[..., Any]:
    """The decoder's part of a config, by ``(layers, **more of rope_parameters)``."""

    def sizes(layers: int | None, **rope: Any) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": _at_most(layers, depth),
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "vocab_size": vocab,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
        }

    return sizes


# ------------------------------------------------------------------------------ LLaVA-OneVision

_TILE = 384
_PATCHES = 27


def _onevision(sizes: Callable[..., Any], tied: bool) -> Any:
    def config(layers: int | None) -> Any:
        from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

        vision = SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=_at_most(layers, 26),
            num_attention_heads=16,
            image_size=_TILE,
            patch_size=14,
            vision_use_head=False,
        )
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=Qwen2Config(**sizes(layers), tie_word_embeddings=tied),
            image_token_index=151646,
            video_token_index=151647,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[_TILE * a, _TILE * b] for a in range(1, 7) for b in range(1, 7)],
            vision_aspect_ratio="anyres_max_9",
            tie_word_embeddings=tied,
        )

    return config


def _onevision_pixels(config: Any, visual: Visual, batch: int) -> tuple[Inputs, int]:
    if visual.video:
        each = visual.count * 14 * 14 + 1
        return {"pixel_values_videos": _noise(batch, visual.count, 3, _TILE, _TILE)}, each
    if visual.count == 1:  # the whole image, then its only tile, a newline behind each of its rows
        each = _PATCHES * _PATCHES + _PATCHES * (_PATCHES + 1)
        pixels = _noise(batch, 2, 3, _TILE, _TILE)
    else:  # of several images each is one tile, with one newline
        each = visual.count * (_PATCHES * _PATCHES + 1)
        pixels = _noise(batch * visual.count, 1, 3, _TILE, _TILE)
    return {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[_TILE, _TILE]] * (batch * visual.count)),
        "batch_num_images": torch.tensor([visual.count] * batch),
    }, each


# ------------------------------------------------------------------------------------ InternVL2.5


def _internvl(sizes: Callable[..., Any]) -> Any:
    def config(layers: int | None) -> Any:
        from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig

        vision = InternVLVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=_at_most(layers, 24),
            num_attention_heads=16,
            image_size=448,
            patch_size=14,
            attention_bias=True,
        )
        text = LlamaConfig(**sizes(layers))
        return InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=text.vocab_size - 7,
            image_seq_length=256,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )

    return config


def _internvl_pixels(config: Any, visual: Visual, batch: int) -> tuple[Inputs, int]:
    return {"pixel_values": _noise(batch * visual.count, 3, 448, 448)}, visual.count * 256


# --------------------------------------------------------------------------------------- Qwen2-VL


def _qwen2_vl(sizes: Callable[..., Any], tied: bool) -> Any:
    def config(layers: int | None) -> Any:
        from transformers import Qwen2VLConfig

        text = sizes(layers, mrope_section=[16, 24, 24])
        return Qwen2VLConfig(
            vision_config={
                "depth": _at_most(layers, 32),
                "embed_dim": 1280,
                "hidden_size": text["hidden_size"],
                "num_heads": 16,
                "mlp_ratio": 4,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            text_config=text,
            image_token_id=151655,
            video_token_id=151656,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
            tie_word_embeddings=tied,
        )

    return config


def _qwen2_vl_pixels(config: Any, visual: Visual, batch: int) -> tuple[Inputs, int]:
    side = visual.side // 28 * 2
    times = max(1, visual.count // 2) if visual.video else 1
    items = 1 if visual.video else visual.count
    patches = _noise(batch * items * times * side * side, 3 * 2 * 14 * 14)
    grid = torch.tensor([[times, side, side]] * (batch * items))
    names = ("pixel_values_videos", "video_grid_thw") if visual.video else ("pixel_values", "image_grid_thw")
    return dict(zip(names, (patches, grid), strict=True)), items * times * side * side // 4


_ONEVISION, _INTERNVL, _QWEN2_VL = (
    "LlavaOnevisionForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-ov-0.5b",
            _ONEVISION,
            _onevision(_text(896, 4864, 24, 14, 2, 152000), True),
            _onevision_pixels,
            0.9,
        ),
        Shape(
            "llava-ov-7b",
            _ONEVISION,
            _onevision(_text(3584, 18944, 28, 28, 4, 152128), False),
            _onevision_pixels,
            8.0,
        ),
        Shape(
            "internvl2.5-2b", _INTERNVL, _internvl(_text(2048, 8192, 24, 16, 8, 92553)), _internvl_pixels, 2.2
        ),
        Shape(
            "internvl2.5-8b",
            _INTERNVL,
            _internvl(_text(4096, 14336, 32, 32, 8, 92553)),
            _internvl_pixels,
            8.1,
        ),
        Shape(
            "qwen2-vl-2b",
            _QWEN2_VL,
            _qwen2_vl(_text(1536, 8960, 28, 12, 2, 151936), True),
            _qwen2_vl_pixels,
            2.2,
        ),
        Shape(
            "qwen2-vl-7b",
            _QWEN2_VL,
            _qwen2_vl(_text(3584, 18944, 28, 28, 4, 152064), False),
            _qwen2_vl_pixels,
            8.3,
        ),
    )
}


def smaller(shape: Shape, visual: Visual, budget: float) -> Visual | None:
    """An input that has `budget` of the visual tokens to begin with; None where the model takes none.

    Frames and tiles are left out, or pixels where the model takes images of any size.
    """
    if visual.count > 1:
        count = max(1, round(budget * visual.count))
        return Visual(count, visual.video, visual.side)
    if shape.model == _QWEN2_VL:
        side = max(28, round(budget**0.5 * visual.side / 28) * 28)
        return Visual(1, visual.video, side)
    return None
