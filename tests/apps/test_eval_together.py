"""Questions that share the prefill of their image: the same tokens stay, and the answers are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig, MistralConfig

import luvc_fx
from examples.research.tinyvlm.questions import export
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.apps.demo import MODEL_DIR
from luvc_fx.apps.evaluation import asking
from luvc_fx.apps.evaluation.asking import ask, combined
from luvc_fx.apps.evaluation.features import Decoders, Features
from luvc_fx.apps.evaluation.markdown import markdown
from luvc_fx.apps.evaluation.methods import methods
from luvc_fx.apps.evaluation.prompts import PADDED, Prompt, Prompts, collate
from luvc_fx.apps.evaluation.questions import read_questions
from luvc_fx.apps.evaluation.result import Cell, CellResult, EvalResult, Score
from luvc_fx.apps.evaluation.together import Group, generate_together, groups, why_apart
from luvc_fx.apps.local_model import load
from luvc_fx.generate.families import placeholders
from tests.support.models import FIRST_TEXT, inputs, tiny_internvl, tiny_llava
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_vl

NEW_TOKENS = 2
QUESTIONS = ((0, 5), (0, 1), (1, 3), (1, 9), (1, 5))
"""Of which image, and how many tokens."""


def schedule_of(selector: str = "spectrum", merges: bool = False, **options: Any) -> Schedule:
    """Some go in the middle, and all before the last layer."""
    prune = (Prune(keep=0.5, layer=1, selector=selector, **options), Prune(keep=0.0, layer=-1))
    return Schedule(merge=(Merge("width", keep=0.5, layer=0),) if merges else (), prune=prune)


def llava_prompt(model: Any, number: int) -> dict[str, Tensor]:
    """An image, with nothing in front of it."""
    return inputs(model, text=(0, 1), seed=number)


def internvl_prompt(model: Any, number: int) -> dict[str, Tensor]:
    """Two tiles behind text."""
    return inputs(model, text=(3, 1), seed=number, tiles=2)


def qwen_prompt(model: Any, number: int) -> dict[str, Tensor]:
    """Two images of other sizes, whose positions have three axes."""
    return qwen_inputs(model, [[2, ("image", 8, 12), 1, ("image", 4, 8), 1]], seed=number)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any, int], dict[str, Tensor]]]] = {
    "llava": (lambda: tiny_llava(decoder_layers=3, encoder_layers=2), llava_prompt),
    "internvl": (lambda: tiny_internvl(decoder_layers=3, encoder_layers=2), internvl_prompt),
    "qwen2_vl": (lambda: tiny_qwen2_vl(decoder_layers=3, encoder_layers=2), qwen_prompt),
}


def rows_about(model: Any, make: Callable[[Any, int], dict[str, Tensor]]) -> list[Prompt]:
    """One row a question."""
    drawn, found = torch.Generator().manual_seed(5), []
    for image, length in QUESTIONS:
        prompt = make(model, image)
        visual = placeholders(model, prompt["input_ids"])[0].nonzero()
        front = int(visual[-1]) + 1
        question = torch.randint(FIRST_TEXT + 8, 90, (1, length), generator=drawn)
        behind = {name: torch.zeros_like(question) for name in PADDED}
        behind |= {"input_ids": question, "attention_mask": torch.ones_like(question)}
        text = {
            name: torch.cat([prompt.pop(name)[:, :front], behind[name]], dim=1)
            for name in PADDED
            if name in prompt
        }
        found.append(Prompt(text, prompt, len(visual), front=front))
    return found


def heard(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Any]:
    """New tokens, logits of the first of them, and the cache at the end."""
    found, generate = [], model.generate

    def spy(**given: Any) -> Tensor:
        found.append(generate(**given, output_logits=True, return_dict_in_generate=True))
        return found[-1].sequences

    model.generate = spy
    try:
        tokens = run()
    finally:
        model.generate = generate
    return tokens, found[-1].logits[0], found[-1].past_key_values


CASES = {
    "llava, centres and means": ("llava", schedule_of("pact", absorb=True)),
    "internvl, merged": ("internvl", schedule_of("diversity", merges=True)),
    "qwen2_vl": ("qwen2_vl", schedule_of()),
    "llava": ("llava", schedule_of()),
    "llava, unpruned": ("llava", Schedule()),
    "qwen2_vl, merged": ("qwen2_vl", schedule_of("random", merges=True)),
}
FAST = 1


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (n >= FAST)) for n, case in enumerate(CASES)]
)
@torch.inference_mode()
def test_a_shared_prefill_changes_nothing(case: str) -> None:
    """Questions of unequal length about two images, against each prompt by itself, padded on the left."""
    family, schedule = CASES[case]
    build, make = FAMILIES[family]
    model = build()
    rows = rows_about(model, make)
    prompts: Any = SimpleNamespace(model=model, padding=0)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS}
    whole = collate(rows, len(rows), 0, model.device, model.dtype)
    length = whole["input_ids"].shape[1]
    with luvc_fx.applied(model, schedule, inner="eager", strict=True):
        wanted = heard(model, lambda: model.generate(**whole, **options)[:, length:])
        got = heard(
            model,
            lambda: generate_together(prompts, [rows[0], rows[2]], rows, [0, 0, 1, 1, 1], options),
        )
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], atol=1e-4, rtol=1e-4)
    longest = max(row.length for row in rows)
    for layer, (ours, theirs) in enumerate(zip(got[2].layers, wanted[2].layers, strict=True)):
        for number, row in enumerate(rows):
            seen = row.length - row.visual + NEW_TOKENS - 1 + _visual(model, schedule, layer, row.visual)
            assert ours.keys.shape[2] >= seen and theirs.keys.shape[2] >= seen, (layer, longest)
            for one, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(
                    one[number, :, -seen:], other[number, :, -seen:], atol=1e-4, rtol=1e-4
                )


def _visual(model: Any, schedule: Schedule, layer: int, visual: int) -> int:
    """How many visual tokens that layer sees."""
    if not schedule.prune:
        return visual
    fused = visual // 2 if schedule.merge else visual
    return (fused, -(-fused // 2), 0)[layer]


def test_who_may_not_share_is_told_why() -> None:
    """By what the selector asks for, the masks, the cache and the options of the model."""
    model = tiny_llava(decoder_layers=1, encoder_layers=1)
    assert not why_apart(model, Schedule()) and not why_apart(model, schedule_of("pact"))
    assert "'fastv' looks at the attention of the last token" in why_apart(model, schedule_of("fastv"))
    model.generation_config.use_cache = False
    assert why_apart(model, Schedule()) == "the generation config says use_cache=False"
    model.generation_config.use_cache = True
    model.config.text_config = MistralConfig(sliding_window=16)
    assert "needs the same rows in every layer" in why_apart(model, Schedule())
    model.config.text_config = GemmaConfig()
    own = type("Own", (type(model),), {"create_masks_for_generate": None})
    model.__class__ = own
    assert "Own makes masks of its own" in why_apart(model, Schedule())


def test_groups_hold_whole_images_where_they_can() -> None:
    images = ["a", "b", "a", "c", "c", "c", "c", "b", "d"]
    found = groups(["x"] * 8 + ["y"], images, 3)
    assert found == [
        (Group([0], [0, 2], [0, 0]), 1, 3),
        (Group([1], [1, 7], [0, 0]), 1, 3),
        (Group([3], [3, 4, 5], [0, 0, 0]), 1, 3),
        (Group([6], [6], [0]), 1, 3),
        (Group([8], [8], [0]), 1, 1),
    ]
    (one, *counts), *_ = groups("xxxxx", "aabbc", 5)
    assert one == Group([0, 2, 4], [0, 1, 2, 3, 4], [0, 0, 1, 1, 2]) and counts == [3, 5]
    assert one.filled(4, 7) == Group([0, 2, 4, 4], [0, 1, 2, 3, 4, 4, 4], [0, 0, 1, 1, 2, 2, 2])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prompts, list[Any]]]:
    """The shipped model, with its first and last layers only, and eleven questions about three scenes."""
    folder = tmp_path_factory.mktemp("together")
    model, processor = load(MODEL_DIR)
    layers = model.model.language_model.layers
    del layers[2:-1]
    layers[-1].self_attn.layer_idx = 2
    model.config.text_config.num_hidden_layers = 3
    export(folder, "dev", 3, per_scene=4)
    asked = read_questions(folder / "questions.jsonl")
    yield Prompts(model.float(), processor), asked[:11]


@pytest.mark.slow
def test_answers_are_those_of_single_prompts(
    demo: tuple[Prompts, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups of which the last is filled up; the second time over what the first one compiled."""
    prompts, asked = demo
    calls = []
    real = generate_together

    def noted(given: Any, images: Any, rows: Any, *more: Any) -> Tensor:
        calls.append((len(images), len(rows)))
        return real(given, images, rows, *more)

    monkeypatch.setattr(asking, "generate_together", noted)
    reports = []

    class Noting(Decoders):
        def share(self, model: Any) -> None:
            reports.append(luvc_fx.report_of(model))
            super().share(model)

    features, decoders = Features(), Noting()
    said: list[dict[Any, str]] = []
    for layer, why in ((0, ""), (0, "so asked"), (1, ""), (1, "so asked")):
        monkeypatch.setattr(asking, "why_apart", lambda *_, why=why: why)
        schedule = Schedule(prune=(Prune(keep=0.5, layer=layer), Prune(keep=0.0, layer=-1)))
        parts = list(ask(prompts, asked, schedule, "eager", 8, 2, features, decoders))
        said.append({question: text for part, _ in parts for question, text in part})
        assert {facts.apart for _, facts in parts} == {why}
        entering = [256 if layer else 128, 128, 0]
        assert all(facts.tokens_per_layer == entering for _, facts in parts)
        assert set(said[-1]) == set(asked)
    assert said[0] == said[1] and said[2] == said[3]
    assert calls == [(2, 8), (2, 8)] * 2
    assert [len(report.of_kind("decode")) for report in reports] == [2, 0, 0, 0], "for all numbers of rows"


