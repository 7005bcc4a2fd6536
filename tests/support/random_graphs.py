"""One captured random model, its eager oracle, and what must hold for every schedule on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from luvc_fx import _compat
from luvc_fx.dynamo import rewrite
from luvc_fx.dynamo.backend import LuvcBackend
from luvc_fx.passes import PASSES, Context
from luvc_fx.report import GraphReport, Reason, Refusal
from luvc_fx.schedule import Schedule
from tests.support.cases import GAP
from tests.support.oracle import Grid, merge_grid, select
from tests.support.random_spec import IMAGE, Spec, inputs
from tests.support.random_vlm import Hooks, RandomVLM, Rows, make
from tests.support.replay import Captured, assert_close, code, quietly

NO_ENCODER = ("columns", "channels last", "register behind", "two features")
"""Troubles of which nothing can be merged, and the grid stays unknown."""


def explained(spec: Spec, schedule: Schedule, refusal: Refusal) -> bool:
    """Whether the spec says that this may be refused. Nothing else may be, and no pass may ever fail."""
    merges = bool(schedule.merge)
    if merges and spec.trouble in NO_ENCODER and refusal.reason is Reason.SCHEDULE:
        # counts that fit the merged grid need not fit the whole one
        return True
    reason, trouble = refusal.reason, spec.trouble
    if spec.patches == 1 and reason in (Reason.NO_GRID, Reason.SCHEDULE):
        # one patch has no neighbour, and a single token shows no grid
        return merges
    if trouble in NO_ENCODER[:2]:
        # the grid is not flattened row by row from `[I, C, H, W]`
        return merges and reason is Reason.NO_GRID
    if trouble in ("register behind", "places in each block", "table"):
        # rows that a merge would have to move, or a value without a batch axis that it would have to cut
        return merges and reason is Reason.TOKEN_AXIS
    if trouble == "two features":
        # the projector reads the stream at two places, so no value behind the last block is all of it
        return merges and reason is Reason.RESIDUAL_STREAM
    if trouble == "two fusions":
        return reason is Reason.NO_FUSION
    if trouble == "uneven":
        return reason is Reason.UNEVEN_BATCH
    if trouble in ("flat rotary", "fixed cut"):
        return reason is Reason.TOKEN_AXIS
    if trouble == "shortcut":
        return reason is Reason.RESIDUAL_STREAM
    return False


# ------------------------------------------------------------------------------------------- the oracle


class Budget(Hooks):
    """The merges and prunes of a schedule, done eagerly by indexing.

    Attributes:
        gaps: how far every decision was from its runner-up.
        tokens: visual tokens of one row that enter each decoder layer.
        rows: what is left of the prompt.
    """

    def __init__(self, spec: Spec, schedule: Schedule, grid_known: bool = True) -> None:
        self.spec, self.grid_known = spec, grid_known
        self.height, self.width = spec.grid
        self.merges = schedule.merges_at(spec.blocks)
        self.schedule = schedule
        self.grid: Grid | None = None
        self.gaps: list[float] = []
        self.tokens: list[int] = []
        self.rows: Rows | None = None

    def block(self, index: int, x: Tensor, keys: Tensor) -> Tensor:
        lead, images, channels = self.spec.prefix, x.shape[0], x.shape[2]
        seen: Tensor | None = keys[:, :, lead:].transpose(1, 2).flatten(2)
        for _, merge in (site for site in self.merges if site[0] == index):
            tokens = x[:, lead:].reshape(images, self.height, self.width, channels)
            grid = Grid.of(tokens) if self.grid is None else replace(self.grid, x=tokens)
            if seen is not None:  # a further merge at this site compares what the keys have become
                grid, seen = replace(grid, keys=seen.reshape(images, self.height, self.width, -1)), None
            target = merge.target(self.height if merge.axis == "height" else self.width)
            self.grid = merge_grid(grid, merge.axis, target, self.gaps, merge.pairing, merge.feature)
            self.height, self.width = self.grid.x.shape[1:3]
            x = torch.cat([x[:, :lead], self.grid.x.reshape(images, -1, channels)], dim=1)
        return x

    def fuse(self, embeds: Tensor, rows: Rows, features: Tensor) -> tuple[Tensor, Rows]:
        batch, length = rows.ids.shape
        rows = Rows(*(part.expand(batch, length) for part in rows))
        patches, each = self.spec.patches, features.shape[0] // batch
        fused, parts = [], []
        for row in range(batch):
            visual = (rows.ids[row] == IMAGE).nonzero()[:, 0]
            mine = features[row * each : (row + 1) * each].reshape(-1, features.shape[-1])
            stands = torch.arange(len(visual))
            if self.grid is not None:
                own = self.grid.slots[row * each : (row + 1) * each].reshape(each, -1)
                stands = (own + torch.arange(each)[:, None] * patches).reshape(-1)
            stays = rows.ids[row] != IMAGE
            stays[visual[stands]] = True
            order = stays.nonzero()[:, 0]
            now = rows.ids[row, order] == IMAGE
            places = order.clone()
            places[now] = visual[stands]
            x = embeds[row, order].clone()
            x[now] = mine
            fused.append(x)
            parts.append((rows.ids[row, order], order, rows.positions[row, places], rows.valid[row, order]))
        return torch.stack(fused), Rows(*(torch.stack(part) for part in zip(*parts, strict=True)))

    def layer(self, index: int, x: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        visual = rows.ids == IMAGE
        count = int(visual[0].sum())
        whole = len(visual[0].nonzero()) == self.fused(rows)
        prunes = dict(self.schedule.prunes_at(self.spec.layers, self.fused(rows)))
        if index in prunes:
            keep = prunes[index].count(self.fused(rows))
            places = visual.nonzero()[:, 1].reshape(len(visual), count)
            tokens = torch.stack([part[at] for part, at in zip(x, places, strict=True)])
            grid = (self.height, self.width) if whole and self.grid_known else None
            kept = select(tokens, prunes[index], keep, index, grid, self.gaps)
            stays = ~visual
            stays.scatter_(1, places.gather(1, kept), True)
            left = stays.nonzero()[:, 1].reshape(len(stays), -1)
            x = torch.stack([part[at] for part, at in zip(x, left, strict=True)])
            rows = Rows(*(part.gather(1, left) for part in rows))
            count = keep
        self.tokens.append(count)
        self.rows = rows
        return x, rows

    def fused(self, rows: Rows) -> int:
        """Visual tokens of one row at the fusion."""
        return self.spec.images * self.height * self.width

    @property
    def gap(self) -> float:
        """The least of `gaps`."""
        return min(self.gaps, default=math.inf)


# ------------------------------------------------------------------------------------------ the capture


Made = tuple[Callable[..., Any], fx.GraphModule, GraphReport]
"""What a backend compiled, the graph that it made, and its report on it."""


def rewritten(captured: Captured, backend: LuvcBackend) -> Made:
    """A copy of the graph, handed to `backend`."""
    gm = captured.copy()
    compiled = backend(gm, list(captured.example_inputs))
    return compiled, gm, backend.report.graphs[-1]


class Session:
    """A model of a spec, captured once; `run` puts any graph in the place of the captured one.

    What the captured function returns is put together by Dynamo's own code, so a rewritten graph meets
    its true caller.

    Attributes:
        graphs: what was captured; a second one where another length did not pass the guards of the first.
    """

    def __init__(self, spec: Spec, dynamic: bool = False) -> None:
        self.spec, self.dynamic = spec, dynamic
        self.model: RandomVLM = make(spec)
        self.batch = inputs(spec)
        self._capture(None)

    def _capture(self, within: LuvcBackend | None) -> None:
        """Capture the model, with `within` at work while Dynamo still collects guards."""
        torch._dynamo.reset()
        self.graphs: list[Captured] = []
        self.made: list[Made] = []
        self.forward: Callable[..., Any] | None = None
        self.calls = 0
        self.within = within
        _compat.dynamo_patches.install()
        self.compiled = torch.compile(self.model, backend=self._backend, dynamic=self.dynamic)
        with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.no_grad():
            self.plain = self.compiled(**self.batch)
        assert len(self.graphs) == 1, f"captured {len(self.graphs)} graphs"
        self.captured = self.graphs[0]
        self.code = code(self.captured.gm.graph)

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        assert not self.graphs or self.within, "Dynamo captures again"
        captured = Captured(gm, tuple(example_inputs))
        again = bool(self.graphs)
        self.graphs.append(captured)
        if self.within is not None:
            self.made.append(rewritten(captured, self.within))
        now = self.made[-1][0] if again else None

        def call(*args: Any) -> Any:
            self.calls += 1
            return (now or self.forward or gm.forward)(*args)

        return call

    @torch.no_grad()
    def run(self, forward: Callable[..., Any] | None, **batch: Tensor) -> dict[str, Tensor]:
        """The outputs with `forward` as the graph, on `batch` or what was captured.

        Another length than the captured one may make Dynamo capture again, and its own graph runs.
        """
        before, self.forward = self.calls, forward
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            out = self.compiled(**(batch or self.batch))
        assert self.calls == before + 1, "the graph did not run"
        assert len(self.graphs) == 1 or batch, "Dynamo captured again"
        return out

    def rewrite(self, schedule: Schedule, identity_sites: bool = False) -> Made:
        """What the backend makes of a copy of the graph.

        One with symbolic sizes is captured anew. A pass may put guards on them (a length of 1 is never
        symbolic, so where one row is left, that prompt has its own graph): they hold for what Dynamo
        compiles at that moment, and would make later rewrites of the same graph wrong without a word.
        """
        backend = LuvcBackend(schedule, "eager", on_no_match="ignore", identity_sites=identity_sites)
        if self.dynamic:
            self._capture(backend)
            return self.made[0]
        return rewritten(self.captured, backend)

    @torch.no_grad()
    def oracle(
        self, schedule: Schedule, grid_known: bool = True, **batch: Tensor
    ) -> tuple[dict[str, Tensor], Budget]:
        """The eager outputs under a schedule."""
        budget = Budget(self.spec, schedule, grid_known)
        return self.model(**(batch or self.batch), hooks=budget), budget


# --------------------------------------------------------------------------------------- the properties


def compare(got: dict[str, Tensor], want: dict[str, Tensor], valid: Tensor, tolerance: float = 2e-5) -> None:
    """Every output; rows of padding mean nothing."""
    assert got.keys() == want.keys()
    for name, mine in got.items():
        theirs = want[name]
        assert mine.shape == theirs.shape, f"{name}: {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
        if mine.dim() == 4:
            mine, theirs = mine.transpose(1, 2), theirs.transpose(1, 2)
        if name.startswith(("keys", "values", "hidden", "logits")) and mine.shape[1] > 1:
            kept = valid[:, -mine.shape[1] :]
            if mine.shape[:2] == kept.shape:
                mine, theirs = mine[kept], theirs[kept]
        assert torch.isfinite(mine).all(), f"{name} is not finite"
        assert_close(mine, theirs, tolerance, name)


def check_schedule(session: Session, schedule: Schedule) -> str:
    """The graph under a schedule is the oracle's, or is left alone for a reason that the spec gives.

    Returns:
        "rewritten", "in part" (the merges were refused), "refused", "idle" (nothing to do) or "tie" (a
        decision too close to call; all but the numbers was compared).
    """
    spec = session.spec
    compiled, gm, report = session.rewrite(schedule)
    for refusal in report.refusals:
        assert explained(spec, schedule, refusal), f"unexplained: {refusal}"
    if not report.rewritten:
        assert code(gm.graph) == session.code, "a graph that was left alone differs"
        got = session.run(compiled)
        assert all(torch.equal(got[name], session.plain[name]) for name in session.plain)
        if schedule == Schedule():
            return "idle"
        if not report.refusals:
            _, budget = session.oracle(schedule)
            assert set(budget.tokens) == {spec.images * spec.patches}
            return "idle"
        return "refused"
    gm.graph.lint()
    effective = Schedule(prune=schedule.prune) if report.refusals else schedule
    no_grid = spec.trouble in NO_ENCODER or spec.patches == 1
    assert report.grid == spec.grid or (report.grid is None and no_grid), report.grid
    want, budget = session.oracle(effective, report.grid is not None)
    assert report.tokens_per_layer == budget.tokens
    assert report.encoder_blocks == (0 if report.grid is None else spec.blocks)
    assert report.decoder_layers == spec.layers
    check_text(session, budget)
    got = session.run(compiled)
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in want.items()}
    if budget.gap < GAP:
        return "tie"
    assert budget.rows is not None
    compare(got, want, budget.rows.valid)
    if session.dynamic and not session.spec.padding[0]:
        check_another_length(session, compiled, effective, report.grid is not None)
    return "in part" if report.refusals else "rewritten"


def check_text(session: Session, budget: Budget) -> None:
    """All text rows are left, in order, where they were."""
    assert budget.rows is not None
    ids = session.batch["ids"]
    for row, left in zip(ids, budget.rows.order, strict=True):
        text = (row != IMAGE).nonzero()[:, 0]
        assert torch.equal(left[row[left] != IMAGE], text)


def check_another_length(
    session: Session, compiled: Callable[..., Any], schedule: Schedule, grid_known: bool
) -> None:
    """A longer prompt with other pixels: by the same graph, or by one that Dynamo's guards ask for."""
    batch = inputs(session.spec, seed=1, longer=3)
    want, budget = session.oracle(schedule, grid_known, **batch)
    got = session.run(compiled, **batch)
    if budget.gap >= GAP:
        assert budget.rows is not None
        compare(got, want, budget.rows.valid)


