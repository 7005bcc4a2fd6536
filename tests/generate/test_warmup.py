"""After a warm-up nothing compiles; beyond it, one vision and one prefill graph and their cause."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import luvc_fx
from examples.research.mixed_sizes.qwen2_vl import build_processor
from luvc_fx import LuvcWarning, SizeBuckets, _compat
from luvc_fx.generate.chat_prompt import make_prompt
from luvc_fx.generate.sizes import longer_prompts, warming
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models import PAD, inputs, tiny_llava
from tests.support.models_qwen import PATCH, UNIT, tiny_qwen2_vl

BOTH = Schedule(
    merge=(Merge(axis="width", keep=0.75, layer=0),),
    prune=(Prune(keep=0.5, layer=0), Prune(keep=0.0, layer=1)),
)
PRUNED = Schedule(prune=Prune(keep=0.5, layer=1))
STEP = PATCH * UNIT


@pytest.fixture
def processor() -> Any:
    return build_processor(patch_size=PATCH, min_pixels=STEP**2, max_pixels=(6 * STEP) ** 2)


@pytest.fixture
def qwen() -> Iterator[Any]:
    made = tiny_qwen2_vl(decoder_layers=2, encoder_layers=1)
    yield made
    luvc_fx.restore(made)


@pytest.fixture
def llava() -> Iterator[Any]:
    made = tiny_llava(decoder_layers=2, encoder_layers=2, grid=4)
    yield made
    luvc_fx.restore(made)


def ask(model: Any, processor: Any, size: tuple[int, int], text: str = "what is left", new: int = 2) -> None:
    noise = numpy.random.default_rng(len(text)).integers(0, 256, (*size, 3), dtype=numpy.uint8)
    given = make_prompt(model, processor, [Image.fromarray(noise)], text)
    model.generate(**given, max_new_tokens=new)


def kinds(model: Any, since: int = 0) -> list[str]:
    return [graph.kind for graph in luvc_fx.report_of(model).graphs[since:]]


def test_after_it_nothing_compiles_and_another_size_compiles_once(qwen: Any, processor: Any) -> None:
    luvc_fx.compile(qwen, BOTH, inner="eager", strict=True)
    numbers = torch.get_rng_state()
    done = luvc_fx.warmup(qwen, [(32, 32), (16, 48), (32, 32)], processor)
    assert torch.equal(torch.get_rng_state(), numbers)
    first, second = done.sizes
    assert (first.size, first.what) == ((32, 32), "image_grid_thw 1,8,8")
    assert (first.vision, first.prefill, first.decode, first.other) == (1, 2, 2, 0)
    assert (first.prompts, second.prompts) == (3, 2)
    # Of a decode graph nothing is new: how many rows were merged away is no part of it.
    assert (second.vision, second.prefill, second.decode, second.other) == (1, 1, 0, 0)
    assert done.settled and not done.left_out
    warmed = len(kinds(qwen))
    assert (done.graphs, warmed) == (7, 7)
    for size in ((32, 32), (16, 48), (33, 31)):  # the last is the first to the processor
        for text in ("left", "what is left of the image", "what is this ? " * 9):
            ask(qwen, processor, size, text)
        ask(qwen, processor, size, new=9)
    assert luvc_fx.warmup(qwen, [(16, 48)], processor).graphs == 0
    assert kinds(qwen, warmed) == []

    for text in ("left", "what is left of the image"):
        ask(qwen, processor, (24, 40), text)
    assert kinds(qwen, warmed) == ["vision", "prefill"]
    vision, prefill = luvc_fx.report_of(qwen).graphs[warmed:]
    assert "image_grid_thw" in vision.recompile_reason
    assert "encoded['image']" in prefill.recompile_reason


@pytest.mark.slow
def test_buckets_bound_the_graphs(qwen: Any, processor: Any) -> None:
    luvc_fx.compile(qwen, PRUNED, inner="eager", strict=True)
    area, unit = (5 * STEP) ** 2, SizeBuckets.granularity_of(qwen)
    buckets = SizeBuckets.spread(3, area, unit)
    done = luvc_fx.warmup(qwen, buckets, processor)
    assert [one.size for one in done.sizes] == list(buckets.sizes)
    assert done.graphs <= buckets.most_graphs()
    warmed = len(kinds(qwen))
    numbers = random.Random(0)
    sizes = [(numbers.randint(8, 120), numbers.randint(8, 120)) for _ in range(20)]
    for number, (height, width) in enumerate(sizes):
        image = Image.new("RGB", (width, height), (number, 50, 200))
        fitted = buckets.fit(image, how=("resize", "pad")[number % 2])
        given = make_prompt(qwen, processor, [fitted], "what is " * (1 + number))
        qwen.generate(**given, max_new_tokens=2)
    assert kinds(qwen, warmed) == []


@pytest.mark.slow
def test_a_batch_is_warmed_with_padded_rows_and_without(llava: Any) -> None:
    luvc_fx.compile(llava, BOTH, inner="eager", strict=True)
    done = luvc_fx.warmup(llava, inputs=inputs(llava, batch=2))
    assert done.settled
    assert done.sizes[0].size is None
    assert done.sizes[0].what == "pixel_values (2, 3, 16, 16)"
    for padding in (0, (0, 2), (5, 1)):
        for tail in (1, 6):
            given = inputs(llava, batch=2, text=(2, tail), padding=padding, seed=1)
            llava.generate(**given, max_new_tokens=3, pad_token_id=PAD)
    assert len(kinds(llava)) == done.graphs


@pytest.mark.slow
def test_ready_inputs_of_one_row(llava: Any) -> None:
    luvc_fx.compile(llava, BOTH, inner="eager", strict=True)
    done = luvc_fx.warmup(llava, inputs=[inputs(llava)])
    assert done.settled and done.graphs == 5
    for text in ((1, 1), (9, 30)):
        llava.generate(**inputs(llava, text=text, seed=2), max_new_tokens=2)
    assert len(kinds(llava)) == 5


def limit_to(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `luvc_fx.compile` lets Dynamo compile of one function, where it is told and where it is read."""
    monkeypatch.setattr(_compat, "RECOMPILE_LIMIT", number)
    monkeypatch.setattr("luvc_fx._compat.torch.RECOMPILE_LIMIT", number)


