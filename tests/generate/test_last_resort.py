"""What fails in our hands is run by the stock model; what is wrong by itself fails as it does there."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import luvc_fx
from luvc_fx import LuvcWarning, Merge, NotRewritten, Prune, Schedule
from luvc_fx.generate.cache import PrunedCache
from luvc_fx.generate.last_resort import GIVE_UP_AFTER, CacheState, Failures, LostCacheError
from luvc_fx.graph.emit import inserted
from luvc_fx.report import Reason
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_generate

CASCADE = Schedule(
    merge=(Merge("width", keep=0.5, layer=0),),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)),
)
PRUNE_ONLY = Schedule(prune=CASCADE.prune)
SCHEDULES = {"cascade": CASCADE, "prune": PRUNE_ONLY, "empty": Schedule()}
NEW_TOKENS = 4


@pytest.fixture
def model() -> Iterator[Any]:
    made = tiny_llava()
    with torch.no_grad():
        yield made
    luvc_fx.restore(made)


def generate(model: Any, **kwargs: Any) -> Any:
    return model.generate(**kwargs, max_new_tokens=NEW_TOKENS, do_sample=False)


def fell_back(model: Any) -> list[str]:
    return [
        refusal.text
        for refusal in luvc_fx.report_of(model).all_refusals()
        if refusal.reason in (Reason.FELL_BACK, Reason.PASS_FAILED)
    ]


@contextlib.contextmanager
def warned() -> Iterator[None]:
    """Somewhere in the block a `LuvcWarning` says that a call was left alone."""
    with pytest.warns(LuvcWarning, match=r"left this alone"):
        yield


# ------------------------------------------------------------------------- a decoder that is no single graph


def with_a_hook_dynamo_cannot_see(model: Any) -> None:
    hook = torch._dynamo.disable(lambda module, args, output: None)
    model.model.language_model.layers[1].register_forward_hook(hook)


def with_a_graph_break(model: Any) -> None:
    layer = model.model.language_model.layers[1]
    forward = layer.forward

    def breaking(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = breaking


OBSTACLES = {
    "a hook that Dynamo cannot see": with_a_hook_dynamo_cannot_see,
    "a graph break": with_a_graph_break,
}


@pytest.mark.parametrize("name", slow_unless(OBSTACLES, ["a hook that Dynamo cannot see"]))
@pytest.mark.filterwarnings("ignore:luvc_fx left this alone")
def test_images_are_put_back_whole_where_the_decoder_is_no_single_graph(model: Any, name: str) -> None:
    OBSTACLES[name](model)
    prompt = inputs(model, batch=2, padding=(0, 3))
    wanted = generate(model, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager")
    with warned():
        assert torch.equal(generate(model, **prompt), wanted)
    assert any("no single graph" in text for text in fell_back(model))
    visions = len(luvc_fx.report_of(model).of_kind("vision"))
    assert torch.equal(generate(model, **prompt), wanted)
    assert len(luvc_fx.report_of(model).of_kind("vision")) == visions, "it was tried again"


@pytest.mark.slow
def test_strict_raises_where_the_decoder_is_no_single_graph(model: Any) -> None:
    with_a_graph_break(model)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    with pytest.raises(NotRewritten, match="no single graph"):
        model(**inputs(model))


@pytest.mark.slow
def test_other_calls_are_merged_as_before(model: Any) -> None:
    prompt = inputs(model)
    wanted = oracle_generate(model, CASCADE, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager")
    with warned():
        generate(model, **prompt, output_attentions=True)
    assert torch.equal(generate(model, **prompt), wanted)


# --------------------------------------------------------------------------------- errors of the caller


def with_a_placeholder_too_many(model: Any) -> dict[str, Any]:
    prompt = inputs(model)
    more = torch.full((1, 1), model.config.image_token_id)
    ids = torch.cat([prompt["input_ids"], more], dim=1)
    return {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def without_placeholders(model: Any) -> dict[str, Any]:
    prompt = inputs(model)
    ids = prompt["input_ids"]
    return {**prompt, "input_ids": ids.masked_fill(ids == model.config.image_token_id, 5)}


def with_an_image_too_many(model: Any) -> dict[str, Any]:
    prompt = inputs(model)
    return {**prompt, "pixel_values": torch.cat([prompt["pixel_values"]] * 2)}


def with_an_image_too_few(model: Any) -> dict[str, Any]:
    prompt = inputs(model, batch=2)
    return {**prompt, "pixel_values": prompt["pixel_values"][:1]}


def with_an_image_of_another_size(model: Any) -> dict[str, Any]:
    prompt = inputs(model)
    return {**prompt, "pixel_values": prompt["pixel_values"][..., :-3]}


WRONG = [
    with_a_placeholder_too_many,
    without_placeholders,
    with_an_image_too_many,
    with_an_image_too_few,
    with_an_image_of_another_size,
]


@pytest.mark.parametrize("name", slow_unless(SCHEDULES, ["cascade"]))
@pytest.mark.filterwarnings("ignore:luvc_fx left this alone. uneven-batch")
def test_a_wrong_prompt_raises_what_the_stock_model_raises(model: Any, name: str) -> None:
    ways: list[Callable[..., Any]] = [
        lambda **prompt: model(**prompt),
        lambda **prompt: generate(model, **prompt),
    ]
    wrong = [(make(model), way) for make in WRONG for way in ways]
    errors = [error_of(way, prompt) for prompt, way in wrong]
    right = inputs(model)
    wanted = oracle_generate(model, SCHEDULES[name], NEW_TOKENS, **right)
    luvc_fx.compile(model, SCHEDULES[name], inner="eager")
    for (prompt, way), error in zip(wrong, errors, strict=True):
        assert error_of(way, prompt) == error
    assert any("tokens: 65" in text for _, text in errors)
    assert not fell_back(model)
    assert torch.equal(generate(model, **right), wanted)


def error_of(way: Callable[..., Any], prompt: dict[str, Any]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:
        way(**prompt)
    return caught.type, str(caught.value)


# ------------------------------------------------------------------------------------- errors of our own

ALWAYS = ["luvc_fx.generate.calls.over_pruned_cache", "luvc_fx.generate.prefill.compact"]
PARTS = [
    "luvc_fx.generate.calls.for_generate",
    "luvc_fx.generate.calls.refusal_of_forward",
    "luvc_fx.generate.calls.refusal_of_later_images",
    "luvc_fx.generate.calls.PromptState.of",
    "luvc_fx.generate.calls.over_pruned_cache",
    "luvc_fx.generate.compiled_encoder.CompiledEncoder.__call__",
    "luvc_fx.generate.prefill.choose_cache",
    "luvc_fx.generate.prefill.choose_mask",
    "luvc_fx.generate.prefill.cut_prompt",
    "luvc_fx.generate.prefill.compact",
    "luvc_fx.generate.prefill.hand_back_cache",
    "luvc_fx.dynamo.rewrite.recognise",
    "luvc_fx.dynamo.rewrite.make_plan",
    "luvc_fx.dynamo.backend.rewrite",
    "luvc_fx.graph.markers.REPRESENTATIVES",
]


class Broken(Exception):
    """What a broken part raises."""


def broken(*args: Any, **kwargs: Any) -> Any:
    raise Broken("a part that does not work")


@pytest.mark.parametrize(
    "part",
    slow_unless(PARTS, ["luvc_fx.generate.calls.over_pruned_cache", "luvc_fx.generate.prefill.compact"]),
)
@pytest.mark.filterwarnings("ignore:luvc_fx left this alone")
def test_whatever_part_of_us_fails(model: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs(model)
    wanted, logits = generate(model, **prompt), model(**prompt).logits
    monkeypatch.setattr(part, broken)
    luvc_fx.compile(model, CASCADE, inner="eager")
    assert torch.equal(generate(model, **prompt), wanted)
    assert any("a part that does not work" in text for text in fell_back(model))
    assert torch.equal(generate(model, **prompt), wanted)
    if part not in ("luvc_fx.generate.calls.for_generate", "luvc_fx.generate.calls.over_pruned_cache"):
        assert torch.equal(model(**prompt).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS[:-1])  # a broken marker ends the graph, and that is refused first
def test_strict_raises_errors_of_our_own(model: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs(model)
    monkeypatch.setattr(part, broken)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    with pytest.raises(Exception, match="a part that does not work"):
        generate(model, **prompt)


def test_a_step_that_fails_over_a_shortened_cache_starts_the_call_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = inputs(model)

    def sample(**kwargs: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=True, **kwargs)

    wanted = sample()
    luvc_fx.compile(model, CASCADE, inner="eager")
    monkeypatch.setattr("luvc_fx.generate.calls.over_pruned_cache", broken)
    with warned():
        assert torch.equal(sample(), wanted)
    assert torch.equal(sample(), wanted)
    own = DynamicCache(config=model.config.get_text_config())
    assert torch.equal(sample(past_key_values=own), wanted)
    assert not isinstance(own, PrunedCache) and own.get_seq_length() == wanted.shape[1] - 1


class Stream(BaseStreamer):
    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


def test_what_was_streamed_is_not_taken_back(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs(model)
    luvc_fx.compile(model, CASCADE, inner="eager")
    monkeypatch.setattr("luvc_fx.generate.calls.over_pruned_cache", broken)
    with pytest.raises(LostCacheError, match=r"a part that does not work.*start again with an empty cache"):
        generate(model, **prompt, streamer=Stream())


def test_after_some_failures_in_a_row_nothing_is_tried(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def counted(*args: Any) -> Any:
        tried.append(args)
        raise Broken("a part that does not work")

    monkeypatch.setattr("luvc_fx.generate.prefill.choose_cache", counted)
    luvc_fx.compile(model, PRUNE_ONLY, inner="eager")
    with warned():
        for padding in range(GIVE_UP_AFTER + 2):
            prompt = inputs(model, padding=padding)
            model(**prompt)
            model(**prompt)
    assert len(tried) == GIVE_UP_AFTER
    assert "try again" in fell_back(model)[-1]
    luvc_fx.restore(model)
    luvc_fx.compile(model, PRUNE_ONLY, inner="eager", strict=True)
    with pytest.raises(NotRewritten):
        model(**prompt)
    assert len(tried) == GIVE_UP_AFTER + 1


@pytest.mark.parametrize("part", ["model_check.family_of", "frontdoor.GraphSet"])
def test_a_model_that_cannot_be_wired(model: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"luvc_fx.generate.{part}", broken)
    with pytest.raises(ValueError, match=r"cannot wire Llava.*: Broken: a part that does not work\. For"):
        luvc_fx.compile(model, CASCADE)
    assert "forward" not in vars(model)


# --------------------------------------------------------------------------- a compiler behind that fails


def refusing_what_we_write(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    if any(map(inserted, gm.graph.nodes)):
        raise Broken("this compiler knows no such operators")
    return gm.forward


@pytest.mark.parametrize("front_door", slow_unless([True, False], [True]), ids=["compile", "backend"])
def test_a_compiler_that_fails_on_our_graph_gets_the_captured_one(model: Any, front_door: bool) -> None:
    prompt = inputs(model)
    wanted = model(**prompt).logits

    def run(strict: bool) -> Any:
        if front_door:
            luvc_fx.compile(model, PRUNE_ONLY, inner=refusing_what_we_write, strict=strict)
            return model(**prompt), luvc_fx.report_of(model)
        backend = luvc_fx.backend(PRUNE_ONLY, inner=refusing_what_we_write, strict=strict)
        return torch.compile(luvc_fx.prepare(model), backend=backend)(**prompt), backend.report

    with warned():
        output, report = run(strict=False)
    assert torch.equal(output.logits, wanted)
    (graph,) = (graph for graph in report.graphs if graph.decoder_layers)
    assert not graph.inserted and graph.nodes_after == graph.nodes_before
    assert "knows no such operators" in graph.refusals[-1].text
    with pytest.raises(Exception, match="knows no such operators"):
        run(strict=True)


# ------------------------------------------------------------------------------------------ its parts


def test_a_cache_is_what_it_was(model: Any) -> None:
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.model.language_model(input_ids=torch.arange(6)[None], past_key_values=cache)
    held = [layer.keys for layer in cache.layers]
    state = CacheState(cache)
    model.model.language_model(input_ids=torch.arange(3)[None], past_key_values=cache)
    cache.__class__ = PrunedCache
    assert state.restore()
    assert type(cache) is DynamicCache and cache.get_seq_length() == 6
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, held, strict=True))

    static = StaticCache(config=config, max_cache_len=16)
    assert CacheState(static).restore()
    model.model.language_model(input_ids=torch.arange(6)[None], past_key_values=static)
    state = CacheState(static)
    assert state.restore()
    model.model.language_model(input_ids=torch.arange(3)[None], past_key_values=static)
    assert not state.restore(), "rows were written in place"


def test_a_cache_that_misses_rows_is_not_continued(model: Any) -> None:
    prompt = inputs(model)
    luvc_fx.compile(model, PRUNE_ONLY, inner="eager", strict=True)
    assert not CacheState(model(**prompt).past_key_values).restore()
    assert CacheState(None).restore()


def test_failures_know_calls_by_their_sizes_and_plain_values() -> None:
    failures = Failures()
    call = {"input_ids": torch.zeros(1, 4), "use_cache": True, "labels": None}
    failures.add(call)
    assert {"input_ids": torch.ones(1, 4), "use_cache": True} in failures
    assert {"input_ids": torch.zeros(1, 5), "use_cache": True} not in failures
    assert {**call, "use_cache": False} not in failures
    failures.succeeded()
    for length in range(GIVE_UP_AFTER):
        assert not failures.given_up
        failures.add({"input_ids": torch.zeros(1, length)})
    assert failures.given_up and {} in failures
