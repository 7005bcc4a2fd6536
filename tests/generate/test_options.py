"""Options of `generate`, set as a keyword, in a config that is passed, or in the model's own.

What keeps all visual tokens gives what the stock model gives, and says so; what only changes the choice of
tokens changes nothing for visual ones. Every option of the installed transformers is in one of the tables.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.report import Reason
from tests.support.cases import slow_unless
from tests.support.models import PAD, inputs, tiny_llava
from tests.support.oracle import oracle_generate
from tests.support.over_oracle import OracleCache, over_oracle

SCHEDULE = Schedule(
    merge=(Merge("width", keep=0.5, layer=0),),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)),
)
NEW_TOKENS = 3
SIZE = {"decoder_layers": 3, "encoder_layers": 2, "grid": 4}


def on_every_device() -> CompileConfig:
    """Transformers leaves CPUs out otherwise."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


KEEPS: dict[str, Any] = {
    "prefill_chunk_size": 16,
    "is_assistant": True,
    "token_healing": True,
    "assistant_early_exit": 1,
    "prompt_lookup_num_tokens": 2,
    "use_mtp": True,
    "use_cache": False,
    "output_attentions": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "constraints": ["any"],
    "force_words_ids": [[3]],
}
"""With these values all visual tokens stay."""

SEVERAL = {"beams": {"num_beams": 2}, "beams, both returned": {"num_beams": 2, "num_return_sequences": 2}}
"""With these they are pruned, but not merged."""

LIKE_GREEDY: dict[str, Any] = {
    "cache_implementation": "static",
    "compile_config": on_every_device(),
    "disable_compile": False,
    "max_cache_len": 64,
    "max_new_tokens": NEW_TOKENS,
    "max_length": 200,
    "min_length": 1,
    "min_new_tokens": 1,
    "early_stopping": True,
    "max_time": 600.0,
    "stop_strings": None,  # need a tokenizer
    "do_sample": False,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "top_h": 0.5,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "length_penalty": 0.5,
    "diversity_penalty": 0.5,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "forced_bos_token_id": 5,  # for an empty prompt
    "exponential_decay_length_penalty": (100, 1.1),
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "return_dict_in_generate": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "decoder_start_token_id": 1,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "max_matching_ngram_size": 3,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "cache_config": {"nbits": 4},
    "low_memory": True,
    "continuous_batching_config": None,  # deprecated here
    "_from_model_config": True,
    "transformers_version": "5.0.0",
}
"""With these a greedy answer is what it is without."""

