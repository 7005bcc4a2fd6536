"""CompileConfig: alone it never sees the prompt; beside `luvc_fx.compile` both do their part."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, GenerationConfig

import luvc_fx
from luvc_fx import LuvcWarning, Prune, Schedule, _compat
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_generate

SCHEDULE = Schedule(prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)))
NEW_TOKENS = 5


@pytest.fixture
def model() -> Iterator[Any]:
    made = tiny_llava(decoder_layers=3, encoder_layers=2, grid=4)
    with torch.no_grad():
        yield made
    luvc_fx.restore(made)


def on_every_device(**settings: Any) -> CompileConfig:
    """Transformers leaves CPUs out otherwise."""
    config = CompileConfig(**settings)
    config._compile_all_devices = True
    return config


def speak(model: Any, **given: Any) -> torch.Tensor:
    return model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation="static")


def test_alone_it_warns_and_names_the_front_door(model: Any) -> None:
    prompt = inputs(model)
    stock = speak(model, **prompt)
    config = on_every_device(backend=luvc_fx.backend(SCHEDULE, inner="eager"))
    assert config.mode == "reduce-overhead", "its default, which the backend has to accept"
    with pytest.warns(
        LuvcWarning, match=r"CompileConfig for decoding alone.*luvc_fx\.compile\(model, schedule\)"
    ):
        said = speak(model, compile_config=config, **prompt)
    assert torch.equal(said, stock)


def test_a_compiled_forward_does_not_warn_of_it(model: Any) -> None:
    prompt = inputs(luvc_fx.prepare(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LuvcWarning)
        backend = luvc_fx.backend(SCHEDULE, inner="eager", strict=True)
        torch.compile(model.forward, backend=backend)(**prompt)


@pytest.mark.parametrize(
    ("settings", "given", "modes"),
    [
        ({}, {"compile_config": {}}, [None, None, "reduce-overhead"]),
        ({}, {"compile_config": {"mode": "default"}}, [None, None, None]),
        ({}, {}, [None, None, None]),
        ({}, {"compile_config": {}, "disable_compile": True}, [None, None, None]),
        ({"mode": "max-autotune-no-cudagraphs"}, {"compile_config": {}}, 3 * ["max-autotune-no-cudagraphs"]),
    ],
    ids=["its default mode", "mode default", "none", "disabled", "a mode of ours goes first"],
)
def test_together_both_do_their_part(
    model: Any, settings: Any, given: Any, modes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned, decoded over the static cache, and decoding compiled in the mode that was asked for."""
    prompt, seen = inputs(model), []

    def compile_inductor(gm: Any, example_inputs: Any, mode: Any, options: Any, key: str) -> Any:
        seen.append(mode)
        return gm.forward

    monkeypatch.setattr(_compat, "compile_inductor", compile_inductor)
    wanted = oracle_generate(model, SCHEDULE, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, SCHEDULE, strict=True, **settings)
    if "compile_config" in given:
        given = {**given, "compile_config": on_every_device(**given["compile_config"])}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LuvcWarning)
        assert torch.equal(speak(model, **prompt, **given), wanted)
    assert [graph.kind for graph in luvc_fx.report_of(model).graphs] == ["vision", "prefill", "decode"]
    assert seen == modes


def test_another_compiler_inside_is_left_alone(model: Any) -> None:
    prompt = inputs(model)
    wanted = oracle_generate(model, SCHEDULE, NEW_TOKENS, **prompt)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    assert torch.equal(speak(model, compile_config=on_every_device(), **prompt), wanted)


def test_a_generation_config_is_left_as_it_is(
    model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = inputs(model)
    wanted = oracle_generate(model, SCHEDULE, NEW_TOKENS, **prompt)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, cache_implementation="static", compile_config=on_every_device()
    )
    before = config.to_dict()
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    assert torch.equal(model.generate(**prompt, generation_config=config), wanted)
    assert config.to_dict() == before
    assert "generation_config" not in caplog.text, "transformers complains of options beside one"
