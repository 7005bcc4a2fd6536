"""What training and evaluation have to know of each family of models, in one table.

All families speak the same words; the shipped LLaVA knows only the first ones (`model.VOCAB`), so a
decoder can start from its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from examples.research.tinyvlm import model as llava

EXTRA = ("<img>", "</img>", "<video>", "rows", "way", "does", "move", "moves", "appears", "first", "last")
EXTRA += ("at", "end", "start", "in", "row", "up", "down", "still")
EXTRA += ("a", "not", "present", "contain", "image", "yes", "no", "rectangle")
EXTRA += ("black", "gray", "teal", "brown")
VOCAB = (*llava.VOCAB, *EXTRA)
WORD = {word: number for number, word in enumerate(VOCAB)}


_DECODER = ".language_model.layers."  # in the names of a decoder layer's parameters

DECODER = {
    "vocab_size": len(VOCAB),
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": llava.PAD,
    "bos_token_id": None,
    "eos_token_id": llava.EOS,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
"""The text config of the families that know all words: the sizes of the shipped LLaVA's decoder."""


@dataclass(frozen=True)
class Layout:
    """The prompt in front of the text: ids (L,), position ids (A, L), and the position after them.

    A is the number of position axes: 1, or 3 with multimodal rotary positions.
    """

    ids: list[int]
    positions: np.ndarray
    after: int


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        build: a model with fresh weights.
        features: (model, pixels (B, 3, S, S)) -> visual tokens (B, N, D).
        layout: (frames, grid) -> `Layout`, for `frames` images of ``grid x grid`` tokens each.
        side, pixels_per_token: of an image in training.
        small_sides: smaller images, seen now and then.
        groups: dense labels that a visual token of this family can know about itself.
        kinds: scenes that it is trained on, with their shares.
        vision_from_llava: (model, trained LLaVA): start the vision tower from that one's.
        processor: the stock class, for images.
    """

    name: str
    build: Callable[[], nn.Module]
    features: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    layout: Callable[[int, int], Layout]
    side: int
    pixels_per_token: int
    small_sides: tuple[int, ...]
    groups: tuple[str, ...]
    kinds: dict[str, float]
    vision_from_llava: Callable[[nn.Module, nn.Module], None]
    processor: Callable[[], ProcessorMixin]

    def grid(self, side: int | None = None) -> int:
        """Visual tokens along one side of an image."""
        return (side or self.side) // self.pixels_per_token


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the families that know all words."""
    return llava.build_tokenizer(
        VOCAB,
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<image>",
            "video_token": "<video>",
        },
    )


def in_a_row(ids: list[int]) -> Layout:
    """`ids` with positions 0, 1, 2, ..."""
    return Layout(ids, np.arange(len(ids))[None], len(ids))


def _llava_layout(frames: int, grid: int) -> Layout:
    return in_a_row([WORD["user:"]] + [llava.IMAGE] * (frames * grid * grid))


def _only_whole(model: nn.Module, source: nn.Module) -> None:
    raise ValueError(f"a LLaVA starts from a LLaVA, not from a {type(source).__name__}")


def family(name: str) -> Family:
    """The family called `name`: llava, internvl or qwen2_vl."""
    from examples.research.tinyvlm import family_internvl, family_qwen2_vl

    table = {
        "llava": Family(
            "llava",
            llava.build_model,
            llava.image_features,
            _llava_layout,
            side=128,
            pixels_per_token=8,
            small_sides=(64, 80, 96, 112),
            groups=("color", "kind", "number", "cell"),
            kinds={"objects": 0.5, "chart": 0.3, "cards": 0.2},
            vision_from_llava=_only_whole,
            processor=llava.build_processor,
        ),
        "internvl": family_internvl.FAMILY,
        "qwen2_vl": family_qwen2_vl.FAMILY,
    }
    if name not in table:
        raise ValueError(f"family is {name!r}; allowed: {', '.join(table)}")
    return table[name]


def with_depth(model: nn.Module, layers: int) -> nn.Module:
    """`model`, or a fresh one of its class and sizes if its decoder has another number of layers."""
    text = model.config.text_config
    if text.num_hidden_layers == layers:
        return model
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * layers
    fresh = type(model)(model.config)
    fresh.generation_config = model.generation_config
    return fresh


@torch.no_grad()
def more_words(model: nn.Module, count: int) -> None:
    """Give a model that knows fewer words embeddings for `count`; the new ones are random."""
    if len(model.get_input_embeddings().weight) < count:
        model.resize_token_embeddings(count, mean_resizing=False)


@torch.no_grad()
def decoder_from_llava(model: nn.Module, source: nn.Module) -> None:
    """Start the decoder of `model` from that of a LLaVA of the same sizes; new words stay as they are."""
    ours, theirs = model.model.language_model, source.model.language_model
    known = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name == "embed_tokens.weight":
            parameter[: len(llava.VOCAB)] = known[name]
        elif name in known:
            parameter.copy_(known[name])
        else:  # Qwen2 has biases where Llama has none
            parameter.zero_()


@torch.no_grad()
def redepthed(source: nn.Module, layers: int) -> nn.Module:
    """`source` with another number of decoder layers, to be trained on.

    Fewer: evenly spaced ones stay, the first and the last among them. More: they lie evenly spaced among
    fresh ones that add nothing to the residual stream yet, so that the outputs are the same.
    """
    text = source.config.text_config
    depth = text.num_hidden_layers
    if depth == layers:
        return source
    few, many = sorted((depth, layers))
    places = [round(index * (many - 1) / (few - 1)) for index in range(few)]
    pairs = list(zip(places, range(few), strict=True))  # (of the deeper model, of the other)
    known = source.model.language_model.layers
    rest = {name: value for name, value in source.state_dict().items() if _DECODER not in name}
    model = with_depth(source, layers)
    missing, unknown = model.load_state_dict(rest, strict=False)
    assert not unknown and all(_DECODER in name for name in missing), (unknown, missing)
    ours = model.model.language_model.layers
    if layers > depth:
        for layer in ours:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    for deep, other in pairs:
        to, of = (deep, other) if layers > depth else (other, deep)
        ours[to].load_state_dict(known[of].state_dict())
    return model
