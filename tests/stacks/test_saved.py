"""What one process compiles for a real model, another one finds: compile caches and saved functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx import Merge, Prune, Schedule
from luvc_fx.report import GraphReport
from tests.support.models import inputs, tiny_llava
from tests.support.oracle import oracle_forward, oracle_generate
from tests.support.paths import ROOT

MERGE = (Merge("width", keep=0.5, layer=0),)
SCHEDULE = Schedule(merge=MERGE, prune=Prune(keep=0.5, layer=1))
OTHER = Schedule(merge=MERGE, prune=Prune(keep=0.25, layer=1))
SMALL = {"decoder_layers": 2, "encoder_layers": 2}

GENERATE = """
import json, sys
import torch
from tests.support.models import inputs, tiny_llava
import luvc_fx

model = tiny_llava(decoder_layers=2, encoder_layers=2)
luvc_fx.compile(model, luvc_fx.Schedule.from_json(sys.argv[1]), strict=True)
with torch.no_grad():
    tokens = model.generate(**inputs(model), max_new_tokens=4, do_sample=False)
counters = torch._dynamo.utils.counters
graphs = luvc_fx.report_of(model).graphs
found = {
    "tokens": tokens.tolist(),
    "aot": {k: v for k, v in counters["aot_autograd"].items() if "autograd_cache" in k},
    "fx": {k: v for k, v in counters["inductor"].items() if k in ("fxgraph_cache_hit", "fxgraph_cache_miss")},
    "seconds": [graph.compile_seconds for graph in graphs],
    "cached": [graph.cached for graph in graphs],
}
print(json.dumps(found))
"""

SAVED = """
import sys
import torch
from tests.support.models import inputs, tiny_llava
from tests.stacks.test_saved import Logits, arguments, SMALL

model = Logits(tiny_llava(**SMALL))
with open(sys.argv[1], "rb") as file:
    loaded = torch.compiler.load_compiled_function(file)
with torch.no_grad():
    logits = loaded(model, *arguments(model.model, seed=3))
assert not torch._dynamo.utils.counters["frames"], "nothing was compiled here"
torch.save(logits, sys.argv[2])
"""


def process(program: str, *arguments: str, caches: Path) -> str:
    """What a process of its own printed last."""
    path = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return (done.stdout.splitlines() or [""])[-1]


class Logits(torch.nn.Module):
    """A forward from tensors to a tensor: what transformers returns cannot be saved by torch 2.13."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = luvc_fx.prepare(model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).logits


def arguments(model: Any, seed: int = 0) -> tuple[torch.Tensor, ...]:
    prompt = inputs(model, seed=seed)
    return prompt["input_ids"], prompt["attention_mask"], prompt["pixel_values"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generate_in_a_second_process_compiles_nothing_and_with_another_schedule_its_own(
    tmp_path: Path,
) -> None:
    first, second, third = (
        json.loads(process(GENERATE, schedule.to_json(), caches=tmp_path))
        for schedule in (SCHEDULE, SCHEDULE, OTHER)
    )
    model = tiny_llava(**SMALL)
    graphs = 4  # vision, prefill, decode of one and of any length
    for found, schedule in ((first, SCHEDULE), (second, SCHEDULE), (third, OTHER)):
        assert found["tokens"] == oracle_generate(model, schedule, 4, **inputs(model)).tolist()
        assert len(found["seconds"]) == graphs
    assert first["aot"] == {"autograd_cache_miss": graphs, "autograd_cache_saved": graphs}
    assert first["fx"] == {"fxgraph_cache_miss": graphs}
    assert first["cached"] == [False] * graphs
    # A graph of decoding that knows no lengths is the same under any schedule.
    assert third["cached"][:2] == [False, False], "vision and prefill are the schedule's"
    assert third["aot"]["autograd_cache_miss"] == graphs - third["cached"].count(True)
    assert second["aot"] == {"autograd_cache_hit": graphs}
    assert second["fx"] == {"fxgraph_cache_hit": graphs}
    assert second["cached"] == [True] * graphs
    assert sum(second["seconds"]) < sum(first["seconds"])


@pytest.mark.slow
def test_a_saved_forward_answers_in_a_new_process(tmp_path: Path) -> None:
    model = Logits(tiny_llava(**SMALL))
    backend = luvc_fx.backend(SCHEDULE, strict=True)
    # Of a transformers model torch can only save the guards on tensors, with or without luvc_fx.
    options = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
        saved = compiled.forward.aot_compile((arguments(model.model), {}))
    saved.save_compiled_function(str(tmp_path / "saved"))
    assert len(backend.report.graphs[0].inserted) == 2
    process(SAVED, str(tmp_path / "saved"), str(tmp_path / "logits.pt"), caches=tmp_path / "caches")
    wanted = oracle_forward(model.model, SCHEDULE, **inputs(model.model, seed=3))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted.logits, atol=1e-4, rtol=1e-4)


def test_the_report_tells_how_long_the_compiler_took() -> None:
    model = tiny_llava(**SMALL)
    luvc_fx.compile(model, SCHEDULE, inner="eager", strict=True)
    with torch.no_grad():
        model(**inputs(model))
    for graph in luvc_fx.report_of(model).graphs:
        assert graph.compile_seconds is not None
        assert f", the compiler behind it {graph.compile_seconds:.1f} s" in str(graph)
        assert not graph.cached
    assert str(GraphReport(compile_seconds=1.25, cached=True)).endswith("behind it 1.2 s, from its caches")
    assert "compiler" not in str(GraphReport())
