"""Tiny random models of each family and prompts for the tests: stock classes, fp32, CPU, built at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

PAD = 0
IMAGE = 1
FIRST_TEXT = 2


def tiny_llava(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    grid: int = 8,
    vision_hidden: int = 32,
    vision_intermediate: int = 40,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    vision_feature_layer: int = -2,
    collide: bool = False,
    attn: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """A random LLaVA (CLIP tower, Llama decoder) whose hidden states differ clearly between tokens.

    The tower sees `grid` x `grid` patches of 4 pixels. The weights are drawn here, wider than the
    library's initialiser, so that neighbours differ and score gaps are comfortable; they depend on
    `seed` only.

    Args:
        collide: every size that can equal another does: 16 = visual tokens = hidden = heads *
            head_dim (vision and text); 24 = vocabulary = intermediate = length of the prompt of
            `inputs` with its default text; 4 = grid = heads = kv_heads = head_dim = decoder layers
            (and a batch of 4, if you like). Sizes given beside it are overruled.
        attn: the attention implementation, ``"sdpa"`` or ``"eager"``.
    """
    if collide:
        grid, hidden, vision_hidden, heads, kv_heads = 4, 16, 16, 4, 4
        intermediate, vocab, vision_intermediate = 24, 24, 17
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=vision_intermediate,
        num_hidden_layers=encoder_layers,
        num_attention_heads=4,
        image_size=4 * grid,
        patch_size=4,
        projection_dim=vision_hidden,
    )
    text = LlamaConfig(
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
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=grid * grid,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
    )
    config._attn_implementation = attn
    return ready(LlavaForConditionalGeneration(config), seed)


def tiny_internvl(
    seed: int = 0,
    *,
    decoder_layers: int = 4,
    encoder_layers: int = 4,
    grid: int = 8,
    vision_hidden: int = 32,
    vision_intermediate: int = 40,
    hidden: int = 48,
    intermediate: int = 56,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    vision_feature_layer: int = -1,
    qk_norm: bool = False,
    mean_pooling: bool = True,
    text: str = "qwen2",
    collide: bool = False,
    attn: str = "sdpa",
) -> InternVLForConditionalGeneration:
    """A random InternVL (InternViT tower, Qwen2 or Llama decoder), in the spirit of `tiny_llava`.

    The tower sees `grid` x `grid` patches of 4 pixels in each tile, CLS in front; a pixel shuffle
    makes (`grid` / 2) x (`grid` / 2) features of them.

    Args:
        grid: even.
        qk_norm: RMS norms on the tower's queries and keys, as the largest towers have them.
        mean_pooling: without it there is a norm after the last block (for `vision_feature_layer` -1).
        text: ``"qwen2"`` or ``"llama"``.
        collide: as in `tiny_llava`: 16 = features of a tile = hidden = vision_hidden = heads *
            head_dim (vision and text); 64 = patches of a tile = channels of a shuffled block; 24 =
            vocabulary = intermediate = length of the default prompt; 4 = features on a side = heads
            = kv_heads = head_dim. Sizes given beside it are overruled.
        attn: the attention implementation, ``"sdpa"`` or ``"eager"``.
    """
    if collide:
        grid, hidden, vision_hidden, heads, kv_heads = 8, 16, 16, 4, 4
        intermediate, vocab, vision_intermediate = 24, 24, 17
    vision = InternVLVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=vision_intermediate,
        num_hidden_layers=encoder_layers,
        num_attention_heads=4,
        image_size=4 * grid,
        patch_size=4,
        attention_bias=True,
        use_qk_norm=qk_norm,
        use_mean_pooling=mean_pooling,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config={"qwen2": Qwen2Config, "llama": LlamaConfig}[text](
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
        ),
        image_token_id=IMAGE,
        image_seq_length=grid * grid // 4,
        downsample_ratio=0.5,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config._attn_implementation = attn
    return ready(InternVLForConditionalGeneration(config), seed)


def ready(model: Any, seed: int) -> Any:
    """Evaluation mode, weights from `seed`, no token that ends a row early."""
    model.eval()
    _randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.requires_grad_(False)


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if name == "bias":
                value = 0.1 * noise
            elif isinstance(module, nn.Embedding):
                value = noise if "position" not in module_name else 0.5 * noise
            elif name in ("cls_token", "position_embeddings"):  # InternVL's are bare parameters
                value = noise if name == "cls_token" else 0.5 * noise
            elif parameter.ndim == 1:  # norms, layer scales, single embeddings
                value = noise if name in ("class_embedding", "image_newline") else 1.0 + 0.1 * noise
            else:
                gain = 1.5 if module_name.endswith(("q_proj", "k_proj", "qkv")) else 1.0
                value = gain * noise / parameter[0].numel() ** 0.5
            parameter.copy_(value)
    # A generated image token would look like a placeholder, which a trained model never emits.
    model.get_output_embeddings().weight[[PAD, IMAGE]] = 0.0


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the grid of patches that the tower sees of one image (or tile)."""
    vision = model.config.vision_config
    size, patch = (
        tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        for value in (vision.image_size, vision.patch_size)
    )
    return size[0] // patch[0], size[1] // patch[1]


