"""Stacked bars: what the time of each arm consists of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from luvc_fx.apps.bench.result import BenchResult
from luvc_fx.apps.bench.timing import DECODE, PREFILL, PROJECTOR, VISION
from luvc_fx.report.errors import InputError


def check_path(path: Path) -> None:
    """Look, before the benchmark runs, whether a plot can be written to `path`.

    Raises:
        InputError: matplotlib is not installed, or knows no such ending, or the folder is not there.
    """
    endings = _figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in endings:
        raise InputError(f"--plot is '{path}'; allowed: an ending of {', '.join(sorted(endings))}")
    if not os.path.isdir(path.parent) or os.path.isdir(path):
        raise InputError(f"--plot is '{path}'; allowed: a file in a folder that exists")


def _figure(**options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install matplotlib") from None
    return Figure(**options)


def draw(result: BenchResult, path: Path) -> None:
    """Write the picture to `path`, in the format of its ending.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    arms = list(dict.fromkeys(row.arm for row in result.rows))
    bars = [parts(result, arm) for arm in arms]
    figure = _figure(figsize=(7, 0.6 * len(arms) + 1.5), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(arms)
    for label in bars[0]:
        widths = [bar[label] for bar in bars]
        axes.barh(arms, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the plot cannot be written to '{path}': {error}") from None


def parts(result: BenchResult, arm: str) -> dict[str, float]:
    """Milliseconds of each bar of an arm, by its label.

    The projector is a part of the vision stage; where it was not timed by itself, it stays in that bar.
    """

    def median(stage: str) -> float:
        row = result.row(arm, stage)
        return 0.0 if row is None else row.median_ms

    tokens = result.rows[0].shape["new_tokens"]
    vision = median(VISION)
    projector = min(vision, median(PROJECTOR))
    return {
        "vision, but the projector": vision - projector,
        "projector": projector,
        "prefill": median(PREFILL),
        f"decode of {tokens} tokens": tokens * median(DECODE),
    }