def test_smaller_images_are_shared_too(
    demo: tuple[Prompts, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock model, of which the image is encoded before it is called."""
    prompts, asked = demo
    smaller = Prompts(prompts.model, prompts.processor, 0.25)
    found = []
    for why in ("", "so asked"):
        monkeypatch.setattr(asking, "why_apart", lambda *_, why=why: why)
        parts = list(ask(smaller, asked, Schedule(), batch=8, new_tokens=2))
        found.append({question: text for part, _ in parts for question, text in part})
        assert all(facts.tokens_per_layer == [64] * 3 and facts.budget == 0.25 for _, facts in parts)
    assert found[0] == found[1]


def test_the_report_says_who_did_not_share(demo: tuple[Prompts, list[Any]]) -> None:
    prompts, asked = demo
    fastv = methods()["fastv"].make(0.8, 3)
    assert fastv is not None
    ((_, facts),) = ask(prompts, asked[:2], fastv, batch=2, new_tokens=1)
    ((_, alone),) = ask(prompts, asked[:1], Schedule(), batch=2, new_tokens=1)
    assert "last token" in facts.apart and alone.apart == "no two questions are about one image"
    told = combined([dataclasses.asdict(one) for one in (facts, facts, alone)])["apart"]
    assert told == f"{facts.apart}; {alone.apart}"
    score = Score(2, 1, 1.0, None, 1.0, None, 1.0)
    rows = [CellResult(Cell("unpruned", None, Schedule()), scores={"all": score})]
    rows.append(CellResult(Cell("fastv", 0.8, fastv), scores={"all": score}, apart=facts.apart))
    text = markdown(EvalResult(rows, ["all"], {}, {}, {}, {}))
    assert f"- fastv at 80 %: each question had a prefill of its own: {facts.apart}\n" in text
    assert text.count("prefill of its own") == 1 and rows[1].to_dict()["apart"] == facts.apart
