"""`luvc_fx.compile` on a stock model: generate, chat turns, manual decoding, beams, threads, refusals."""

from __future__ import annotations

import copy
import importlib
import itertools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.generate.cache import PrunedCache
from luvc_fx.graph.emit import inserted
from luvc_fx.report import Reason
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_continue, oracle_forward, oracle_generate, oracle_greedy

CASCADE = Schedule(
    merge=(Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1)),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=2), Prune(keep=0.0, layer=-1)),
)
MERGE_ONLY = Schedule(merge=(Merge("width", keep=0.5, layer=1),))
PRUNE_ONLY = Schedule(prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)))
SCHEDULES = {"cascade": CASCADE, "merge": MERGE_ONLY, "prune": PRUNE_ONLY}
NEW_TOKENS = 8


class Recorder:
    """An inner compiler that keeps the graphs it got and runs them eagerly."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward

    def inserted(self) -> list[int]:
        return [sum(map(inserted, gm.graph.nodes)) for gm in self.graphs]


@pytest.fixture
def model() -> Iterator[Any]:
    made = tiny_llava()
    with torch.no_grad():
        yield made
    luvc_fx.restore(made)


def generate(model: Any, count: int = NEW_TOKENS, **prompt: Any) -> torch.Tensor:
    return model.generate(**prompt, max_new_tokens=count, do_sample=False)


def logits_error(out: Any, wanted: Any) -> float:
    return float(((out.logits - wanted.logits) * wanted.mask[..., None]).abs().max())


@pytest.mark.parametrize(
    ("name", "batch", "padding"),
    slow_unless(
        [(name, *rows) for name in SCHEDULES for rows in [(1, 0), (1, 2), (2, 0), (2, (0, 3))]],
        [("cascade", 1, 0), ("cascade", 2, (0, 3))],
    ),
    ids=lambda value: "left-padded" if isinstance(value, tuple) else None,
)
def test_generate_equals_the_oracle(model: Any, name: str, batch: int, padding: Any) -> None:
    prompt = inputs(model, batch=batch, padding=padding)
    wanted = oracle_generate(model, SCHEDULES[name], NEW_TOKENS, **prompt)
    luvc_fx.compile(model, SCHEDULES[name], inner="eager", strict=True)
    assert torch.equal(generate(model, **prompt), wanted)
    assert torch.equal(generate(model, **prompt), wanted), "the second, warm call differs"


@pytest.mark.parametrize("name", slow_unless(SCHEDULES, ["cascade"]))
def test_forward_equals_the_oracle_and_tells_the_rows(model: Any, name: str) -> None:
    prompt = inputs(model, batch=2)
    wanted = oracle_forward(model, SCHEDULES[name], **prompt)
    luvc_fx.compile(model, SCHEDULES[name], inner="eager", strict=True)
    out = model(**prompt)
    assert logits_error(out, wanted) < 1e-5
    assert torch.equal(out.row_index, wanted.rows)
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == wanted.kv_lengths


def test_arguments_by_place(model: Any) -> None:
    prompt = inputs(model)
    wanted = oracle_generate(model, CASCADE, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    ids, config = prompt.pop("input_ids"), GenerationConfig(max_new_tokens=NEW_TOKENS)
    assert torch.equal(model.generate(ids, config, **prompt), wanted)


def test_forward_without_cache_and_mask_is_not_taken_for_packed_sequences(model: Any) -> None:
    prompt = inputs(model)
    wanted = oracle_forward(model, CASCADE, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    out = model(input_ids=prompt["input_ids"], pixel_values=prompt["pixel_values"], use_cache=False)
    assert logits_error(out, wanted) < 1e-5


def test_nodes_are_inserted_in_vision_prefill_and_decode(model: Any) -> None:
    recorder = Recorder()
    luvc_fx.compile(model, CASCADE, inner=recorder, strict=True)
    generate(model, **inputs(model, batch=2, padding=(0, 2)))
    kinds = [graph.kind for graph in luvc_fx.report_of(model).graphs]
    assert kinds[:3] == ["vision", "prefill", "decode"]
    assert min(recorder.inserted()[:3]) > 0
    assert luvc_fx.report_of(model).of_kind("decode")[0].masks_rebuilt == 4


def test_passes_switched_off_is_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = inputs(model)
    wanted = oracle_generate(model, CASCADE, NEW_TOKENS, **prompt)
    monkeypatch.setattr(importlib.import_module("luvc_fx.dynamo.rewrite"), "PASSES", ())
    luvc_fx.compile(model, CASCADE, inner="eager")
    assert not torch.equal(generate(model, **prompt), wanted)


def test_decoding_recompiles_once_for_growing_caches(model: Any) -> None:
    recorder = Recorder()
    luvc_fx.compile(model, CASCADE, inner=recorder, strict=True)
    prompt = inputs(model)
    generate(model, 24, **prompt)
    warm = len(recorder.graphs)
    assert warm <= 4, "vision, prefill, decode with fixed and with growing lengths"
    generate(model, 24, **prompt)
    assert len(recorder.graphs) == warm


@pytest.mark.slow
def test_prompts_of_other_lengths(model: Any) -> None:
    recorder = Recorder()
    luvc_fx.compile(model, CASCADE, inner=recorder, strict=True)
    for text in ((3, 5), (4, 9), (2, 7), (6, 11)):
        prompt = inputs(model, text=text)
        luvc_fx.restore(model)
        wanted = oracle_generate(model, CASCADE, 4, **prompt)
        luvc_fx.compile(model, CASCADE, inner=recorder, strict=True)
        assert torch.equal(generate(model, 4, **prompt), wanted)


@pytest.mark.parametrize("name", slow_unless(SCHEDULES, ["cascade"]))
def test_a_second_turn_continues_the_conversation(model: Any, name: str) -> None:
    prompt = inputs(model)
    first = oracle_forward(model, SCHEDULES[name], **prompt)
    answer = oracle_greedy(model, first, NEW_TOKENS)
    said = torch.cat([prompt["input_ids"], answer], dim=1)
    turn = torch.tensor([[7, 9, 11, 13]])
    # As after generate, the oracle's cache holds all but the last new token.
    wanted = oracle_continue(model, first.state, torch.cat([answer[:, -1:], turn], dim=1))[:, -1]

    luvc_fx.compile(model, SCHEDULES[name], inner="eager", strict=True)
    cache = DynamicCache(config=model.config.get_text_config())
    spoken = generate(model, past_key_values=cache, **prompt)
    assert torch.equal(spoken, said)
    assert isinstance(cache, PrunedCache)
    assert cache.get_seq_length() == said.shape[1] - 1
    longer = torch.cat([spoken, turn], dim=1)
    out = model.generate(
        input_ids=longer,
        attention_mask=torch.ones_like(longer),
        past_key_values=cache,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(out.logits[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "mask"), slow_unless(itertools.product(SCHEDULES, [False, True]), [("cascade", False)])
)
def test_manual_decoding_without_position_ids(model: Any, name: str, mask: bool) -> None:
    prompt = inputs(model)
    wanted = oracle_generate(model, SCHEDULES[name], NEW_TOKENS, **prompt)
    luvc_fx.compile(model, SCHEDULES[name], inner="eager", strict=True)
    out = model(**prompt)
    ids, seen = prompt["input_ids"], prompt["attention_mask"]
    for _ in range(NEW_TOKENS):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        seen = torch.cat([seen, torch.ones_like(token)], dim=1)
        more = {"attention_mask": seen} if mask else {}
        out = model(input_ids=token, past_key_values=out.past_key_values, **more)
    assert torch.equal(ids, wanted)


def test_several_new_tokens_at_once_over_a_padded_cache(model: Any) -> None:
    prompt = inputs(model, batch=2, padding=(0, 3))
    first = oracle_forward(model, CASCADE, **prompt)
    turn = torch.tensor([[7, 9, 11], [8, 10, 12]])
    state = first.state.clone()
    wanted = oracle_continue(model, state, turn)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    out = model(**prompt)
    seen = torch.cat([prompt["attention_mask"], torch.ones_like(turn)], dim=1)
    length = prompt["input_ids"].shape[1]
    places = torch.arange(length, length + 3).expand(2, 3)
    out = model(input_ids=turn, attention_mask=seen, position_ids=places, past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits, wanted, atol=1e-4, rtol=1e-4)


def test_masks_over_a_shortened_cache_must_be_left_padding(model: Any) -> None:
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    prompt = inputs(model)
    out = model(**prompt)
    token = torch.tensor([[5]])
    hole = torch.cat([prompt["attention_mask"], torch.ones_like(token)], dim=1)
    hole[0, 1] = 0
    with pytest.raises(RuntimeError, match="only left padding"):
        model(input_ids=token, attention_mask=hole, past_key_values=copy.deepcopy(out.past_key_values))
    with pytest.raises(NotImplementedError, match="4-D attention_mask"):
        model(
            input_ids=token,
            attention_mask=torch.ones(1, 1, 1, 9, dtype=torch.bool),
            past_key_values=out.past_key_values,
        )
    with pytest.raises(NotImplementedError, match="cropped"):
        out.past_key_values.crop(-1)


def same_as_schedule(model: Any, schedule: Schedule, prompt: dict[str, Any], **options: Any) -> None:
    """`generate` under CASCADE gives what stock `generate` gives over hooks that only prune (or nothing)."""
    luvc_fx.compile(model, schedule, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LuvcWarning)
        wanted = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.warns(LuvcWarning):
        got = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert torch.equal(got, wanted)


def test_beams_are_pruned_but_not_merged(model: Any) -> None:
    prompt = inputs(model, batch=2)
    same_as_schedule(model, Schedule(prune=CASCADE.prune), prompt, num_beams=3)
    assert [r.reason for r in luvc_fx.report_of(model).refusals] == [Reason.INPUTS]
    tokens = [graph.tokens_per_layer for graph in luvc_fx.report_of(model).of_kind("prefill")]
    assert tokens == [[64, 32, 16, 0]]


@pytest.mark.slow
def test_one_beam_returned_several_times_is_greedy_decoding_of_the_pruned_model(model: Any) -> None:
    prompt = inputs(model)
    pruned = Schedule(prune=CASCADE.prune)
    wanted = oracle_generate(model, pruned, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager", on_no_match="ignore")
    torch.manual_seed(0)
    got = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(got, wanted.expand(3, -1))


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_size": 16},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        # They move keys and values to the processor and back, so the model has to be on a GPU.
        pytest.param({"cache_implementation": "offloaded"}, marks=pytest.mark.gpu),
        pytest.param({"cache_implementation": "offloaded_static"}, marks=pytest.mark.gpu),
    ],
    ids=["chunked prefill", "no cache", "prompt lookup", "offloaded cache", "offloaded static cache"],
)
def test_what_cannot_be_shortened_runs_with_all_tokens(model: Any, options: dict[str, Any]) -> None:
    device = "cuda" if "offloaded" in options.get("cache_implementation", "") else "cpu"
    model.to(device)
    prompt = {name: given.to(device) for name, given in inputs(model).items()}
    # Compiled by nobody: transformers would, of a static cache on a GPU, and round otherwise.
    options = {**options, "disable_compile": True}
    stock = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.warns(LuvcWarning, match="all visual tokens stay"):
        got = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    assert torch.equal(got, stock)
    with pytest.raises(luvc_fx.NotRewritten):
        luvc_fx.compile(model, CASCADE, inner="eager", on_no_match="raise")
        model.generate(**prompt, max_new_tokens=2, do_sample=False, **options)


@pytest.mark.slow
def test_assisted_decoding_runs_with_all_tokens(model: Any) -> None:
    prompt, helper = inputs(model), tiny_llava(seed=1)
    stock = generate(model, assistant_model=helper, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.warns(
        LuvcWarning, match="assistant_model=LlavaForConditionalGeneration: all visual tokens stay"
    ):
        assert torch.equal(generate(model, assistant_model=helper, **prompt), stock)


def sliding(cache: type[Any], model: Any) -> Any:
    """A cache of layers with a sliding window, as Gemma and Mistral have."""
    config = copy.deepcopy(model.config.get_text_config())
    config.sliding_window, config.layer_types = 128, ["sliding_attention"] * config.num_hidden_layers
    return cache(config=config, max_cache_len=96) if cache is StaticCache else cache(config=config)


CACHES = {
    "sliding windows": lambda model: sliding(DynamicCache, model),
    "static sliding windows": lambda model: sliding(StaticCache, model),
    "quantised": lambda model: QuantizedCache(
        "quanto", model.config.get_text_config(), nbits=4, q_group_size=4
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_other_caches_in_forward_are_refused_by_name(model: Any, name: str) -> None:
    prompt = inputs(model)
    stock = model(**prompt, past_key_values=CACHES[name](model)).logits
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.warns(LuvcWarning, match="cache: .*needs the same rows in every layer"):
        out = model(**prompt, past_key_values=CACHES[name](model))
    torch.testing.assert_close(out.logits, stock, atol=1e-5, rtol=1e-5)
    assert luvc_fx.report_of(model).refusals[0].reason is Reason.CACHE


def test_an_image_of_a_later_turn_over_a_static_cache_keeps_its_tokens(model: Any) -> None:
    prompt = inputs(model)
    rows = prompt["input_ids"].shape[1]
    start = oracle_forward(model, CASCADE, **prompt).state
    places = torch.arange(rows, 2 * rows)[None]
    wanted = oracle_forward(model, Schedule(), past=start, position_ids=places, **prompt).logits
    luvc_fx.compile(model, CASCADE, inner="eager", on_no_match="ignore")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=2 * rows)
    model(**prompt, past_key_values=cache)
    seen = torch.ones(1, 2 * rows, dtype=torch.int64)
    got = model(**{**prompt, "attention_mask": seen, "position_ids": places}, past_key_values=cache).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    reasons = [refusal.reason for refusal in luvc_fx.report_of(model).refusals]
    assert reasons == [Reason.PAST_NOT_EMPTY]


@pytest.mark.slow
def test_later_images_of_a_model_with_masks_of_its_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 and PaliGemma override `create_masks_for_generate`: their images are not causal."""
    own = staticmethod(create_masks_for_generate)
    monkeypatch.setattr(type(model), "create_masks_for_generate", own, raising=False)
    prompt = inputs(model)
    rows = prompt["input_ids"].shape[1]
    seen = torch.ones(1, rows + 4, dtype=torch.int64)
    later = {**prompt, "attention_mask": seen, "position_ids": torch.arange(4, 4 + rows)[None]}
    text = torch.tensor([[4, 8, 15, 16]])
    stock = model(**later, past_key_values=model(input_ids=text).past_key_values).logits
    luvc_fx.compile(model, CASCADE, inner="eager", on_no_match="ignore")
    over_text = model(**later, past_key_values=model(input_ids=text).past_key_values).logits
    torch.testing.assert_close(over_text, stock, atol=1e-5, rtol=1e-5)
    assert "masks of the model's own" in str(luvc_fx.report_of(model).refusals[0])
    with pytest.raises(NotImplementedError, match="attention masks of its own"):
        model(**later, past_key_values=model(**prompt).past_key_values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_that_was_reset_holds_a_longer_prompt(model: Any, kind: type[Any]) -> None:
    short, long = inputs(model), inputs(model, text=(3, 40))
    room = {"max_cache_len": long["input_ids"].shape[1]} if kind is StaticCache else {}
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    cache = kind(config=model.config.get_text_config(), **room)
    model(**short, past_key_values=cache)
    assert int(cache.get_seq_length()) == short["input_ids"].shape[1]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    out = model(**long, past_key_values=cache)
    torch.testing.assert_close(
        out.logits, oracle_forward(model, CASCADE, **long).logits, atol=1e-5, rtol=1e-5
    )
    assert int(cache.get_seq_length()) == long["input_ids"].shape[1]


def test_rows_with_different_numbers_of_images(model: Any) -> None:
    prompt = inputs(model, images=2)
    ids = prompt["input_ids"].repeat(2, 1)
    image = ids[1] == model.config.image_token_id
    ids[1, image] = 5
    uneven = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": prompt["pixel_values"],
    }
    stock = generate(model, **uneven)
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.warns(LuvcWarning, match="a row without images, with left padding of 0"):
        assert torch.equal(generate(model, **uneven), stock)


