"""Any transformer graph under any schedule: rewritten as the oracle says, or left alone for a known reason.

`LUVC_HYPOTHESIS=thorough` draws more; `python -m tests.support.random_graphs_campaign` as many as asked for.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luvc_fx.dynamo import rewrite
from luvc_fx.graph.nodes import settled_size
from luvc_fx.passes import PASSES
from luvc_fx.report import Reason, Refusal
from luvc_fx.schedule import Merge, Prune, Schedule
from tests.support.cases import slow_unless
from tests.support.oracle import schedules
from tests.support.random_graphs import (
    Session,
    check_identity,
    check_nothing_asked,
    check_rollback,
    check_schedule,
    explained,
)
from tests.support.random_spec import EXTRAS, TROUBLES, Body, Spec, in_trouble, keep_all, specs
from tests.support.random_vlm import RandomVLM, Rows, Tables
from tests.support.replay import examples

BOTH = Schedule(
    merge=(Merge("width", length=2, layer=0), Merge("height", length=2, layer=-1)),
    prune=(Prune(tokens=3, layer=0), Prune(tokens=1, layer=-1, coverage="global")),
)


def drawn(spec: Spec, count: int) -> st.SearchStrategy[list[Schedule]]:
    """Some schedules for one captured model, as capturing costs most."""
    fit = schedules(blocks=spec.blocks, grid=spec.grid, layers=spec.layers, images=spec.images, merges=2)
    return st.lists(fit, min_size=count, max_size=count)


# --------------------------------------------------------------------------------- whatever is drawn


@settings(max_examples=examples(6))
@given(st.data())
def test_a_random_graph_is_the_oracle(data: st.DataObject) -> None:
    spec = data.draw(specs(trouble=False))
    session = Session(spec, dynamic=data.draw(st.integers(0, 4)) == 4)
    check_nothing_asked(session)
    for schedule in data.draw(drawn(spec, 4)):
        assert check_schedule(session, schedule) in ("rewritten", "idle", "tie")


@settings(max_examples=examples(5))
@given(st.data())
def test_a_graph_in_trouble_is_left_alone_where_it_must_be(data: st.DataObject) -> None:
    spec = data.draw(specs(trouble=True))
    session = Session(spec)
    for schedule in data.draw(drawn(spec, 3)):
        check_schedule(session, schedule)


@settings(max_examples=examples(3))
@given(st.data())
def test_forced_sites_that_keep_all_change_nothing(data: st.DataObject) -> None:
    spec = data.draw(specs(trouble=False))
    session = Session(spec)
    schedule = data.draw(keep_all(spec))
    assert check_identity(session, schedule) is bool(schedule.merge or schedule.prune)


@settings(max_examples=examples(3))
@given(st.data())
def test_a_failing_pass_leaves_any_graph_as_it_was(data: st.DataObject) -> None:
    session = Session(data.draw(specs()))
    for schedule in data.draw(drawn(session.spec, 2)):
        check_rollback(session, schedule, data.draw(st.integers(0, len(PASSES))))


# ------------------------------------------------------------------------------- shapes once at least


@pytest.mark.parametrize(
    "residual", slow_unless(["pre", "post", "parallel", "scale", "skip"], ["post", "parallel"])
)
def test_every_residual_style(residual: str) -> None:
    body = Body(heads=4, kv_heads=2, residual=residual, fused_qkv=True, norm="rms", pool=True)
    session = Session(Spec(vision=body, decoder=body, extras=EXTRAS))
    assert check_schedule(session, BOTH) == "rewritten"


@pytest.mark.parametrize(
    "mask", slow_unless(["causal", "bool", "additive", "keys", "distance"], ["causal", "distance"])
)
def test_every_mask_style(mask: str) -> None:
    padded = mask != "causal"
    spec = Spec(
        text=((2, 3), (0, 5)) if not padded else ((2, 1), (0, 5)),
        padding=(2, 0) if padded else (0, 0),
        mask=mask,
        images=2,
        given_positions=padded,
        extras=("caches",),
    )
    assert check_schedule(Session(spec), BOTH) == "rewritten"


@pytest.mark.parametrize(("words", "graphs"), [(1, 2), (2, 1)])
def test_another_length_has_its_own_graph_where_one_row_was_left(words: int, graphs: int) -> None:
    """A length of 1 is never symbolic: Dynamo's guards must know, and a later rewrite must not."""
    spec = Spec(text=((0, words),) * 2, padding=(0, 0), mask="causal", positions="none")
    session = Session(spec, dynamic=True)
    assert check_schedule(session, Schedule(prune=Prune(keep=0.0, layer=0))) == "rewritten"
    assert len(session.graphs) == graphs
    assert check_schedule(session, Schedule(prune=Prune(tokens=3, layer=0))) == "rewritten"
    assert len(session.graphs) == 1


