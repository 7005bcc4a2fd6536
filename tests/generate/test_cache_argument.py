"""A forward may call its cache `cache`, as in transformers from 5.24 on, or `past_key_values`, as before."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration, QuantizedCache, StaticCache
from transformers.modeling_outputs import ModelOutput

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_continue, oracle_forward, oracle_generate

SIGNATURE = inspect.signature(LlavaForConditionalGeneration.forward)
INSTALLED = "cache" if "cache" in SIGNATURE.parameters else "past_key_values"
CASCADE = Schedule(merge=(Merge("width", keep=0.5, layer=0),), prune=(Prune(keep=0.5, layer=1),))


@dataclass
class OutputWithCache(ModelOutput):
    logits: torch.Tensor | None = None
    cache: Any = None


class TakesCache(LlavaForConditionalGeneration):
    """The installed model with the later names; `generate` gives its forward the cache by its own one."""

    def forward(self, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> OutputWithCache:
        assert past_key_values is None, "the old name, which `generate` looks for in the signature"
        output = super().forward(**{INSTALLED: cache}, **kwargs)
        return OutputWithCache(logits=output.logits, cache=output[INSTALLED])

    forward.__signature__ = SIGNATURE.replace(  # type: ignore[attr-defined]
        parameters=[
            *(given for name, given in SIGNATURE.parameters.items() if name not in ("cache", "kwargs")),
            inspect.Parameter("cache", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
            SIGNATURE.parameters["kwargs"],
        ]
    )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given = super().prepare_inputs_for_generation(*args, **kwargs)
        if "past_key_values" in given:
            given["cache"] = given.pop("past_key_values")
        return given

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **more: Any) -> Any:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **more)
        if "past_key_values" in updated:
            updated["past_key_values"] = outputs.cache
        return updated


def takes_cache() -> Any:
    model = tiny_llava()
    model.__class__ = TakesCache
    return model


@torch.no_grad()
def test_two_left_padded_turns_by_generate() -> None:
    model, two_turns = takes_cache(), {}
    batch = inputs(model, batch=2, padding=(0, 3))
    stock = tiny_llava()
    wanted = oracle_generate(stock, CASCADE, 4, **batch)
    for renamed in (model, stock):
        luvc_fx.compile(renamed, CASCADE, inner="eager", strict=True)
        cache = DynamicCache(config=renamed.config.get_text_config())
        said = renamed.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
        longer = torch.cat([said, torch.tensor([[7, 9], [8, 10]])], dim=1)
        seen = (longer != -1).long()
        seen[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
        again = renamed.generate(
            input_ids=longer, attention_mask=seen, past_key_values=cache, max_new_tokens=3, do_sample=False
        )
        two_turns[type(renamed)] = said, again
    said, again = two_turns[TakesCache]
    assert torch.equal(said, wanted)
    assert torch.equal(again, two_turns[LlavaForConditionalGeneration][1])


@pytest.mark.parametrize("make", [None, DynamicCache, StaticCache], ids=["none", "dynamic", "static"])
@torch.no_grad()
def test_a_forward_and_a_step(make: Any) -> None:
    model = takes_cache()
    prompt, token = inputs(model), torch.tensor([[7]])
    first = oracle_forward(model, CASCADE, **prompt)
    wanted = oracle_continue(model, first.state, token)
    luvc_fx.compile(model, CASCADE, inner="eager", strict=True)
    config = model.config.get_text_config()
    given = {"config": config, "max_cache_len": 128} if make is StaticCache else {"config": config}
    out = model(**prompt, **({} if make is None else {"cache": make(**given)}))
    held = out.cache
    assert held.get_seq_length() == prompt["input_ids"].shape[1]
    torch.testing.assert_close(model(input_ids=token, cache=held).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_that_needs_equal_rows_is_seen() -> None:
    pytest.importorskip("optimum.quanto")
    model = takes_cache()
    prompt, config = inputs(model), model.config.get_text_config()
    stock = model(**prompt, cache=QuantizedCache("quanto", config)).logits
    luvc_fx.compile(model, CASCADE, inner="eager")
    with pytest.warns(LuvcWarning, match="QuantizedCache"):
        out = model(**prompt, cache=QuantizedCache("quanto", config))
    torch.testing.assert_close(out.logits, stock, atol=1e-4, rtol=1e-4)
