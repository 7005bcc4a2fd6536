"""orthogonal_merge with `runs`: padding stays as it is, and each run loses what its lines lose."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from luvc_fx.ops import orthogonal_merge
from luvc_fx.schedule import AXES, PAIRINGS
from tests.unit.ops.test_oim import assert_same, grid, random_grid, twin
from tests.unit.ops.test_oim_options import keys_of

Run = tuple[int, int]


def shortest_of(runs: list[Run], size: int) -> int | None:
    """As the plan gives it: of the runs that are not the whole axis."""
    return min((end - first for first, end in runs if end - first < size), default=None)


def merged(
    tensors: tuple[Tensor, ...], axis: str, length: int, runs: list[Run], **options: Any
) -> tuple[Tensor, ...]:
    size = tensors[0].shape[2 if axis == "width" else 1]
    shortest = shortest_of(runs, size)
    return orthogonal_merge(*tensors, axis, length, runs=torch.tensor(runs), shortest=shortest, **options)


def along_width(parts: tuple[Tensor, ...], axis: str) -> list[Tensor]:
    """The parts with the merged axis as axis 2."""
    return [part if axis == "width" else part.transpose(1, 2) for part in parts]


@st.composite
def padded(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], str, int, list[Run]]:
    """A grid whose images have runs of their own, and a length that every one of them allows."""
    batch, lines, size = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 11))
    axis = draw(st.sampled_from(AXES))
    runs = []
    for _ in range(batch):
        first = draw(st.integers(0, size - 1))
        runs.append((first, draw(st.integers(first + 1, size))))
    least = min(end - first for first, end in runs)
    length = draw(st.integers(size - least + 1, size))
    shape = (batch, lines, size) if axis == "width" else (batch, size, lines)
    count = batch * lines * size
    x = draw(st.lists(st.integers(-2, 2), min_size=2 * count, max_size=2 * count))
    sizes = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    tensors = grid(torch.tensor(x).float().reshape(*shape, 2), torch.tensor(sizes).float().reshape(shape))
    return tensors, axis, length, runs


@given(padded())
def test_equals_twin_on_ties(case: tuple[tuple[Tensor, ...], str, int, list[Run]]) -> None:
    tensors, axis, length, runs = case
    assert_same(merged(*case), twin(*tensors, axis, length, runs=np.array(runs)))


@pytest.mark.parametrize("pairing, keyed", list(product(PAIRINGS, [False, True])))
@pytest.mark.parametrize("axis", AXES)
def test_equals_twin_with_every_option(axis: str, pairing: str, keyed: bool) -> None:
    tensors = random_grid(1, 3, 13, 13, 4)
    runs = [(3, 10), (0, 13), (1, 13)]
    feature = keys_of(2, tensors[0], 6) if keyed else None
    got = merged(tensors, axis, 8, runs, pairing=pairing, feature=feature)
    keys = None if feature is None else feature.numpy()
    want = twin(*tensors, axis, 8, pairing=pairing, feature=keys, runs=np.array(runs))
    assert_same(got[1:3], want[1:3])
    for a, b in zip((got[0], *got[3:]), (want[0], *want[3:]), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-5, atol=1e-5)


@given(padded())
def test_padding_stays_and_content_keeps_its_mass(
    case: tuple[tuple[Tensor, ...], str, int, list[Run]],
) -> None:
    tensors, axis, length, runs = case
    before, after = along_width(tensors, axis), along_width(merged(*case), axis)
    lost = before[0].shape[2] - length
    for b, (first, end) in enumerate(runs):
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[b, :, :first], old[b, :, :first])
            assert torch.equal(new[b, :, end - lost :], old[b, :, end:])
        inside = [old[b, :, first:end].double() for old in before[:2]]
        left = [new[b, :, first : end - lost].double() for new in after[:2]]
        assert torch.equal(left[1].sum(1), inside[1].sum(1))
        mass, mass_left = ((x * sizes.unsqueeze(-1)).sum(1) for x, sizes in (inside, left))
        torch.testing.assert_close(mass_left, mass, rtol=1e-5, atol=1e-5)
        # Representatives are the picture's own, in order.
        allowed = before[2][b, :, first:end]
        for line, slots in zip(allowed, after[2][b, :, first : end - lost], strict=True):
            assert set(slots.tolist()) <= set(line.tolist())
        assert (after[2][b].diff(dim=1) > 0).all()


@given(padded(), st.integers(0, 2**31))
def test_what_lies_in_the_padding_decides_nothing(
    case: tuple[tuple[Tensor, ...], str, int, list[Run]], seed: int
) -> None:
    (x, sizes, slots), axis, length, runs = case
    other = along_width((x.clone(),), axis)[0]
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(seed))
    for b, (first, end) in enumerate(runs):
        other[b, :, :first], other[b, :, end:] = noise[b, :, :first], noise[b, :, end:]
    other = along_width((other,), axis)[0]
    mine = along_width(merged(case[0], axis, length, runs), axis)
    theirs = along_width(merged((other, sizes, slots), axis, length, runs), axis)
    lost = x.shape[2 if axis == "width" else 1] - length
    assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[2], theirs[2])
    for b, (first, end) in enumerate(runs):
        assert torch.equal(mine[0][b, :, first : end - lost], theirs[0][b, :, first : end - lost])


@given(padded())
def test_each_image_merges_as_if_its_padding_were_not_there(
    case: tuple[tuple[Tensor, ...], str, int, list[Run]],
) -> None:
    """Where a run starts at an even place, so that the same tokens propose, and one round is enough."""
    tensors, axis, length, runs = case
    before, after = along_width(tensors, axis), along_width(merged(*case), axis)
    lost = before[0].shape[2] - length
    shortest = min(end - first for first, end in runs)
    for b, (first, end) in enumerate(runs):
        if first % 2 or lost > shortest // 2:
            continue
        alone = orthogonal_merge(
            *(part[b : b + 1, :, first:end].contiguous() for part in before), "width", end - first - lost
        )
        for whole, only in zip(after, alone, strict=True):
            assert torch.equal(whole[b, :, first : end - lost], only[0])


@given(padded(), st.sampled_from(PAIRINGS))
def test_whole_runs_are_no_runs(case: tuple[tuple[Tensor, ...], str, int, list[Run]], pairing: str) -> None:
    tensors, axis, length, runs = case
    whole = [(0, tensors[0].shape[2 if axis == "width" else 1])] * len(runs)
    got = merged(tensors, axis, length, whole, pairing=pairing)
    want = orthogonal_merge(*tensors, axis, length, pairing)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_run_shrinks_by_what_each_round_takes() -> None:
    # Six equal tokens between two zeros and three: 3, then 1 of the 3 that are left, then 1 of 2.
    x = torch.zeros(1, 1, 11, 2)
    x[:, :, 2:8] = 1.0
    got, sizes, slots = merged(grid(x), "width", 6, [(2, 8)])
    assert sizes.tolist() == [[[1, 1, 6, 1, 1, 1]]]
    assert slots.tolist() == [[[0, 1, 7, 8, 9, 10]]]
    assert got[0, 0, :, 0].tolist() == [0, 0, 1, 0, 0, 0]
    for length, content in ((8, [2, 2, 2]), (7, [4, 2])):
        assert merged(grid(x), "width", length, [(2, 8)])[1][0, 0, 2 : length - 3].tolist() == content


def test_equal_neighbours_across_an_end_do_not_merge() -> None:
    """Place 2 is the picture's first and equals the padding beside it; its own neighbour differs."""
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [-1, 0], [0, 1], [0, 1]]).reshape(1, 1, 6, 2)
    assert orthogonal_merge(*grid(x), "width", 5)[2].tolist() == [[[1, 2, 3, 4, 5]]]
    assert merged(grid(x), "width", 5, [(2, 4)])[2].tolist() == [[[0, 1, 3, 4, 5]]]


