"""One graph: recognise, plan, rewrite in place, and roll back what fails."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

from torch import fx

from luvc_fx import _compat
from luvc_fx.anatomy import costs
from luvc_fx.anatomy.recognise import Anatomy, recognise
from luvc_fx.dynamo.advice import with_advice
from luvc_fx.graph.nodes import drop_dead, live_nodes, op_name
from luvc_fx.graph.notes import LAYOUT
from luvc_fx.passes import PASSES, PREPARE, Context
from luvc_fx.plan import Plan, make_plan
from luvc_fx.report import GraphReport, Reason, Refusal, Refused
from luvc_fx.schedule import Schedule

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Rewriting:
    """What `rewrite` did to a graph.

    Attributes:
        undo: puts the captured graph back, because of an error, and says so in the report. None where nothing
            was changed, or where the captured graph could not run as it is.
    """

    report: GraphReport
    undo: Callable[[Exception], None] | None = None


def rewrite(
    gm: fx.GraphModule,
    schedule: Schedule,
    strict: bool,
    front_door: bool,
    identity_sites: bool,
    site_compiler: str = "eager",
) -> Rewriting:
    """Rewrite `gm` in place.

    Args:
        strict: let an error of our own through; else the graph is left as it was.
        front_door: whether `luvc_fx.compile` asks, for the reasons' advice.
        identity_sites: insert sites that keep all tokens, too (for tests).
        site_compiler: who compiles sites that are operators: a name in `site_operator.COMPILERS`.

    Raises:
        Exception: whatever a pass raised where the captured graph could not run as it is: it reads a
            shortened cache, whose masks only a pass can build.
    """
    report = GraphReport(nodes_before=len(gm.graph.nodes), nodes_after=len(gm.graph.nodes))
    report.compile_id, report.recompile_reason = _compat.compile_id(), _compat.recompile_reason()
    backup = _Backup(gm)
    try:
        _prepare(gm.graph, schedule, backup, report)
        with _timed(report, "recognise and plan"):
            anatomy = recognise(gm.graph)
            plan = make_plan(schedule, anatomy, identity_sites)
    except Exception as error:
        backup.restore()
        _failed(report, error, strict, "recognition failed and the graph was left as it is")
        return Rewriting(report)
    _describe(report, anatomy, plan, schedule)
    report.refusals = [with_advice(refusal, gm, front_door) for refusal in report.refusals]
    report.flops_before, report.kv_bytes_before = _costs(gm.graph, report)
    report.flops_after, report.kv_bytes_after = report.flops_before, report.kv_bytes_before
    if _is_nothing_to_do(anatomy, plan, schedule):
        backup.restore()
        return Rewriting(report)
    backup.save()
    try:
        if anatomy.encoder is not None:
            anatomy.encoder.leaving[0].meta[LAYOUT] = anatomy.encoder.layout
        _refuse_training(gm.graph)
        _run_passes(gm, anatomy, plan, report, site_compiler)
    except Exception as error:
        backup.restore()
        if anatomy.cache_attentions:
            # The captured mask only stands for the real one: without the pass the answer is wrong.
            raise
        _rolled_back(report, anatomy, error, strict)
        return Rewriting(report)
    report.nodes_after = len(gm.graph.nodes)
    report.flops_after, report.kv_bytes_after = _costs(gm.graph, report)

    def undo(error: Exception) -> None:
        backup.restore()
        report.nodes_after = report.nodes_before
        report.flops_after, report.kv_bytes_after = report.flops_before, report.kv_bytes_before
        _rolled_back(report, anatomy, error, strict)

    return Rewriting(report, None if anatomy.cache_attentions else undo)


class _Backup:
    """The captured graph, copied before the first change and put back when something fails."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph: fx.Graph | None = None

    def save(self) -> None:
        """Copy the graph, unless that has been done; placeholders keep what Dynamo hung on them."""
        if self.graph is not None:
            return
        self.graph = copy.deepcopy(self.gm.graph)
        _compat.copy_sources(self.gm.graph, self.graph)

    def restore(self) -> None:
        """Put the copy back; a graph of which there is none has not been changed."""
        if self.graph is not None:
            self.gm.graph = self.graph
            self.gm.recompile()


