"""`luvc_fx.tune`: its cost model, its measure, what it promises, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.apps.tuning import search
from luvc_fx.apps.tuning.candidates import SLACK, at_random, drawn, shares
from luvc_fx.apps.tuning.divergence import (
    Answer,
    Divergence,
    compare,
    greedy_answers,
    halves,
    measure_divergence,
)
from luvc_fx.apps.tuning.flops import DecoderCost
from luvc_fx.schedule.presets import PICK
from tests.support.models import inputs, tiny_internvl, tiny_llava

LAYERS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(decoder_layers=LAYERS)


@pytest.fixture(scope="module")
def samples(model: Any) -> list[dict[str, Any]]:
    return [inputs(model, seed=number) for number in range(8)]


@pytest.mark.parametrize("make", [tiny_llava, tiny_internvl])
def test_costs_are_those_that_the_report_counts(make: Any) -> None:
    model = make()
    prompt = inputs(model)
    # Uniform tokens: ranking costs products, too.
    schedule = Schedule(prune=(Prune(keep=0.5, layer=1, selector="uniform"), Prune(keep=0.0, layer=-1)))
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        model.generate(**prompt, max_new_tokens=1)
        report = luvc_fx.report_of(model)
    (graph,) = report.of_kind("prefill")
    cost = DecoderCost.of(model)
    text = prompt["input_ids"].shape[1] - graph.original
    whole = cost.flops([text + graph.original] * len(cost.weights))
    less = cost.flops([text + count for count in report.tokens_per_layer()])
    assert whole - less == graph.flops_before - graph.flops_after


def test_candidates_promise_what_was_asked_for() -> None:
    def speedup(kept: list[float]) -> float:
        return len(kept) / (sum(kept) + 0.1 * len(kept))

    found = drawn(20, 2.0, 16, speedup, seed=0)
    assert len(set(found)) == 20
    assert found == drawn(20, 2.0, 16, speedup, seed=0) != drawn(20, 2.0, 16, speedup, seed=1)
    assert all(2.0 <= speedup(shares(schedule, 16)) <= 2.0 * SLACK for schedule in found)
    assert any(schedule.merge for schedule in found)


@pytest.mark.parametrize("target", [1.3, 2.0, 4.0])
def test_the_default_cascade_is_always_tried(target: float) -> None:
    def speedup(kept: list[float]) -> float:
        return len(kept) / (sum(kept) + 0.1 * len(kept))

    first = drawn(5, target, 16, speedup, seed=0)[0]
    assert [prune.selector.name for prune in first.prune] == [PICK["selector"]] * len(first.prune)
    assert target <= speedup(shares(first, 16)) <= target * SLACK
    assert first.prune[-1].keep == 0.0


def test_shares_count_merges_and_the_layers_behind_a_prune() -> None:
    schedule = Schedule(
        merge=Merge(axis="width", keep=0.75, layer=0),
        prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)),
    )
    assert shares(schedule, 4) == [0.75, 0.375, 0.375, 0.0]


def test_the_measure_ends_with_the_first_token_that_differs() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    one = Answer(torch.tensor([0, 1, 0]), logits, [])
    assert compare(one, one) == (0.0, False)
    other = logits.clone()
    other[1] = torch.tensor([1.0, 0.0])
    other[2] = torch.tensor([-50.0, 50.0])  # has another past
    kl, differs = compare(one, Answer(torch.tensor([0, 0, 1]), other, []))
    p, q = logits[1].log_softmax(0), other[1].log_softmax(0)
    assert differs
    assert kl == pytest.approx((p.exp() * (p - q)).sum().item() / 2)
    ended = Answer(torch.tensor([0, 0]), other[:2], [])
    assert compare(one, ended)[1]


@pytest.mark.slow
def test_the_model_itself_diverges_by_nothing(model: Any, samples: list[dict[str, Any]]) -> None:
    wanted = greedy_answers(model, samples[:2], 3)
    divergence = measure_divergence(model, samples[:2], wanted, Schedule(), 3, "eager")
    assert (divergence.kl, divergence.changed) == (0.0, 0.0)
    harsh = measure_divergence(
        model, samples[:2], wanted, Schedule(prune=Prune(tokens=0, layer=0)), 3, "eager"
    )
    assert harsh.kl > 0.01
    text = int((samples[0]["input_ids"] != model.config.image_token_id).sum())
    assert harsh.rows == [[text] * LAYERS] * 2
    assert wanted[0].rows == [samples[0]["input_ids"].shape[1]] * LAYERS


def test_no_image_is_both_searched_on_and_held_out() -> None:
    def sample(image: int, word: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[word]]), "pixel_values": torch.full((1, 3), float(image))}

    asked = [sample(image, word) for image in (3, 1, 2) for word in (5, 6)]
    assert halves([*asked, sample(3, 7)]) == ([0, 1, 6, 4, 5], [2, 3])
    with pytest.raises(ValueError, match="all samples are about one image"):
        halves(asked[:2])


@pytest.mark.slow
def test_what_a_model_refuses_is_left_out(
    model: Any, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are not so many tokens. Dynamo wraps what the backend says to that."""
    refused = Schedule(prune=Prune(tokens=10_000, layer=1))
    fine = Schedule(prune=(Prune(keep=0.25, layer=0, selector="uniform"), Prune(keep=0.0, layer=-1)))
    monkeypatch.setattr(search, "drawn", lambda *_: [refused, fine])
    monkeypatch.setattr(search, "PRESETS", {})
    tuned = luvc_fx.tune(model, samples, target_speedup=1.5, new_tokens=1)
    assert tuned.schedule == fine
    assert [schedule for schedule, _ in tuned.left_out] == [refused]
    assert "10000" in tuned.left_out[0][1]
    monkeypatch.setattr(search, "drawn", lambda *_: [refused])
    with pytest.raises(ValueError, match=r"no candidate promises 1\.5x.*the first refusal"):
        luvc_fx.tune(model, samples, target_speedup=1.5, new_tokens=1)