OTHER_TOKENS: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[3], [4]],
    "forced_eos_token_id": 7,
    "suppress_tokens": [3, 4],
    "begin_suppress_tokens": [3, 4],
    "sequence_bias": [[[3], 9.0]],
    "watermarking_config": {"bias": 9.0},
    "guidance_scale": 3.0,
}
"""With these the choice of tokens is another one."""


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    """One that is compiled, and its stock twin."""
    made = tiny_llava(**SIZE)
    made.generation_config.eos_token_id = PAD  # which none of its answers has
    stock = copy.deepcopy(made)
    luvc_fx.compile(made, SCHEDULE, inner="eager", on_no_match="ignore")
    with torch.no_grad():
        yield made, stock
    luvc_fx.restore(made)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers says of many of these options that they do nothing here."""
    monkeypatch.setattr(logging.getLogger("transformers"), "disabled", True)


PLACES = ("keyword", "passed", "the model's own", "the model's own beside one that is passed")
ABOVE = "the model's own beside one that is passed"


def speak(model: Any, place: str, **options: Any) -> Any:
    """What `generate` returns with these options set in that place; each is greedy else."""
    prompt, own = inputs(model), model.generation_config
    plain = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    try:
        model.generation_config = copy.deepcopy(own)
        if place == "keyword":
            return model.generate(**prompt, **{**plain, **options})
        if place == "passed":
            return model.generate(**prompt, generation_config=GenerationConfig(**{**plain, **options}))
        model.generation_config.update(**options)
        if place == ABOVE:
            return model.generate(**prompt, generation_config=GenerationConfig(**plain))
        return model.generate(**prompt, **plain)
    finally:
        model.generation_config = own


def outcome(model: Any, place: str, **options: Any) -> Any:
    """As `speak`, or the words of its error."""
    try:
        return speak(model, place, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same(got: Any, wanted: Any) -> bool:
    return torch.equal(got, wanted) if isinstance(wanted, torch.Tensor) else got == wanted


@pytest.mark.parametrize("place", PLACES)
def test_what_keeps_tokens_or_features_is_refused_by_name(place: str) -> None:
    model = tiny_llava(**SIZE)
    luvc_fx.compile(model, SCHEDULE, inner="eager", on_no_match="raise")
    for name, given in KEEPS.items():
        with pytest.raises(luvc_fx.NotRewritten, match=f"inputs: {name}=.*: all visual tokens stay"):
            speak(model, place, **{name: given})
    for options in SEVERAL.values():
        with pytest.raises(luvc_fx.NotRewritten, match=r"above 1: .*; pruned, but not merged"):
            speak(model, place, **options)


@pytest.mark.parametrize("name", slow_unless(KEEPS, ["is_assistant", "token_healing"]))
def test_what_keeps_all_tokens_gives_what_the_stock_model_gives(models: Any, name: str) -> None:
    model, stock = models
    refusals = luvc_fx.report_of(model).refusals
    for place in PLACES:
        refusals.clear()
        wanted = outcome(stock, place, **{name: KEEPS[name]})
        got = outcome(model, place, **{name: KEEPS[name]})
        assert same(got, wanted), f"{place}: {got} is not {wanted}"
        assert [refusal.reason for refusal in refusals] == [Reason.INPUTS], place


@pytest.mark.slow
@pytest.mark.parametrize("options", SEVERAL)
def test_several_answers_are_pruned_but_not_merged_wherever_they_are_asked_for(
    models: Any, options: str
) -> None:
    model, stock = models
    report = luvc_fx.report_of(model)
    prune = Schedule(prune=SCHEDULE.prune)
    with over_oracle(stock, prune, pixel_values=inputs(model)["pixel_values"]):
        wanted = speak(stock, "keyword", past_key_values=OracleCache(), **SEVERAL[options])
    for place in PLACES:
        report.refusals.clear()
        assert torch.equal(speak(model, place, **SEVERAL[options]), wanted), place
        (refusal,) = report.refusals
        assert "pruned, but not merged" in refusal.text, place


@pytest.mark.parametrize("place", slow_unless(PLACES, [ABOVE]))
def test_what_changes_nothing_is_the_oracle(models: Any, place: str) -> None:
    model, stock = models
    report = luvc_fx.report_of(model)
    report.refusals.clear()
    wanted = oracle_generate(stock, SCHEDULE, NEW_TOKENS, **inputs(model))
    for name, given in LIKE_GREEDY.items():
        assert torch.equal(speak(model, place, **{name: given}), wanted), name
    assert report.refusals == []


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_what_changes_the_choice_of_tokens_chooses_among_the_oracles_logits(models: Any, place: str) -> None:
    model, stock = models
    report = luvc_fx.report_of(model)
    report.refusals.clear()
    for name, given in OTHER_TOKENS.items():
        with over_oracle(stock, SCHEDULE, pixel_values=inputs(model)["pixel_values"]):
            wanted = speak(stock, "keyword", past_key_values=OracleCache(), **{name: given})
        assert torch.equal(speak(model, place, **{name: given}), wanted), name
    assert report.refusals == []


def test_every_option_is_known() -> None:
    """A new one is to be looked at, and belongs into a table here and into `luvc_fx.generate.options`."""
    tables = KEEPS.keys() | SEVERAL["beams, both returned"].keys() | LIKE_GREEDY.keys() | OTHER_TOKENS.keys()
    assert vars(GenerationConfig()).keys() - tables == set()


@pytest.mark.parametrize("place", PLACES)
def test_an_option_that_nobody_has_looked_at_keeps_all_tokens(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = GenerationConfig.__init__

    def with_a_new_one(self: Any, **given: Any) -> None:
        self.skip_layers = given.pop("skip_layers", None)
        make(self, **given)

    monkeypatch.setattr(GenerationConfig, "__init__", with_a_new_one)
    model = tiny_llava(**SIZE)
    luvc_fx.compile(model, SCHEDULE, inner="eager", on_no_match="raise")
    with pytest.raises(luvc_fx.NotRewritten, match=r"skip_layers=2 \(an option that luvc_fx does not know\)"):
        speak(model, place, skip_layers=2)