def test_several_images_in_one_row(model: Any) -> None:
    prompt = inputs(model, batch=2, images=2)
    wanted = oracle_generate(model, CASCADE, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    assert torch.equal(generate(model, **prompt), wanted)


def test_text_only_prompts_are_untouched(model: Any) -> None:
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stock = generate(model, **text)
    recorder = Recorder()
    luvc_fx.compile(model, CASCADE, inner=recorder, strict=True)
    assert torch.equal(generate(model, **text), stock)
    assert recorder.inserted() and not any(recorder.inserted())


def test_features_asked_for_by_the_user_are_whole(model: Any) -> None:
    pixels = inputs(model)["pixel_values"]
    stock = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    assert torch.equal(torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output)), stock)


def test_training_mode_runs_whole(model: Any) -> None:
    prompt = inputs(model)
    stock = model(**prompt).logits
    luvc_fx.compile(model, CASCADE, inner="eager")
    model.train()
    with pytest.warns(LuvcWarning, match="training mode"):
        out = model(**prompt)
    torch.testing.assert_close(out.logits, stock, atol=1e-5, rtol=1e-5)


def test_compile_is_idempotent_and_restore_leaves_nothing(model: Any) -> None:
    before = set(vars(model)), set(vars(model.base_model))
    prompt = inputs(model)
    stock = generate(model, **prompt)
    assert luvc_fx.compile(model, "image", inner="eager") is model
    hook = model.forward
    luvc_fx.compile(model, Schedule.preset("image"), inner="eager")
    assert model.forward is hook
    luvc_fx.compile(model, CASCADE, inner="eager")
    assert model.forward is not hook
    assert luvc_fx.restore(model) is model
    assert (set(vars(model)), set(vars(model.base_model))) == before
    assert torch.equal(generate(model, **prompt), stock)
    luvc_fx.restore(model)
    with pytest.raises(ValueError, match="not compiled"):
        luvc_fx.report_of(model)


