"""What decoding costs: graphs, recompiles, waits for the device, memory, and the bytes that are reported."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.models import inputs, tiny_llava
from tests.support.paths import ROOT

SCHEDULE = Schedule(
    merge=Merge("width", keep=0.5, layer=0),
    prune=(Prune(keep=0.5, layer=1), Prune(keep=0.0, layer=-1)),
)


@pytest.fixture
def model() -> Iterator[Any]:
    made = tiny_llava(decoder_layers=3, encoder_layers=2, grid=4)
    with torch.no_grad():
        yield made
    luvc_fx.restore(made)


def speak(model: Any, count: int, **given: Any) -> Any:
    return model.generate(**given, min_new_tokens=count, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize(("cache", "decoded"), slow_unless([("dynamic", 2), ("static", 1)], [("dynamic", 2)]))
def test_graphs_do_not_grow_with_the_answer(model: Any, cache: str, decoded: int) -> None:
    """Of a dynamic cache there is one for its first length and one for all others."""
    prompt = inputs(model)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    room = {"cache_implementation": cache, "max_cache_len": 256} if cache == "static" else {}
    speak(model, 4, **prompt, **room)
    report = luvc_fx.report_of(model)
    assert [graph.kind for graph in report.graphs] == ["vision", "prefill", *decoded * ["decode"]]
    speak(model, 200, **prompt, **room)
    for text in ((3, 9), (3, 21)):  # prompts of other lengths: the text axis becomes symbolic, once
        speak(model, 8, **inputs(model, text=text), **room)
    assert len(report.of_kind("decode")) == decoded
    assert len(report.of_kind("prefill")) == 2
    before = len(report.graphs)
    speak(model, 30, **inputs(model, text=(5, 15)), **room)
    assert len(report.graphs) == before


def waits_only_on_a_cpu(event: Any) -> bool:
    """`_assert_async` does not wait for a GPU."""
    above = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        above.append(event.name)
    return "aten::_assert_async" in above


@pytest.mark.parametrize("cache", slow_unless(["dynamic", "static"], ["static"]))
def test_a_step_waits_for_the_device_no_more_often_than_the_stock_model(model: Any, cache: str) -> None:
    """Reading a number out of a tensor is what makes the host wait."""
    prompt = inputs(model, batch=2, padding=(0, 3))
    room = {"cache_implementation": cache, "max_cache_len": 64, "disable_compile": True}
    room = room if cache == "static" else {}

    def reads(count: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            speak(model, count, **prompt, **room)
        found = [event for event in profile.events() if event.name == "aten::_local_scalar_dense"]
        return sum(not waits_only_on_a_cpu(event) for event in found)

    stock = reads(12) - reads(4)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    speak(model, 12, **prompt, **room)
    graphs = len(luvc_fx.report_of(model).graphs)
    assert stock > 0
    assert reads(12) - reads(4) <= stock
    assert len(luvc_fx.report_of(model).graphs) == graphs, "what was counted did not compile anything"


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("batch", slow_unless([1, 2], [2]))
def test_reported_bytes_are_those_of_the_cache(model: Any, kind: type[Any], batch: int) -> None:
    """Of a static cache, the rows written; it has room for more."""
    prompt = inputs(model, batch=batch)
    room = {"max_cache_len": 64} if kind is StaticCache else {}
    cache = kind(config=model.config.get_text_config(), **room)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    model(**prompt, past_key_values=cache)
    (prefill,) = luvc_fx.report_of(model).of_kind("prefill")
    held = []
    for layer in cache.layers:
        share = int(layer.get_seq_length()) / layer.keys.shape[-2]
        held.append(int(share * (layer.keys.nbytes + layer.values.nbytes)))
    assert prefill.kv_bytes_after == held
    assert held[0] > held[1]
    assert prefill.kv_bytes_before[0] == held[0], "merged before they came here"


def resident() -> int:
    """Bytes of memory that this process really has (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@torch.no_grad()
def growth() -> dict[str, int]:
    """What 850 further prompts add to a process that has seen 150: graphs, tensors and bytes."""
    model = tiny_llava(decoder_layers=3, encoder_layers=2, grid=4)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)

    def run(first: int, last: int) -> None:
        for number in range(first, last):
            speak(model, 3, **inputs(model, text=(2 + number % 3, 4 + number % 17), seed=number))

    def counted() -> dict[str, int]:
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        return {"graphs": len(luvc_fx.report_of(model).graphs), "tensors": tensors, "bytes": resident()}

    run(0, 150)
    before = counted()
    run(150, 1000)
    after = counted()
    return {name: after[name] - before[name] for name in before}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of its memory")
def test_memory_is_flat_over_a_thousand_prompts() -> None:
    """In a process of its own: what other tests left in memory comes and goes."""
    program = "import json; from tests.generate.test_decoding_cost import growth; print(json.dumps(growth()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    added = json.loads(done.stdout.splitlines()[-1])
    assert added["graphs"] == 0
    assert added["tensors"] <= 0
    assert added["bytes"] < 8 * 2**20