def test_images_with_different_runs_lose_as_many() -> None:
    tensors = random_grid(3, 2, 8, 8, 3)
    got = merged(tensors, "height", 5, [(2, 6), (0, 8)])
    assert got[0].shape == (2, 5, 8, 3)
    assert torch.equal(got[0][0, :2], tensors[0][0, :2]) and torch.equal(got[0][0, 3:], tensors[0][0, 6:])
    assert (got[1][0, 2] == tensors[1][0, 2:6].sum(0)).all()
    # The whole one merges in two rounds, too: the other's run of 4 gives 2 in one, then 1.
    alone = tuple(part[1:] for part in tensors)
    stepped = orthogonal_merge(*orthogonal_merge(*alone, "height", 6), "height", 5)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(stepped, got, strict=True))


@pytest.mark.parametrize("axis, keyed", list(product(AXES, [False, True])))
def test_traces_without_sort_or_scatter(traced_names: Any, axis: str, keyed: bool) -> None:
    tensors = random_grid(4, 2, 9, 9, 4, torch.bfloat16)
    feature = [keys_of(5, tensors[0], 6).bfloat16()] if keyed else []

    def body(x: Tensor, sizes: Tensor, slots: Tensor, runs: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        return orthogonal_merge(
            x, sizes, slots, axis, 6, feature=keys[0] if keys else None, runs=runs, shortest=5
        )

    names = traced_names(body, *tensors, torch.tensor([[0, 9], [2, 7]]), *feature)
    assert not names & {"sort", "topk", "argsort", "scatter", "scatter_reduce", "index_put"}


def test_a_traced_graph_takes_other_runs() -> None:
    """The runs are data: what is traced for some is right for others with the same `shortest`."""
    tensors = random_grid(6, 2, 3, 9, 4)

    def body(x: Tensor, sizes: Tensor, slots: Tensor, runs: Tensor) -> tuple[Tensor, ...]:
        return orthogonal_merge(x, sizes, slots, "width", 6, runs=runs, shortest=5)

    graph = make_fx(body, tracing_mode="fake")(*tensors, torch.tensor([[0, 9], [2, 7]]))
    for runs in ([(2, 7), (4, 9)], [(0, 5), (0, 9)]):
        got = graph(*tensors, torch.tensor(runs))
        assert all(torch.equal(a, b) for a, b in zip(got, merged(tensors, "width", 6, runs), strict=True))


def test_gradient() -> None:
    x, sizes, slots = random_grid(7, 1, 3, 6, 2, torch.float64)
    runs = torch.tensor([[1, 5]])
    x.requires_grad_()
    torch.autograd.gradcheck(
        lambda v: orthogonal_merge(v, sizes, slots, "width", 4, runs=runs, shortest=4)[0], (x,)
    )


@pytest.mark.slow
def test_compiles(compiled: Any) -> None:
    tensors, runs = random_grid(8, 2, 6, 7, 8), torch.tensor([[0, 7], [1, 5]])

    def body(*t: Tensor) -> tuple[Tensor, ...]:
        return orthogonal_merge(*t[:3], "width", 4, runs=t[3], shortest=4)

    torch.testing.assert_close(compiled(body)(*tensors, runs), body(*tensors, runs))
