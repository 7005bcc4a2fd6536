"""The oracle's options: pairing and feature of a merge, normalisation, images and norm of a prune."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import find
from torch import Tensor, nn

from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.models import inputs, patch_grid, patches_per_side, tiny_internvl, tiny_llava
from tests.support.oracle import (
    Grid,
    cosines,
    encode,
    energies,
    merge_grid,
    oracle_forward,
    schedules,
    select,
    to_blocks,
)


@cache
def build(family: str, **options: Any) -> nn.Module:
    """A tiny model; do not change it."""
    return {"llava": tiny_llava, "internvl": tiny_internvl}[family](**options)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ shared pairing


def turns(*steps: float) -> Tensor:
    """A line [len(steps) + 1, 2] of unit vectors whose neighbours are `steps` degrees apart."""
    angles = torch.tensor([0.0, *itertools.accumulate(steps)]).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def test_all_lines_merge_where_the_mean_similarity_is_best() -> None:
    # 0 -> 1 and 2 -> 3 are proposed in both lines; each line has another favourite
    grid = Grid.of(torch.stack([turns(10, 60, 20), turns(40, 60, 15)])[None])
    alone = merge_grid(grid, "width", 3, [])
    assert alone.slots.tolist() == [[[1, 2, 3], [4, 5, 7]]]
    gaps: list[float] = []
    together = merge_grid(grid, "width", 3, gaps, pairing="shared")
    assert together.slots.tolist() == [[[0, 1, 3], [4, 5, 7]]]
    cos = {d: math.cos(math.radians(d)) for d in (10, 15, 20, 40, 60)}
    first, second = (cos[10] + cos[40]) / 2, (cos[20] + cos[15]) / 2
    assert min(gaps) == pytest.approx(second - first, abs=1e-6)
    # sizes weigh the tokens, not the lines
    grid.sizes[:, 0] = 9
    assert torch.equal(merge_grid(grid, "width", 3, [], pairing="shared").slots, together.slots)


def test_the_direction_is_shared_too() -> None:
    # token 2 goes left in the first line and right in the second; the second is surer
    grid = Grid.of(torch.stack([turns(90, 20, 25), turns(90, 60, 0)])[None])
    assert merge_grid(grid, "width", 3, []).slots.tolist() == [[[0, 1, 3], [4, 5, 7]]]
    alone, together = (merge_grid(grid, "width", 3, [], pairing) for pairing in ("line", "shared"))
    assert alone.sizes.tolist() == [[[1, 2, 1], [1, 1, 2]]]
    assert together.sizes.tolist() == [[[1, 1, 2], [1, 1, 2]]]


def test_a_nan_counts_as_minus_two_in_the_mean() -> None:
    x = torch.stack([turns(0, 90, 60), turns(0, 90, 60)])[None]
    assert merge_grid(Grid.of(x), "width", 3, [], "shared").slots[0, 0].tolist() == [1, 2, 3]
    x[0, 1, 0] = math.nan  # 0 -> 1 is now worth (1 - 2) / 2, 2 -> 3 still cos 60
    assert merge_grid(Grid.of(x), "width", 3, [], "shared").slots[0, 0].tolist() == [0, 1, 3]
    assert cosines(x[0, 1].numpy())[0] == -2


@pytest.mark.parametrize("axis", ["width", "height"])
def test_shared_lines_stay_aligned_and_images_apart(axis: str) -> None:
    x = random(8, 6, 7, 4)
    grid = merge_grid(Grid.of(x), axis, 2, [], "shared")
    cross = grid.slots % 7 if axis == "width" else (grid.slots // 7).transpose(1, 2)
    assert (cross == cross[:, :1]).all()
    assert len({tuple(image[0].tolist()) for image in cross}) > 1  # images choose for themselves
    for image in range(8):
        alone = merge_grid(Grid.of(x[image : image + 1]), axis, 2, [], "shared")
        assert torch.equal(alone.x[0], grid.x[image]) and torch.equal(alone.sizes[0], grid.sizes[image])
    weighted = (grid.x * grid.sizes[..., None]).sum(dim=(1, 2))
    assert torch.allclose(weighted, x.sum(dim=(1, 2)), atol=1e-5)


def test_a_single_line_shares_with_itself() -> None:
    grid = Grid.of(random(2, 1, 9, 4))
    shared, line = (merge_grid(grid, "width", 3, [], pairing) for pairing in ("shared", "line"))
    assert torch.equal(shared.x, line.x) and torch.equal(shared.slots, line.slots)


# --------------------------------------------------------------------------------------- key feature


@pytest.mark.parametrize("pairing", ["line", "shared"])
def test_keys_decide_and_merge_as_the_tokens_do(pairing: str) -> None:
    x, keys = random(2, 5, 7, 3), random(2, 5, 7, 6, seed=1)
    mine = theirs = Grid.of(x, keys)
    hidden, plain = Grid.of(keys), Grid.of(x)
    for axis, target in (("width", 2), ("height", 3)):  # rounds, then the other axis
        mine = merge_grid(mine, axis, target, [], pairing, "keys")
        hidden = merge_grid(hidden, axis, target, [], pairing)
        theirs = merge_grid(theirs, axis, target, [], pairing, "hidden")
        plain = merge_grid(plain, axis, target, [], pairing)
    assert torch.equal(mine.slots, hidden.slots) and torch.equal(mine.sizes, hidden.sizes)
    assert mine.keys is not None and torch.equal(mine.keys, hidden.x)
    assert torch.allclose((mine.x * mine.sizes[..., None]).sum(dim=(1, 2)), x.sum(dim=(1, 2)), atol=1e-5)
    assert torch.equal(theirs.x, plain.x) and not torch.equal(theirs.slots, mine.slots)


def recorded_keys(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What attention gets as K from now on, each [images, heads, tokens, d]."""
    seen: list[Tensor] = []
    attention = nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(key.clone())
        return attention(query, key, *args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    return seen


@pytest.mark.parametrize(
    ("family", "options"), [("llava", {}), ("internvl", {}), ("internvl", {"qk_norm": True})]
)
@torch.no_grad()
def test_keys_are_those_that_enter_attention_in_the_same_block(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family, grid=12, **options)
    pixels = inputs(model, 2)["pixel_values"]
    unit = patches_per_side(model)
    sites = {
        0: (
            Merge("width", keep=0.67, layer=0, feature="keys"),
            Merge("height", keep=0.5, layer=0, feature="keys", pairing="shared"),
        ),
        2: (
            Merge("height", keep=0.67, layer=2),
            Merge("width", keep=0.5, layer=2, feature="keys"),
        ),
    }
    schedule = Schedule(merge=(*sites[0], *sites[2]))
    encoder = model.model.vision_tower.encoder
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: outputs.append(out))
        for block in getattr(encoder, "layers", None) or encoder.layer
    ]
    keys = recorded_keys(monkeypatch)
    gaps: list[float] = []
    try:
        tokens = encode(model, schedule, pixels, gaps)
    finally:
        for hook in hooks:
            hook.remove()
    assert min(gaps) > 1e-6
    # once more from what the blocks and attention really saw
    height, width = patch_grid(model)
    start = to_blocks(outputs[0][:, 1:], height, width, unit)
    grid = Grid.of(start)
    for block, merges in sites.items():
        hidden = to_blocks(outputs[block][:, 1:], height, width, unit)
        entered = to_blocks(keys[block].transpose(1, 2).flatten(2)[:, 1:], height, width, unit)
        grid = Grid(hidden, grid.sizes, grid.slots, entered)
        for merge in merges:
            side = grid.sizes.shape[2 if merge.axis == "width" else 1]
            grid = merge_grid(grid, merge.axis, merge.target(side), [], merge.pairing, merge.feature)
        height, width = (unit * side for side in grid.sizes.shape[1:])
    assert tokens.grid == tuple(grid.sizes.shape[1:])
    assert torch.equal(tokens.slots, grid.slots.flatten(1))
    assert torch.equal(tokens.sizes, grid.sizes.flatten(1))
    hidden_only = encode(model, Schedule(merge=Merge("width", keep=0.75, layer=0)), pixels, [])
    by_keys = encode(model, Schedule(merge=Merge("width", 0.75, layer=0, feature="keys")), pixels, [])
    assert not torch.equal(hidden_only.slots, by_keys.slots)


