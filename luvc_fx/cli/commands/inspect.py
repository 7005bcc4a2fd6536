"""`luvc-fx inspect`: what luvc_fx recognises in a model, and what a schedule would do to it."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from luvc_fx.apps.inputs import read_schedule
from luvc_fx.apps.inspection import DEFAULT_PROMPT, Inspection
from luvc_fx.apps.inspection import inspect as run
from luvc_fx.cli.output import make_console, make_table, note
from luvc_fx.report import GraphReport, Refusal

COLUMNS = 5
"""Graphs that the table has room for."""

KINDS = {
    "whole": "whole (encoder, fusion, decoder)",
    "vision": "vision (encoder)",
    "prefill": "prefill (fusion, decoder)",
}


def inspect(
    model_dir: Annotated[Path, typer.Argument(help="A directory that from_pretrained can load.")],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image file; may be given several times. Default: a synthetic image."),
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="image, video, document or a JSON file.")
    ] = "image",
    prompt: Annotated[str, typer.Option(help="The text behind the images.")] = DEFAULT_PROMPT,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Show what is recognised in a local model, and what a schedule does to it.

    The model runs once, on the CPU and without a compiler; all numbers follow from shapes. Nothing
    is timed or downloaded, and no code in the directory is run.
    """
    # Nothing but the result may reach stdout, whatever a library prints.
    with contextlib.redirect_stdout(sys.stderr):
        inspection = run(model_dir, read_schedule(schedule), image or (), prompt, note)
    if as_json:
        print(json.dumps(inspection.to_dict()))
    else:
        _show(inspection, schedule, make_console())


def _show(inspection: Inspection, schedule: str, console: Console) -> None:
    height, width = inspection.image_size
    images = ", ".join(inspection.images)
    if inspection.synthetic:
        images += f", {height} x {width} (no --image was given)"
    console.print(f"{inspection.model} in {inspection.directory}, {inspection.hardware['dtype']}")
    console.print(f"image:    {images}")
    console.print(f"prompt:   {inspection.prompt_rows} tokens, {inspection.visual_tokens} of them visual")
    console.print(f"schedule: {schedule}")
    _show_anatomy(inspection.report.graphs, console)
    _show_plan(inspection, console)
    _show_layers(inspection, console)
    _show_costs(inspection, console)
    _show_refusals(inspection, console)


def _show_anatomy(graphs: list[GraphReport], console: Console) -> None:
    console.print()
    if not graphs:
        console.print("no graph was captured: Dynamo ran this model eagerly")
        return
    recognised = [(number, graph) for number, graph in enumerate(graphs) if graph.kind != "other"]
    shown = recognised[:COLUMNS]
    if shown:
        table = make_table(
            "what was recognised", *(f"graph {number}" for number, _ in shown), title="anatomy"
        )
        for name, value in _ANATOMY:
            cells = [value(graph) for _, graph in shown]
            if any(cells):
                table.add_row(name, *(cell or "-" for cell in cells))
        console.print(table)
    if len(shown) < len(recognised):
        console.print(f"{len(recognised) - len(shown)} more graphs are in --json")
    if len(recognised) < len(graphs):
        console.print(f"{len(graphs) - len(recognised)} graphs without image or attention are not shown")


def _show_plan(inspection: Inspection, console: Console) -> None:
    console.print()
    if not inspection.plan:
        nothing = not inspection.schedule.merge and not inspection.schedule.prune
        why = "the schedule asks for nothing" if nothing else "see what was refused"
        console.print(f"plan: nothing is inserted; {why}")
        return
    table = make_table("graph", "where", "what", "tokens", title="plan")
    for line in inspection.plan:
        tokens = (
            "-"
            if line.before is None
            else f"{line.before:,} -> {line.after:,} {line.of.removesuffix(' tokens')}"
        )
        table.add_row(str(line.graph), line.where, line.what, tokens)
    console.print(table)


