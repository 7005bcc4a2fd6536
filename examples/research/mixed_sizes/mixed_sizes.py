"""100 requests with images of mixed sizes: what graphs cost, what they give, and when they have paid.

Three arms answer the same requests, each in a process of its own with an empty compiler cache:

- ``eager``: the stock model;
- ``luvc_fx``: `luvc_fx.compile`, images as they come, so each new size compiles when it comes;
- ``buckets``: the same with every image resized to one of 8 `luvc_fx.SizeBuckets`, all of them compiled
  by `luvc_fx.warmup` before the first request. Its seconds count from the first.

The model is Qwen2-VL by class, with random weights, 34 million parameters and 2 + 3 layers: large enough
that most of a request is arithmetic, far too small to say anything about a 7B model. There a request
costs hundreds of times as much, and a graph some seven times (compile time grows with the layers, not
with their width), so it would take fewer requests to pay back. A request is resizing, the processor and
`generate`. Nothing here is about answers: those of random weights mean nothing.

With ``--clock cpu`` seconds are those of the processor, of the process and the C++ compilers that it
starts, on one thread. On an idle machine that is the time on the wall; on one that others use too it
says more. The arms then run side by side.

No number is printed when a graph was left alone or ran eagerly.

    python -m examples.research.mixed_sizes.mixed_sizes --quick
    python -m examples.research.mixed_sizes.mixed_sizes --out examples/research/mixed_sizes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch._dynamo.callback import on_compile_end, on_compile_start

import luvc_fx
from examples.research.mixed_sizes.qwen2_vl import WORDS, build_model, build_processor
from examples.research.paths import ROOT
from luvc_fx.apps.environment import hardware, versions
from luvc_fx.cli.output import make_console, make_table
from luvc_fx.generate.chat_prompt import make_prompt

MODULE = "examples.research.mixed_sizes.mixed_sizes"
ARMS = ("eager", "luvc_fx", "buckets")
MAX_PIXELS = 392 * 392
"""Most pixels that the model sees: 196 tokens before anything is merged."""
NARROWEST, WIDEST = 0.4, 2.5
SIDES = (480, 1600)
"""Longer sides of the images, evenly spread as ratios are."""
NEW_TOKENS = 4
SCHEDULE = "image"

SHAPES = ((0.2, 4 / 3), (0.1, 3 / 4), (0.1, 16 / 9), (0.1, 9 / 16), (0.05, 1.0), (0.05, 3 / 2))
"""Shares of what cameras and phones give, by width over height; the rest are crops of any shape."""

CAUSES = (
    ("image_grid_thw", "another image size (vision)"),
    ("encoded[", "another image size (prefill)"),
    ("dropped_rows", "another number of merged rows (decode)"),
    ("past_key_values", "another cache length (decode)"),
    ("input_ids", "another prompt length (prefill)"),
)

KINDS = ("vision", "prefill", "decode")


def requests(count: int, seed: int) -> list[tuple[tuple[int, int], str]]:
    """(height, width) and text of each request."""
    numbers = random.Random(seed)
    found = []
    for _ in range(count):
        crop = _between(numbers, NARROWEST, WIDEST)
        shares = [share for share, _ in SHAPES]
        shapes = [*(shape for _, shape in SHAPES), crop]
        (ratio,) = numbers.choices(shapes, [*shares, 1 - sum(shares)])
        long = round(_between(numbers, *SIDES))
        size = (long, round(long * ratio)) if ratio < 1 else (round(long / ratio), long)
        found.append((size, " ".join(numbers.choices(WORDS[3:], k=numbers.randint(3, 20)))))
    return found


def _between(numbers: random.Random, low: float, high: float) -> float:
    return math.exp(numbers.uniform(math.log(low), math.log(high)))


def cpu_seconds() -> float:
    """Processor time of this process and of those that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