class ReadsTheStream(RandomVLM):
    """Rows are numbered by the length of the fused stream, which is settled only after it was read."""

    def fuse(self, embeds: Tensor, ids: Tensor, features: Tensor) -> Tensor:
        x = super().fuse(embeds, ids, features)
        self.length = x.shape[1]
        torch._check(ids.shape[1] == 17)
        return x

    def tables(self, rows: Rows) -> Tables:
        order = torch.arange(self.length)[None]
        return super().tables(Rows(rows.ids, order, order, rows.valid) if len(rows.order[0]) == 17 else rows)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "bool", "flag"])
def test_positions_made_of_a_length_that_was_read_late(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is merged or dropped, the rows that are left keep the numbers of the whole prompt."""
    monkeypatch.setattr("tests.support.random_vlm.RandomVLM", ReadsTheStream)
    session = Session(Spec(mask=mask, extras=("hidden",)), dynamic=True)
    session.dynamic = False  # there is no other length
    reads = [n for n in session.captured.gm.graph.nodes if settled_size(n) is not None]
    assert any(made.target is torch.arange for n in reads for made in n.users)
    for schedule in (Schedule(merge=BOTH.merge), Schedule(prune=BOTH.prune), BOTH):
        assert check_schedule(session, schedule) == "rewritten"


@pytest.mark.parametrize("trouble", slow_unless(TROUBLES, TROUBLES[::3]))
def test_every_trouble_is_refused(trouble: str) -> None:
    """Or the list that explains refusals has one too many."""
    session = Session(in_trouble(Spec(text=((2, 3), (1, 4)), padding=(0, 0)), trouble))
    _, _, report = session.rewrite(BOTH)
    assert report.refusals, "this can be rewritten now: move it to the ordinary models"
    outcome = check_schedule(session, BOTH)
    assert outcome == ("in part" if report.rewritten else "refused")


# ------------------------------------------------------------------------------ the properties can fail


def test_a_failed_pass_is_never_explained() -> None:
    for trouble in ("none", *TROUBLES):
        refusal = Refusal(Reason.PASS_FAILED, "RuntimeError: a bug of ours")
        assert not explained(in_trouble(Spec(), trouble), BOTH, refusal)


def test_a_plain_model_has_no_excuse() -> None:
    assert not any(explained(Spec(), BOTH, Refusal(reason, "anything")) for reason in Reason)


# These graphs have no cache, whose masks are all that `rebuild_masks` is for.
@pytest.mark.parametrize("left_out", [run.__name__ for run in PASSES if run.__name__ != "rebuild_masks"])
def test_a_pass_that_is_left_out_is_noticed(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Spec(grid=(4, 4)))
    assert check_schedule(session, BOTH) == "rewritten"
    monkeypatch.setattr(rewrite, "PASSES", tuple(run for run in PASSES if run.__name__ != left_out))
    with pytest.raises((AssertionError, RuntimeError)):
        check_schedule(session, BOTH)


def test_another_choice_of_tokens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Spec(grid=(4, 4)))
    plain = session.rewrite
    other = Schedule(merge=BOTH.merge, prune=(Prune(tokens=3, layer=0, selector="uniform"), BOTH.prune[1]))
    monkeypatch.setattr(session, "rewrite", lambda schedule: plain(other))
    with pytest.raises(AssertionError, match="RMS error"):
        check_schedule(session, BOTH)


def test_a_spec_makes_the_same_model_again() -> None:
    spec = Spec(seed=7, extras=EXTRAS)
    again = eval(repr(spec))
    assert again == spec
    one, two = Session(spec), Session(again)
    assert all(torch.equal(one.plain[name], two.plain[name]) for name in one.plain)
