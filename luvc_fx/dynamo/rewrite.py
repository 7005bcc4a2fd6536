"""One graph: recognise, plan, rewrite in place, and roll back what fails."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time

from torch import fx

from luvc_fx import _compat
from luvc_fx.anatomy import costs
from luvc_fx.anatomy.recognise import Anatomy, recognise
from luvc_fx.dynamo.advice import with_mend
from luvc_fx.graph import markers
from luvc_fx.graph.nodes import drop_dead, live_nodes, op_name
from luvc_fx.passes import PASSES, Context
from luvc_fx.passes.prepare.plain_collectives import collectives, plain_collectives
from luvc_fx.passes.prepare.spread_deepstack import deepstack_additions, spread_deepstack
from luvc_fx.passes.support.retarget import Retarget
from luvc_fx.plan import Plan, make_plan
from luvc_fx.report import GraphReport, Reason, Refusal, Refused
from luvc_fx.schedule import Schedule

log = logging.getLogger(__name__)


def rewrite(
    gm: fx.GraphModule, schedule: Schedule, strict: bool, front_door: bool, identity_sites: bool
) -> GraphReport:
    """Do in `gm`, in place, what `schedule` asks for and the graph allows; say what became of it.

    Args:
        strict: let an error of our own through; else the graph is left as it was.
        front_door: whether `luvc_fx.compile` asks, for the reasons' advice.
        identity_sites: insert sites that keep all tokens, too (for tests).

    Raises:
        Exception: whatever a pass raised where the captured graph could not run as it is: it reads a
            shortened cache, whose masks only a pass can build.
    """
    report = GraphReport(nodes_before=len(gm.graph.nodes), nodes_after=len(gm.graph.nodes))
    report.compile_id, report.recompile_reason = _compat.compile_id(), _compat.recompile_reason()
    started = time.perf_counter()
    captured = None
    changes = bool(schedule.prune or schedule.merge)
    if changes and (deepstack_additions(gm.graph) or collectives(gm.graph)):
        captured = _save(gm)
    try:
        if captured is not None:
            plain_collectives(gm.graph)
        if captured is not None and schedule.prune:
            spread_deepstack(gm.graph)
        anatomy = recognise(gm.graph)
        plan = make_plan(schedule, anatomy, identity_sites)
    except Exception as error:
        _restore(gm, captured)
        _failed(report, error, strict, "recognition failed and the graph was left as it is")
        return report
    _describe(report, anatomy, plan, schedule)
    report.refusals = [with_mend(refusal, gm, front_door) for refusal in report.refusals]
    report.milliseconds["recognise and plan"] = (time.perf_counter() - started) * 1e3
    report.flops_before, report.kv_bytes_before = _costs(gm.graph, report)
    report.flops_after, report.kv_bytes_after = report.flops_before, report.kv_bytes_before
    wants_grid = anatomy.encoder is not None and anatomy.encoder.slots is not None
    if plan.empty and not anatomy.cache_attentions and not (wants_grid and schedule.prune):
        _restore(gm, captured)
        return report
    saved = captured or _save(gm)
    try:
        _refuse_training(gm.graph)
        _run_passes(gm, anatomy, plan, report)
    except Exception as error:
        _restore(gm, saved)
        if anatomy.cache_attentions:
            # The captured mask only stands for the real one: without the pass the answer is wrong.
            raise
        _rolled_back(report, anatomy, error, strict)
        return report
    report.nodes_after = len(gm.graph.nodes)
    report.flops_after, report.kv_bytes_after = _costs(gm.graph, report)
    return report


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


def _run_passes(gm: fx.GraphModule, anatomy: Anatomy, plan: Plan, report: GraphReport) -> None:
    drop_dead(gm.graph)
    spaces = [part.axes for part in (anatomy.encoder, anatomy.decoder) if part is not None]
    context = Context(gm.graph, anatomy, plan, report, Retarget(gm.graph, *spaces))
    for run in PASSES:
        started = time.perf_counter()
        run(context)
        report.milliseconds[run.__name__] = (time.perf_counter() - started) * 1e3
    started = time.perf_counter()
    context.retarget.advance()
    drop_dead(gm.graph)
    if any(markers.is_call(node, markers.CACHE_MASK) for node in gm.graph.nodes):
        raise Refused(Reason.CACHE, "a mask over a shortened cache is used outside of attention")
    gm.graph.lint()
    gm.recompile()
    report.milliseconds["retarget"] = (time.perf_counter() - started) * 1e3


def _costs(graph: fx.Graph, report: GraphReport) -> tuple[int, list[int]]:
    """FLOPs and cache of a graph; what cannot be counted is noted, and stops nothing."""
    started = time.perf_counter()
    try:
        return costs.flops(graph), costs.kv_bytes(graph)
    except Exception as error:
        report.notes.append(f"its costs could not be counted: {type(error).__name__}: {error}")
        return 0, []
    finally:
        spent = (time.perf_counter() - started) * 1e3
        report.milliseconds["costs"] = report.milliseconds.get("costs", 0.0) + spent


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
    if not schedule.merge or encoder is None or encoder.slots is not None:
        return refusal
    return dataclasses.replace(refusal, text=f"{refusal.text}, so nothing is merged either")


def _save(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the graph to roll back to; placeholders keep what Dynamo hung on them."""
    saved = copy.deepcopy(gm.graph)
    for old, new in zip(gm.graph.nodes, saved.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return saved


def _restore(gm: fx.GraphModule, saved: fx.Graph | None) -> None:
    """Roll back to what `_save` gave, if anything."""
    if saved is not None:
        gm.graph = saved
        gm.recompile()


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