class CompileClock:
    """Seconds in which Dynamo or the compiler behind it was at work."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds, self._since, self._now = 0.0, 0.0, now
        on_compile_start(self._start)
        on_compile_end(self._end)

    def _start(self, _: object) -> None:
        self._since = self._now()

    def _end(self, _: object) -> None:
        self.seconds += self._now() - self._since


def run_arm(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """One arm, in this process."""
    size = {"hidden": 256, "vision_hidden": 128, "decoder_layers": 4} if options.quick else {}
    model = build_model(**size)
    processor = build_processor(max_pixels=MAX_PIXELS)
    now = CLOCKS[options.clock]
    clock = CompileClock(now)
    buckets = None
    warmed: dict[str, Any] | None = None
    if arm != "eager":
        luvc_fx.compile(model, SCHEDULE, inner=options.inner)
    started = now()
    if arm == "buckets":
        unit = luvc_fx.SizeBuckets.granularity_of(model)
        buckets = luvc_fx.SizeBuckets.spread(options.buckets, MAX_PIXELS, unit, NARROWEST, WIDEST)
        warmed = luvc_fx.warmup(model, buckets, processor, new_tokens=NEW_TOKENS).to_dict()
    warm_seconds = now() - started
    pixels = numpy.random.default_rng(options.seed)
    each, grids = [], set()
    for number, ((height, width), text) in enumerate(requests(options.requests, options.seed)):
        image = Image.fromarray(pixels.integers(0, 256, (height, width, 3), dtype=numpy.uint8))
        before = 0 if arm == "eager" else len(luvc_fx.report_of(model).graphs)
        started = now()
        if buckets is not None:
            image = buckets.fit(image)
        inputs = make_prompt(model, processor, [image], text)
        model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        seconds = now() - started
        after = 0 if arm == "eager" else len(luvc_fx.report_of(model).graphs)
        each.append({"seconds": round(seconds, 4), "graphs": after - before})
        grids.add(tuple(inputs["image_grid_thw"][0].tolist()))
        if number % 10 == 9:
            print(f"... {arm}: {number + 1} requests, {after} graphs", file=sys.stderr, flush=True)
    report = None if arm == "eager" else luvc_fx.report_of(model)
    return {
        "arm": arm,
        "warm_seconds": warm_seconds,
        "warm_up": warmed,
        "buckets": None if buckets is None else buckets.sizes,
        "most_graphs": None if buckets is None else buckets.most_graphs(),
        "compile_seconds": clock.seconds,
        "grids": len(grids),
        "requests": each,
        "graphs": Counter() if report is None else Counter(graph.kind for graph in report.graphs),
        "recompiles": Counter() if report is None else causes(report),
        "obstacles": [] if report is None else obstacles(report, len(grids), buckets is not None),
        "hardware": {**hardware(model), "cores": os.cpu_count()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def causes(report: luvc_fx.Report) -> Counter[str]:
    """Why functions were compiled again."""
    found: Counter[str] = Counter()
    for graph in report.graphs:
        if graph.recompile_reason:
            line = graph.recompile_reason.splitlines()[0]
            names = (name for part, name in CAUSES if part in line.partition("#")[0])
            found[next(names, line[:80])] += 1
    return found


def obstacles(report: luvc_fx.Report, grids: int, warmed: bool) -> list[str]:
    """Why numbers would mislead: a graph that was left alone, or that nobody compiled."""
    found = [str(refusal) for refusal in report.refusals]
    for graph in report.graphs:
        found += [f"{graph.kind} graph {graph.compile_id}: {refusal}" for refusal in graph.refusals]
        if graph.kind not in ("vision", "prefill", "decode"):
            found.append(f"a graph {graph.compile_id} of kind {graph.kind}: the capture fell into pieces")
        if graph.kind in ("vision", "prefill") and not graph.inserted:
            found.append(f"{graph.kind} graph {graph.compile_id} was not rewritten")
    vision = len(report.of_kind("vision"))
    if vision < grids or (not warmed and vision > grids):
        found.append(f"{vision} vision graphs for {grids} image sizes: some ran eagerly or compiled twice")
    return found


def summary(arm: dict[str, Any], eager: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one arm."""
    times = [each["seconds"] for each in arm["requests"]]
    steady = [each["seconds"] for each in arm["requests"] if not each["graphs"]]
    base = [each["seconds"] for each in eager["requests"]]
    median = statistics.median(steady) if steady else None
    found = {
        "grids": arm["grids"],
        "graphs": sum(arm["graphs"].values()),
        "graphs_by_kind": dict(arm["graphs"]),
        "recompiles": dict(arm["recompiles"]),
        "compile_seconds": round(arm["compile_seconds"], 1),
        "warm_seconds": round(arm["warm_seconds"], 1),
        "total_seconds": round(arm["warm_seconds"] + sum(times), 1),
        "steady_requests": len(steady),
        "median_seconds": median,
        "worst_seconds": max(times),
        "paid_back_after": None,
        "would_pay_back_after": None,
    }
    if arm is eager or median is None:
        return found
    spent, saved_by = arm["warm_seconds"], 0.0
    behind = []
    for own, other in zip(times, base, strict=True):
        spent, saved_by = spent + own, saved_by + other
        behind.append(spent > saved_by)
    if not behind[-1]:
        found["paid_back_after"] = len(behind) - behind[::-1].index(True) + 1 if True in behind else 1
    # What is behind at the end, at what a request that compiles nothing gains.
    gain = statistics.median(base) - median
    overhead = arm["warm_seconds"] + sum(
        each["seconds"] - median for each in arm["requests"] if each["graphs"]
    )
    if gain > 0:
        found["would_pay_back_after"] = math.ceil(overhead / gain)
    return found


