"""Two processes under torchrun with the model's tensor-parallel plan, and one process, get the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from luvc_fx import Merge, Prune, Schedule
from tests.support.models import inputs, tiny_internvl, tiny_llava
from tests.support.oracle import oracle_forward, oracle_generate, score_gap
from tests.support.paths import EXAMPLES

EXAMPLE = EXAMPLES / "tensor_parallel.py"
SCHEDULE = Schedule(merge=(Merge("width", keep=0.5, layer=0),), prune=(Prune(keep=0.5, layer=1),))
NEW_TOKENS = 8


def run(folder: Path, processes: int, inner: str) -> list[dict[str, Any]]:
    """What each process of the example wrote."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    outputs = folder / f"{processes}-{inner}-{{rank}}.pt"
    arguments = [folder / "model", folder / "inputs.pt", outputs, folder / "schedule.json", inner]
    command = [sys.executable, *launch, str(EXAMPLE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rows of the prompt left") == processes
    return [torch.load(str(outputs).format(rank=rank)) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "inner"), [(tiny_llava, "eager"), (tiny_internvl, "eager"), (tiny_llava, "inductor")]
)
def test_two_processes_keep_the_same_tokens_and_answer_as_one(make: Any, inner: str, tmp_path: Path) -> None:
    model = make(decoder_layers=2, encoder_layers=2)  # 97 words: the processes' shares of them are unequal
    prompt = inputs(model)
    assert score_gap(model, SCHEDULE, **prompt) > 1e-3
    model.save_pretrained(tmp_path / "model")
    torch.save(prompt, tmp_path / "inputs.pt")
    (tmp_path / "schedule.json").write_text(SCHEDULE.to_json())
    wanted = oracle_forward(model, SCHEDULE, **prompt)
    tokens = oracle_generate(model, SCHEDULE, NEW_TOKENS, **prompt)
    found = run(tmp_path, 2, inner)
    for each in found:
        assert torch.equal(each["row_index"], wanted.rows)
        torch.testing.assert_close(each["logits"], wanted.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(each["tokens"], tokens)
        assert each["heads"] == [1, 1], "each process has one of the two heads of keys and values"
        report = json.loads(each["report"])
        graphs = [graph for graph in report["graphs"] if graph["kind"] == "prefill"]
        assert len(graphs) == 2
        assert all(graph["inserted"] for graph in graphs)
        assert not any(graph["refusals"] for graph in report["graphs"])
    assert torch.equal(found[0]["logits"], found[1]["logits"])
