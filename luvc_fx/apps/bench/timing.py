"""Clocks, the stages of a run, and statistics of their times."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

RESAMPLES = 2000

VISION, PREFILL, FIRST_TOKEN, DECODE = "vision", "prefill", "first token", "decode"
STAGES = (VISION, PREFILL, FIRST_TOKEN, DECODE)
"""``first token`` runs from the call of `generate` to the end of the prefill."""

PROJECTOR, SELECTOR = "projector", "selector"
"""Parts of the vision stage and of the prefill, timed by themselves (`luvc_fx.apps.bench.alone`)."""


@dataclass(frozen=True, slots=True)
class Span:
    """Milliseconds of one call: on the wall (by device events on a GPU), and of this process's cores."""

    wall: float
    cpu: float


class Clock:
    """Times calls; on a GPU between events on its stream, read once everything has run."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device

    def start(self) -> Any:
        """A mark to hand to `stop`."""
        if not self.cuda:
            return time.process_time(), time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, mark: Any) -> Callable[[], Span]:
        """The span since `mark`, to be asked for after `wait`."""
        if not self.cuda:
            cpu, wall = time.process_time() - mark[0], time.perf_counter() - mark[1]
            return lambda: Span(wall * 1e3, cpu * 1e3)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return lambda: Span(mark.elapsed_time(event), 0.0)

    def stop_after(self, call: Callable[[], Any]) -> Callable[[], Span]:
        """The span of one call, to be asked for after `wait`."""
        mark = self.start()
        call()
        return self.stop(mark)

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


@dataclass(slots=True)
class Stages:
    """Spans of the calls of each stage, in the order of the calls."""

    clock: Clock
    pending: list[tuple[str, Callable[[], Span]]] = field(default_factory=list)
    begun: Any = None

    def begin(self) -> None:
        """Mark the start of a run: the time to its first token is a stage, too."""
        self.clock.wait()
        self.begun = self.clock.start()

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, noting how long it takes."""

        def run(*args: Any, **kwargs: Any) -> Any:
            mark = self.clock.start()
            result = call(*args, **kwargs)
            self.pending.append((stage, self.clock.stop(mark)))
            if stage == PREFILL:
                self.pending.append((FIRST_TOKEN, self.clock.stop(self.begun)))
            return result

        return run

    def take(self) -> dict[str, list[Span]]:
        """The spans of each stage since the last call of `take`."""
        self.clock.wait()
        spans: dict[str, list[Span]] = {}
        for stage, span in self.pending:
            spans.setdefault(stage, []).append(span())
        self.pending.clear()
        return spans


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of median(above) / median(below), over paired rounds."""
    pairs = list(zip(above, below, strict=True))
    numbers = random.Random(0)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = numbers.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn))
    ratios.sort()
    return ratios[round(0.025 * (RESAMPLES - 1))], ratios[round(0.975 * (RESAMPLES - 1))]
