"""What `auto` takes follows the committed measurements, and those are whole."""

from __future__ import annotations

import json
from itertools import groupby

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from examples.research.benchmarks import realisations
from luvc_fx.ops.lowpass import chosen

CPU = json.loads((realisations.RESULTS / "realisations-cpu.json").read_text(encoding="utf-8"))
SIZES = {
    key: list(rows)
    for key, rows in groupby(CPU["times"], lambda row: (row["tokens"], row["dim"], row["cutoff"]))
}
ALMOST = 1.25
"""Times of one size that differ by less are the same: the machine was shared."""


def choice(tokens: int, dim: int, cutoff: float, device: str) -> str:
    with FakeTensorMode():
        return chosen(torch.empty(1, tokens, dim, device=device), cutoff)


def test_all_sizes_were_measured() -> None:
    assert {tokens for tokens, _, _ in SIZES} == set(realisations.TOKENS)
    assert {dim for _, dim, _ in SIZES} == set(realisations.DIMS)
    for rows in SIZES.values():
        assert tuple(row["realisation"] for row in rows) == realisations.REALISATIONS


@pytest.mark.parametrize("tokens", realisations.TOKENS)
def test_auto_is_the_fastest_on_a_cpu(tokens: int) -> None:
    for size in (size for size in SIZES if size[0] == tokens):
        taken = {row["realisation"]: row["cpu_ms"] for row in SIZES[size] if "left_out" not in row}
        assert taken[choice(*size, "cpu")] <= ALMOST * min(taken.values()), (size, taken)


@pytest.mark.parametrize("tokens", sorted({row["tokens"] for row in CPU["agreement"]}))
def test_what_auto_may_choose_keeps_the_same_tokens(tokens: int) -> None:
    """On an accelerator, too: with more channels than the model's there is less FIR, not more."""
    for row in (row for row in CPU["agreement"] if row["tokens"] == tokens):
        cutoff = row["cutoff"]
        choices = {
            choice(tokens, dim, cutoff, device) for device in ("cpu", "cuda") for dim in (1, 896, 4096)
        }
        if row["realisation"] in choices | {"basis, TF32"}:
            assert row["least"] >= 0.99, row
        if row["realisation"].endswith("bfloat16 energies"):
            assert row["least"] < 0.99, "then rounding them would do, and they need not be float32"


def test_a_window_that_was_cut_off_is_not_chosen() -> None:
    assert choice(1024, 8, 0.25, "cuda") == "fir"
    assert choice(4096, 8, 0.25, "cuda") == "basis"


def test_rounding_to_tf32_leaves_ten_bits() -> None:
    x = torch.tensor([[1.0 + 2.0**-10, 1.0 + 2.0**-12]])
    with realisations.InTF32():
        rounded = torch.matmul(x, torch.eye(2)).tolist()[0]
    assert rounded == [1.0 + 2.0**-10, 1.0]


def test_what_is_timed_and_compared() -> None:
    x = torch.randn(2, 256, 4)
    with torch.no_grad():
        rows = list(realisations.agreements({0: x}, (256,)))
    assert {row["realisation"] for row in rows} == set(realisations.ROUNDED)
    assert all(0.5 < row["least"] <= 1.0 for row in rows)
    large = realisations.time_of(torch.empty(1, 16384, 4096, device="cpu"), 0.25, "basis", 1)
    assert "products" in large["left_out"]