def paid(row: dict[str, Any], count: int) -> str:
    """The last column of the table."""
    if row["paid_back_after"] is not None:
        return f"{row['paid_back_after']} requests"
    needed = row["would_pay_back_after"]
    more = "" if needed is None else f" (about {needed:,} at this rate)"
    return f"never in {count}{more}"


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Heading and cells of the table, a column for each arm."""
    arms = result["summary"]
    count = result["settings"]["requests"]

    def line(name: str, value: Any) -> list[str]:
        return [name, *(value(arms[arm]) for arm in ARMS)]

    why = sorted({cause for arm in ARMS for cause in arms[arm]["recompiles"]})
    return [
        ["", *ARMS],
        line("image sizes that the model sees", lambda a: str(a["grids"])),
        line("graphs compiled", lambda a: str(a["graphs"])),
        *(line(f"  {kind}", lambda a, k=kind: str(a["graphs_by_kind"].get(k, 0))) for kind in KINDS),
        *(line(f"  again: {cause}", lambda a, c=cause: str(a["recompiles"].get(c, 0))) for cause in why),
        line("seconds of compiling", lambda a: f"{a['compile_seconds']:.1f}"),
        line("seconds before the first request", lambda a: f"{a['warm_seconds']:.1f}"),
        line("seconds in all", lambda a: f"{a['total_seconds']:.1f}"),
        line("requests that compiled nothing", lambda a: str(a["steady_requests"])),
        line("  their median, seconds", lambda a: _seconds(a["median_seconds"])),
        line("slowest request, seconds", lambda a: _seconds(a["worst_seconds"])),
        ["paid back after", "-", *(paid(arms[arm], count) for arm in ARMS[1:])],
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def markdown(result: dict[str, Any]) -> str:
    """RESULTS.md."""
    heading, *body = rows(result)
    settings, machine, names = result["settings"], result["hardware"], result["versions"]
    sides = ", ".join(f"{height} x {width}" for height, width in result["buckets"])
    lines = [
        "# Mixed image sizes",
        "",
        "Made by `mixed_sizes.py`, whose first lines say what the arms are and what the numbers do not say.",
        "",
        "| " + " | ".join(heading) + " |",
        "| --- | ---: | ---: | ---: |",
        *("| " + " | ".join(cell.strip() for cell in row) + " |" for row in body),
        "",
        f"{settings['requests']} requests (seed {settings['seed']}), {NEW_TOKENS} new tokens each, at most "
        f"{MAX_PIXELS // 28**2} visual tokens; schedule `{settings['schedule']}`, inner compiler "
        f"`{settings['inner']}`. Buckets, height x width: {sides}.",
        "",
        f"Qwen2-VL by class, random weights, {result['parameters'] / 1e6:.0f} million parameters, "
        f"{machine['dtype']}. {machine['device']}, {machine['threads']} thread of {machine['cores']} cores; "
        + ("seconds of the processor, not of the wall. " if settings["clock"] == "cpu" else "")
        + ", ".join(f"{name} {number}" for name, number in names.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def run_all(together: bool) -> dict[str, Any]:
    """Each arm in a process of its own, with one thread and a compiler cache of its own."""
    arms = {}
    with tempfile.TemporaryDirectory() as caches:
        running: dict[str, subprocess.Popen[str]] = {}
        for arm in ARMS:
            # One thread, and no pool of compilers, whose processor time would not be seen.
            threads = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"} if together else {}
            running[arm] = subprocess.Popen(
                [sys.executable, "-m", MODULE, *sys.argv[1:], "--arm", arm],
                cwd=ROOT,
                env={**os.environ, **threads, "TORCHINDUCTOR_CACHE_DIR": str(Path(caches, arm))},
                stdout=subprocess.PIPE,
                text=True,
            )
            if not together:
                arms[arm] = _answer(running[arm])
        return arms or {arm: _answer(process) for arm, process in running.items()}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"an arm failed with exit code {process.returncode}; its error is above")
    return json.loads(text.splitlines()[-1])


def main() -> int:
    """Run all arms, or with ``--arm`` one of them."""
    parser = argparse.ArgumentParser(description="What mixed image sizes cost, with and without buckets.")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--buckets", type=int, default=8)
    parser.add_argument("--inner", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", default="wall", choices=tuple(CLOCKS))
    parser.add_argument("--quick", action="store_true", help="a smaller model and 12 requests, to try it out")
    parser.add_argument("--out", type=Path, help="folder for results.json and RESULTS.md")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.requests = min(options.requests, 12) if options.quick else options.requests
    if options.arm:
        print(json.dumps(run_arm(options.arm, options)))
        return 0
    arms = run_all(together=options.clock == "cpu")
    found = [f"{arm}: {text}" for arm in ARMS for text in arms[arm]["obstacles"]]
    if found:
        print("no numbers, because they would mislead:", *found, sep="\n  ", file=sys.stderr)
        return 1
    result = {
        "settings": {
            "requests": options.requests,
            "seed": options.seed,
            "inner": options.inner,
            "clock": options.clock,
            "schedule": SCHEDULE,
            "quick": options.quick,
        },
        "hardware": arms["eager"]["hardware"],
        "versions": versions(),
        "parameters": arms["eager"]["parameters"],
        "buckets": arms["buckets"]["buckets"],
        "summary": {arm: summary(arms[arm], arms["eager"]) for arm in ARMS},
        "arms": arms,
    }
    heading, *body = rows(result)
    table = make_table(*heading, title=f"{options.requests} requests of mixed sizes", right=True)
    table.columns[0].justify = "left"
    for row in body:
        table.add_row(*row)
    make_console().print(table)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (options.out / "RESULTS.md").write_text(markdown(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    sys.exit(main())
