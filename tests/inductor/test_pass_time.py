"""Our passes are linear in the graph, and a small part of its compilation."""

from __future__ import annotations

import importlib
import itertools
import json
import resource
import time
from typing import Any

import pytest
import torch

import luvc_fx
from luvc_fx.apps.bench.arms import FROZEN
from luvc_fx.dynamo import rewrite
from tests.support.models import inputs, tiny_llava
from tests.support.pass_time import DEPTHS, RESULT, work_of_passes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_work_is_linear_in_the_graph() -> None:
    """By calls, which a busy machine cannot change: a quadratic part would double from slope to slope."""
    found = {layers: work_of_passes(layers) for layers in DEPTHS}
    told = ", ".join(f"{depth} layers: {n} nodes, {c} calls" for depth, (n, c, _) in found.items())
    slopes = [
        (found[after][1] - found[before][1]) / (found[after][0] - found[before][0])
        for before, after in itertools.pairwise(DEPTHS)
    ]
    assert all(slope > 0 for slope in slopes), told
    assert max(slopes) < 1.15 * min(slopes), told


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_part_of_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = luvc_fx.prepare(tiny_llava(decoder_layers=16, encoder_layers=16))
    backend = luvc_fx.backend(FROZEN, strict=True)
    spent = 0.0

    def timed(*args: Any) -> Any:
        nonlocal spent
        started = time.process_time()
        rewriting = rewrite.rewrite(*args)
        spent += time.process_time() - started
        return rewriting

    monkeypatch.setattr(importlib.import_module("luvc_fx.dynamo.backend"), "rewrite", timed)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        started = time.process_time()
        before = children()
        torch.compile(model, backend=backend, dynamic=False)(**inputs(model))
        whole = time.process_time() - started + children() - before
    share = spent / whole
    assert 0 < share <= 0.05, f"{spent:.2f} s of {whole:.2f} s is {share:.1%}"


def children() -> float:
    """Processor time of the C++ compilers so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_committed_figures_are_linear() -> None:
    depths = json.loads(RESULT.read_text(encoding="utf-8"))["depths"]
    assert [depth["layers"] for depth in depths] == list(DEPTHS)
    slopes = [(b["calls"] - a["calls"]) / (b["nodes"] - a["nodes"]) for a, b in itertools.pairwise(depths)]
    assert max(slopes) < 1.15 * min(slopes)
