"""The README's table of speed, made from the JSON files in results/.

``.venv/bin/python examples/benchmarks/speed_table.py`` prints it, ``--write`` puts it into README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent.parent / "README.md"
START, END = "<!-- speed: by examples/benchmarks/speed_table.py -->", "<!-- /speed -->"
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
    return [*lines, "", *map(_sentence, results)]


def _sentence(result: dict[str, Any]) -> str:
    shape = result["rows"][0]["shape"]
    (cost,) = (cost for cost in result["costs"] if cost["arm"] == "luvc_fx")
    return (
        f"- {shape['name']}, {shape['input']}: a budget of {cost['budget']:.3f} is {result['ideal']:.2f} "
        f"times fewer FLOPs in the prefill, of which {result['realised']:.0%} became time; `luvc_fx` took "
        f"{cost['luvc_share']:.1%} of the first run, in which everything is compiled."
    )


def _cells(result: dict[str, Any], row: dict[str, Any]) -> list[str]:
    shape, machine, interval = row["shape"], row["hardware"], row["interval"]
    return [
        shape["name"],
        f"{shape['input']}, {result['visual_tokens']:,} + {shape['text']} tokens",
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
    """All results of `luvc-fx bench --json`, by file name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if "rows" in result]


def written() -> list[str]:
    """The table that stands in the README."""
    _, _, rest = README.read_text(encoding="utf-8").partition(START)
    text, _, _ = rest.partition(END)
    return text.strip().splitlines()


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into README.md, between its markers")
    lines = lines_of(read())
    if not parser.parse_args().write:
        print("\n".join(lines))
        return
    before, start, rest = README.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"README.md has no {START} ... {END}")
    README.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
