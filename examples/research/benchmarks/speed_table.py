"""The table of speed, made from the JSON files in results/. README.md there documents their keys.

Rows of `campaign.py` that have no result say "not measured".
``python -m examples.research.benchmarks.speed_table`` prints it; docs/generated.py has ``--write`` and
``--check``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from docs import generated
from examples.research.benchmarks.campaign import GPU, RESULTS, ROWS, Row

COLUMNS = (
    "shape",
    "input",
    "arm",
    "stage",
    "median",
    "spread",
    "speed-up",
    "95 %",
    "in processor time",
    "device",
)


def lines_of(results: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown: each stage of each arm, and what the FLOPs alone would give."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 4 + " ---: |" * 5 + " --- |"]
    for result in results:
        for row in result["rows"]:
            lines.append("| " + " | ".join(_cells(result, row)) + " |")
    measured = {result.get("row") for result in results}
    for row in ROWS:
        if row.shape is not None and row.name not in measured:
            lines.append("| " + " | ".join(_missing(row)) + " |")
    return [*lines, "", *map(_sentence, results)]


def _missing(row: Row) -> list[str]:
    given = f"{row.frames} frames" if row.frames else "1 image"
    if "text" in row.options:
        given += f", {row.options['text']} text tokens"
    if "batch" in row.options:
        given += ", the largest batch"
    if "mode" in row.options:
        given += f", {row.options['mode']}"
    return [str(row.shape), given, "luvc_fx", "all", "not measured", *["-"] * 4, "a GPU, bfloat16"]


def _apart(result: dict[str, Any]) -> list[str]:
    """What tells a result from others of its shape and input: batch, mode, and the row of the campaign."""
    shape, row = result["rows"][0]["shape"], result.get("row")
    found = [f"batch {shape['batch']}"] if shape["batch"] > 1 else []
    if shape.get("mode", "default") != "default":
        found.append(shape["mode"])
    return [*found, *([] if row is None else [f"row {row}"])]


def _sentence(result: dict[str, Any]) -> str:
    shape = result["rows"][0]["shape"]
    (cost,) = (cost for cost in result["costs"] if cost["arm"] == "luvc_fx")
    what = f"- {', '.join([shape['name'], shape['input'], *_apart(result)])}:"
    if result["obstacles"]:
        return f"{what} no speed-up is given: {'; '.join(result['obstacles'])}"
    return (
        f"{what} a budget of {cost['budget']:.3f} is {result['ideal']:.2f} "
        f"times fewer FLOPs in the prefill, of which {result['realised']:.0%} became time; `luvc_fx` took "
        f"{cost['luvc_share']:.1%} of the first run, in which everything is compiled."
    )


def _cells(result: dict[str, Any], row: dict[str, Any]) -> list[str]:
    shape, machine, interval = row["shape"], row["hardware"], row["interval"]
    given = f"{shape['input']}, {result['visual_tokens']:,} + {shape['text']} tokens"
    return [
        shape["name"],
        ", ".join([given, *_apart(result)]),
        row["arm"],
        row["stage"],
        f"{row['median_ms']:,.0f} ms",
        f"{row['spread_ms']:,.0f} ms",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        "-" if interval is None else f"{interval[0]:.2f} - {interval[1]:.2f}",
        "-" if row["cpu_speedup"] is None else f"{row['cpu_speedup']:.2f}x",
        f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads",
    ]


def read() -> list[dict[str, Any]]:
    """All results of `luvc-fx bench --json`, by file name, those of a GPU behind the others."""
    paths = sorted(RESULTS.glob("*.json"), key=lambda path: (path.name.startswith(GPU), path.name))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [result for result in found if "rows" in result]


def summary(results: list[dict[str, Any]]) -> str:
    """Two lines: what the first result is, and how much faster each stage became."""
    result = results[0]
    machine = result["rows"][0]["hardware"]
    ours = {row["stage"]: row for row in result["rows"] if row["arm"] == "luvc_fx"}
    plain = {row["stage"]: row for row in result["rows"] if row["arm"] == "inductor"}
    (cost,) = (cost for cost in result["costs"] if cost["arm"] == "luvc_fx")
    told = [
        f"{stage} {ours[stage]['speedup']:.2f}x ({plain[stage]['median_ms'] / 1e3:.2f} s to "
        f"{ours[stage]['median_ms'] / 1e3:.2f} s)"
        for stage in ("prefill", "first token", "decode")
    ]
    rows = sum(row.shape is not None for row in ROWS)
    measured = sum(result.get("row") is not None for result in results)
    return (
        f"Against plain Inductor on one CPU thread ({machine['device']}, {machine['dtype']}), "
        f"{result['rows'][0]['shape']['name']} with one image at a budget of {cost['budget']:.1%}: "
        f"{', '.join(told)}.\n"
        f"On a GPU {measured or 'none'} of the {rows} planned rows are measured so far."
    )


def mask_table(found: dict[str, Any]) -> list[str]:
    """What attention takes with a mask and without, from results/mask.json."""
    lines = [
        "| rows | prompt with a mask | without | decode step with a mask | without |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, took in found["layer"].items():
        cells = [took[f"{stage}_ms"] for stage in ("prefill_masked", "prefill_causal")]
        steps = [took[f"{stage}_ms"] for stage in ("step_masked", "step_plain")]
        shown = [*(f"{cell:.1f} ms" for cell in cells), *(f"{step:.3f} ms" for step in steps)]
        lines.append(f"| {int(length):,} | " + " | ".join(shown) + " |")
    made = found["mask"]
    rows = min(map(int, found["layer"]))
    return [
        *lines,
        "",
        f"Under padding, the mask of {rows} rows is made in {made['made_anew_ms']:.2f} ms; cutting it out "
        f"of the long one took {made['two_gathers_ms']:.2f}.",
    ]


def pages() -> generated.Pages:
    """The tables of the documentation."""
    results = read()
    mask = json.loads((RESULTS / "mask.json").read_text(encoding="utf-8"))
    return {
        "speed": "\n".join(lines_of(results)),
        "speed_summary": summary(results),
        "mask": "\n".join(mask_table(mask)),
    }


if __name__ == "__main__":
    sys.exit(generated.run(pages, generated.parser(__doc__).parse_args()))
