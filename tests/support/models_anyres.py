"""Tiny random models that cut an image into tiles (LLaVA-OneVision, LLaVA-NeXT) and their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from tests.support.models import IMAGE, PAD, ready

VIDEO, FIRST_TEXT = 2, 5
PATCH = 4
TILES = ((1, 2), (2, 1), (2, 2), (1, 3))
"""The (rows, columns) of tiles that an image may be cut into."""

Item = int | tuple[str, int] | tuple[str, int, int]
"""A run of text, ``("image", height, width)`` in pixels, or ``("video", frames)``."""


def _text(
    kind: type, decoder_layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int
) -> Any:
    return kind(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=decoder_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
    )


def _pinpoints(size: int, tiles: Sequence[tuple[int, int]]) -> list[list[int]]:
    return [[rows * size, columns * size] for rows, columns in tiles]


def tiny_onevision(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    grid: int = 6,
    vision_hidden: int = 32,
    vision_intermediate: int = 40,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    vision_feature_layer: int = -1,
    tiles: Sequence[tuple[int, int]] = TILES,
    most: int = 9,
    attn: str = "sdpa",
) -> LlavaOnevisionForConditionalGeneration:
    """A random LLaVA-OneVision (SigLIP tower, Qwen2 decoder), in the spirit of `tiny_llava`.

    Args:
        grid: patches of 4 pixels on the side of a tile.
        tiles: the (rows, columns) that an image may be cut into.
        most: N of ``anyres_max_N``: beyond about 1.2 N tiles the features are interpolated.
        attn: the attention implementation, ``"sdpa"`` or ``"eager"``.
    """
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=vision_intermediate,
            num_hidden_layers=encoder_layers,
            num_attention_heads=4,
            image_size=PATCH * grid,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        text_config=_text(Qwen2Config, decoder_layers, hidden, intermediate, heads, kv_heads, vocab),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=_pinpoints(PATCH * grid, tiles),
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    config._attn_implementation = attn
    return _finish(LlavaOnevisionForConditionalGeneration(config), seed)


def tiny_llava_next(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    grid: int = 6,
    vision_hidden: int = 32,
    vision_intermediate: int = 40,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    vision_feature_layer: int = -2,
    tiles: Sequence[tuple[int, int]] = TILES,
    attn: str = "sdpa",
) -> LlavaNextForConditionalGeneration:
    """A random LLaVA-NeXT (CLIP tower with CLS, Llama decoder), as `tiny_onevision`."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=vision_intermediate,
            num_hidden_layers=encoder_layers,
            num_attention_heads=4,
            image_size=PATCH * grid,
            patch_size=PATCH,
            projection_dim=vision_hidden,
        ),
        text_config=_text(LlamaConfig, decoder_layers, hidden, intermediate, heads, kv_heads, vocab),
        image_token_index=IMAGE,
        image_seq_length=grid * grid,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=_pinpoints(PATCH * grid, tiles),
    )
    config._attn_implementation = attn
    return _finish(LlavaNextForConditionalGeneration(config), seed)


def _finish(model: Any, seed: int) -> Any:
    ready(model, seed)
    model.lm_head.weight[VIDEO] = 0.0  # as in `models`: never generated
    return model


# ------------------------------------------------------------------------------------------ prompts


def cut(model: nn.Module, height: int, width: int, numbers: torch.Generator) -> Tensor:
    """[1 + tiles, 3, size, size] of a random image as the image processor cuts it.

    First the whole image, then its tiles row by row: the image in the best resolution, keeping its
    shape, in the middle of zeros.
    """
    size = model.config.vision_config.image_size
    full = torch.randn(1, 3, size, size, generator=numbers)
    high, wide = select_best_resolution((height, width), model.config.image_grid_pinpoints)
    if wide / width < high / height:
        inner = (min(math.ceil(height * wide / width), high), wide)
    else:
        inner = (high, min(math.ceil(width * high / height), wide))
    canvas = torch.zeros(3, high, wide)
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    canvas[:, top : top + inner[0], left : left + inner[1]] = torch.randn(3, *inner, generator=numbers)
    tiles = canvas.reshape(3, high // size, size, wide // size, size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([full, tiles])


def _placeholders(model: nn.Module, tiles: Tensor, size: tuple[int, int]) -> int:
    """How many features the stock model makes of one image."""
    arguments = {"pixel_values": tiles[None], "image_sizes": torch.tensor([size])}
    if isinstance(model, LlavaOnevisionForConditionalGeneration):
        arguments["batch_num_images"] = torch.tensor([1 if len(tiles) > 1 else 2])
        if len(tiles) == 1:  # one of several
            arguments = {name: value.repeat_interleave(2, 0) for name, value in arguments.items()}
            arguments["batch_num_images"] = torch.tensor([2])
    return len(model.get_image_features(**arguments).pooler_output[0])


def anyres_inputs(model: nn.Module, rows: Sequence[Sequence[Item]], seed: int = 0) -> dict[str, Tensor]:
    """A prompt of `rows`, each of them text lengths, images and videos in the order given.

    OneVision shows each of several images in one row as one tile, and cuts up a single one; LLaVA-NeXT
    cuts up every image. Shorter rows are padded on the left.

    Args:
        rows: of ints (text tokens), ``("image", height, width)`` in pixels and (OneVision)
            ``("video", frames)``, all videos of a batch with as many frames.

    Returns:
        ``input_ids`` and ``attention_mask`` [B, S]; with images ``pixel_values`` [images, most tiles,
        3, size, size], zeros behind an image's tiles, ``image_sizes`` [images, 2] and for OneVision
        ``batch_num_images`` [B]; with videos ``pixel_values_videos`` [videos, frames, 3, size, size].
    """
    several = isinstance(model, LlavaOnevisionForConditionalGeneration)
    numbers = torch.Generator().manual_seed(seed + 1000)
    config = model.config
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    ids: list[list[int]] = []
    images: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    videos: list[Tensor] = []
    for row in rows:
        tokens: list[int] = []
        shown = sum(not isinstance(item, int) and item[0] == "image" for item in row)
        for item in row:
            if isinstance(item, int):
                text = torch.randint(FIRST_TEXT, config.text_config.vocab_size, (item,), generator=numbers)
                tokens += text.tolist()
            elif item[0] == "video":
                videos.append(torch.randn(item[1], 3, size, size, generator=numbers))
                tokens += [VIDEO] * (item[1] * math.ceil(side / 2) ** 2 + 1)
            else:
                _, height, width = item  # type: ignore[misc]
                tiles = cut(model, height, width, numbers)
                tiles = tiles[:1] if several and shown > 1 else tiles
                images.append(tiles)
                sizes.append((height, width))
                tokens += [IMAGE] * _placeholders(model, tiles, (height, width))
        ids.append(tokens)
    length = max(len(tokens) for tokens in ids)
    batch = {
        "input_ids": torch.tensor([[PAD] * (length - len(tokens)) + tokens for tokens in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in ids]),
    }
    if images:
        most = max(len(tiles) for tiles in images)
        batch["pixel_values"] = torch.stack(
            [torch.cat([tiles, tiles.new_zeros(most - len(tiles), *tiles.shape[1:])]) for tiles in images]
        )
        batch["image_sizes"] = torch.tensor(sizes)
        if several:
            counts = [sum(not isinstance(item, int) and item[0] == "image" for item in row) for row in rows]
            batch["batch_num_images"] = torch.tensor(counts)
    if videos:
        batch["pixel_values_videos"] = torch.stack(videos)
    return batch
