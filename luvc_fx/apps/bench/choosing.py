"""Choose by trying: the mode in which the baseline is fastest, and the largest batch that fits."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from luvc_fx.apps.bench.arms import BASELINE, EAGER, Arm
from luvc_fx.apps.bench.running import Compiled, Stock
from luvc_fx.apps.bench.timing import FIRST_TOKEN
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Schedule

BEST, AUTO = "best", "auto"
"""Values of `--mode` and `--batch` that leave the choice to the benchmark."""

MODES_ON_CPU: tuple[str | None, ...] = (None, "max-autotune")
MODES = (None, "reduce-overhead", "max-autotune")

_TRIES = 3
_MOST_ROWS = 1024


def best_mode(
    model: Any, inputs: Mapping[str, Tensor], tokens: int, say: Callable[[str], None]
) -> tuple[str | None, dict[str, float | str]]:
    """The mode of Inductor in which the baseline's first token comes soonest, and the time of each mode.

    Returns:
        The mode, and milliseconds by its name; for one that failed, why.
    """
    by_mode: dict[str, float | str] = {}
    for mode in MODES_ON_CPU if model.device.type == "cpu" else MODES:
        say(f"the baseline in mode {mode or 'default'}")
        try:
            by_mode[mode or "default"] = _first_token(model, inputs, tokens, mode)
        except Exception as error:  # a mode that cannot run this model is not its best
            by_mode[mode or "default"] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.compiler.reset()
        gc.collect()
    milliseconds = {mode: value for mode, value in by_mode.items() if not isinstance(value, str)}
    if not milliseconds:
        raise InputError(f"the baseline runs in no mode: {by_mode}")
    best = min(milliseconds, key=milliseconds.__getitem__)
    return (None if best == "default" else best), by_mode


def _first_token(model: Any, inputs: Mapping[str, Tensor], tokens: int, mode: str | None) -> float:
    runner = Compiled(model, Arm(BASELINE, Schedule()), inputs, mode)
    spans = []
    for number in range(-2, _TRIES):
        runner.generate(tokens)
        taken = runner.stages.take()[FIRST_TOKEN]
        if number >= 0:
            spans.append(taken[0].wall)
    return statistics.median(spans)


def largest_batch(fits: Callable[[int], bool]) -> int:
    """The largest power of two for which `fits`, from 1 up.

    Raises:
        InputError: not even one row fits.
    """
    rows = 1
    if not fits(rows):
        raise InputError("not even one row fits into the memory of the device")
    while rows < _MOST_ROWS and fits(2 * rows):
        rows *= 2
    return rows


def fits(
    model: Any, inputs: Callable[[int], Mapping[str, Tensor]], tokens: int, mode: str | None
) -> Callable[[int], bool]:
    """Tells of a number of rows whether the stock and the compiled model run them in the device's memory."""

    def tried(rows: int) -> bool:
        given = inputs(rows)
        try:
            Stock(model, Arm(EAGER, None), given).generate(tokens)
            Compiled(model, Arm(BASELINE, Schedule()), given, mode).generate(tokens)
        except Exception as error:
            if _is_out_of_memory(error):
                return False
            raise
        finally:
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return tried


def _is_out_of_memory(error: object) -> bool:
    """Whether it is an out-of-memory error, or Dynamo's error around one of the compiler."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        getattr(error, "inner_exception", None), torch.OutOfMemoryError
    )
