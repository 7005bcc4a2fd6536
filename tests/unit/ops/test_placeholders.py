"""surviving_rows: against its twin, and by what must hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from luvc_fx.ops import reference, surviving_rows

Case = tuple[Tensor, Tensor, int]


@st.composite
def prompts(draw: st.DrawFn) -> Case:
    """Rows with as many placeholders each, anywhere in them, and distinct ones of each row in any order."""
    batch, text, each = draw(st.integers(1, 3)), draw(st.integers(0, 6)), draw(st.integers(1, 8))
    left = draw(st.integers(1, each))
    rows, slots = [], []
    for b in range(batch):
        rows.append(draw(st.permutations([True] * each + [False] * text)))
        slots.append([b * each + slot for slot in draw(st.permutations(range(each)))[:left]])
    return torch.tensor(rows), torch.tensor(slots), batch * each


@given(prompts())
def test_equals_twin(case: Case) -> None:
    visual, slots, placeholders = case
    got = surviving_rows(visual, slots, placeholders)
    want = reference.surviving_rows(visual.numpy(), slots.numpy(), placeholders)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == torch.int64
        np.testing.assert_array_equal(mine.numpy(), theirs)


@given(prompts())
def test_text_stays_and_tokens_keep_their_order(case: Case) -> None:
    visual, slots, placeholders = case
    places, ascending = surviving_rows(visual, slots, placeholders)
    batch, each = len(visual), placeholders // len(visual)
    assert torch.equal(places.sort(1).values, ascending)
    assert (ascending.diff(dim=1) > 0).all()
    short = visual.gather(1, ascending)
    for b in range(batch):
        text = torch.arange(visual.shape[1])[~visual[b]]
        assert torch.equal(ascending[b][~short[b]], text) and torch.equal(places[b][~short[b]], text)
        own = torch.arange(visual.shape[1])[visual[b]]
        assert torch.equal(places[b][short[b]], own[slots[b] - b * each])


@given(prompts())
def test_slots_may_have_any_shape(case: Case) -> None:
    """Grids ``[n, H', W']``, or all in a row."""
    visual, slots, placeholders = case
    want = surviving_rows(visual, slots, placeholders)
    for shaped in (slots.reshape(1, 1, -1), slots.unsqueeze(1), slots.flatten()):
        for mine, theirs in zip(surviving_rows(visual, shaped, placeholders), want, strict=True):
            assert torch.equal(mine, theirs)


def test_all_slots_leave_the_prompt_whole() -> None:
    visual = torch.tensor([[False, True, True, False], [True, False, False, True]])
    places, ascending = surviving_rows(visual, torch.arange(4), 4)
    assert places.tolist() == ascending.tolist() == [[0, 1, 2, 3]] * 2


def test_representatives_that_do_not_ascend() -> None:
    """As after a merge in height: the second column kept an upper row, the first a lower one."""
    visual = torch.tensor([[False, True, True, True, True, False]])
    places, ascending = surviving_rows(visual, torch.tensor([[[2, 1]]]), 4)
    assert places.tolist() == [[0, 3, 2, 5]]
    assert ascending.tolist() == [[0, 2, 3, 5]]


def test_images_that_keep_different_counts() -> None:
    """One row, an image of four tokens of which one is left and one of two of which all are."""
    visual = torch.tensor([[True] * 4 + [False] + [True] * 2])
    places, ascending = surviving_rows(visual, torch.tensor([[[3, 4, 5]]]), 6)
    assert places.tolist() == ascending.tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize("batch", [1, 2])
def test_traces(traced_names: Any, batch: int) -> None:
    names = traced_names(
        lambda visual, slots: surviving_rows(visual, slots, 4 * batch),
        torch.zeros(batch, 8, dtype=torch.bool),
        torch.zeros(1, 1, 2 * batch, dtype=torch.int64),
    )
    assert not names & {"sort", "topk", "argsort", "index", "index_put"}
