"""Stacked bars: what the time of each arm consists of."""

from __future__ import annotations

from pathlib import Path

from luvc_fx.bench.result import Result
from luvc_fx.bench.timing import DECODE, PREFILL, VISION
from luvc_fx.inputs import InputError


def draw(result: Result, path: Path) -> None:
    """Write the picture to `path`, in the format of its ending.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install matplotlib") from None
    arms = list(dict.fromkeys(row.arm for row in result.rows))
    figure = Figure(figsize=(7, 0.6 * len(arms) + 1.5), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(arms)
    tokens = result.rows[0].shape["new_tokens"]
    for stage, times in ((VISION, 1), (PREFILL, 1), (DECODE, tokens)):
        widths = []
        for arm in arms:
            row = result.row(arm, stage)
            widths.append(0.0 if row is None else times * row.median_ms)
        axes.barh(arms, widths, left=left, label=stage if times == 1 else f"{stage} of {times} tokens")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the plot cannot be written to '{path}': {error}") from None
