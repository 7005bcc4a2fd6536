"""What the documentation says of the evidence is in the committed results."""

from __future__ import annotations

import copy
import json
from statistics import mean

import pytest
import torch

from examples.research.evidence import choices, table, tuned
from luvc_fx.apps.bench.shapes import SHAPES
from luvc_fx.apps.tuning.candidates import shares
from luvc_fx.apps.tuning.flops import DecoderCost
from luvc_fx.schedule import KINDS
from luvc_fx.schedule.budget import cascade
from tests.support.paths import ROOT

SAID = ROOT / "docs" / "evidence" / "accuracy.md"


def test_every_reported_cell_has_enough_questions() -> None:
    for name, result in table.load("test").items():
        for row in result["rows"]:
            if row["scores"]:
                assert row["scores"]["all"]["questions"] >= 2500, (name, row["method"])


def test_what_is_above_the_default_is_told() -> None:
    name, result = next(iter(table.load("test").items()))
    changed = copy.deepcopy(result)
    for row in changed["rows"]:
        for score in row["scores"].values():
            score["against"].pop("default", None)
    sure, _, nearest = table.told_above({name: changed})
    assert sure.endswith(": nothing.") and nearest.endswith(f"{name}: nothing is above.")
    rows = [row for row in changed["rows"] if row["method"] == "uniform"]
    for row, p, adjusted in zip(rows, (0.0123, 0.03), (0.02, 0.5), strict=False):
        row["scores"]["all"]["against"]["default"] = {"difference": 0.021, "p": p, "adjusted": adjusted}
    sure, _, nearest = table.told_above({name: changed})
    assert sure.endswith(f"{name}: uniform at {rows[0]['budget']:.1%}, +2.1 points.")
    assert nearest.endswith("points, p = 0.012.")


def test_a_set_below_ninety_percent_is_no_evidence() -> None:
    name, result = next(iter(table.load("test").items()))
    weak = copy.deepcopy(result)
    assert table.sets_table({name: result})[-1].endswith("| yes |  |")
    weak["rows"][0]["scores"]["all"]["accuracy"] = 0.89
    task = weak["tasks"][1]
    weak["rows"][0]["scores"][task]["accuracy"] = 0.71
    assert table.sets_table({name: weak})[-1].endswith(f"| no: unproven | {task} (71%) |")


@pytest.mark.parametrize("method", ["default", "random"])
def test_the_short_table_is_read_off_the_long_one(method: str) -> None:
    name, result = next(iter(table.load("test").items()))
    changed = copy.deepcopy(result)
    budget = next(row["budget"] for row in changed["rows"] if row["budget"])
    row = next(r for r in changed["rows"] if r["method"] == method and r["budget"] == budget)
    row["scores"]["all"]["retention"] = 0.123
    mark = "**12.3**" if method == "default" else " 12.3 /"
    assert mark in table.short_table({name: changed})[-1]
    assert mark not in table.short_table({name: result})[-1]


def test_the_table_of_presets_has_the_best_and_the_worst_set_of_each() -> None:
    results = table.load("test")
    worst = results["llava_seed2-objects"]
    assert "95.3 % (LLaVA of a third seed, objects) | 97.0 %" in table.presets_table(results)[2]
    changed = copy.deepcopy(worst)
    row = next(row for row in changed["rows"] if row["method"] == "image")
    row["scores"]["all"]["retention"] = 0.123
    made = table.presets_table({**results, "llava_seed2-objects": changed})[2]
    assert "12.3 % (LLaVA of a third seed, objects)" in made
    row["scores"]["all"]["retention"] = 1.234
    made = table.presets_table({**results, "llava_seed2-objects": changed})[2]
    assert "123.4 % (LLaVA of a third seed, objects) | 95.6 % (LLaVA of another seed, objects)" in made


def test_the_advice_has_the_budgets_of_the_presets() -> None:
    advice = (ROOT / "docs" / "start" / "which-schedule.md").read_text(encoding="utf-8").splitlines()
    made = table.presets_table(table.load("test"))
    for name in KINDS:
        (share,) = (line.split(" | ")[1].strip() for line in made if line.startswith(f"| `{name}` |"))
        (said,) = (line for line in advice if f'| `"{name}"` |' in line)
        assert f" {share}" in said, (name, share)