def patches_per_side(model: nn.Module) -> int:
    """How many patches, on each side, become one feature."""
    return round(1 / getattr(model.config, "downsample_ratio", 1))


def visual_tokens(model: nn.Module) -> int:
    """The placeholders of one image (or tile)."""
    height, width = patch_grid(model)
    return height * width // patches_per_side(model) ** 2


def inputs(
    model: nn.Module,
    batch: int = 1,
    text: tuple[int, int] = (3, 5),
    padding: int | Sequence[int] = 0,
    images: int = 1,
    seed: int = 0,
    tiles: int | Sequence[int] = 1,
) -> dict[str, torch.Tensor]:
    """A prompt: `text[0]` text tokens, the image's placeholders, `text[1]` text tokens.

    With several `images` in a row, one text token stands between two images. All rows have the same
    length: a row with fewer pad tokens than the longest padding has more text before the image.

    Args:
        padding: pad tokens on the left, for all rows or one number a row.
        tiles: how many tiles an image is cut into, for all images or one number an image of a row;
            its tiles' placeholders follow each other with nothing between.

    Returns:
        ``input_ids`` [batch, S], ``attention_mask`` [batch, S] and ``pixel_values``
        [batch * all tiles of a row, 3, size, size], rows' images one after another.
    """
    pads = [padding] * batch if isinstance(padding, int) else list(padding)
    if len(pads) != batch:
        raise ValueError(f"padding has {len(pads)} rows, the batch {batch}")
    cuts = [tiles] * images if isinstance(tiles, int) else list(tiles)
    if len(cuts) != images:
        raise ValueError(f"tiles has {len(cuts)} images, a row {images}")
    generator = torch.Generator().manual_seed(seed + 1000)
    visual = visual_tokens(model)
    vocab = model.config.text_config.vocab_size
    total = max(pads) + text[0] + sum(cuts) * visual + (images - 1) + text[1]
    ids = torch.randint(FIRST_TEXT, vocab, (batch, total), generator=generator)
    mask = torch.ones(batch, total, dtype=torch.long)
    first = max(pads) + text[0]
    for cut in cuts:
        ids[:, first : first + cut * visual] = model.config.image_token_id
        first += cut * visual + 1
    for row, pad in enumerate(pads):
        ids[row, :pad] = PAD
        mask[row, :pad] = 0
    size = model.config.vision_config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(batch * sum(cuts), 3, height, width, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def rename_everything(model: nn.Module, paths: bool = False) -> nn.Module:
    """Give every submodule of `model` (in place) a class with a meaningless name, and return it.

    Nothing that looks at class names, qualified names or defining modules can recognise the model
    afterwards; weights, code and behaviour stay.

    Args:
        paths: the same for module paths: children get meaningless names, and properties of the new
            classes find them for stock code. Members of lists keep their numbers.
    """
    from transformers import PreTrainedModel
    from transformers.utils import output_capturing

    registry: dict[Any, Any] = output_capturing._CAN_RECORD_REGISTRY

    def key(module: nn.Module) -> Any:
        return str(type(module)) if type(registry) is dict else module  # a plain dict in transformers 5.17

    renamed: dict[type, type] = {}
    for module in list(model.modules()):
        kind = type(module)
        recorded = None
        if isinstance(module, PreTrainedModel):  # recorded by class name, so it has to be told
            recorded = registry.get(key(module))
        if kind not in renamed:
            name = f"K{len(renamed)}"
            renamed[kind] = type(name, (kind,), {"__qualname__": name, "__module__": "nowhere"})
        module.__class__ = renamed[kind]
        if recorded is not None:
            registry[key(module)] = recorded
    if paths:
        _rename_paths(model)
    return model


def _rename_paths(model: nn.Module) -> None:
    """Of a model whose classes are its own."""
    names: dict[str, str] = {}

    def stand_in(new: str) -> property:
        return property(lambda self: self._modules[new])

    for module in list(model.modules()):
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        kind, moved = type(module), {}
        for old, child in module._modules.items():
            moved[names.setdefault(old, f"m{len(names)}")] = child
            if old not in vars(kind):
                setattr(kind, old, stand_in(names[old]))
        module._modules = moved
