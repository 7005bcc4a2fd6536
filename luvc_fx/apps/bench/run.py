"""Run the benchmark: build the model, compile and check every arm, time the arms in turns."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from luvc_fx import _compat
from luvc_fx.apps.bench import alone, arms, choosing, gate
from luvc_fx.apps.bench.arms import BASELINE, LUVC, Arm
from luvc_fx.apps.bench.result import BenchResult, Cost, StageTiming
from luvc_fx.apps.bench.running import Compiled, Reference, Stock
from luvc_fx.apps.bench.shapes import SHAPES, Shape, Visual, smaller
from luvc_fx.apps.bench.timing import PREFILL, PROJECTOR, SELECTOR, STAGES, Span, ratio_interval, spread
from luvc_fx.apps.environment import hardware, versions
from luvc_fx.generate.families import placeholders
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Schedule

ONE_IMAGE = Visual()

WARM_UP = 1
"""Rounds that are not counted, after the first run of each arm has compiled everything."""

Runner = Compiled | Stock


@dataclass(frozen=True, slots=True)
class Options:
    """What to run.

    Args:
        shape: a name in `SHAPES`.
        visual: images or frames; None: one image.
        text: text tokens in the prompt.
        batch: rows; None: a power of two, the largest that fits into a GPU's memory.
        new_tokens: decoded after the first.
        rounds: timed runs of each arm, in turns.
        layers: at most so many layers of the encoder and of the decoder; None: all.
        names: of the arms; the baseline and luvc_fx are always among them.
        mode: of Inductor, in all arms; "best": that in which the baseline is fastest.
        device: None: a GPU where there is one.
    """

    shape: str
    schedule: Schedule = arms.FROZEN
    visual: Visual = ONE_IMAGE
    text: int = 64
    batch: int | None = 1
    new_tokens: int = 4
    rounds: int = 10
    layers: int | None = None
    threads: int | None = None
    names: tuple[str, ...] = arms.QUICK
    mode: str | None = None
    device: str | None = None


def run(options: Options, say: Callable[[str], None] = lambda _: None) -> BenchResult:
    """The benchmark. On a CPU it is float32, on a GPU bfloat16.

    Raises:
        InputError: a shape that does not exist or does not fit, or a schedule that it cannot follow.
    """
    shape = _shape(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _refuse_too_large(shape, options, device)
    load = os.getloadavg()[0]
    say(f"building {shape.name} with random weights")
    torch.manual_seed(0)
    model = shape.build(options.layers, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    options = _with_batch(model, shape, options, say)
    inputs = shape.inputs(model, options.visual, options.text, options.batch or 1)
    visual = int(placeholders(model, inputs["input_ids"])[0].sum())

    say("running the graphs of luvc_fx without a compiler: logits and FLOPs")
    luvc = Arm(LUVC, options.schedule)
    try:
        references = {LUVC: Reference(model, luvc, inputs)}
    except ValueError as error:
        raise InputError(f"the schedule does not fit the model: {error}") from None
    budget = references[LUVC].report.budget(visual)
    say(f"the same of the baseline; the budget is {budget:.3f}")
    references[BASELINE] = Reference(model, Arm(BASELINE, Schedule()), inputs)
    modes: dict[str, float | str] = {}
    if options.mode == choosing.BEST:
        mode, modes = choosing.best_mode(model, inputs, options.new_tokens + 1, say)
        options = dataclasses.replace(options, mode=mode)

    left_out: dict[str, str] = {}
    runners = []
    layers = model.config.get_text_config().num_hidden_layers
    known = arms.arms_of(options.schedule, budget, layers)
    if arms.FASTV in options.names and arms.FASTV not in {arm.name for arm in known}:
        left_out[arms.FASTV] = f"all tokens in its first {arms.FASTV_LAYER} layers are more than the budget"
    for arm in known:
        if arm.name not in {BASELINE, LUVC, *options.names}:
            continue
        given = inputs
        if arm.smaller:
            less = smaller(shape, options.visual, budget)
            if less is None:
                left_out[arm.name] = "this model takes an image in one size only"
                continue
            given = shape.inputs(model, less, options.text, options.batch or 1)
        runners.append(_first_run(model, arm, given, options, say))
    obstacles = _checked(runners, references, options, visual)
    timings = _timed(runners, options, say)
    result = _result(options, model, runners, references, timings, obstacles, left_out, load, visual, inputs)
    return dataclasses.replace(result, modes=modes)


def _with_batch(model: Any, shape: Shape, options: Options, say: Callable[[str], None]) -> Options:
    """The options with the largest batch that fits, if that was asked for."""
    if options.batch is not None:
        return options
    say("looking for the largest batch")

    def inputs(rows: int) -> dict[str, Any]:
        return shape.inputs(model, options.visual, options.text, rows)

    mode = None if options.mode == choosing.BEST else options.mode
    rows = choosing.largest_batch(choosing.fits(model, inputs, options.new_tokens + 1, mode))
    return dataclasses.replace(options, batch=rows)


def _shape(options: Options) -> Shape:
    if options.shape not in SHAPES:
        raise InputError(f"there is no shape {options.shape!r}; there are {', '.join(SHAPES)}")
    return SHAPES[options.shape]


def _refuse_too_large(shape: Shape, options: Options, device: torch.device) -> None:
    if device.type != "cuda" and options.batch is None:
        raise InputError("--batch auto needs a GPU: elsewhere the system ends what takes too much memory")
    if device.type == "cpu" and shape.parameters > 3 and options.layers is None:
        raise InputError(
            f"{shape.name} has {shape.parameters:g} billion parameters: it needs a GPU, or --layers"
        )


def _first_run(
    model: Any, arm: Arm, inputs: dict[str, Any], options: Options, say: Callable[[str], None]
) -> Runner:
    say(f"compiling: {arm.name}" if arm.schedule is not None else "running the stock model")
    if arm.schedule is None:
        runner: Runner = Stock(model, arm, inputs)
    else:
        runner = Compiled(model, arm, inputs, options.mode)
    started = time.perf_counter()
    runner.generate(options.new_tokens + 1)
    runner.stages.take()
    runner.first_s = time.perf_counter() - started
    return runner


@dataclass(slots=True)
class Timings:
    """What was measured in the timed rounds, by the name of the arm.

    Attributes:
        spans: by stage, one a round.
        graphs: compiled before and after the timed rounds.
        calls: of compiled graphs in the timed rounds, by the kind of graph.
        peak: bytes of device memory; None on a CPU.
    """

    spans: dict[str, dict[str, list[Span]]]
    graphs: dict[str, tuple[int, int]]
    calls: dict[str, dict[str, int]]
    peak: dict[str, int | None]


def _timed(runners: list[Runner], options: Options, say: Callable[[str], None]) -> Timings:
    timings = Timings({}, {}, {}, {})
    for runner in runners:
        timings.spans[runner.arm.name] = {}
        timings.peak[runner.arm.name] = None
    gc.collect()
    say(f"timing {options.rounds} rounds of {len(runners)} arms")
    for number in range(-WARM_UP, options.rounds):
        if number == 0:
            for runner in runners:
                timings.graphs[runner.arm.name] = (len(runner.report.graphs), 0)
                runner.calls.clear()
        for runner in runners if number % 2 else reversed(runners):
            _reset_peak(runner)
            runner.generate(options.new_tokens + 1)
            spans = runner.stages.take()
            if number < 0:
                continue
            timings.peak[runner.arm.name] = _peak(runner, timings.peak[runner.arm.name])
            for stage, values in spans.items():
                # One number a round: all calls of the encoder together, the mean of the decode steps.
                share = len(values) if stage == "decode" else 1
                one = Span(sum(v.wall for v in values) / share, sum(v.cpu for v in values) / share)
                timings.spans[runner.arm.name].setdefault(stage, []).append(one)
    for runner in runners:
        before, _ = timings.graphs[runner.arm.name]
        timings.graphs[runner.arm.name] = (before, len(runner.report.graphs))
        timings.calls[runner.arm.name] = dict(runner.calls)
    return timings


def _reset_peak(runner: Runner) -> None:
    if runner.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(runner: Runner, before: int | None) -> int | None:
    if runner.model.device.type != "cuda":
        return None
    return max(before or 0, torch.cuda.max_memory_allocated())


def _checked(
    runners: list[Runner], references: dict[str, Reference], options: Options, visual: int
) -> list[str]:
    """Run each arm once, before anything is timed; returns what the gate objects to."""
    obstacles = []
    for runner in runners:
        name, schedule = runner.arm.name, runner.arm.schedule
        output = runner.watched()
        runner.stages.take()
        if schedule is None:
            continue
        obstacles += gate.refusals(name, runner.report)
        obstacles += gate.unmatched(name, runner.report, schedule)
        if name in references:
            obstacles += gate.wrong_logits(name, output.logits[0], references[name].logits)
        if not runner.arm.smaller:
            planned = runner.report.tokens_per_layer()
            held = [layer.keys.shape[-2] for layer in _compat.cache_of(output).layers]
            obstacles += gate.wrong_lengths(name, planned, held, runner.inputs["input_ids"].shape[1] - visual)
    return obstacles


def _result(
    options: Options,
    model: Any,
    runners: list[Runner],
    references: dict[str, Reference],
    timings: Timings,
    obstacles: list[str],
    left_out: dict[str, str],
    load: float,
    visual: int,
    inputs: dict[str, Any],
) -> BenchResult:
    for runner in runners:
        name = runner.arm.name
        if runner.arm.schedule is not None:
            obstacles += gate.eager_stages(name, timings.calls[name], options.rounds)
            obstacles += gate.recompiled(name, *timings.graphs[name])
    about = {
        "hardware": hardware(model),
        "versions": versions(),
        "shape": {
            "name": options.shape,
            "input": str(options.visual),
            "text": options.text,
            "batch": options.batch,
            "new_tokens": options.new_tokens,
            "mode": options.mode or "default",
            "encoder_layers": options.layers,
            "decoder_layers": model.config.get_text_config().num_hidden_layers,
        },
    }
    rows = []
    for runner in runners:
        for stage in STAGES:
            spans = timings.spans[runner.arm.name].get(stage)
            if spans:
                base = timings.spans[BASELINE].get(stage) if runner.arm.name != BASELINE else None
                rows.append(_row(runner.arm, stage, spans, None if obstacles else base, about))
    luvc = next(runner for runner in runners if runner.arm.name == LUVC)
    rows += _parts(runners, options, obstacles, about)
    flops = [references[name].flops.get(PREFILL, 0) for name in (BASELINE, LUVC)]
    ideal = flops[0] / flops[1] if all(flops) else None
    prefill = next((row for row in rows if (row.arm, row.stage) == (LUVC, PREFILL)), None)
    speedup = None
    if prefill is not None:
        speedup = prefill.cpu_speedup if model.device.type == "cpu" else prefill.speedup
    return BenchResult(
        rows=rows,
        costs=[_cost(runner, references, timings, visual) for runner in runners],
        visual_tokens=visual,
        prompt_rows=inputs["input_ids"].shape[1],
        ideal=ideal,
        realised=None if speedup is None or ideal is None else speedup / ideal,
        obstacles=obstacles,
        left_out=left_out,
        load=(load, os.getloadavg()[0]),
        report=luvc.report.to_dict(),
    )


def _row(
    arm: Arm, stage: str, spans: list[Span], base: list[Span] | None, about: dict[str, Any]
) -> StageTiming:
    wall, cpu = [s.wall for s in spans], [s.cpu for s in spans]
    median, processor = statistics.median(wall), statistics.median(cpu)
    speedup = interval = cpu_speedup = None
    if base is not None:
        speedup = statistics.median(s.wall for s in base) / median
        interval = ratio_interval([s.wall for s in base], wall)
        cpu_speedup = statistics.median(s.cpu for s in base) / processor if processor else None
    return StageTiming(
        schedule=None if arm.schedule is None else json.loads(arm.schedule.to_json()),
        arm=arm.name,
        stage=stage,
        median_ms=median,
        spread_ms=spread(wall),
        cpu_ms=processor,
        runs=len(spans),
        speedup=speedup,
        interval=interval,
        cpu_speedup=cpu_speedup,
        **about,
    )


def _cost(runner: Runner, references: dict[str, Reference], timings: Timings, visual: int) -> Cost:
    name, report = runner.arm.name, runner.report
    tokens = report.tokens_per_layer()
    luvc = sum(sum(graph.milliseconds.values()) for graph in report.graphs) / 1e3
    before, after = timings.graphs[name]
    kv = [sum(graph.kv_bytes_after) for graph in report.graphs if graph.kind == PREFILL]
    return Cost(
        arm=name,
        tokens_per_layer=tokens,
        budget=report.budget(visual) if tokens else None,
        flops=references[name].flops if name in references else None,
        kv_bytes=kv[-1] if kv else 0,
        first_s=runner.first_s,
        inductor_s=runner.compile_s,
        luvc_s=luvc,
        luvc_share=luvc / runner.first_s,
        graphs=after,
        recompiled=after - before,
        peak_bytes=timings.peak[name],
        attention=runner.attention,
    )


def _parts(
    runners: list[Runner], options: Options, obstacles: list[str], about: dict[str, Any]
) -> list[StageTiming]:
    """The projector and the selectors of each compiled arm, each compiled by itself."""
    compiled = [runner for runner in runners if isinstance(runner, Compiled)]
    parts: dict[tuple[str, str], alone.Part] = {}
    for runner in compiled:
        name, schedule, model = runner.arm.name, runner.arm.schedule, runner.model
        assert schedule is not None
        parts[name, PROJECTOR] = alone.projector(model, runner.projected, options.mode)
        parts[name, SELECTOR] = alone.selectors(
            model, schedule, runner.report, options.batch or 1, options.mode
        )
    spans = alone.timed(parts, compiled[0].model.device, max(3, options.rounds))
    base = spans.get((BASELINE, PROJECTOR))
    rows = []
    for stage in (PROJECTOR, SELECTOR):
        for runner in compiled:
            measured = spans.get((runner.arm.name, stage))
            if measured:
                compared = stage == PROJECTOR and runner.arm.name != BASELINE and not obstacles
                rows.append(_row(runner.arm, stage, measured, base if compared else None, about))
    return rows
