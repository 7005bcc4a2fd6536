"""The tiny VLM: stock Hugging Face classes only, plus the word-level processor."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.research.tinyvlm.scenes import CELLS, COLORS, SHAPES, SIZE

PATCH = 8
SPECIAL = ("<pad>", "<unk>", "</s>", "<image>")
QUESTION_WORDS = (
    "user: assistant: ? how many objects object are there what color shape is the where which "
    "bar tallest shortest value of number on card with"
)
NUMBERS = tuple(str(n) for n in range(10))
POSITIONS = tuple(word for row in CELLS for word in row)
VOCAB = (*SPECIAL, *QUESTION_WORDS.split(), *NUMBERS, *COLORS, *SHAPES, *POSITIONS)
PAD, EOS, IMAGE = (VOCAB.index(t) for t in ("<pad>", "</s>", "<image>"))
# Message content is a string or a list of {"type": "image"} / {"type": "text", "text": ...} parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'USER:' }}{% endif %}"
    "{% if message.content is string %}{{ ' ' + message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ ' <image>' }}{% else %}{{ ' ' + part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'user' %}{{ ' ASSISTANT:' }}{% else %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
)


def build_tokenizer(
    vocab: tuple[str, ...] = VOCAB, special: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Lower-casing word-level tokenizer; '?' is its own word even when glued to another."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\?"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", **(special or {})},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Processor: any image becomes 128x128; the prompt gets one <image> token per patch."""
    side = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size=side,
            do_center_crop=False,
            crop_size=side,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlavaForConditionalGeneration:
    """Freshly initialised LLaVA: a small CLIP vision tower and a 16-layer Llama."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.06,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_new_tokens=4, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )
    return model


def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Projected visual tokens, (B, 3, S, S) -> (B, (S/8)^2, 128), at any multiple-of-8 size S.

    The same as ``model.get_image_features(pixels, interpolate_pos_encoding=True)``, without the
    last vision layer, whose output LLaVA (``vision_feature_layer=-2``) never reads.
    """
    tower = model.model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=True))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return model.model.multi_modal_projector(hidden[:, 1:])