@pytest.mark.slow
def test_a_speedup_that_nobody_promises_does_not_end_the_search(
    model: Any, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = Schedule(prune=(Prune(keep=0.25, layer=0, selector="uniform"), Prune(keep=0.0, layer=-1)))
    monkeypatch.setattr(search, "drawn", lambda count, target, *_: [fine] if target == 1.5 else [])
    monkeypatch.setattr(search, "PRESETS", {})
    assert luvc_fx.tune(model, samples, max_loss=0.99, new_tokens=1).schedule == fine


@pytest.mark.slow
def test_the_best_schedule_of_a_speedup(model: Any, samples: list[dict[str, Any]]) -> None:
    told: list[str] = []
    tuned = luvc_fx.tune(model, samples, target_speedup=1.5, candidates=2, new_tokens=2, say_so=told.append)
    best = min((t for t in tuned.trials if t.speedup >= 1.485), key=lambda trial: trial.kl)
    assert {trial.samples for trial in tuned.trials} == {4}
    assert tuned.schedule == best.schedule
    assert tuned.held_out is not None
    assert tuned.held_out.speedup >= 1.485
    assert tuned.held_out.samples == 4
    assert {"image", "video", "document", "tuned, at random"} == set(tuned.compared)
    random = tuned.compared["tuned, at random"]
    assert random.schedule == at_random(tuned.schedule)
    assert random.speedup == tuned.held_out.speedup
    assert Schedule.from_json(json.dumps(tuned.to_dict()["schedule"])) == tuned.schedule
    assert len(told) == 2
    assert "_luvc_fx" not in vars(model)
    assert "tuned: 1." in str(tuned)


def test_the_better_half_goes_on_to_more_samples(
    model: Any, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a planted KL, the later the first prune the smaller: four candidates, then two on all samples."""
    whole = samples[0]["input_ids"].shape[1]
    asked: list[tuple[int, Schedule]] = []

    def planted(
        model: Any, given: Any, wanted: Any, schedule: Schedule, steps: int, inner: str
    ) -> Divergence:
        asked.append((len(given), schedule))
        kl = -float(schedule.prune[0].layer or 0) if schedule.prune[0].layer is not None else 9.0
        return Divergence(kl, 0.0, [[whole // 2] * LAYERS] * len(given))

    monkeypatch.setattr(search, "measure_divergence", planted)
    tuned = luvc_fx.tune(model, samples, target_speedup=1.5, candidates=4, new_tokens=1)
    rounds = [count for count, _ in asked[: len(tuned.trials)]]
    assert rounds == [2, 2, 2, 2, 4, 4]
    first = [schedule for _, schedule in asked[:4]]
    by_kl = sorted(first, key=lambda schedule: -(schedule.prune[0].layer or 0))
    assert [schedule for _, schedule in asked[4:6]] == by_kl[:2]
    assert tuned.schedule == by_kl[0]


def test_the_fastest_schedule_that_changes_nothing(
    model: Any, samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer may differ by a planted share: the search goes up the ladder as far as that allows."""
    asked: list[float] = []

    def best(self: Any, target: float) -> search.Trial:
        asked.append(target)
        return search.Trial(Schedule(prune=Prune(keep=0.5, layer=len(asked))), target, 0.0, target / 10, 4)

    def held_out(self: Any, schedule: Schedule) -> search.Trial:
        return search.Trial(schedule, schedule.prune[0].layer, 0.0, 0.5, 4)

    monkeypatch.setattr(search._Search, "best", best)
    monkeypatch.setattr(search._Search, "held_out", held_out)
    monkeypatch.setattr(search._Search, "_try", lambda self, schedule, part, count: None)
    tuned = luvc_fx.tune(model, samples, max_loss=0.2, new_tokens=1)
    assert asked == [1.25, 1.5, 1.75, 2.0, 2.5]
    assert tuned.schedule.prune[0].layer == 4  # the fourth rung
    assert tuned.held_out is not None
    nothing = luvc_fx.tune(model, samples, max_loss=0.01, new_tokens=1)
    assert (nothing.schedule, nothing.held_out) == (Schedule(), None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "either target_speedup or max_loss"),
        ({"target_speedup": 2.0, "max_loss": 0.1}, "either target_speedup or max_loss"),
        ({"target_speedup": 1.0}, "target_speedup is 1.0; allowed: above 1"),
        ({"max_loss": 1.0}, "max_loss is 1.0"),
        ({"target_speedup": 2.0, "candidates": 0}, "candidates is 0"),
        ({"target_speedup": 500.0}, "no candidate promises 500.0x"),
    ],
)
def test_arguments(model: Any, samples: list[dict[str, Any]], arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        luvc_fx.tune(model, samples, **arguments)


def test_samples(model: Any, samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="there are 3 samples"):
        luvc_fx.tune(model, samples[:3], target_speedup=2.0)
    both = {name: torch.cat([value, value]) for name, value in samples[0].items()}
    with pytest.raises(ValueError, match=r"input_ids are Tensor \[2, "):
        luvc_fx.tune(model, [both, *samples], target_speedup=2.0)
    text = {"input_ids": torch.tensor([[5, 6, 7]])}
    with pytest.raises(ValueError, match="no visual tokens"):
        luvc_fx.tune(model, [text, *samples], target_speedup=2.0)
