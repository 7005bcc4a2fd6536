"""What our passes cost on graphs of several depths: measured, and written down.

``python -m tests.support.pass_time`` prints it, ``--write`` puts it into research/benchmarks/results.
"""

from __future__ import annotations

import contextlib
import cProfile
import json
import sys
import time

import luvc_fx
from luvc_fx.apps.bench.arms import FROZEN
from luvc_fx.apps.environment import hardware, versions
from tests.support.models import inputs, tiny_llava
from tests.support.paths import RESEARCH
from tests.support.replay import capture

DEPTHS = (8, 16, 32, 64)
RESULT = RESEARCH / "benchmarks" / "results" / "pass_time.json"


def work_of_passes(layers: int) -> tuple[int, int, float]:
    """Of a model so deep: nodes of its graph, the calls that our part makes, its processor seconds."""
    model = luvc_fx.prepare(tiny_llava(decoder_layers=layers, encoder_layers=layers))
    captured = capture(model, False, **inputs(model))
    times = []
    profile = cProfile.Profile()
    for last in (False, False, True):
        gm = captured.copy()
        backend = luvc_fx.backend(FROZEN, inner=lambda gm, given: gm.forward, strict=True)
        started = time.process_time()
        with profile if last else contextlib.nullcontext():
            backend(gm, list(captured.example_inputs))
        times.append(time.process_time() - started)
    assert len(backend.report.graphs[-1].inserted) == 4
    calls = sum(entry.callcount for entry in profile.getstats())
    return len(captured.gm.graph.nodes), calls, min(times)


def main() -> None:
    """Measure all depths."""
    found = {
        "depths": [
            dict(zip(("layers", "nodes", "calls", "seconds"), (depth, *work_of_passes(depth)), strict=True))
            for depth in DEPTHS
        ],
        "hardware": hardware(tiny_llava()),
        "versions": versions(),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if "--write" in sys.argv[1:]:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
