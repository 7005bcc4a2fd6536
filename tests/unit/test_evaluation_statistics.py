"""Intervals and tests on hand-made answers: planted differences are found, and nothing else is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.apps.evaluation.questions import Question
from luvc_fx.apps.evaluation.result import Cell
from luvc_fx.apps.evaluation.scoring import score
from luvc_fx.apps.evaluation.statistics import cluster_sums, holm, ratio_interval, sign_flip
from luvc_fx.schedule import Schedule

UNPRUNED, GOOD, BAD = (
    Cell(name, budget, Schedule()) for name, budget in (("u", None), ("g", 0.5), ("b", 0.5))
)


def test_sums_over_clusters() -> None:
    assert cluster_sums([1, 0, 1, 1], ["b", "a", "b", "c"]).tolist() == [2, 0, 1]


@given(st.lists(st.integers(-3, 3), max_size=9))
def test_the_sign_flip_test_is_exact(differences: list[int]) -> None:
    """All flips, one by one."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip(differences) == pytest.approx(sum(s >= observed for s in sums) / len(sums))


def test_known_p_values() -> None:
    assert sign_flip([]) == sign_flip([0, 0]) == 1.0
    assert sign_flip([-1] * 10) == pytest.approx(2 / 2**10)
    assert sign_flip([1] * 8 + [-1] * 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # McNemar, exact
    with pytest.raises(ValueError, match="whole numbers"):
        sign_flip([0.5])


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last is below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_cover_as_often_as_they_say() -> None:
    """Accuracy 0.8 in clusters that are right or wrong together, which questions drawn alone would miss."""
    numbers = np.random.default_rng(1)
    covered, trials, clusters = 0, 300, 80
    for trial in range(trials):
        chance = np.where(numbers.random(clusters) < 0.8, 1.0, 0.0)
        found = ratio_interval(5 * chance, np.full(clusters, 5.0), seed=trial, resamples=400)
        assert found is not None
        covered += found[0] <= 0.8 <= found[1]
    assert 0.90 <= covered / trials <= 0.98


def test_intervals_that_do_not_exist() -> None:
    assert ratio_interval(np.array([1.0]), np.array([1.0])) is None
    assert ratio_interval(np.array([0.0, 0.0]), np.array([0.0, 0.0])) is None
    assert ratio_interval(np.array([1.0, 2.0]), np.array([2.0, 4.0])) == (0.5, 0.5)


def _questions(scenes: int, each: int = 3) -> list[Question]:
    tasks = ("color", "count", "color")
    return [
        Question((), f"{scene} {i} ?", "Yes", tasks[i % 3], str(scene))
        for scene in range(scenes)
        for i in range(each)
    ]


def _said(right: np.ndarray) -> list[str]:
    return ["yes " if r else "no" for r in right]


def test_a_planted_difference_is_found_and_a_null_is_not() -> None:
    questions = _questions(200)
    numbers = np.random.default_rng(0)
    base = numbers.random(len(questions)) < 0.9
    noise = numbers.random(len(questions)) < 0.9  # equally often right, but elsewhere
    worse = base & (numbers.random(len(questions)) < 0.85)
    answers = {UNPRUNED: _said(base), GOOD: _said(noise), BAD: _said(worse)}
    found = score(questions, answers, UNPRUNED, rivals={"g": {BAD: GOOD, GOOD: GOOD}})

    assert found[UNPRUNED]["all"].accuracy == pytest.approx(base.mean())
    assert found[UNPRUNED]["all"].retention == 1.0
    assert found[UNPRUNED]["all"].against == {}, "not compared with itself"
    assert found[GOOD]["all"].against["unpruned"].adjusted > 0.05
    bad = found[BAD]["all"]
    assert bad.retention == pytest.approx(worse.sum() / base.sum())
    assert bad.retention_interval is not None
    assert bad.retention_interval[0] < bad.retention < bad.retention_interval[1] < 1.0
    assert bad.agreement == pytest.approx((worse == base).mean())
    assert bad.against["unpruned"].difference == pytest.approx(worse.mean() - base.mean())
    assert bad.against["unpruned"].adjusted < 1e-6
    assert bad.against["g"].difference < 0 and bad.against["g"].adjusted < 0.01
    assert "g" not in found[GOOD]["all"].against

    color = np.array([question.task == "color" for question in questions])
    assert found[BAD]["color"].questions == color.sum() and found[BAD]["color"].scenes == 200
    assert found[BAD]["color"].accuracy == pytest.approx(worse[color].mean())
    # Two cells of two tasks are one family, apart from the pooled questions.
    single = [found[cell][task].against["unpruned"] for cell in (GOOD, BAD) for task in ("color", "count")]
    assert [c.adjusted for c in single] == pytest.approx(holm([c.p for c in single]))


def test_questions_of_one_scene_are_not_counted_as_evidence_by_themselves() -> None:
    """Twenty questions lost in two scenes are two differences, and not twenty."""
    questions = _questions(40, each=10)
    lost = np.array([question.scene not in ("3", "4") for question in questions])
    answers = {UNPRUNED: ["yes"] * len(questions), BAD: _said(lost)}
    found = score(questions, answers, UNPRUNED)[BAD]["all"]
    assert found.against["unpruned"].p == pytest.approx(0.5)
    assert found.retention_interval is not None and found.retention_interval[1] == 1.0


def test_nothing_right_has_no_retention() -> None:
    questions = _questions(3)
    said = ["no"] * len(questions)
    found = score(questions, {UNPRUNED: said, BAD: said}, UNPRUNED)[BAD]["all"]
    assert found.retention is None and found.retention_interval is None
    assert found.agreement == 1.0 and found.against["unpruned"].p == 1.0