def test_no_published_method_and_no_control_is_above_the_default() -> None:
    """What is significantly above it prunes with the same pick: once, or behind a merge."""
    results = table.load("test")
    sure = [key for key, one in table.above(results).items() if one["adjusted"] < table.SIGNIFICANT]
    assert {method for _, method, _ in sure} <= {"single-shot", "default+merge"}
    asked = {row["method"] for result in results.values() for row in result["rows"]}
    assert asked >= {"random", "uniform", "norm", "fastv", "pact", "vtw", "downsample", "diversity", "luvc"}


def test_candidates_that_are_compared_let_as_many_tokens_in() -> None:
    """In each line of picks what the budget says; places beside others of the same words in front."""
    by_words: dict[str, list[float]] = {}
    for stem, (_, name, schedule) in choices.candidates(16).items():
        if stem.startswith("pick"):
            assert mean(shares(schedule, 16)) == pytest.approx(float(stem.partition("-")[2]) / 100, abs=1e-4)
        elif stem.startswith("place"):
            by_words.setdefault(name.partition(":")[0], []).append(mean(shares(schedule, 16)))
    assert len(by_words) == len(KINDS) + len(choices.BUDGETS)
    for budgets in by_words.values():
        assert len(budgets) >= 3 and budgets == pytest.approx(budgets[:1] * len(budgets), abs=1e-4)


def test_the_tuners_table_has_the_committed_numbers() -> None:
    results = json.loads((tuned.RESULTS / "tuned.json").read_text())
    assert (tuned.RESULTS / "tuned.md").read_text() == tuned.table(results)
    best = results["llava_seed1, objects"]["rows"]
    text = " ".join(SAID.read_text(encoding="utf-8").split())
    for name in ("tuned", tuned.PRESET):
        assert f"{100 * best[name]['retention']:.1f} %" in text
    assert best["tuned"]["speedup"] > best[tuned.PRESET]["speedup"]


def test_what_half_of_the_tokens_keep_is_in_the_prose() -> None:
    """Lowest and highest over the sets that count as evidence."""
    kept = [
        100 * row["scores"]["all"]["retention"]
        for result in table.load("test").values()
        if table.counts(result["rows"][0]["scores"]["all"], result["wrong_image"]["all"])
        for row in result["rows"]
        if (row["method"], row["budget"]) == ("default", 0.5)
    ]
    assert len(kept) >= 5 and min(kept) >= 99.0
    assert f"{min(kept):.1f} to {max(kept):.1f} % of the right answers stay" in " ".join(
        SAID.read_text(encoding="utf-8").split()
    )


def test_what_the_prose_says_of_presets_and_controls_is_in_the_results() -> None:
    results, text = table.load("test"), " ".join(SAID.read_text(encoding="utf-8").split())

    def kept(name: str, method: str, budget: float | None = None) -> str:
        rows = results[name]["rows"]
        row = next(row for row in rows if (row["method"], row["budget"]) == (method, budget))
        return f"{100 * row['scores']['all']['retention']:.1f}"

    by_averaging = [kept("qwen2_vl-page", "random+absorb", budget) for budget in (0.5, 0.25, 0.125)]
    assert "random tokens with the same averaging keep {}, {} and {} %".format(*by_averaging) in text
    internvl, shipped = kept("internvl-objects", "image"), kept("llava-objects", "image")
    assert f"{internvl} % in InternVL and {shipped} % in the shipped LLaVA" in text
    others = [kept(f"llava_seed{number}-objects", "image") for number in (1, 2)]
    assert "**only {} and {} % in two other LLaVAs**".format(*others) in text
    for name in ("internvl-objects", "llava-objects", "qwen2_vl-page"):
        assert float(kept(name, "last")) >= 99.6, "costs 0.4 % or less"
    assert float(kept("internvl-video4", "video")) >= 99.95
    for name in ("qwen2_vl-page", "llava-chart"):
        assert float(kept(name, "document")) >= 99.9


def test_half_of_the_tokens_is_the_speed_up_that_the_prose_says() -> None:
    """The LLM prefill of LLaVA-OV-7B: 32 frames of 196 tokens and a newline, 64 tokens of text."""
    model = SHAPES["llava-ov-7b"].build(None, torch.device("meta"), torch.bfloat16)
    cost = DecoderCost.of(model)
    visual, text, layers = 32 * 196 + 1, 64, len(cost.weights)
    places, keep, rows = dict(cascade(0.5, layers) or ()), 1.0, []
    for layer in range(layers):
        keep = places.get(layer, keep)
        rows.append(text + round(keep * visual))
    found = cost.speedup(text + visual, rows)
    assert f"{found:.1f} times fewer" in SAID.read_text(encoding="utf-8")