# ------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("count", [1, 2, 7, 24])
@pytest.mark.parametrize("cutoff", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("normalize", ["none", "mean", "rms"])
def test_energies_are_those_of_the_normalised_tokens(count: int, cutoff: float, normalize: str) -> None:
    x = (random(2, count, 5) * 3 + 1).double()
    if normalize == "mean":
        tokens = x - x.mean(dim=1, keepdim=True)
    else:
        scale = (x.square().mean(dim=2, keepdim=True) + 1e-6).sqrt() if normalize == "rms" else 1.0
        tokens = x / scale
    bins = count // 2 + 1
    passing = max(1, math.floor(cutoff * bins + 0.5))
    # the filter as a sum over frequencies, without a transform
    time, low = torch.arange(count).double(), torch.zeros_like(x)
    for f in range(passing):
        weight = 0.54 + 0.46 * math.cos(math.pi * f / passing)
        weight *= (1.0 if f == 0 or 2 * f == count else 2.0) / count
        wave = torch.cos(2 * math.pi * f / count * (time[:, None] - time[None, :]))
        low += weight * torch.einsum("ts,bsd->btd", wave, tokens)
    expected = {
        "lowpass": low.square().sum(-1),
        "residual": (tokens - low).square().sum(-1),
        "ratio": low.square().sum(-1) / tokens.square().sum(-1).clamp_min(1e-12),
    }
    for energy, value in expected.items():
        got = torch.from_numpy(energies(x, energy, cutoff, normalize))
        assert torch.allclose(got, value, rtol=1e-8, atol=1e-12)


def test_what_normalisation_leaves_out() -> None:
    x = random(1, 24, 5)
    # DC passes whole, so a mean makes no residual; an offset makes no low-pass energy of mean-free tokens
    np.testing.assert_allclose(energies(x, "residual", 0.3, "mean"), energies(x, "residual", 0.3), rtol=1e-9)
    moved = x.double() + random(1, 1, 5, seed=1) * 50
    np.testing.assert_allclose(
        energies(moved, "lowpass", 0.3, "mean"), energies(x, "lowpass", 0.3, "mean"), rtol=1e-6
    )
    assert abs(energies(moved, "lowpass", 0.3) / energies(x, "lowpass", 0.3) - 1).min() > 1
    # a massive token is one among others
    massive = x.double()
    massive[:, 7] *= 1000
    for energy in ("lowpass", "residual", "ratio"):
        np.testing.assert_allclose(
            energies(massive, energy, 0.3, "rms"), energies(x, energy, 0.3, "rms"), rtol=1e-4
        )
    assert energies(massive, "residual", 0.3)[0].argmax() == 7


def test_nothing_left_to_compare_is_a_tie() -> None:
    x = random(1, 16, 5) + 4
    ties: list[float] = []
    prune = Prune(
        tokens=4, layer=0, energy="lowpass", coverage="global", cutoff=0.05, normalize="mean"
    )  # only DC passes, and it was taken away
    select(x, prune, 4, 0, None, ties)
    assert max(ties) < 1e-9
    gaps: list[float] = []
    select(x, Prune(tokens=4, layer=0, normalize="mean"), 4, 0, None, gaps)
    assert min(gaps) > 1e-5


@pytest.mark.parametrize("normalize", ["none", "mean", "rms"])
@pytest.mark.parametrize("energy", ["residual", "lowpass", "ratio"])
@pytest.mark.parametrize("coverage", ["block", "global"])
def test_float32_chooses_the_same_where_the_gap_says_so(normalize: str, energy: str, coverage: str) -> None:
    """The scale of the gap is honest: single precision never swaps what is further apart."""
    decided = 0
    for seed in range(30):
        offset = random(1, 1, 6, seed=100 + seed) * (0.3 if normalize == "rms" else 10)
        x = random(1, 24, 6, seed=seed) * 0.1 + offset
        prune = Prune(tokens=6, layer=0, energy=energy, coverage=coverage, normalize=normalize)
        gaps: list[float] = []
        chosen = select(x, prune, 6, 0, None, gaps)
        if min(gaps) < 1e-5:
            continue
        decided += 1
        tokens = x - x.mean(dim=1, keepdim=True) if normalize == "mean" else x
        if normalize == "rms":
            tokens = x * torch.rsqrt(x.square().mean(dim=2, keepdim=True) + 1e-6)
        spectrum = torch.fft.rfft(tokens, dim=1)
        f = torch.arange(13)
        weights = torch.where(f < 3, 0.54 + 0.46 * torch.cos(math.pi * f / 3), 0.0)
        low = torch.fft.irfft(spectrum * weights[None, :, None], n=24, dim=1)
        score = {
            "lowpass": low.square().sum(-1),
            "residual": (tokens - low).square().sum(-1),
            "ratio": low.square().sum(-1) / tokens.square().sum(-1).clamp_min(1e-12),
        }[energy][0]
        if coverage == "global":
            mine = score.topk(6).indices.sort().values
        else:
            mine = score.reshape(6, 4).argmax(dim=1) + 4 * torch.arange(6)
        assert torch.equal(mine, chosen[0]), (seed, gaps)
    assert decided >= 5


# --------------------------------------------------------------------------------- images by themselves


@pytest.mark.parametrize("normalize", ["none", "mean", "rms"])
def test_an_image_is_filtered_by_itself(normalize: str) -> None:
    x = random(2, 48, 5) + random(2, 3, 5, seed=1).repeat_interleave(16, dim=1) * 20
    options: dict[str, Any] = {"layer": 0, "energy": "lowpass", "cutoff": 0.5, "normalize": normalize}
    alone = np.concatenate(
        [energies(x[:, i : i + 16], "lowpass", 0.5, normalize) for i in (0, 16, 32)], axis=1
    )
    best = Prune(tokens=5, coverage="global", per_image=True, **options)
    chosen = select(x, best, 5, 0, (4, 4), [])
    assert chosen.tolist() == [sorted(np.argsort(-row)[:5].tolist()) for row in alone]
    # one winner in each 2 x 2 block: images side by side are images one by one
    block = Prune(tokens=12, per_image=True, **options)
    each = [select(x[:, i : i + 16], Prune(tokens=4, **options), 4, 0, (4, 4), []) + i for i in (0, 16, 32)]
    assert torch.equal(select(x, block, 12, 0, (4, 4), []), torch.cat(each, dim=1))
    # without whole images it is the row, as without the option
    row = Prune(tokens=12, **options)
    assert torch.equal(select(x, block, 12, 0, None, []), select(x, row, 12, 0, None, []))
    assert not torch.equal(select(x, row, 12, 0, (4, 4), []), select(x, block, 12, 0, (4, 4), []))


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_later_sites_filter_over_the_row(family: str) -> None:
    model = build(family)
    case = {"llava": {"images": 3}, "internvl": {"images": 2, "tiles": (2, 1)}}[family]
    batch = inputs(model, 2, **case)

    def kept(first: bool, second: bool, merge: tuple[Merge, ...] = ()) -> dict[int, Tensor]:
        options: dict[str, Any] = {
            "energy": "lowpass",
            "coverage": "global",
            "cutoff": 0.6,
            "normalize": "mean",
        }
        prune = (
            Prune(keep=0.5, layer=0, per_image=first, **options),
            Prune(keep=0.25, layer=2, per_image=second, **options),
        )
        result = oracle_forward(model, Schedule(merge=merge, prune=prune), **batch)
        features = result.features.reshape(2, 3, -1, result.features.shape[-1])
        together = result.features if not first else features.flatten(0, 1)
        scores = torch.from_numpy(energies(together, "lowpass", 0.6, "mean")).reshape(2, -1)
        top = scores.topk(scores.shape[1] // 2).indices.sort().values
        assert torch.equal(result.kept[0], top)
        return result.kept

    both, first, neither = kept(True, True), kept(True, False), kept(False, False)
    assert torch.equal(both[2], first[2]) and torch.equal(both[0], first[0])
    assert not torch.equal(both[0], neither[0])
    merged = kept(True, False, (Merge("width", keep=0.5, layer=0),))
    assert merged[0].shape[1] == both[0].shape[1] // 2


# --------------------------------------------------------------------------- norm, realization, the rest


def test_norm_is_the_sum_of_squares() -> None:
    x = torch.zeros(2, 8, 3)
    x[0, :, 0] = torch.tensor([1.0, 5.0, 2.0, 4.0, -6.0, 0.0, 3.0, 3.0])
    x[1] = x[0].flip(0)
    best = Prune(tokens=3, layer=0, selector="norm", coverage="global")
    assert select(x, best, 3, 0, None, []).tolist() == [[1, 3, 4], [3, 4, 6]]
    pairs = Prune(tokens=4, layer=0, selector="norm")
    assert select(x, pairs, 4, 0, None, []).tolist() == [[1, 3, 4, 6], [0, 3, 4, 6]]
    squares = Prune(tokens=2, layer=0, selector="norm")
    gaps: list[float] = []
    assert select(x[:1], squares, 2, 0, (2, 4), gaps).tolist() == [[3, 4]]
    assert min(gaps) == pytest.approx((16 - 9) / 36)


def test_realization_changes_nothing() -> None:
    x = random(2, 24, 5)
    chosen = [
        select(x, Prune(tokens=7, layer=0, realization=name), 7, 0, None, [])
        for name in ("auto", "fft", "fir", "basis")
    ]
    assert all(torch.equal(first, chosen[0]) for first in chosen)


def test_a_selector_that_the_oracle_does_not_know_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="mine"):
        select(random(1, 8, 3), SimpleNamespace(selector=SimpleNamespace(name="mine")), 2, 0, None, [])  # type: ignore[arg-type]


MERGE_OPTIONS = {"pairing": ("line", "shared"), "feature": ("hidden", "keys")}
PRUNE_OPTIONS = {
    "normalize": ("none", "mean", "rms"),
    "per_image": (False, True),
    "realization": ("auto", "fft", "basis"),
}
DRAWN_SELECTORS = ("spectrum", "random", "uniform", "norm")


def test_schedules_draw_every_option() -> None:
    def has(items: Callable[[Schedule], Any], field: str, value: Any) -> Callable[[Schedule], bool]:
        return lambda schedule: any(getattr(item, field, None) == value for item in items(schedule))

    for options, items in ((MERGE_OPTIONS, lambda s: s.merge), (PRUNE_OPTIONS, lambda s: s.prune)):
        for field, values in options.items():
            for value in values:
                find(schedules(), has(items, field, value))
    for name in DRAWN_SELECTORS:
        find(schedules(), lambda s, name=name: any(prune.selector.name == name for prune in s.prune))
    find(
        schedules(unit=2, ragged=True), lambda s: any(m.length is not None and m.length % 2 for m in s.merge)
    )
