"""The control of a smaller image: as many visual tokens as asked for, and the model's own answer to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    LlavaNextImageProcessor,
    Qwen2VLImageProcessor,
)

import luvc_fx
from luvc_fx.downsample import downsample
from tests.support.models import tiny_internvl
from tests.support.models_anyres import tiny_llava_next
from tests.support.models_qwen import tiny_qwen2_vl

DEMO = Path(luvc_fx.__file__).parent / "apps" / "demo_model"


def picture(width: int, height: int) -> Image.Image:
    draw = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=draw).byte().numpy())


def with_images(processor: Any) -> Any:
    return SimpleNamespace(image_processor=processor)


@pytest.mark.parametrize(
    ("budget", "side"), [(1.0, 16), (0.5, 11), (0.25, 8), (0.001, 1)], ids=lambda v: str(v)
)
@torch.no_grad()
def test_a_square_grid(budget: float, side: int) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(DEMO), AutoProcessor.from_pretrained(DEMO)
    less = downsample(model, processor, Image.open(DEMO / "objects.png").convert("RGB"), budget)
    assert (less.tokens, less.of) == (side * side, 256)
    raw = processor(images=[less.image], text=["<image> what"], return_tensors="pt", **less.processing)
    assert int((raw["input_ids"] == model.config.image_token_id).sum()) == less.tokens
    given = less.encoded(model, raw)
    logits = model(**given).logits
    with torch.no_grad():
        tower = model.model.vision_tower
        states = tower(raw["pixel_values"], interpolate_pos_encoding=True, output_hidden_states=True)
        layer = states.hidden_states[model.config.vision_feature_layer][:, 1:]
        embeds = model.get_input_embeddings()(raw["input_ids"])
        visual = raw["input_ids"] == model.config.image_token_id
        embeds[visual] = model.model.multi_modal_projector(layer)[0]
        want = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    answer = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == raw["input_ids"].shape[1] + 3


@pytest.mark.parametrize("budget", [1.0, 0.6, 0.25, 0.01])
def test_any_size(budget: float) -> None:
    model = tiny_qwen2_vl(decoder_layers=1, encoder_layers=1)
    vision = model.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    processor = Qwen2VLImageProcessor(
        patch_size=vision.patch_size, merge_size=2, min_pixels=16 * unit * unit, max_pixels=400 * unit * unit
    )
    wide = picture(14 * unit, 8 * unit)
    less = downsample(model, with_images(processor), wide, budget)
    (grid,) = processor(images=[less.image], return_tensors="pt", **less.processing)[
        "image_grid_thw"
    ].tolist()
    assert less.of == 8 * 14
    assert grid[1] * grid[2] // 4 == less.tokens
    assert less.tokens == pytest.approx(budget * 112, abs=max(1.0, 0.06 * budget * 112))
    assert grid[1] <= grid[2] or less.tokens == 1
    assert less.encoded(model, {"pixel_values": 1}) == {"pixel_values": 1}


@pytest.mark.parametrize(
    ("make", "processor"),
    [
        (tiny_internvl, GotOcr2ImageProcessor),
        (tiny_llava_next, LlavaNextImageProcessor),
    ],
)
def test_models_of_one_size_are_refused(make: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match=r"takes images, or tiles of them, of one size only"):
        downsample(make(), with_images(processor()), picture(40, 40), 0.5)


def test_bad_arguments() -> None:
    for budget in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"budget is {budget}; allowed: a number in \(0, 1\]"):
            downsample(None, None, picture(4, 4), budget)
    with pytest.raises(ValueError, match="are for no images"):
        downsample(torch.nn.Linear(1, 1), with_images(CLIPImageProcessor()), picture(4, 4), 0.5)
