"""The figures' numbers hold what drawings and captions need; what they show of merges is what merges."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.research.figures import bias, figures, integrity, latency, progressive, smoothing
from examples.research.figures.figure_kit import UNPRUNED, Bench, Size
from luvc_fx.apps.evaluation.prompts import Prompts, collate
from luvc_fx.apps.evaluation.questions import Question
from luvc_fx.apps.evaluation.result import Cell
from luvc_fx.schedule import Schedule
from tests.support.oracle import vision as oracle_vision


class Stub:
    """Answers three of four questions, others under each schedule, and all without one."""

    def __init__(self, bench: Bench) -> None:
        self.prompts = Prompts(bench.model, bench.processor)
        config = bench.model.config
        self.layers, self.fused = config.text_config.num_hidden_layers, config.image_seq_length
        sizes = (config.vision_config.image_size, config.vision_config.patch_size)
        size, patch = (side if isinstance(side, int) else side[0] for side in sizes)
        self.side = size // patch

    def answers(self, cell: Cell, questions: Sequence[Question]) -> list[str]:
        wrong = [
            cell.name != UNPRUNED and not zlib.crc32((cell.name + q.text).encode()) % 4 for q in questions
        ]
        return ["?" if missed else q.answer for missed, q in zip(wrong, questions, strict=True)]

    def facts(self, cell: Cell, questions: Sequence[Question]) -> dict[str, Any]:
        assert cell.schedule is not None
        fused = self.fused
        for merge in cell.schedule.merge:
            fused = fused * (merge.length or 12) // self.side
        tokens = entering(cell.schedule, self.layers, fused)
        budget = sum(tokens) / self.fused / self.layers
        return {"tokens_per_layer": tokens, "visual": self.fused, "budget": budget}


def entering(schedule: Schedule, layers: int, fused: int) -> list[int]:
    tokens = [fused] * layers
    for layer, prune in schedule.prunes_at(layers, fused):
        tokens[layer:] = [prune.count(fused)] * (layers - layer)
    return tokens


class Small(Bench):
    """Two images, and answers of the stub."""

    @cached_property
    def asker(self) -> Any:  # type: ignore[override]
        return Stub(self)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Small(tmp_path_factory.mktemp("figures"), Size(questions=2, images=2), lambda *_: None)


def films() -> dict[str, Any]:
    """As `luvc-fx eval --time` has them; the model does not know the order."""
    rows = []
    for method, budget, ms in ((UNPRUNED, None, 900.0), ("default", 0.5, 400.0), ("video", None, 300.0)):
        scores = {
            task: {
                "accuracy": 0.3 if task == "first" else 0.95,
                "accuracy_interval": [0.9, 1.0],
                "questions": 5,
            }
            for task in ("all", "color", "first")
        }
        place = {"method": method, "budget": budget, "visual_tokens": 2304, "measured_budget": budget or 0.3}
        rows.append({**place, "prefill_ms": ms, "prefill_spread_ms": 8.0, "scores": scores})
    return {"rows": rows, "hardware": {"device": "a CPU", "dtype": "float32"}}


@pytest.mark.slow
def test_every_figure_is_drawn_and_described(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measured", lambda folder, watch: films())
    monkeypatch.setattr(smoothing, "LEARNT", 2)
    monkeypatch.setattr(smoothing, "TOLD", 1)
    figures.make(bench, tmp_path)
    text = (tmp_path / "FIGURES.md").read_text()
    for figure in figures.FIGURES:
        assert (tmp_path / f"{figure.NAME}.png").stat().st_size > 10_000
        assert f"({figure.NAME}.png)" in text
    assert not re.search(r"\bnan\b", text)
    # What is drawn again comes from the JSON alone.
    before = (tmp_path / "bias.png").read_bytes()
    (tmp_path / "bias.png").unlink()
    figures.make(None, tmp_path, only="bias", redraw=True)  # type: ignore[arg-type]
    assert (tmp_path / "bias.png").read_bytes() == before
    assert (tmp_path / "FIGURES.md").read_text() == text


def test_questions_are_of_all_types_in_turns(bench: Bench) -> None:
    tasks = [question.task for question in bench.questions]
    assert len(tasks) == 10
    assert tasks[0] != tasks[5]  # color and shape take turns
    assert sorted(tasks[1::5]) == ["position"] * 2
    assert len({(question.task, question.scene) for question in bench.questions}) == 10
    assert len({question.scene for question in bench.scenes}) == 2


@pytest.mark.parametrize("method", ["oim", "tome"])
@pytest.mark.parametrize("grid", ["16 x 12", "8 x 8"])
def test_memberships_are_what_the_oracle_merges(bench: Bench, method: str, grid: str) -> None:
    pixels = pixels_of(bench)
    steps = integrity.merges(grid, method)
    found = integrity.memberships(bench.model, pixels, steps)
    with torch.inference_mode():
        expected = oracle_vision.encode(bench.model, Schedule(merge=steps), pixels, [])
    for image, token_of in enumerate(found):
        sizes = token_of.bincount(minlength=expected.sizes.shape[1])
        assert sizes.tolist() == expected.sizes[image].tolist()
        # Each token holds its own representative.
        places = torch.arange(len(sizes))
        assert token_of[expected.slots[image]].tolist() == places.tolist()


@cache
def pixels_of(bench: Bench) -> torch.Tensor:
    from luvc_fx.apps.evaluation.questions import read_frames

    images = [read_frames(question)[0] for question in bench.scenes]
    return bench.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def test_spread_tells_torn_tokens() -> None:
    token_of = list(range(256))
    token_of[17] = 16  # beside it
    assert integrity.spread(token_of) == {"reach": 1.0, "torn": 0.0, "largest": 2.0}
    token_of[200] = 100  # six rows below, four columns to the right
    assert integrity.spread(token_of) == {"reach": 3.5, "torn": 0.5, "largest": 2.0}


def test_position_bias_is_0_for_chance_and_1_for_one_ranking() -> None:
    rng = np.random.default_rng(0)
    chance, same = rng.random((100, 256)), np.tile(np.arange(256.0), (100, 1))
    assert bias.explained(chance) == pytest.approx(0.0, abs=0.005)
    assert bias.explained(same) == pytest.approx(1.0)
    assert bias.slope(same)[0] == pytest.approx(1.0, abs=0.01)
    assert bias.slope(-same)[0] == pytest.approx(-1.0, abs=0.01)
    low, high = bias.slope(chance)[1] or (1.0, 1.0)
    assert low < 0.0 < high < 0.1


@pytest.mark.parametrize("depth", progressive.DEPTHS)
def test_budgets_of_the_progressive_figure_are_equal(depth: int) -> None:
    fused = 256
    made = progressive.schedules(depth)
    assert {key.partition(",")[0] for key in made} == set(progressive.ARMS)
    for key, schedule in made.items():
        asked = float(key.rpartition(", ")[2].split()[0]) / 100
        tokens = entering(schedule, depth, fused)
        assert sum(tokens) / fused / depth == pytest.approx(asked, abs=0.005), key


def test_the_latency_figure_leaves_out_what_the_model_does_not_know(
    monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    monkeypatch.setattr(latency, "measured", lambda folder, watch: films())
    numbers = latency.data(bench)
    assert latency.known(numbers) == ["color"]
    caption = latency.caption(numbers)
    assert "does not know well enough to judge by: first 30 %" in caption
    assert "default, 50 % 400 ms (2.25 times faster; color 95.0 %)" in caption


def test_textures_are_grey_squares() -> None:
    """A grey square on a smooth ground."""
    rng = np.random.default_rng(0)
    for name in smoothing.TEXTURES:
        image = np.asarray(smoothing.textured(name, rng, told=True), float)
        assert image.shape == (128, 128, 3)
        assert (image[..., 0] == image[..., 2]).all()
        rough = (
            np.abs(np.diff(image[..., 0], n=2, axis=0))[:, 1:-1] + np.abs(np.diff(image[..., 0], n=2))[1:-1]
        )
        inside = rough > 4
        assert 0.1 < inside.mean() < 0.3, "a quarter of the image"


def test_what_is_left_over_is_told() -> None:
    """A readout of features that name the texture is always right, and one of noise is chance."""
    rng = np.random.default_rng(0)
    kinds = len(smoothing.TEXTURES)
    learnt, told = (
        np.eye(kinds).repeat(count, 0) @ rng.normal(size=(kinds, 128)) * 3
        for count in (smoothing.LEARNT, smoothing.TOLD)
    )
    same = np.eye(kinds).repeat(smoothing.TOLD, 0) @ learnt[:: smoothing.LEARNT]
    assert smoothing.told_right(learnt, same).all()
    noise = rng.normal(size=(2, kinds * smoothing.LEARNT, 128))
    assert abs(smoothing.told_right(noise[0], noise[1][: len(told)]).mean() - 1 / kinds) < 0.15


@torch.inference_mode()
@pytest.mark.slow
def test_the_rows_left_over_are_visual_ones_of_the_last_layer(bench: Bench) -> None:
    images = [smoothing.textured("brick", np.random.default_rng(0), told=False)]
    question = bench.questions[0]
    found = smoothing.left_over(bench, images, question, Schedule())
    inputs = collate(
        [bench.prompts.prompt(question)], 1, bench.prompts.padding, bench.model.device, torch.float32
    )
    pixels = bench.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    states = bench.model(**{**inputs, "pixel_values": pixels}, output_hidden_states=True).hidden_states[-2]
    visual = inputs["input_ids"] == bench.model.config.image_token_id
    np.testing.assert_allclose(found[0], states[visual].mean(0).numpy(), rtol=1e-4, atol=1e-5)
    pruned = smoothing.left_over(bench, images, question, smoothing.schedules()["preset"])
    assert np.abs(pruned - found).max() > 1e-3