def test_applied_is_for_the_length_of_a_block(model: Any) -> None:
    prompt = inputs(model)
    luvc_fx.compile(model, PRUNE_ONLY, inner="eager")
    outer = luvc_fx.report_of(model)
    with luvc_fx.applied(model, CASCADE, inner="eager", strict=True) as inside:
        assert inside is model
        generate(model, 2, **prompt)
        assert luvc_fx.report_of(model) is not outer
    assert luvc_fx.report_of(model) is outer
    luvc_fx.restore(model)
    with pytest.raises(KeyError), luvc_fx.applied(model, CASCADE, inner="eager"):
        raise KeyError
    assert "forward" not in vars(model)


def test_copies_and_pickles_are_refused(model: Any) -> None:
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.raises(ValueError, match="restore"):
        copy.deepcopy(model)


@pytest.mark.slow
def test_two_threads_generate_at_once(model: Any) -> None:
    prompts = [inputs(model, seed=seed, batch=1 + seed % 2) for seed in range(4)]
    wanted = [oracle_generate(model, CASCADE, NEW_TOKENS, **prompt) for prompt in prompts]
    luvc_fx.compile(model, CASCADE, inner="eager", on_no_match="ignore")
    failures: list[str] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for turn in range(3):
                got = generate(model, **prompts[number])
                beams = generate(model, 2, num_beams=2, **prompts[number]) if turn == 1 else None
                if not torch.equal(got, wanted[number]):
                    failures.append(f"thread {number}, turn {turn}")
                if beams is not None and beams.shape[0] != got.shape[0]:
                    failures.append(f"thread {number}: beams")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_thread_that_compiles_changes_nothing_in_the_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's flag for it is one for the whole process."""
    prompt = inputs(model)
    wanted = oracle_generate(model, CASCADE, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    monkeypatch.setattr("torch.compiler._is_compiling_flag", True)
    assert torch.equal(generate(model, **prompt), wanted)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(prune=(Prune(keep=0.5, layer=9),)), "Prune.layer is 9"),
        (Schedule(merge=(Merge("width", keep=0.5, layer=5),)), "Merge.layer is 5"),
        (Schedule(merge=(Merge("width", length=9, layer=0),)), "Merge.length is 9"),
        ("film", "preset is 'film'"),
        (3, "schedule is 3"),
    ],
    ids=["prune layer", "merge layer", "merge length", "preset", "type"],
)
def test_impossible_schedules_raise_before_anything_changes(model: Any, schedule: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        luvc_fx.compile(model, schedule, inner="eager")
    assert "forward" not in vars(model)


@pytest.mark.slow
def test_more_tokens_than_there_are_is_said_by_the_graph(model: Any) -> None:
    """Before that nobody knows how many there are: a row may hold several images."""
    schedule = Schedule(prune=(Prune(tokens=65, layer=1),))
    two = inputs(model, images=2)
    wanted = oracle_generate(model, schedule, 2, **two)
    luvc_fx.compile(model, schedule, inner="eager")
    assert torch.equal(generate(model, 2, **two), wanted)
    with pytest.warns(LuvcWarning, match="Prune.tokens is 65; allowed: at most 64"):
        generate(model, 2, **inputs(model))


def test_a_length_above_what_a_merge_left_is_said_by_the_graph(model: Any) -> None:
    """How many patches make one feature, and so what is left, is seen there."""
    prompt = inputs(model)
    wanted = model(**prompt).logits
    merges = (Merge("width", length=5, layer=1), Merge("width", keep=0.5, layer=0))
    luvc_fx.compile(model, Schedule(merge=merges), inner="eager")
    with pytest.warns(LuvcWarning, match="Merge.length is 5; allowed: at most 4, the width"):
        assert torch.equal(model(**prompt).logits, wanted)
    assert [refusal.reason for refusal in luvc_fx.report_of(model).all_refusals()] == [Reason.SCHEDULE]


def test_other_arguments_and_models_raise(model: Any) -> None:
    with pytest.raises(ValueError, match="inner is 'fast'"):
        luvc_fx.compile(model, "image", inner="fast")
    with pytest.raises(ValueError, match="cannot wire LlamaModel"):
        luvc_fx.compile(model.model.language_model)
