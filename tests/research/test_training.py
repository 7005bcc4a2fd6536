"""The training scripts of the small models: the optimizer, the batches, the public set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from examples.research.tinyvlm import batches
from examples.research.tinyvlm.families import family, more_words, redepthed
from examples.research.tinyvlm.muon import BatchedMuon
from examples.research.tinyvlm.packing import pack
from examples.research.tinyvlm.scenes import SIZE, sample
from tests.support.cases import slow_unless

SHAPES = ((24, 16), (24, 16), (16, 24), (16, 16), (24, 16))


def test_batched_muon_is_torchs() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.01, "weight_decay": 0.02, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 4}
    steps = (BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options))
    for number in range(3):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            gradient = None if number == index == 1 else torch.randn_like(mine)
            mine.grad = gradient
            other.grad = None if gradient is None else gradient.clone()
        for optimizer in steps:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        # A batched product may round its bfloat16 sums otherwise on another machine.
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="closure"):
        steps[0].step(lambda: 0.0)


@pytest.mark.parametrize("workers", slow_unless([0, 1], [0]))
def test_a_draw_depends_on_its_step_alone(workers: int) -> None:
    """So a run that was stopped goes on with the scenes that it would have seen."""
    made = batches.Batches("internvl", warmup_batch=2, batch=2)
    made.progress.copy_(torch.tensor([0.0, 0.5, 1.0, 0.5]))
    draws = batches.feed(made, first=3, workers=workers)
    image, video = next(draws), next(draws)
    assert not image.video
    assert video.video, "half of the batches, where there are videos"
    assert len(video.batch.pixels) >= 4
    again = made[3].batch
    for field in dataclasses.fields(again):
        one, other = getattr(again, field.name), getattr(image.batch, field.name)
        assert one.keys() == other.keys() if isinstance(one, dict) else torch.equal(one, other)


def test_the_mask_lets_each_conversation_see_itself_and_the_image() -> None:
    batch = pack([sample("train", 3, "objects")], np.random.default_rng(0), turns=(1.0,))
    segment, seen = batch.segment[0], batch.mask[0, 0] == 0
    length = len(segment)
    for row in range(0, length, 7):
        for column in range(length):
            want = column <= row and int(segment[column]) in (0, int(segment[row]))
            assert bool(seen[row, column]) == want


def test_an_image_of_the_public_set() -> None:
    """The box is what differs from the paper; the splits share no image."""
    scene = sample("dev", 5, "easy")
    x0, y0, x1, y1 = scene.things[0].box
    assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
    drawn = np.asarray(scene.image, int)
    differs = np.abs(drawn - drawn[0, 0]).sum(-1) > 60
    assert differs[y0:y1, x0:x1].mean() > 0.4, "a triangle fills half of its box"
    differs[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = False
    assert not differs.any(), "nothing is drawn beside the box"
    assert {question.task for question in scene.questions} >= {"easy_yes_no"}
    images = [
        np.asarray(sample(split, 0, "easy").image).tobytes() for split in ("train", "tune", "dev", "test")
    ]
    assert len(set(images)) == 4


@pytest.mark.slow
def test_a_model_that_knows_fewer_words_is_trained_on() -> None:
    model = family("qwen2_vl").build()
    before = model.get_input_embeddings().weight.detach().clone()
    more_words(model, len(before) + 3)
    assert len(model.get_input_embeddings().weight) == len(before) + 3
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.slow
@pytest.mark.parametrize("layers", [8, 24])
def test_a_trained_decoder_of_another_depth(layers: int) -> None:
    torch.manual_seed(0)
    source = family("llava").build().eval()
    kept = [layer.mlp.up_proj.weight.clone() for layer in source.model.language_model.layers]
    words = torch.randint(4, 20, (1, 9))
    with torch.no_grad():
        before = source(input_ids=words).logits
        model = redepthed(source, layers).eval()
        after = model(input_ids=words).logits
    ours = [layer.mlp.up_proj.weight for layer in model.model.language_model.layers]
    assert len(ours) == layers == model.config.text_config.num_hidden_layers
    found = [index for index, one in enumerate(kept) if any(torch.equal(one, other) for other in ours)]
    assert {0, 15} <= set(found) and len(found) == min(16, layers)
    for name, value in source.model.vision_tower.state_dict().items():
        assert torch.equal(value, model.model.vision_tower.state_dict()[name]), name
    assert torch.equal(before, after) is (layers > 16), "fresh layers add nothing; dropped ones did"
