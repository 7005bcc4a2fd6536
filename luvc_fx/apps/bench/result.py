"""The benchmark's result as data: JSON with documented keys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from luvc_fx.apps.bench.arms import BASELINE


@dataclass(frozen=True, slots=True)
class StageTiming:
    """One stage of one arm.

    Attributes:
        shape: name of the model's sizes, and how much of it ran: layers, input, prompt, batch.
        schedule: of the arm, as JSON; None for the stock model.
        arm: "inductor" is the baseline: the same callables with a schedule that does nothing.
        stage: "vision" (encoder and projector), "prefill", "decode" (one token), "first token" (from the
            call of `generate` to the end of the prefill); and parts that are in those, compiled and timed
            by themselves: "projector", "selector" (what ranks and picks at all sites).
        median_ms, spread_ms: wall time, or time between device events; spread is the distance of the
            quartiles.
        cpu_ms: median of the processor time of this process; 0 on a GPU. Other processes disturb it less.
        speedup: median of the baseline over this median; None for the baseline and where the gate is shut.
        interval: 95 % of that ratio, by bootstrap over rounds.
        cpu_speedup: the same of the processor time.
    """

    shape: dict[str, Any]
    schedule: dict[str, Any] | None
    arm: str
    stage: str
    median_ms: float
    spread_ms: float
    cpu_ms: float
    runs: int
    speedup: float | None
    interval: tuple[float, float] | None
    cpu_speedup: float | None
    hardware: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm takes beside time.

    Attributes:
        budget: mean over decoder layers of the visual tokens entering the layer, over the original.
        flops: by torch's counter on the graphs in eager mode, per kind of graph; None where not counted.
        kv_bytes: of keys and values after the prompt, held by the cache.
        first_s: seconds of the first run, compilation in it; `inductor_s` of them in Inductor, `luvc_s`
            in luvc_fx; `luvc_share` is the last over the first.
        graphs: compiled, and `recompiled` while timing.
        peak_bytes: of device memory during the timed runs; None on a CPU.
        attention: the attention kernels of ATen in vision and prefill; none where Inductor wrote its own.
    """

    arm: str
    tokens_per_layer: list[int]
    budget: float | None
    flops: dict[str, int] | None
    kv_bytes: int
    first_s: float
    inductor_s: float
    luvc_s: float
    luvc_share: float
    graphs: int
    recompiled: int
    peak_bytes: int | None
    attention: list[str]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One run of the benchmark.

    Attributes:
        ideal: FLOPs of the baseline's prefill over those of luvc_fx's.
        realised: the prefill's speed-up over `ideal`, in processor time on a CPU; None with `obstacles`.
        obstacles: why no speed-up is given.
        modes: milliseconds to the baseline's first token by Inductor's mode, or why it failed; empty unless
            the best was asked for.
        load: of the machine, before and after: other processes, mean of one minute.
        left_out: arms that this shape or input has no form of, and why.
    """

    rows: list[StageTiming]
    costs: list[Cost]
    visual_tokens: int
    prompt_rows: int
    ideal: float | None
    realised: float | None
    obstacles: list[str]
    left_out: dict[str, str]
    load: tuple[float, float]
    report: dict[str, Any] = field(default_factory=dict)
    modes: dict[str, float | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1)

    def other_attention(self) -> list[str]:
        """Arms whose attention kernels are not the baseline's."""
        (base,) = (cost.attention for cost in self.costs if cost.arm == BASELINE)
        return [cost.arm for cost in self.costs if cost.attention != base]

    def row(self, arm: str, stage: str) -> StageTiming | None:
        """The row of that arm and stage."""
        return next((row for row in self.rows if (row.arm, row.stage) == (arm, stage)), None)
