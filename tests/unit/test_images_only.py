"""A directory whose processor's part for videos cannot be loaded still answers about images."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlavaProcessor, Qwen2VLProcessor

from examples.research.mixed_sizes.qwen2_vl import build_model, build_processor
from luvc_fx.apps import local_model
from luvc_fx.apps.images_only import images_only, load_images_only
from luvc_fx.generate.chat_prompt import make_prompt
from luvc_fx.generate.sizes.synthetic_image import synthetic_image
from luvc_fx.report.errors import InputError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = build_model(hidden=256, decoder_layers=1, vision_hidden=64, encoder_layers=1)
    model.save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    return tmp_path


def test_loads_without_the_part_for_videos(directory: Path) -> None:
    model, processor = local_model.load(directory)
    assert isinstance(processor, Qwen2VLProcessor)
    assert processor.video_processor is None
    image = synthetic_image(model, processor, (56, 84))
    prompt = make_prompt(model, processor, [image], "Describe the image")
    assert prompt["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert int((prompt["input_ids"] == model.config.image_token_id).sum()) == 6


def test_what_else_is_missing_is_still_an_error(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="holds no processor that can be loaded"):
        local_model.load(directory)


def test_only_processors_that_take_videos(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    with pytest.raises(ValueError, match="processor_class is 'LlavaProcessor'"):
        load_images_only(tmp_path)
    assert images_only(LlavaProcessor).get_attributes() == LlavaProcessor.get_attributes()
