"""The oracle's merging and selecting: hand-made cases, invariants and the written rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luvc_fx.schedule import Prune
from tests.support.oracle import (
    Grid,
    choose,
    cosines,
    energies,
    join,
    merge_grid,
    mix32,
    random_scores,
    select,
)


def angles(*degrees: float) -> np.ndarray:
    """Unit vectors [n, 2] float32: the similarity of two is the cosine of their angle."""
    radians = np.radians(np.array(degrees))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)


def line(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(n, dtype=np.float32), np.arange(n)


def merge_line(
    tokens: np.ndarray, sizes: np.ndarray, slots: np.ndarray, merged: int, gaps: list[float]
) -> tuple[np.ndarray, ...]:
    """One round on one line by the cosines of its own tokens: tokens, sizes, slots."""
    sizes, slots, out = join(choose(cosines(tokens), merged, gaps), sizes, slots, tokens)
    return out, sizes, slots


def test_a_line_merges_its_best_proposals() -> None:
    # neighbours are 40, 10, 50, 20 degrees apart: 0 -> 1 (40), 2 -> 1 (10), 4 -> 3 (20)
    tokens = angles(0, 40, 50, 100, 120)
    gaps: list[float] = []
    out, sizes, slots = merge_line(tokens, *line(5), 2, gaps)
    assert slots.tolist() == [0, 1, 3]
    assert sizes.tolist() == [1, 2, 2]
    np.testing.assert_allclose(out[1], (tokens[1] + tokens[2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(out[2], (tokens[3] + tokens[4]) / 2, rtol=1e-6)
    cos = {d: math.cos(math.radians(d)) for d in (10, 20, 40, 50)}
    assert min(gaps) == pytest.approx(min(cos[20] - cos[40], cos[10] - cos[50]), abs=1e-6)


def test_two_proposals_to_one_token_and_weights() -> None:
    tokens = angles(0, 10, 20, 90)
    out, sizes, slots = merge_line(tokens, np.array([3, 1, 2, 1], dtype=np.float32), np.arange(4) + 7, 2, [])
    assert slots.tolist() == [8, 10]
    assert sizes.tolist() == [6, 1]
    mean = (3 * tokens[0] + tokens[1] + 2 * tokens[2]) / 6
    np.testing.assert_allclose(out, np.stack([mean, tokens[3]]), rtol=1e-6)


def test_ties_go_right_and_to_the_lower_index() -> None:
    same = np.ones((6, 2), dtype=np.float32)
    _, sizes, slots = merge_line(same, *line(6), 2, [])
    assert slots.tolist() == [1, 3, 4, 5]  # 0 -> 1 and 2 -> 3
    assert sizes.tolist() == [2, 2, 1, 1]
    _, sizes, slots = merge_line(same[:3], *line(3), 1, [])
    assert slots.tolist() == [1, 2]


def same(first: Grid, second: Grid) -> bool:
    """Whether two grids are equal bit for bit."""
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("x", "sizes", "slots", *(() if first.keys is None else ("keys",)))
    )


def test_rounds_axes_and_carried_sizes() -> None:
    x = torch.randn(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    grid = Grid.of(x)
    once = merge_grid(grid, "width", 2, [])
    assert same(once, merge_grid(merge_grid(grid, "width", 4, []), "width", 2, []))
    assert once.x.shape == (2, 5, 2, 3) and once.keys is None
    assert torch.allclose(once.sizes.sum(dim=2), torch.full((2, 5), 7.0))
    weighted = (once.x * once.sizes[..., None]).sum(dim=2)
    assert torch.allclose(weighted, x.sum(dim=2), atol=1e-5)
    assert (once.slots // 7 == torch.arange(5)[None, :, None]).all()  # a slot stays in its row
    assert same(merge_grid(grid.transposed(), "height", 2, []).transposed(), once)
    assert merge_grid(Grid.of(x.bfloat16()), "width", 3, []).x.dtype == torch.bfloat16


def test_a_nan_ranks_below_every_cosine() -> None:
    tokens = angles(0, 180, 90, 90, 0, 180)
    tokens[2] = math.nan  # its own proposal is worth -2, below the -1 of 0 -> 1
    assert choose(cosines(tokens), 2, []) == [(4, 3), (0, 1)]


@pytest.mark.parametrize("count", [1, 2, 7, 24])
@pytest.mark.parametrize("cutoff", [0.01, 0.25, 1.0])
def test_energies_are_those_of_a_float32_fft(count: int, cutoff: float) -> None:
    x = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(1))
    spectrum = torch.fft.rfft(x, dim=1)
    bins = spectrum.shape[1]
    passing = max(1, math.floor(cutoff * bins + 0.5))
    f = torch.arange(bins)
    window = torch.where(f < passing, 0.54 + 0.46 * torch.cos(math.pi * f / passing), 0.0)
    low = torch.fft.irfft(spectrum * window[None, :, None], n=count, dim=1)
    expected = {
        "lowpass": low.square().sum(-1),
        "residual": (x - low).square().sum(-1),
        "ratio": low.square().sum(-1) / x.square().sum(-1),
    }
    for energy, value in expected.items():
        got = torch.from_numpy(energies(x, energy, cutoff)).float()
        assert torch.allclose(got, value, rtol=1e-4, atol=1e-5)


def test_murmur_finaliser_and_streams() -> None:

    assert [mix32(i) for i in (0, 1, 2)] == [0, 0x514E28B7, 0x30F4C306]
    scores = random_scores(64, 0, 2)
    assert len(set(scores)) == 64 and all(0 <= s < 1 << 32 for s in scores)
    assert scores[0] == mix32(3 * 0x9E3779B9 % (1 << 32))
    assert scores != random_scores(64, 1, 2) != random_scores(64, 0, 3)


def test_uniform_and_blocks() -> None:
    x = torch.zeros(1, 16, 4)
    x[0, [5, 2, 8, 15], [0, 1, 2, 3]] = 1.0
    uniform = Prune(tokens=3, layer=0, selector="uniform")
    assert select(x, uniform, 3, 0, None, []).tolist() == [[2, 8, 13]]
    # the widest low-pass spreads each of them to its neighbours but leaves it the largest
    wide = {"energy": "lowpass", "cutoff": 1.0, "layer": 0}
    squares = select(x, Prune(tokens=4, **wide), 4, 0, (4, 4), [])
    assert squares.tolist() == [[2, 5, 8, 15]]  # one in each 2 x 2 corner, ascending
    runs = select(x, Prune(tokens=4, **wide), 4, 0, None, [])
    assert runs.tolist() == [[2, 5, 8, 15]]  # and one in each run of four
    crowd = torch.zeros(1, 16, 4)
    crowd[0, [1, 5, 10, 13], [0, 1, 2, 3]] = torch.tensor([1.0, 1.1, 1.2, 1.3])
    best = Prune(tokens=2, coverage="global", **wide)
    assert select(crowd, best, 2, 0, (4, 4), []).tolist() == [[10, 13]]
    assert select(crowd, Prune(tokens=2, **wide), 2, 0, None, []).tolist() == [[5, 13]]
    assert select(x, Prune(tokens=0, **wide), 0, 0, None, []).shape == (1, 0)
    assert select(x, Prune(tokens=16, **wide), 16, 0, None, []).tolist() == [list(range(16))]


def test_block_grids_of_two_images_are_stacked() -> None:
    x = torch.randn(1, 32, 3, generator=torch.Generator().manual_seed(2))
    prune = Prune(tokens=8, layer=0)
    chosen = select(x, prune, 8, 0, (4, 4), [])
    corners = [(int(i) // 4 // 2, int(i) % 4 // 2) for i in chosen[0]]
    assert sorted(corners) == [(row, column) for row in range(4) for column in range(2)]
    odd = select(x[:, :20], Prune(tokens=5, layer=0), 5, 0, (5, 4), [])
    assert [int(i) // 4 for i in odd[0]] == list(range(5))
