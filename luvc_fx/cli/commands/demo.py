"""`luvc-fx demo`: one question about one image, without and with a token budget."""

from __future__ import annotations

import contextlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from luvc_fx.apps.demo import DemoResult, ask, run
from luvc_fx.apps.inputs import read_schedule
from luvc_fx.cli import most
from luvc_fx.cli.output import make_console, make_table, note


class Inner(StrEnum):
    """What compiles the graphs after luvc_fx."""

    INDUCTOR = "inductor"
    AOT_EAGER = "aot_eager"
    EAGER = "eager"


def demo(
    image: Annotated[Path | None, typer.Option(help="An image file. Default: the shipped one.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask. Default: the shipped one.")] = None,
    schedule: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="image, video, document or a JSON file.")
    ] = "image",
    inner: Annotated[Inner, typer.Option(help="What compiles the graphs, in both arms.")] = Inner.INDUCTOR,
    runs: Annotated[int, typer.Option(min=1, max=most.RUNS, help="Timed prefills of each arm.")] = 20,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the tokens that are kept, stage by stage, into this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Ask the shipped model about an image: plainly, and with fewer visual tokens.

    Both arms run the same callables, the plain one with an empty schedule. Prefill is the time of
    generate to its first token, vision tower included: median and distance of the quartiles over
    interleaved runs after a warm-up.
    """
    # Nothing but the result may reach stdout, whatever a library prints.
    with contextlib.redirect_stdout(sys.stderr):
        result = run(ask(image, question), read_schedule(schedule), inner.value, runs, note, picture)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        _show(result, make_console())


def _show(result: DemoResult, console: Console) -> None:
    plain = "plain Inductor" if result.inner == "inductor" else f"plain {result.inner}"
    question, baseline, luvc = result.question, result.baseline, result.luvc
    expected = "" if question.expected is None else f" (right answer: {question.expected})"
    console.print(f"{question.source}: {question.text}{expected}")

    arms = make_table("", plain, "luvc_fx")
    arms.add_row("answer", Text(baseline.answer), Text(luvc.answer))
    arms.add_row("prefill, median", *(f"{arm.prefill_ms:.2f} ms" for arm in (baseline, luvc)))
    arms.add_row("  quartile distance", *(f"{arm.prefill_spread_ms:.2f} ms" for arm in (baseline, luvc)))
    arms.add_row("first answer, compilation in it", *(f"{arm.compile_s:.1f} s" for arm in (baseline, luvc)))
    console.print(arms)

    title = "visual tokens entering each decoder layer, and rows in its KV cache"
    headings = ("layer", f"tokens, {plain}", "tokens, luvc_fx", f"KV, {plain}", "KV, luvc_fx")
    layers = make_table(*headings, title=title, right=True)
    rows = zip(
        baseline.tokens_per_layer, luvc.tokens_per_layer, baseline.kv_lengths, luvc.kv_lengths, strict=True
    )
    for number, row in enumerate(rows):
        layers.add_row(str(number), *map(str, row))
    console.print(layers)

    console.print(f"budget: {result.budget:.3f} of {result.visual_tokens} visual tokens, mean over layers")
    if result.prefill_speedup is not None:
        hardware = result.hardware
        where = f"{hardware['device']}, {hardware['dtype']}, {hardware['threads']} threads"
        console.print(f"prefill speed-up: {result.prefill_speedup:.2f}x; {result.runs} runs on {where}")
    for obstacle in result.obstacles:
        console.print(f"no speed-up is given: {obstacle}")
    if result.picture is not None:
        console.print(f"picture of the kept tokens: {result.picture}")
    console.print(f"\nreport\n{result.report}")
