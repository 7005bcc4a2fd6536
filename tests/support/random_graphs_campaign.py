"""Many random graphs under many random schedules, in one process that may be stopped and started again.

    python -m tests.support.random_graphs_campaign --examples 10000 --seed 1 --out random_graphs.json

An example is one schedule on one captured graph (see `random_graphs.check_schedule`). They come in chunks;
the file is written after each, and a run with the same seed goes on behind the chunks that it holds. A
failure is written down with all that is needed to see it again, and does not end the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import subprocess
import time
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from luvc_fx.passes import PASSES
from luvc_fx.schedule import Schedule
from tests.support.oracle import schedules
from tests.support.random_graphs import (
    Session,
    check_identity,
    check_nothing_asked,
    check_rollback,
    check_schedule,
)
from tests.support.random_spec import Spec, keep_all, specs

GRAPHS, SCHEDULES, DYNAMIC = 10, 20, 6
"""Graphs of a chunk, and schedules for each; fewer with symbolic sizes, captured anew for each of them."""


def commit() -> str:
    """Of the code that runs, where git tells."""
    told = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


COMMIT = commit()


class Chunk:
    """What one chunk did.

    Attributes:
        outcomes: how many schedules ended how; graphs: models captured.
        failures: one record each.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.outcomes: Counter[str] = Counter()
        self.graphs = 0
        self.failures: list[dict[str, Any]] = []
        self.begun = False

    def run(self, seed: int) -> dict[str, Any]:
        """Draw and check; the chunk as plain data."""
        started, cpu = time.perf_counter(), time.process_time()

        # Hypothesis always begins with the simplest model under empty schedules: it is not counted.
        @seeded(1_000_003 * seed + self.number)
        @settings(
            max_examples=GRAPHS + 1,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def draw(data: st.DataObject) -> None:
            spec = data.draw(specs())
            dynamic = data.draw(st.integers(0, 7)) == 7
            fit = schedules(
                blocks=spec.blocks, grid=spec.grid, layers=spec.layers, images=spec.images, merges=2, prunes=2
            )
            drawn = data.draw(st.lists(fit, min_size=SCHEDULES, max_size=SCHEDULES))
            keeps, place = data.draw(keep_all(spec)), data.draw(st.integers(0, len(PASSES)))
            if self.begun:
                fewer = list(dict.fromkeys(drawn))[: DYNAMIC if dynamic else SCHEDULES]
                self.graph(spec, dynamic, fewer, keeps, place)
            self.begun = True

        draw()
        return {
            "chunk": self.number,
            "commit": COMMIT,
            "graphs": self.graphs,
            "examples": sum(self.outcomes.values()),
            "outcomes": dict(sorted(self.outcomes.items())),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "failures": self.failures,
        }

    def graph(self, spec: Spec, dynamic: bool, drawn: list[Schedule], keeps: Schedule, place: int) -> None:
        """All checks on one model."""
        gc.collect()
        self.graphs += 1
        try:
            session = Session(spec, dynamic)
            check_nothing_asked(session)
        except Exception as error:
            self.fail("capture", spec, dynamic, Schedule(), error)
            return
        for schedule in drawn:
            try:
                self.outcomes[check_schedule(session, schedule)] += 1
            except Exception as error:
                self.outcomes["failed"] += 1
                self.fail("schedule", spec, dynamic, schedule, error)
        try:
            check_identity(session, keeps)
        except Exception as error:
            self.fail("identity", spec, dynamic, keeps, error)
        try:
            check_rollback(session, drawn[-1], place)
        except Exception as error:
            self.fail(f"rollback after {place} passes", spec, dynamic, drawn[-1], error)

    def fail(self, check: str, spec: Spec, dynamic: bool, schedule: Schedule, error: Exception) -> None:
        """Write down one failure."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.failures.append(
            {
                "check": check,
                "spec": repr(spec),
                "dynamic": dynamic,
                "schedule": schedule.to_json(),
                "error": f"{type(error).__name__} in {where.name}: {error}",
            }
        )
        print(f"chunk {self.number}: {self.failures[-1]}", flush=True)


def summary(seed: int, wanted: int, chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The file's content."""
    outcomes: Counter[str] = Counter()
    for chunk in chunks:
        outcomes.update(chunk["outcomes"])
    return {
        "seed": seed,
        "examples": sum(outcomes.values()),
        "wanted": wanted,
        "graphs": sum(chunk["graphs"] for chunk in chunks),
        "failures": sum(len(chunk["failures"]) for chunk in chunks),
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(sum(chunk["seconds"] for chunk in chunks), 1),
        "cpu_seconds": round(sum(chunk["cpu_seconds"] for chunk in chunks), 1),
        "versions": {
            "luvc_fx": version("luvc-fx"),
            "torch": torch.__version__,
            "hypothesis": hypothesis.__version__,
            "python": platform.python_version(),
        },
        "chunks": chunks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="schedules in all (10000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("random_graphs.json"))
    parser.add_argument("--again", action="store_true", help="run chunks with failures once more")
    given_args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    chunks: list[dict[str, Any]] = []
    if given_args.out.exists():
        old = json.loads(given_args.out.read_text(encoding="utf-8"))
        if old["seed"] != given_args.seed:
            parser.error(f"{given_args.out} holds a run with seed {old['seed']}")
        chunks = [c for c in old["chunks"] if not (given_args.again and c["failures"])]
    while sum(chunk["examples"] for chunk in chunks) < given_args.examples:
        held = {chunk["chunk"] for chunk in chunks}
        chunks.append(Chunk(min(set(range(len(chunks) + 1)) - held)).run(given_args.seed))
        chunks.sort(key=lambda chunk: chunk["chunk"])
        found = summary(given_args.seed, given_args.examples, chunks)
        given_args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print({k: v for k, v in found.items() if k not in ("chunks", "versions")}, flush=True)


if __name__ == "__main__":
    main()
