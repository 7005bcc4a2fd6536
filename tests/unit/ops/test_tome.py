"""ToMe over a row and averaging into the nearest: the twins' values, nothing lost, ToMe's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luvc_fx.ops import absorb, reference, sequence_merge
from luvc_fx.ops.select import counted, marked


def row(seed, batch, tokens, channels, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=draw, dtype=torch.float64).to(dtype)
    sizes = torch.randint(1, 4, (batch, tokens), generator=draw).float()
    slots = torch.stack([torch.randperm(50, generator=draw)[:tokens] for _ in range(batch)])
    return x, sizes, slots


ROWS = (st.integers(0, 2**31), st.integers(1, 2), st.integers(1, 17), st.integers(1, 4), st.data())


@given(*ROWS, st.booleans())
def test_merging_equals_the_twin(seed, batch, tokens, channels, data, by_feature):
    x, sizes, slots = row(seed, batch, tokens, channels)
    feature = row(seed + 1, batch, tokens, 3)[0] if by_feature else None
    length = data.draw(st.integers(1, tokens))
    got = sequence_merge(x, sizes, slots, length, feature)
    given = [None if t is None else t.numpy() for t in (x, sizes, slots, feature)]
    want = reference.sequence_merge(*given[:3], length, given[3])
    assert len(got) == len(want) == 3 + by_feature
    for mine, twin in zip(got, want, strict=True):
        np.testing.assert_allclose(mine.numpy(), twin, rtol=1e-6, atol=1e-9)


@given(*ROWS)
def test_nothing_is_lost_and_slots_are_those_of_survivors(seed, batch, tokens, channels, data):
    x, sizes, slots = row(seed, batch, tokens, channels)
    length = data.draw(st.integers(1, tokens))
    merged, left, kept = sequence_merge(x, sizes, slots, length)
    assert merged.shape == (batch, length, channels)
    assert torch.equal(left.sum(1), sizes.sum(1))
    before, after = (x * sizes[..., None]).sum(1), (merged * left[..., None]).sum(1)
    torch.testing.assert_close(after, before)
    for new, old in zip(kept.tolist(), slots.tolist(), strict=True):
        assert len(set(new)) == length and set(new) <= set(old)


def test_unmerged_evens_come_first_then_all_odds():
    angle = torch.tensor([0.0, 1.0, 2.5, 4.0, 1.01, 5.0])  # place 4 is most like place 1
    x = torch.stack([angle.cos(), angle.sin()], -1)[None]
    merged, sizes, slots = sequence_merge(x, torch.ones(1, 6), torch.arange(6)[None], 5)
    assert slots.tolist() == [[0, 2, 1, 3, 5]]
    assert sizes.tolist() == [[1, 1, 2, 1, 1]]
    torch.testing.assert_close(merged[0, 2], (x[0, 1] + x[0, 4]) / 2)
    assert torch.equal(merged[0, [0, 1, 3, 4]], x[0, [0, 2, 3, 5]]), "the others stay to the last bit"


def test_ties_go_to_the_lower_place():
    slots = torch.arange(7)[None]
    alike = torch.ones(1, 7, 2)
    _, sizes, kept = sequence_merge(alike, torch.ones(1, 7), slots, 5)
    assert kept.tolist() == [[4, 6, 1, 3, 5]]
    assert sizes.tolist() == [[1, 1, 3, 1, 1]]


@pytest.mark.parametrize("length", [0, 5])
def test_refuses_a_length(length):
    with pytest.raises(ValueError, match=rf"length is {length}; allowed: 1 to 4"):
        sequence_merge(*row(0, 1, 4, 2), length)


@pytest.mark.parametrize("shape", [(1, 3, 2), (2, 4, 2), (1, 4)])
def test_refuses_a_feature_of_other_rows(shape):
    with pytest.raises(ValueError, match=r"feature has shape .*; allowed: \[1, 4\] and channels"):
        sequence_merge(*row(0, 1, 4, 2), 3, torch.zeros(shape))


def test_merging_traces(traced_names):
    names = traced_names(lambda *parts: sequence_merge(*parts, 5), *row(0, 2, 12, 4, torch.float32))
    if traced_names.device == "cuda":
        assert not names & {"sort", "scatter", "topk"}


@given(*ROWS)
def test_absorbing_equals_the_twin(seed, batch, tokens, channels, data):
    x, _, _ = row(seed, batch, tokens, channels + 1, torch.float32)
    count = data.draw(st.integers(1, tokens))
    draw = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(tokens, generator=draw)[:count].sort().values for _ in range(batch)])
    keep, ahead = counted(marked(kept, tokens))
    got = absorb(x, keep, ahead, kept)
    np.testing.assert_allclose(got.numpy(), reference.absorb(x.numpy(), kept.numpy()), rtol=1e-4, atol=1e-5)
    if count == tokens:
        assert torch.equal(got, x)


def test_absorbing_leaves_a_token_that_nobody_joins():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 3.0]]]).bfloat16()
    kept = torch.tensor([[0, 1]])
    keep, ahead = counted(marked(kept, 3))
    got = absorb(x, keep, ahead, kept)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[:, 0], x[:, 0])
    assert got[0, 1].tolist() == [pytest.approx(0.05, rel=1e-2), 2.0]


def test_absorbing_traces(traced_names):
    def run(x):
        kept = torch.arange(3, device=x.device).expand(2, 3)
        keep, ahead = counted(marked(kept, 9))
        return absorb(x, keep, ahead, kept)

    assert "scatter_add" not in traced_names(run, row(0, 2, 9, 4, torch.float32)[0])
