"""What is found by trying: the baseline's best mode, and the largest batch that fits."""

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
"""What `--mode` and `--batch` are called where they are to be found out."""

MODES_ON_CPU: tuple[str | None, ...] = (None, "max-autotune")
MODES = (None, "reduce-overhead", "max-autotune")

_TRIES = 3
_MOST_ROWS = 1024


def best_mode(
    model: Any, inputs: Mapping[str, Tensor], tokens: int, say: Callable[[str], None]
) -> tuple[str | None, dict[str, float | str]]:
    """Inductor's mode in which the baseline gives its first token soonest, and what each mode took.

    Returns:
        The mode, and milliseconds by its name; for one that failed, why.
    """
    found: dict[str, float | str] = {}
    for mode in MODES_ON_CPU if model.device.type == "cpu" else MODES:
        say(f"the baseline in mode {mode or 'default'}")
        try:
            found[mode or "default"] = _first_token(model, inputs, tokens, mode)
        except Exception as error:  # a mode that cannot run this model is not its best
            found[mode or "default"] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.compiler.reset()
        gc.collect()
    taken = {mode: value for mode, value in found.items() if not isinstance(value, str)}
    if not taken:
        raise InputError(f"the baseline runs in no mode: {found}")
    best = min(taken, key=taken.__getitem__)
    return (None if best == "default" else best), found


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
    """Whether the stock model, and the baseline compiled, answer so many rows in their device's memory."""

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
    """Whether it is that, or Dynamo says that it came out of the compiler."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        getattr(error, "inner_exception", None), torch.OutOfMemoryError
    )
