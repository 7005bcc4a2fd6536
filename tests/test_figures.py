"""The figures' numbers hold what drawings and captions need; what they show of merges is what merges."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import bias
import failures
import figures
import integrity
import numpy as np
import oracle_vision
import progressive
import pytest
import sensitivity
import torch
from figure_kit import UNPRUNED, Bench, Size

from luvc_fx.evaluation.prompts import Prompts
from luvc_fx.evaluation.questions import Question
from luvc_fx.evaluation.result import Cell
from luvc_fx.schedule import Schedule

LAYERS, FUSED = 16, 256


class Stub:
    """Answers three of four questions, others under each schedule, and all without one."""

    def __init__(self, bench: Bench) -> None:
        self.prompts = Prompts(bench.model, bench.processor)

    def answers(self, cell: Cell, questions: Sequence[Question]) -> list[str]:
        wrong = [
            cell.name != UNPRUNED and not zlib.crc32((cell.name + q.text).encode()) % 4 for q in questions
        ]
        return ["?" if missed else q.answer for missed, q in zip(wrong, questions, strict=True)]

    def facts(self, cell: Cell, questions: Sequence[Question]) -> dict[str, Any]:
        assert cell.schedule is not None
        fused = FUSED
        for merge in cell.schedule.merge:
            fused = fused // 16 * (merge.length or 12)
        tokens = [fused] * LAYERS
        for layer, prune in cell.schedule.prunes_at(LAYERS, fused):
            tokens[layer:] = [prune.count(fused)] * (LAYERS - layer)
        return {"tokens_per_layer": tokens, "visual": FUSED, "budget": sum(tokens) / FUSED / LAYERS}


class Small(Bench):
    """Two images, and answers of the stub."""

    asker = property(lambda self: self.stub)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    small = Small(tmp_path_factory.mktemp("figures"), Size(questions=2, images=2), lambda *_: None)
    small.stub = Stub(small)
    return small


def test_every_figure_is_drawn_and_described(bench: Bench, tmp_path: Path) -> None:
    figures.make(bench, tmp_path)
    text = (tmp_path / "FIGURES.md").read_text()
    for figure in figures.FIGURES:
        assert (tmp_path / f"{figure.NAME}.png").stat().st_size > 10_000
        assert f"({figure.NAME}.png)" in text
    assert "nan" not in text.split()
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
    from luvc_fx.evaluation.questions import read_frames

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


def test_budgets_of_the_progressive_figure_are_equal() -> None:
    fused = 256
    for key, schedule in progressive.schedules().items():
        asked = float(key.rpartition(", ")[2].split()[0]) / 100
        tokens = [fused] * LAYERS
        for layer, prune in schedule.prunes_at(LAYERS, fused):
            tokens[layer:] = [prune.count(fused)] * (LAYERS - layer)
        assert sum(tokens) / fused / LAYERS == pytest.approx(asked, abs=0.005), key


def test_residual_schedules_are_shared_with_the_sensitivity() -> None:
    """So that their answers are asked for once."""
    shared = set(failures.schedules().values()) & set(sensitivity.schedules().values())
    assert len(shared) == 3
