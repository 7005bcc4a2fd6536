"""What an attention mask costs by itself, on a CPU: one layer of LLaVA-OneVision 0.5B, operator by operator.

Both arms of `luvc-fx bench` go without a mask that hides nothing, so this is no part of a speed-up by tokens.
``python -m examples.research.benchmarks.mask`` prints what it finds, ``--write`` puts it into
results/mask.json. README.md here documents its keys.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

RESULTS = Path(__file__).parent / "results"

HEADS, GROUPS, DIM = 14, 2, 64
ROWS, LEFT = 1549, 509
"""Of the prompt of the bench, before and after a prune."""


def milliseconds(call: Callable[[], Tensor], rounds: int = 9) -> float:
    """Median processor time of a call, after one to warm up."""
    call()
    spent = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        spent.append((time.process_time() - started) * 1e3)
    return round(statistics.median(spent), 3)


def repeated(x: Tensor) -> Tensor:
    """Each group of heads as often as queries share it: so transformers does under a mask."""
    return x.repeat_interleave(HEADS // GROUPS, 1)


def attention(rows: int) -> dict[str, float]:
    """One layer over `rows` rows, and one step of decoding behind them, with a mask and without."""
    q = torch.randn(1, HEADS, rows, DIM)
    k, v = (torch.randn(1, GROUPS, rows, DIM) for _ in range(2))
    seen = torch.ones(1, 1, rows, rows, dtype=torch.bool).tril()
    step, all_of = q[:, :, -1:], torch.ones(1, 1, 1, rows, dtype=torch.bool)
    return {
        "prefill_masked_ms": milliseconds(lambda: attend(q, repeated(k), repeated(v), attn_mask=seen)),
        "prefill_causal_ms": milliseconds(lambda: attend(q, k, v, is_causal=True, enable_gqa=True)),
        "step_masked_ms": milliseconds(lambda: attend(step, repeated(k), repeated(v), attn_mask=all_of)),
        "step_plain_ms": milliseconds(lambda: attend(step, k, v, enable_gqa=True)),
    }


def masks() -> dict[str, float]:
    """The mask of `LEFT` rows: cut out of that of `ROWS`, and made anew."""
    long = torch.ones(1, 1, ROWS, ROWS, dtype=torch.bool).tril()
    rows, keys = torch.arange(LEFT)[None] * 3, torch.ones(1, ROWS, dtype=torch.bool)

    def cut() -> Tensor:
        half = long.gather(2, rows[:, None, :, None].expand(1, 1, LEFT, ROWS))
        return half.gather(3, rows[:, None, None].expand(1, 1, LEFT, LEFT))

    def anew() -> Tensor:
        row = torch.arange(LEFT)
        return (row[None] <= row[:, None])[None, None].logical_and(keys.gather(1, rows)[:, None, None])

    assert torch.equal(cut(), anew())
    return {"two_gathers_ms": milliseconds(cut), "made_anew_ms": milliseconds(anew)}


@torch.no_grad()
def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into results/")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    found = {
        "torch": torch.__version__,
        "layer": {str(n): attention(n) for n in (ROWS, LEFT)},
        "mask": masks(),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if write:
        (RESULTS / "mask.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
