"""The InternVL of the tiny models: 192 px, patch 8, pixel shuffle to 144 visual tokens a frame.

A video is a row of frames, each between ``<img>`` and ``</img>``, as InternVL has it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    ProcessorMixin,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from examples.research.tinyvlm.families import DECODER, WORD, Family, Layout, in_a_row, tokenizer
from examples.research.tinyvlm.model import CHAT_TEMPLATE, EOS, IMAGE, PAD
from luvc_fx.apps.images_only import images_only

SIDE = 192
PATCH = 8
LAYERS = 5


def build_model() -> InternVLForConditionalGeneration:
    """Freshly initialised; the decoder has the sizes of the shipped LLaVA's."""
    vision = InternVLVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        attention_bias=True,
        hidden_act="quick_gelu",
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
        layer_scale_init_value=1.0,
        use_mean_pooling=True,
        hidden_dropout_prob=0.0,
    )
    text = Qwen2Config(**DECODER, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )
    return model


def build_processor() -> ProcessorMixin:
    """Any image becomes 192 x 192, one tile; a video is a list of images."""
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    kind = images_only(InternVLProcessor)
    tokens = (SIDE // PATCH // 2) ** 2
    return kind(images, tokenizer(), image_seq_length=tokens, chat_template=CHAT_TEMPLATE)


def features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens (B, N, 128) of pixels (B, 3, S, S)."""
    return model.get_image_features(
        pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output


def layout(frames: int, grid: int) -> Layout:
    """``USER:``, then each frame between its marks."""
    frame = [WORD["<img>"], *[IMAGE] * grid * grid, WORD["</img>"]]
    return in_a_row([WORD["user:"], *frame * frames])


@torch.no_grad()
def vision_from_llava(model: nn.Module, source: nn.Module) -> None:
    """Start the vision tower from the CLIP of the shipped LLaVA, as far as the two are alike.

    InternVL has no norm behind the embeddings, and other positions at 192 px: training mends that.
    """
    ours, theirs = model.model.vision_tower, source.model.vision_tower
    words, places = theirs.embeddings, ours.embeddings
    places.patch_embeddings.projection.weight.copy_(words.patch_embedding.weight)
    places.patch_embeddings.projection.bias.zero_()
    places.cls_token.copy_(words.class_embedding.view(1, 1, -1))
    table = words.position_embedding.weight
    old = int((len(table) - 1) ** 0.5)
    grid = table[1:].T.reshape(1, -1, old, old)
    new = functional.interpolate(grid, SIDE // PATCH, mode="bicubic").flatten(2).transpose(1, 2)
    places.position_embeddings.copy_(torch.cat([table[None, :1], new], 1))
    for mine, other in zip(ours.encoder.layer, theirs.encoder.layers, strict=False):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(mine.attention, name).load_state_dict(getattr(other.self_attn, name).state_dict())
        mine.attention.projection_layer.load_state_dict(other.self_attn.out_proj.state_dict())
        mine.layernorm_before.load_state_dict(other.layer_norm1.state_dict())
        mine.layernorm_after.load_state_dict(other.layer_norm2.state_dict())
        mine.mlp.load_state_dict(other.mlp.state_dict())


FAMILY = Family(
    "internvl",
    build_model,
    features,
    layout,
    side=SIDE,
    pixels_per_token=2 * PATCH,
    small_sides=(96, 128, 160),
    groups=("color", "kind", "number", "cell"),
    kinds={"objects": 0.4, "chart": 0.2, "cards": 0.1, "page": 0.2, "easy": 0.1},
    vision_from_llava=vision_from_llava,
    processor=build_processor,
)