def test_more_sizes_than_the_limit_warn(qwen: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_to(2, monkeypatch)
    luvc_fx.compile(qwen, PRUNED, inner="eager", on_no_match="ignore")
    sizes = [(16, 16), (16, 32), (32, 16), (32, 32)]
    with pytest.warns(LuvcWarning, match="4 sizes of images need up to 5 prefill graphs.* 2 times at most"):
        done = luvc_fx.warmup(qwen, sizes, processor)
    assert done.left_out >= 1
    assert not done.settled
    assert "Dynamo has reached its limit" in str(done)
    # Sizes that the processor brings to one grid are one.
    limit_to(3, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        luvc_fx.warmup(qwen, [(32, 32), (33, 32), (32, 33)], processor)
    assert not [warning for warning in caught if "sizes of images need" in str(warning.message)]


def test_longer_prompts(qwen: Any, processor: Any) -> None:
    row = make_prompt(qwen, processor, [Image.new("RGB", (16, 16))], "left of")
    given = {name: torch.cat([value, value]) for name, value in row.items()}
    length = given["input_ids"].shape[1]
    longer = longer_prompts.longer(qwen, given, 3, padded=False)
    assert torch.equal(longer["input_ids"][:, :length], given["input_ids"])
    assert (longer["input_ids"][:, length:] == given["input_ids"][:, -1:]).all()
    assert (longer["attention_mask"] == 1).all()
    assert (longer["mm_token_type_ids"][:, length:] == 0).all()
    assert longer["pixel_values"] is given["pixel_values"]
    padded = longer_prompts.longer(qwen, given, 3, padded=True)
    assert padded["attention_mask"].tolist() == [[0] * 4 + [1] * length, [1] * (length + 4)]
    assert torch.equal(padded["input_ids"][0, 4:], given["input_ids"][0])
    assert torch.equal(padded["input_ids"][1, :length], given["input_ids"][1])
    assert longer_prompts.longer(qwen, given, 0, padded=False) is given
    # Position ids would have to go on, and nobody here knows how: such inputs stay as they are.
    assert not longer_prompts.can_lengthen(qwen, {**given, "position_ids": torch.zeros(4, 2, length)})


def test_an_image_at_the_end_is_not_repeated(qwen: Any) -> None:
    ids = torch.tensor([[7, 8, 1, 1, 1, 1]])
    longer = longer_prompts.longer(qwen, {"input_ids": ids}, 2, padded=False)
    assert longer["input_ids"].tolist() == [[7, 8, 1, 1, 1, 1, 8, 8]]


def test_the_result_is_a_table_and_data() -> None:
    done = warming.WarmUp(
        (
            warming.WarmedSize((336, 336), "image_grid_thw 1,24,24", 61.25, 1, 2, 2, 0, 3, True),
            warming.WarmedSize(None, "image_grid_thw 1,8,8", 9.0, 1, 1, 0, 0, 4, False),
        )
    )
    assert str(done).splitlines() == [
        "size                  seconds  vision  prefill  decode  other  prompts",
        "336 x 336                61.2       1        2       2      0        3",
        "image_grid_thw 1,8,8      9.0       1        1       0      0        4  not settled",
        "total                    70.2       2        3       2      0        7",
    ]
    assert done.to_dict()["graphs"] == 7
    assert done.to_dict()["sizes"][0]["size"] == (336, 336)
    assert not done.settled


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "sizes and a processor are both needed"),
        ({"sizes": [(7, 7)]}, "sizes and a processor are both needed"),
        ({"sizes": [], "processor": 1}, "sizes is empty"),
        ({"sizes": [(8, -8)], "processor": 1}, r"sizes holds \(8, -8\)"),
        ({"sizes": [(7, 7)], "inputs": []}, "inputs are ready: give either them, or sizes"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": [{"pixel_values": 1}]}, "without input_ids"),
        (
            {"sizes": [(7, 7)], "processor": 1, "batch": 0},
            "batch is 0; allowed: a whole number of at least 1",
        ),
        ({"sizes": [(7, 7)], "processor": 1, "new_tokens": 1}, "new_tokens is 1; .* at least 2"),
        ({"sizes": [(7, 7)], "processor": 1, "images_per_prompt": 1.5}, "images_per_prompt is 1.5"),
    ],
)
def test_wrong_arguments(llava: Any, arguments: dict[str, Any], text: str) -> None:
    luvc_fx.compile(llava, PRUNED, inner="eager")
    with pytest.raises(ValueError, match=text):
        luvc_fx.warmup(llava, **arguments)


def test_a_model_that_is_not_compiled(llava: Any) -> None:
    text = r"this LlavaForConditionalGeneration is not compiled by luvc_fx; call luvc_fx.compile\(model\)"
    with pytest.raises(ValueError, match=text):
        luvc_fx.warmup(llava, inputs=[inputs(llava)])
