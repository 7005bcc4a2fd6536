"""Tiny random Qwen-VL models (2-D rotary towers on packed patches, M-RoPE decoders) and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.support.models import IMAGE, PAD, ready

VIDEO, VISION_START, VISION_END, FIRST_TEXT = 2, 3, 4, 5
PATCH, TEMPORAL, UNIT = 4, 2, 2
"""Pixels on a patch's side, video frames in one temporal patch, patches on the side of a feature."""

Item = int | tuple[str, int, int] | tuple[str, int, int, int]
"""A run of text, ``("image", h, w)`` in patches, or ``("video", t, h, w)`` in temporal patches."""


def _special() -> dict[str, Any]:
    return {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": False,
    }


def _text(
    decoder_layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    pairs = hidden // heads // 2  # of channels that turn together, shared out to the three axes
    sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": decoder_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
    }


def tiny_qwen2_vl(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    vision_hidden: int = 32,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    attn: str = "sdpa",
) -> Qwen2VLForConditionalGeneration:
    """A random Qwen2-VL whose hidden states differ clearly between tokens, as `tiny_llava`.

    Args:
        attn: the attention implementation, ``"sdpa"`` or ``"eager"``.
    """
    config = Qwen2VLConfig(
        text_config=_text(decoder_layers, hidden, intermediate, heads, kv_heads, vocab),
        vision_config={
            "depth": encoder_layers,
            "embed_dim": vision_hidden,
            "hidden_size": hidden,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": UNIT,
            "temporal_patch_size": TEMPORAL,
        },
        **_special(),
    )
    config._attn_implementation = attn
    return _finish(Qwen2VLForConditionalGeneration(config), seed)


def tiny_qwen2_5_vl(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    vision_hidden: int = 32,
    vision_intermediate: int = 40,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    window: int = 4,
    attn: str = "sdpa",
) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL, as `tiny_qwen2_vl`; only its second and last blocks see whole frames.

    Args:
        window: patches on the side of an attention window of the other blocks.
    """
    config = Qwen2_5_VLConfig(
        text_config=_text(decoder_layers, hidden, intermediate, heads, kv_heads, vocab),
        vision_config={
            "depth": encoder_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "out_hidden_size": hidden,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": UNIT,
            "temporal_patch_size": TEMPORAL,
            "tokens_per_second": 2,
            "window_size": window * PATCH,
            "fullatt_block_indexes": [1, encoder_layers - 1],
        },
        **_special(),
    )
    config._attn_implementation = attn
    return _finish(Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_qwen3_vl(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    vision_hidden: int = 32,
    vision_intermediate: int = 40,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    positions: int = 6,
    taps: Sequence[int] = (1, 2),
    attn: str = "sdpa",
) -> Qwen3VLForConditionalGeneration:
    """A random Qwen3-VL, as `tiny_qwen2_vl`, with learned positions and deepstack taps.

    Args:
        positions: the side of the grid of learned positions, resampled to each image.
        taps: the encoder blocks whose output is added after the first decoder layers.
    """
    text = _text(decoder_layers, hidden, intermediate, heads, kv_heads, vocab)
    text["rope_parameters"]["mrope_interleaved"] = True
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": hidden // heads},
        vision_config={
            "depth": encoder_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "out_hidden_size": hidden,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": UNIT,
            "temporal_patch_size": TEMPORAL,
            "num_position_embeddings": positions**2,
            "deepstack_visual_indexes": list(taps),
        },
        **_special(),
    )
    config._attn_implementation = attn
    return _finish(Qwen3VLForConditionalGeneration(config), seed)


def _finish(model: Any, seed: int) -> Any:
    ready(model, seed)
    model.lm_head.weight[[VIDEO, VISION_START, VISION_END]] = 0.0  # as in `models`: never generated
    return model


# ------------------------------------------------------------------------------------------ prompts


def patchify(frames: Tensor) -> Tensor:
    """[t * h * w, 3 * TEMPORAL * PATCH ** 2] of frames [t * TEMPORAL, 3, h * PATCH, w * PATCH].

    Patches are in the order of the image processor: frame by frame, then block by block.
    """
    t = len(frames) // TEMPORAL
    h, w = (side // PATCH // UNIT for side in frames.shape[2:])
    split = frames.reshape(t, TEMPORAL, 3, h, UNIT, PATCH, w, UNIT, PATCH)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w * UNIT**2, -1)


def _placeholders(model: nn.Module, item: tuple[Any, ...], numbers: torch.Generator) -> list[int]:
    """The tokens of an image or video, with what the processor puts around it."""
    kind, *sides = item
    token = {"image": IMAGE, "video": VIDEO}[kind]
    frames = sides[0] if kind == "video" else 1
    each = sides[-2] * sides[-1] // UNIT**2
    if kind == "image" or not isinstance(model, Qwen3VLForConditionalGeneration):
        return [VISION_START, *[token] * (frames * each), VISION_END]
    tokens: list[int] = []  # a time of two tokens before each frame
    for _ in range(frames):
        time = torch.randint(FIRST_TEXT, model.config.text_config.vocab_size, (2,), generator=numbers)
        tokens += [*time.tolist(), VISION_START, *[token] * each, VISION_END]
    return tokens


def qwen_inputs(model: nn.Module, rows: Sequence[Sequence[Item]], seed: int = 0) -> dict[str, Tensor]:
    """A prompt of `rows`, each of them text lengths, images and videos in the order given.

    Around each image and video stand a start and an end token, as the processor puts them (for
    Qwen3-VL around each frame of a video, with its time before). Shorter rows are padded on the left.

    Args:
        rows: of ints (text tokens), ``("image", h, w)`` in patches (even numbers) and
            ``("video", t, h, w)`` in patches.

    Returns:
        ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` [B, S]; with images
        ``pixel_values`` [all their patches, 96] and ``image_grid_thw`` [images, 3]; with videos
        ``pixel_values_videos`` and ``video_grid_thw``, and for Qwen2.5-VL ``second_per_grid_ts``.
    """
    numbers = torch.Generator().manual_seed(seed + 1000)
    vocab = model.config.text_config.vocab_size
    ids: list[list[int]] = []
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for row in rows:
        tokens: list[int] = []
        for item in row:
            if isinstance(item, int):
                tokens += torch.randint(FIRST_TEXT, vocab, (item,), generator=numbers).tolist()
                continue
            kind, *sides = item
            t, h, w = sides if kind == "video" else (1, *sides)
            tokens += _placeholders(model, item, numbers)
            shown = t * TEMPORAL if kind == "video" else 1
            frames = torch.randn(shown, 3, h * PATCH, w * PATCH, generator=numbers)
            pixels[kind].append(patchify(frames if kind == "video" else frames.repeat(TEMPORAL, 1, 1, 1)))
            grids[kind].append([t, h, w])
        ids.append(tokens)
    length = max(len(tokens) for tokens in ids)
    input_ids = torch.tensor([[PAD] * (length - len(tokens)) + tokens for tokens in ids])
    mask = torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in ids])
    kinds = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    batch = {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    names = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    for kind, (pixel_name, grid_name) in names.items():
        if pixels[kind]:
            batch[pixel_name] = torch.cat(pixels[kind])
            batch[grid_name] = torch.tensor(grids[kind])
    if pixels["video"] and isinstance(model, Qwen2_5_VLForConditionalGeneration):
        batch["second_per_grid_ts"] = torch.full((len(pixels["video"]),), 1.0)
    return batch