def check_nothing_asked(session: Session) -> None:
    """The empty schedule leaves every node the same object and the output bit-equal."""
    gm = session.captured.copy()
    graph, before = gm.graph, picture(gm.graph)
    backend = quietly(Schedule())
    compiled = backend(gm, list(session.captured.example_inputs))
    report = backend.report.graphs[-1]
    assert (report.refusals, report.inserted, report.rewritten) == ([], [], False)
    assert gm.graph is graph
    assert picture(gm.graph) == before
    got = session.run(compiled)
    assert all(torch.equal(got[name], session.plain[name]) for name in session.plain)


def check_identity(session: Session, keep_all: Schedule) -> bool:
    """Insertions forced by a schedule that keeps all change no number; whether there were any."""
    compiled, gm, report = session.rewrite(keep_all, identity_sites=True)
    for refusal in report.refusals:
        assert explained(session.spec, keep_all, refusal), f"unexplained: {refusal}"
    gm.graph.lint()
    got = session.run(compiled)
    valid = session.batch.get("valid", torch.ones_like(session.batch["ids"], dtype=torch.bool))
    compare(got, session.plain, valid, 2e-6 if report.rewritten else 0.0)
    return report.rewritten


def check_rollback(session: Session, schedule: Schedule, place: int) -> None:
    """A pass that fails after doing harm leaves the captured graph, which still runs."""

    def break_graph(context: Context) -> None:
        graph = context.graph
        victim = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_after(victim):
            graph.call_function(torch.ops.aten.neg.default, (victim,))
        raise RuntimeError("a bug of ours")

    passes = rewrite.PASSES
    rewrite.PASSES = (*PASSES[:place], break_graph, *PASSES[place:])
    try:
        compiled, gm, report = session.rewrite(schedule)
    finally:
        rewrite.PASSES = passes
    assert not report.rewritten
    assert report.nodes_after == len(gm.graph.nodes) == len(session.captured.gm.graph.nodes)
    for old, new in zip(session.captured.gm.graph.nodes, gm.graph.nodes, strict=True):
        assert (old.op, old.name, old.target, str(old.args), str(old.kwargs)) == (
            *(new.op, new.name, new.target),
            *(str(new.args), str(new.kwargs)),
        )
        assert old.meta.get("example_value") is new.meta.get("example_value")
        assert getattr(old, "_dynamo_source", None) == getattr(new, "_dynamo_source", None)
    got = session.run(compiled)
    assert all(torch.equal(got[name], session.plain[name]) for name in session.plain)


def picture(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """All there is to say about each node, by identity."""
    return [(id(n), n.op, n.name, n.target, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes]
