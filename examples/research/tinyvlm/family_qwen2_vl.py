"""The Qwen2-VL of the tiny models: 192 px, patch 8, 2 x 2 merger to 144 visual tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.research.tinyvlm.families import DECODER, WORD, Family, Layout, tokenizer
from examples.research.tinyvlm.model import CHAT_TEMPLATE, EOS, IMAGE, PAD
from luvc_fx.apps.images_only import images_only

SIDE = 192
PATCH = 8
LAYERS = 5
MERGE = 2
TEMPORAL = 2
SECTIONS = [4, 6, 6]


def build_model() -> Qwen2VLForConditionalGeneration:
    """Freshly initialised; the decoder has the sizes of the shipped LLaVA's."""
    config = Qwen2VLConfig(
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTIONS},
        },
        vision_config={
            "depth": LAYERS,
            "embed_dim": 128,
            "hidden_size": 128,
            "mlp_ratio": 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        },
        image_token_id=IMAGE,
        video_token_id=WORD["<video>"],
        vision_start_token_id=WORD["<img>"],
        vision_end_token_id=WORD["</img>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )
    return model


def build_processor() -> ProcessorMixin:
    """Any square image becomes 192 x 192 pixels."""
    images = Qwen2VLImageProcessorPil(
        min_pixels=SIDE * SIDE,
        max_pixels=SIDE * SIDE,
        patch_size=PATCH,
        merge_size=MERGE,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    template = CHAT_TEMPLATE.replace(" <image>", " <img><image></img>")
    return images_only(Qwen2VLProcessor)(images, tokenizer(), chat_template=template)


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, S, S) as the processor gives them: (B S S / 64, 3 * 2 * 8 * 8), by 2 x 2 blocks."""
    batch, channels, side, _ = pixels.shape
    blocks = side // PATCH // MERGE
    cut = pixels.reshape(batch, channels, blocks, MERGE, PATCH, blocks, MERGE, PATCH)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, block row, block column, row, column, C, y, x
    twice = cut.unsqueeze(6).expand(*cut.shape[:6], TEMPORAL, PATCH, PATCH)
    return twice.reshape(batch * (blocks * MERGE) ** 2, -1)


def features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens (B, N, 128) of pixels (B, 3, S, S)."""
    side = pixels.shape[-1] // PATCH
    grid = torch.tensor([[1, side, side]] * len(pixels), device=pixels.device)
    return torch.stack(list(model.get_image_features(patches(pixels), grid).pooler_output))


def layout(frames: int, grid: int) -> Layout:
    """``USER: <img>``, the image at rows and columns from 2 on, ``</img>``."""
    if frames != 1:
        raise ValueError(f"frames is {frames}; allowed: 1 (this family is trained on images)")
    ids = [WORD["user:"], WORD["<img>"], *[IMAGE] * grid * grid, WORD["</img>"]]
    row, column = np.divmod(np.arange(grid * grid), grid)
    image = 2 + np.stack([np.zeros_like(row), row, column])
    front, back = np.array([[0, 1]] * 3), np.full((3, 1), 2 + grid)
    return Layout(ids, np.concatenate([front, image, back], 1), 3 + grid)


@torch.no_grad()
def vision_from_llava(model: nn.Module, source: nn.Module) -> None:
    """Start the vision tower from the CLIP of the shipped LLaVA, as far as the two are alike.

    Qwen2-VL knows positions by rotation only, and has no norm behind the embeddings.
    """
    ours, theirs = model.model.visual, source.model.vision_tower
    weight = theirs.embeddings.patch_embedding.weight
    ours.patch_embed.proj.weight.copy_(weight.unsqueeze(2).expand(-1, -1, TEMPORAL, -1, -1) / TEMPORAL)
    for mine, other in zip(ours.blocks, theirs.encoder.layers, strict=False):
        parts = [other.self_attn.q_proj, other.self_attn.k_proj, other.self_attn.v_proj]
        mine.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        mine.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        mine.attn.proj.load_state_dict(other.self_attn.out_proj.state_dict())
        mine.norm1.load_state_dict(other.layer_norm1.state_dict())
        mine.norm2.load_state_dict(other.layer_norm2.state_dict())
        mine.mlp.load_state_dict(other.mlp.state_dict())


FAMILY = Family(
    "qwen2_vl",
    build_model,
    features,
    layout,
    side=SIDE,
    pixels_per_token=MERGE * PATCH,
    small_sides=(96, 128, 160),
    groups=("color", "kind", "number"),
    kinds={"objects": 0.4, "chart": 0.2, "cards": 0.1, "page": 0.2, "easy": 0.1},
    vision_from_llava=vision_from_llava,
    processor=build_processor,
)
