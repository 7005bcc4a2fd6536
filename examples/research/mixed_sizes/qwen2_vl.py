"""A Qwen2-VL with random weights and its real processor, with a tokenizer of words made here; no files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from luvc_fx.apps.images_only import images_only

SPECIAL = ("<pad>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
"""Numbers 0 to 4, in the models and in the tokenizer."""

WORDS = (
    "<unk>",
    "user",
    "assistant",
    "Describe",
    "the",
    "image",
    ".",
    "?",
    "and",
    "what",
    "is",
    "left",
    "of",
)

CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def build_processor(
    patch_size: int = 14, min_pixels: int = 56 * 56, max_pixels: int = 336 * 336
) -> Qwen2VLProcessor:
    """The stock processor and its image processor (PIL); only the words are ours."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    core = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[1:]),
    )
    images = Qwen2VLImageProcessorPil(
        min_pixels=min_pixels, max_pixels=max_pixels, patch_size=patch_size, merge_size=2
    )
    # The part for videos needs torchvision.
    return images_only(Qwen2VLProcessor)(images, tokenizer, chat_template=CHAT)


def build_model(
    hidden: int = 768,
    decoder_layers: int = 3,
    vision_hidden: int = 384,
    encoder_layers: int = 2,
    seed: int = 0,
) -> Qwen2VLForConditionalGeneration:
    """The stock class, small, in float32, with random weights from `seed`."""
    heads = hidden // 64
    sections: Sequence[int] = (8, 12, 12)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": decoder_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(sections),
            },
        },
        vision_config={
            "depth": encoder_layers,
            "embed_dim": vision_hidden,
            "hidden_size": hidden,
            "mlp_ratio": 4,
            "num_heads": vision_hidden // 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
    # Placeholders must not be generated: they would stand for images that are not there.
    model.lm_head.weight[:5] = 0.0
    return model