@contextlib.contextmanager
def _timed(report: GraphReport, what: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        spent = (time.perf_counter() - started) * 1e3
        report.milliseconds[what] = report.milliseconds.get(what, 0.0) + spent


def _prepare(graph: fx.Graph, schedule: Schedule, backup: _Backup, report: GraphReport) -> None:
    for step in PREPARE:
        with _timed(report, step.__name__):
            edit = step(graph, schedule)
            if edit is not None:
                backup.save()
                edit()


def _is_nothing_to_do(anatomy: Anatomy, plan: Plan, schedule: Schedule) -> bool:
    asked_for_representatives = (
        anatomy.encoder is not None and anatomy.encoder.representatives_marker is not None
    )
    return plan.empty and not anatomy.cache_attentions and not (asked_for_representatives and schedule.prune)


def _run_passes(
    gm: fx.GraphModule, anatomy: Anatomy, plan: Plan, report: GraphReport, site_compiler: str
) -> None:
    drop_dead(gm.graph)
    context = Context(gm.graph, anatomy, plan, report, site_compiler)
    for run in PASSES:
        with _timed(report, run.__name__):
            run(context)
    with _timed(report, "lint and recompile"):
        drop_dead(gm.graph)
        gm.graph.lint()
        gm.recompile()


def _rolled_back(report: GraphReport, anatomy: Anatomy, error: Exception, strict: bool) -> None:
    report.inserted.clear()
    report.merged_grid = None
    report.fused = report.original
    report.tokens_per_layer = [report.original or 0] * len(report.tokens_per_layer)
    if isinstance(error, Refused):
        report.refusals.append(error.refusal)
        return
    _failed(report, error, strict, "a luvc_fx pass failed and was rolled back")


def _failed(report: GraphReport, error: Exception, strict: bool, what: str) -> None:
    """An error of our own: it stops nobody who is not strict."""
    if strict:
        raise error
    report.refusals.append(Refusal(Reason.PASS_FAILED, f"{type(error).__name__}: {error}"))
    log.warning(what, exc_info=error)


def _costs(graph: fx.Graph, report: GraphReport) -> tuple[int, list[int]]:
    """FLOPs and cache of a graph; what cannot be counted is noted, and stops nothing."""
    with _timed(report, "costs"):
        try:
            return costs.flops(graph), costs.kv_bytes(graph)
        except Exception as error:
            report.notes.append(f"its costs could not be counted: {type(error).__name__}: {error}")
            return 0, []


def _describe(report: GraphReport, anatomy: Anatomy, plan: Plan, schedule: Schedule) -> None:
    report.kind = anatomy.kind
    if anatomy.encoder is not None:
        report.encoder_blocks = len(anatomy.encoder.leaving)
        report.images, report.lead = anatomy.encoder.images, anatomy.encoder.lead
        report.grid = anatomy.encoder.grid
    if anatomy.decoder is not None:
        report.decoder_layers = len(anatomy.decoder.entering)
        report.batch = anatomy.decoder.batch
        report.grid = report.grid or anatomy.decoder.grid
    report.original, report.fused = plan.original, plan.fused
    report.tokens_per_layer = plan.tokens_per_layer
    report.refusals = [*plan.refusals]
    report.notes += plan.notes
    if schedule.merge or schedule.prune:
        report.refusals += [_of_both(refusal, anatomy, schedule) for refusal in anatomy.refusals]
    if schedule.merge:
        report.refusals += anatomy.encoder_refusals
    if plan.prunes and plan.merged_grid is None and anatomy.decoder is not None and not anatomy.decoder.grid:
        report.notes.append("the token grid is not known here: blocks are runs of neighbours, never 2 x 2")


def _of_both(refusal: Refusal, anatomy: Anatomy, schedule: Schedule) -> Refusal:
    """What keeps a decoder from being recognised keeps the encoder in its graph from merging."""
    encoder = anatomy.encoder
    if not schedule.merge or encoder is None or encoder.representatives_marker is not None:
        return refusal
    return dataclasses.replace(refusal, text=f"{refusal.text}, so nothing is merged either")


def _refuse_training(graph: fx.Graph) -> None:
    """Dropout draws per row: with other rows the gradient is not the one that was asked for."""
    live = live_nodes(graph)
    for node in graph.nodes:
        if node not in live:
            continue
        name = op_name(node)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else False)
        drops = name == "dropout" and training is True
        drops = drops or (name == "scaled_dot_product_attention" and bool(node.kwargs.get("dropout_p")))
        if drops:
            raise Refused(Reason.TRAINING, "the model is in training mode; call model.eval()", node)