def _show_layers(inspection: Inspection, console: Console) -> None:
    tokens = inspection.tokens_per_layer
    if not tokens or inspection.budget is None:
        console.print("\nno decoder behind a fusion was recognised: tokens per layer are not known")
        return
    console.print()
    graph = next(graph for graph in reversed(inspection.report.graphs) if graph.tokens_per_layer)
    before, after = graph.kv_bytes_before, graph.kv_bytes_after
    bytes_known = len(before) == len(after) == len(tokens)
    headings = ["layers", "visual tokens", "of the prompt's"]
    headings += ["KV as captured", "KV with luvc_fx"] if bytes_known else []
    table = make_table(*headings, title="entering each decoder layer", right=True)
    rows = zip(tokens, before, after, strict=True) if bytes_known else ((n,) for n in tokens)
    first = 0
    for (count, *kv), same in itertools.groupby(rows):
        last = first + len(list(same)) - 1
        layers = str(first) if first == last else f"{first} - {last}"
        share = f"{count / inspection.visual_tokens:.1%}"
        table.add_row(layers, f"{count:,}", share, *(_bytes(size) for size in kv))
        first = last + 1
    console.print(table)
    console.print(
        f"budget: {inspection.budget:.3f} of {inspection.visual_tokens:,} visual tokens, "
        f"mean over {len(tokens)} layers"
    )


def _show_costs(inspection: Inspection, console: Console) -> None:
    graphs = [(number, graph) for number, graph in enumerate(inspection.report.graphs) if graph.flops_before]
    if not graphs:
        return
    console.print()
    table = make_table("graph", "cost", "as captured", "with luvc_fx", "left", title="cost", right=True)
    for number, graph in graphs[:COLUMNS]:
        kv = sum(graph.kv_bytes_before), sum(graph.kv_bytes_after)
        name = f"{number}, {graph.kind}"
        for what, (before, after), show in (
            ("FLOPs", (graph.flops_before, graph.flops_after), _flops),
            ("keys and values", kv, _bytes),
        ):
            if before:
                table.add_row(name, what, show(before), show(after), f"{after / before:.0%}")
                name = ""
    console.print(table)
    captured = [graph.original for _, graph in graphs if graph.original is not None]
    if captured and max(captured) < inspection.visual_tokens:
        console.print(
            f'"as captured": the prompt of the prefill is merged already, {max(captured):,} visual tokens '
            f"and not {inspection.visual_tokens:,}"
        )


def _show_refusals(inspection: Inspection, console: Console) -> None:
    refused = [("call", refusal) for refusal in inspection.report.refusals]
    for number, graph in enumerate(inspection.report.graphs):
        refused += [(str(number), refusal) for refusal in graph.refusals]
    console.print()
    if refused:
        table = make_table("graph", "reason", "what and why", "graph node", title="refused")
        for place, refusal in refused:
            table.add_row(place, *_refusal(refusal))
        console.print(table)
    else:
        console.print("refused: nothing")
    for number, graph in enumerate(inspection.report.graphs):
        for text in graph.notes:
            console.print(f"note, graph {number}: {text}")


def _refusal(refusal: Refusal) -> tuple[str, str, str]:
    return refusal.reason.value, refusal.text, refusal.node or "-"


def _grid(grid: tuple[int, int] | None) -> str:
    return "" if grid is None else f"{grid[0]} x {grid[1]}"


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


_ANATOMY: tuple[tuple[str, Callable[[GraphReport], str]], ...] = (
    ("kind", lambda graph: KINDS.get(graph.kind, graph.kind)),
    ("nodes", lambda graph: f"{graph.nodes_before:,} -> {graph.nodes_after:,}"),
    ("images or tiles", lambda graph: _number(graph.images)),
    ("encoder blocks", lambda graph: _number(graph.encoder_blocks or None)),
    ("rows before the grid (CLS)", lambda graph: _number(graph.lead)),
    ("patch grid, height x width", lambda graph: _grid(graph.grid) if graph.encoder_blocks else ""),
    ("  merged", lambda graph: _grid(graph.merged_grid)),
    ("fusion", lambda graph: "found" if graph.original is not None else ""),
    ("batch (rows of the prompt)", lambda graph: _number(graph.batch)),
    ("visual tokens a row, as captured", lambda graph: _number(graph.original)),
    ("  merged", lambda graph: "" if graph.fused == graph.original else _number(graph.fused)),
    ("their grid, one image", lambda graph: "" if graph.encoder_blocks else _grid(graph.grid)),
    ("decoder layers", lambda graph: _number(graph.decoder_layers or None)),
)


def _flops(count: int) -> str:
    return _scaled(count, 1000, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"))


def _bytes(count: int) -> str:
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(count: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units:
        if count < step or unit == units[-1]:
            return f"{count:,.0f} {unit}" if unit == units[0] else f"{count:,.4g} {unit}"
        count /= step
    raise ValueError("no units")
