"""`luvc-fx bench`: what a schedule gains on a model of real size, compiled against compiled."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from luvc_fx.apps.bench.arms import ALL, BASELINE, FROZEN, QUICK
from luvc_fx.apps.bench.choosing import AUTO
from luvc_fx.apps.bench.plot import check_path, draw
from luvc_fx.apps.bench.result import BenchResult
from luvc_fx.apps.bench.run import Options, run
from luvc_fx.apps.bench.shapes import SHAPES, Visual
from luvc_fx.apps.inputs import read_schedule
from luvc_fx.cli import most
from luvc_fx.cli.output import make_console, make_table, note
from luvc_fx.methods.checks import shown
from luvc_fx.report.errors import InputError


def bench(
    shape: Annotated[str, typer.Option(metavar="NAME", help=", ".join(SHAPES))] = "llava-ov-0.5b",
    schedule: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A preset, a JSON file, or frozen: a fixed one of 30 %.")
    ] = "frozen",
    images: Annotated[int, typer.Option(min=1, max=most.RUNS, help="Images in the prompt.")] = 1,
    frames: Annotated[
        int, typer.Option(min=0, max=most.RUNS, help="Frames of a video in place of images.")
    ] = 0,
    text: Annotated[int, typer.Option(min=1, max=most.TOKENS, help="Text tokens in the prompt.")] = 64,
    batch: Annotated[
        str, typer.Option(metavar="N|auto", help="Rows; auto: the largest power of two that fits a GPU.")
    ] = "1",
    new_tokens: Annotated[
        int, typer.Option(min=1, max=most.TOKENS, help="Tokens decoded after the first.")
    ] = 4,
    rounds: Annotated[int, typer.Option(min=1, max=most.RUNS, help="Timed runs of each arm, in turns.")] = 10,
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=most.ANY, help="Build at most this many layers of encoder and decoder."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=most.THREADS, help="Threads. Default: torch's.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="Inductor's mode, in all arms; best: the one in which the baseline is fastest."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only plain Inductor and luvc_fx, at most 3 rounds.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write stacked bars of the stages to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Time a schedule on a model of real size with random weights.

    The baseline is the same model, compiled by Inductor through the same callables with a schedule
    that does nothing. All arms run in turns. No speed-up is given if a graph ran eagerly, a prune or
    merge of the schedule is in no graph, anything was compiled during the timing, or the logits are wrong.
    """
    parsed = FROZEN if schedule == "frozen" else read_schedule(schedule)
    names = QUICK if quick else ALL
    options = Options(
        shape=shape,
        schedule=parsed,
        visual=Visual(frames, video=True) if frames else Visual(images),
        text=text,
        batch=_rows(batch),
        new_tokens=new_tokens,
        rounds=min(rounds, 3) if quick else rounds,
        layers=layers,
        threads=threads,
        names=names,
        mode=mode,
    )
    if plot is not None:
        check_path(plot)
    # Nothing but the result may reach stdout, whatever a library prints.
    with contextlib.redirect_stdout(sys.stderr):
        result = run(options, note)
        if plot is not None:
            try:
                draw(result, plot)
            except InputError as error:  # the numbers are there
                note(str(error))
    if as_json:
        print(result.to_json())
    else:
        _show(result, make_console())


def _rows(batch: str) -> int | None:
    if batch == AUTO:
        return None
    digits = len(str(most.RUNS))
    if not batch.isdecimal() or len(batch) > digits or not 1 <= int(batch) <= most.RUNS:
        raise InputError(
            f"--batch is {shown(batch)}; allowed: a whole number from 1 to {most.RUNS}, or {AUTO!r}"
        )
    return int(batch)


def _show(result: BenchResult, console: Console) -> None:
    about = result.rows[0]
    given, machine = about.shape, about.hardware
    text = result.prompt_rows - result.visual_tokens
    console.print(
        f"{given['name']}, {given['decoder_layers']} decoder layers, {given['input']}: "
        f"{result.visual_tokens:,} visual and {text:,} text tokens, batch {given['batch']}"
    )
    console.print(f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads")
    times = make_table("arm", "stage", "median", "spread", "processor", "speed-up", "95 %", right=True)
    for row in result.rows:
        times.add_row(
            row.arm,
            row.stage,
            f"{row.median_ms:,.1f} ms",
            f"{row.spread_ms:,.1f} ms",
            f"{row.cpu_ms:,.1f} ms" if row.cpu_ms else "-",
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
            "-" if row.interval is None else f"{row.interval[0]:.2f} - {row.interval[1]:.2f}",
        )
    console.print(times)
    columns = ["arm", "budget", "prefill FLOPs", "KV bytes", "first run", "luvc_fx in it", "graphs", "peak"]
    costs = make_table(*columns, right=True)
    for cost in result.costs:
        flops = (cost.flops or {}).get("prefill")
        costs.add_row(
            cost.arm,
            "-" if cost.budget is None else f"{cost.budget:.3f}",
            "-" if flops is None else f"{flops / 1e9:,.0f} G",
            f"{cost.kv_bytes:,}",
            f"{cost.first_s:.1f} s",
            f"{cost.luvc_share:.1%}",
            str(cost.graphs),
            "-" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**30:.1f} GiB",
        )
    console.print(costs)
    for mode, taken in result.modes.items():
        console.print(
            f"mode {mode}: {taken if isinstance(taken, str) else f'first token in {taken:,.1f} ms'}"
        )
    kernels = {cost.arm: ", ".join(cost.attention) or "written by Inductor" for cost in result.costs}
    if result.other_attention():
        console.print("attention kernels differ: " + "; ".join(f"{arm}: {k}" for arm, k in kernels.items()))
    else:
        console.print(f"attention in all arms: {kernels[BASELINE]}")
    for name, why in result.left_out.items():
        console.print(f"{name} was left out: {why}")
    if result.realised is not None and result.ideal is not None:
        console.print(f"prefill: {result.ideal:.2f}x fewer FLOPs, of which {result.realised:.0%} became time")
    for obstacle in result.obstacles:
        console.print(f"no speed-up is given: {obstacle}")
