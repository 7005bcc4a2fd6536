"""Tiny random models of families that nothing in the package was written for, one for each kind of contract.

Each function gives a stock model and a prompt of two rows for it, each row with an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    InklingConfig,
    InklingForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
)

from tests.support.models import IMAGE, PAD, ready

Batch = dict[str, Tensor]
Foreign = tuple[nn.Module, Batch]

FIRST_TEXT, VOCAB, HIDDEN, LAYERS = 20, 97, 32, 3
SEED = 0
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **_SPECIAL,
}
_TOWER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _prompt(features: int) -> Batch:
    """Two rows: text, as many placeholders, text; types of tokens are left out."""
    ids = torch.randint(FIRST_TEXT, VOCAB, (2, features + 7), generator=torch.Generator().manual_seed(3))
    ids[:, 2 : 2 + features] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def tower_by_another_name() -> Foreign:
    """HunYuan-VL: a packed encoder whose tower is `vision_tower`, and has other tables than Qwen2-VL's."""
    config = HunYuanVLConfig(
        text_config={
            **_TEXT,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 1, 1],
            },
        },
        vision_config={
            **{name: size for name, size in _TOWER.items() if name != "image_size"},
            "num_key_value_heads": 4,
            "out_hidden_size": HIDDEN,
            "text_hidden_size": HIDDEN,
            "spatial_merge_size": 1,
            "max_image_size": 16,
            "min_image_size": 16,
        },
        image_token_id=IMAGE,
    )
    batch = _prompt(4 * 5 + 2)  # a token ends each row of patches, one begins and one ends the image
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    batch |= {"pixel_values": _noise(32, 48), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return ready(HunYuanVLForConditionalGeneration(config), SEED), batch


def tower_that_computes_with_its_grid() -> Foreign:
    """GLM-4.1V: its tower sums up the lengths of its images and indexes with them."""
    config = Glm4vConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": HIDDEN,
            "intermediate_size": 40,
            "out_hidden_size": HIDDEN,
            "num_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=2,
        image_start_token_id=3,
        image_end_token_id=4,
        video_start_token_id=5,
        video_end_token_id=6,
    )
    batch = _prompt(4)
    batch["input_ids"][:, 1], batch["input_ids"][:, 6] = 3, 4
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    batch |= {"pixel_values": _noise(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return ready(Glm4vForConditionalGeneration(config), SEED), batch


def output_with_more_fields() -> Foreign:
    """Ovis 2: features of indicator tokens come beside those of the image."""
    config = Ovis2Config(
        vision_config={**_TOWER, "vocab_size": VOCAB, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        text_config={**_TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[10, 11, 12, 13, 14],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
    )
    batch = _prompt(4)
    batch["input_ids"][:, 1], batch["input_ids"][:, 6] = 10, 13
    return ready(Ovis2ForConditionalGeneration(config), SEED), {**batch, "pixel_values": _noise(2, 3, 16, 16)}


def pixels_that_a_forward_insists_on() -> Foreign:
    """BLIP-2: `pixel_values` have no default, the output nests others, `generate` is the model's own."""
    config = Blip2Config(
        vision_config=_TOWER,
        qformer_config={
            **{name: _TOWER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
            "num_attention_heads": 4,
            "encoder_hidden_size": HIDDEN,
            "vocab_size": VOCAB,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 40,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            **_SPECIAL,
        },
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    batch = {**_prompt(4), "pixel_values": _noise(2, 3, 16, 16)}
    return ready(Blip2ForConditionalGeneration(config), SEED), batch


def output_without_pooler() -> Foreign:
    """Llama 4: the features are the tower's last hidden state, and projected in the forward."""
    config = Llama4Config(
        vision_config={
            **_TOWER,
            "intermediate_size": 4 * HIDDEN,
            "vision_output_dim": HIDDEN,
            "projector_input_dim": HIDDEN,
            "projector_output_dim": HIDDEN,
            "pixel_shuffle_ratio": 0.5,
        },
        text_config={
            **_TEXT,
            "intermediate_size_mlp": 40,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
        },
        image_token_index=IMAGE,
        boi_token_index=2,
        eoi_token_index=3,
    )
    return ready(Llama4ForConditionalGeneration(config), SEED), {
        **_prompt(4),
        "pixel_values": _noise(2, 3, 16, 16),
    }


def cache_of_convolutions() -> Foreign:
    """LFM2-VL: layers of short convolutions keep a state, not rows; `spatial_shapes` steer the tower."""
    config = Lfm2VlConfig(
        vision_config={**{n: s for n, s in _TOWER.items() if n != "image_size"}, "num_patches": 16},
        text_config={**_TEXT, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 2},
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=HIDDEN,
    )
    batch = _prompt(4)
    batch |= {
        "pixel_values": _noise(2, 16, 48),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    }
    return ready(Lfm2VlForConditionalGeneration(config), SEED), batch


def cache_with_shared_layers() -> Foreign:
    """Gemma 4: late layers read the keys of earlier ones, and keep none."""
    config = Gemma4UnifiedConfig(
        text_config={
            **_TEXT,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
        vision_config={
            "patch_size": 4,
            "mm_embed_dim": HIDDEN,
            "mm_posemb_size": 64,
            "output_proj_dims": HIDDEN,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=2,
        audio_token_id=3,
        boi_token_id=4,
        eoi_token_id=5,
    )
    batch = _prompt(4)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2)).expand(2, 4, 2)
    batch |= {"pixel_values": _noise(2, 4, 432), "image_position_ids": places.clone()}
    return ready(Gemma4UnifiedForConditionalGeneration(config), SEED), batch


def cache_of_windows() -> Foreign:
    """Cohere 2 Vision: each layer keeps a window of rows."""
    config = Cohere2VisionConfig(
        vision_config={**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**_TEXT, "model_type": "cohere2", "sliding_window": 8, "layer_types": None},
        downsample_factor=2,
        image_token_id=IMAGE,
        alignment_intermediate_size=40,
    )
    batch = {**_prompt(4), "pixel_values": _noise(2, 3, 16, 16)}
    return ready(Cohere2VisionForConditionalGeneration(config), SEED), batch


def config_without_use_cache() -> Foreign:
    """Inkling: its text config says nothing of a cache, and layers keep convolutions beside rows."""
    config = InklingConfig(
        text_config={
            **_TEXT,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
            "mlp_layer_types": ["dense"] * LAYERS,
            "d_rel": 8,
        },
        vision_config={
            "text_hidden_size": HIDDEN,
            "hidden_size": HIDDEN,
            "patch_size": 4,
            "n_layers": 2,
            "num_attention_heads": 4,
        },
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8, "text_hidden_size": HIDDEN},
        image_token_id=IMAGE,
        audio_token_id=3,
    )
    return ready(InklingForConditionalGeneration(config), SEED), {
        **_prompt(1),
        "pixel_values": _noise(2, 2, 4, 4, 3),
    }


def images_by_another_argument() -> Foreign:
    """Fuyu: `image_patches` are projected in the forward, and `get_image_features` is not asked."""
    config = FuyuConfig(
        **{name: value for name, value in _TEXT.items() if name != "num_key_value_heads"},
        text_config={
            **{name: value for name, value in _TEXT.items() if name != "num_key_value_heads"},
            "model_type": "persimmon",
        },
        patch_size=4,
        num_channels=3,
        image_token_id=IMAGE,
    )
    return ready(FuyuForCausalLM(config), SEED), {**_prompt(4), "image_patches": _noise(2, 4, 48)}


FOREIGN = (
    images_by_another_argument,
    tower_by_another_name,
    tower_that_computes_with_its_grid,
    output_with_more_fields,
    pixels_that_a_forward_insists_on,
    output_without_pooler,
    cache_of_convolutions,
    cache_with_shared_layers,
    cache_of_windows,
    config_without_use_cache,
)
