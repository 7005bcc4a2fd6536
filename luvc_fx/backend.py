"""The TorchDynamo backend: recognise, plan, rewrite in place, hand on to the inner compiler."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from luvc_fx import _compat, costs, markers, telemetry
from luvc_fx.anatomy import Anatomy, recognise
from luvc_fx.capture import with_mend
from luvc_fx.fingerprint import depends_on_us, fingerprint
from luvc_fx.fx_util import drop_dead, live_nodes, op_name
from luvc_fx.generate_warning import warn_of_compile_config, warn_when_generating
from luvc_fx.passes import PASSES, Context
from luvc_fx.passes.plain_collectives import collectives, plain_collectives
from luvc_fx.passes.retarget import Retarget
from luvc_fx.passes.spread_deepstack import deepstack_additions, spread_deepstack
from luvc_fx.plan import Plan, make_plan
from luvc_fx.report import GraphReport, LuvcWarning, NotRewritten, Reason, Refusal, Refused, Report
from luvc_fx.schedule import Schedule

log = logging.getLogger(__name__)

INNERS = ("inductor", "aot_eager", "eager")
ON_NO_MATCH = ("warn", "raise", "ignore")

_given_up: weakref.WeakSet[Any] = weakref.WeakSet()
"""What Dynamo compiles no more: classes of models, and code of functions."""


class LuvcBackend:
    """A callable that Dynamo hands its graphs to; made by `backend`.

    Two backends are equal when they would compile alike, so Dynamo does not recompile for a second one.

    Attributes:
        report: what happened to every graph so far.
        front_door: whether `luvc_fx.compile` made it.
    """

    def __init__(
        self,
        schedule: Schedule,
        inner: str | Callable[..., Any],
        mode: str | None,
        options: dict[str, Any] | None,
        on_no_match: str,
        strict: bool,
    ) -> None:
        self.schedule = schedule
        self.inner = inner
        self.mode = mode
        self.options = dict(options or {})
        self.on_no_match = on_no_match
        self.strict = strict
        self.report = Report()
        self.identity_sites = False
        self.front_door = False
        self._wrapped: Any = None

    def _key(self) -> tuple[Any, ...]:
        options = tuple(sorted((name, repr(option)) for name, option in self.options.items()))
        flags = (self.on_no_match, self.strict, self.identity_sites)
        return (self.schedule, self.inner, self.mode, options, *flags)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LuvcBackend) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @property
    def __name__(self) -> str:
        # torch.compile asks for the name while it wraps a model: the only moment at which a backend
        # can see that model, and so the only one to arrange that generate() warns.
        wrapped = _compat.being_compiled()
        if wrapped is not None:
            self._wrapping(wrapped)
        return "luvc_fx"

    def __repr__(self) -> str:
        return f"luvc_fx.backend({self.schedule!r}, inner={self.inner!r})"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: list[Any],
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        **_: Any,
    ) -> Callable[..., Any]:
        """Rewrite `gm` in place and compile it; the inner compiler's result is returned unwrapped."""
        _refuse_caching_precompile()
        options = {**self.options, **(options or {})}
        _check_options(None, options)
        telemetry.log_graph("captured graph", gm)
        graph_report = self._rewrite(gm)
        self.report.graphs.append(graph_report)
        telemetry.tell(gm, graph_report)
        self._complain(graph_report.refusals)
        started, hits = time.perf_counter(), _compat.cache_hits()
        compiled = self._compile(gm, example_inputs, mode or self.mode, options)
        graph_report.compile_seconds = time.perf_counter() - started
        graph_report.cached = _compat.cache_hits() > hits
        log.info("compiled in %.1f s%s", graph_report.compile_seconds, " from caches" * graph_report.cached)
        return compiled

    def _compile(
        self, gm: fx.GraphModule, example_inputs: list[Any], mode: str | None, options: dict[str, Any]
    ) -> Callable[..., Any]:
        if callable(self.inner):
            return self.inner(gm, example_inputs)
        if self.inner == "inductor":
            key = fingerprint(self.schedule) if depends_on_us(gm.graph) else ""
            return _compat.compile_inductor(gm, example_inputs, mode, options, key)
        if self.inner == "aot_eager":
            return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
        return gm.forward

    def reset(self) -> None:
        """What `torch._dynamo.reset` calls: Dynamo compiles everything afresh."""
        _given_up.clear()

    def _wrapping(self, wrapped: Any) -> None:
        """Note what `torch.compile` puts this backend on."""
        is_module = isinstance(wrapped, torch.nn.Module)
        if not self.front_door and is_module:
            warn_when_generating(wrapped)
        before, self._wrapped = (
            self._wrapped,
            type(wrapped) if is_module else getattr(wrapped, "__code__", None),
        )
        if not self.front_door and self._wrapped is not before:
            warn_of_compile_config(wrapped)
        if self._wrapped is not None and self._wrapped in _given_up:
            self.give_up(getattr(self._wrapped, "__name__", None) or self._wrapped.co_name)

    def give_up(self, function: str) -> None:
        """Say that Dynamo compiles nothing new of `function`, and runs it eagerly without a word."""
        text = (
            f"Dynamo has compiled {function} as often as torch._dynamo.config.recompile_limit allows, and "
            "runs it eagerly, with all visual tokens, for every further schedule and shape; raise that "
            "limit, or call torch._dynamo.reset() between schedules"
        )
        refusal = Refusal(Reason.RECOMPILE_LIMIT, text)
        new = self.report.refuse(refusal)
        if new:
            telemetry.count_refusals([refusal])
        if new or self._raises:
            self._complain([refusal])
        if self._wrapped is not None:
            _given_up.add(self._wrapped)

    @property
    def _raises(self) -> bool:
        return self.strict or self.on_no_match == "raise"

    def _complain(self, refusals: list[Refusal]) -> None:
        if not refusals:
            return
        text = "luvc_fx left this alone: " + "; ".join(map(str, refusals))
        if self._raises:
            raise NotRewritten(text)
        if self.on_no_match == "warn":
            warnings.warn(text, LuvcWarning, stacklevel=2)

    def _rewrite(self, gm: fx.GraphModule) -> GraphReport:
        report = GraphReport(nodes_before=len(gm.graph.nodes), nodes_after=len(gm.graph.nodes))
        report.compile_id, report.recompile_reason = _compat.compile_id(), _compat.recompile_reason()
        started = time.perf_counter()
        captured = None
        changes = bool(self.schedule.prune or self.schedule.merge)
        if changes and (deepstack_additions(gm.graph) or collectives(gm.graph)):
            captured = _save(gm)
        try:
            if captured is not None:
                plain_collectives(gm.graph)
            if captured is not None and self.schedule.prune:
                spread_deepstack(gm.graph)
            anatomy = recognise(gm.graph)
            plan = make_plan(self.schedule, anatomy, self.identity_sites)
        except Exception as error:
            _restore(gm, captured)
            self._failed(report, error, "recognition failed and the graph was left as it is")
            return report
        _describe(report, anatomy, plan, self.schedule)
        report.refusals = [with_mend(refusal, gm, self.front_door) for refusal in report.refusals]
        report.milliseconds["recognise and plan"] = (time.perf_counter() - started) * 1e3
        report.flops_before, report.kv_bytes_before = _costs(gm.graph, report)
        report.flops_after, report.kv_bytes_after = report.flops_before, report.kv_bytes_before
        wants_grid = anatomy.encoder is not None and anatomy.encoder.slots is not None
        if plan.empty and not anatomy.cache_attentions and not (wants_grid and self.schedule.prune):
            _restore(gm, captured)
            return report
        saved = captured or _save(gm)
        try:
            _refuse_training(gm.graph)
            self._run_passes(gm, anatomy, plan, report)
        except Exception as error:
            _restore(gm, saved)
            if anatomy.cache_attentions:
                # The captured mask only stands for the real one: without the pass the answer is wrong.
                raise
            self._rolled_back(report, anatomy, error)
            return report
        report.nodes_after = len(gm.graph.nodes)
        report.flops_after, report.kv_bytes_after = _costs(gm.graph, report)
        return report

    def _rolled_back(self, report: GraphReport, anatomy: Anatomy, error: Exception) -> None:
        report.inserted.clear()
        report.merged_grid = None
        report.fused = report.original
        report.tokens_per_layer = [report.original or 0] * len(report.tokens_per_layer)
        if isinstance(error, Refused):
            report.refusals.append(error.refusal)
            return
        self._failed(report, error, "a luvc_fx pass failed and was rolled back")

    def _failed(self, report: GraphReport, error: Exception, what: str) -> None:
        """An error of our own: it stops nobody who is not strict."""
        if self.strict:
            raise error
        report.refusals.append(Refusal(Reason.PASS_FAILED, f"{type(error).__name__}: {error}"))
        log.warning(what, exc_info=error)

    def _run_passes(self, gm: fx.GraphModule, anatomy: Anatomy, plan: Plan, report: GraphReport) -> None:
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


def backend(
    schedule: Schedule | str = "image",
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    on_no_match: str = "warn",
    strict: bool = False,
    capture_scalars: bool = True,
    recompile_limit: int | None = _compat.RECOMPILE_LIMIT,
) -> LuvcBackend:
    """A backend for ``torch.compile(model, backend=luvc_fx.backend(schedule))``.

    For forward calls; `generate` does not go through `torch.compile` (see `luvc_fx.compile`). In a
    decode loop of your own over the cache of a merged prompt pass `position_ids`: the cache is then
    shorter than the prompt. Captured logits and hidden states have the surviving rows.

    Args:
        schedule: what to merge and prune, or the name of a preset.
        inner: ``"inductor"``, ``"aot_eager"``, ``"eager"`` or a Dynamo backend of your own.
        mode, options: as of `torch.compile`, for Inductor; here they may both be given.
        on_no_match: ``"warn"``, ``"raise"`` or ``"ignore"`` what the schedule asks for and a graph
            does not allow. Such a graph compiles as if luvc_fx were not there.
        strict: raise on every refusal, and let an error in a pass of ours through.
        capture_scalars: switch on ``torch._dynamo.config.capture_scalar_outputs``. Without it Dynamo ends
            the graph at the model's check of the image tokens, and tokens can be pruned but not merged.
        recompile_limit: raise ``torch._dynamo.config.recompile_limit`` to at least this; None leaves it.
            Dynamo counts the compilations of a function (each schedule, each shape that is not dynamic)
            and runs it eagerly beyond that limit; should it come to that, `on_no_match` says what happens.

    Dynamo's settings hold **for the whole process**, from torch 2.13 on for the calling thread.

    Raises:
        ValueError: for an argument that is not allowed.
        RuntimeError: while ``caching_precompile`` is on; it would hand out graphs of other schedules.
    """
    parsed = Schedule.of(schedule)
    if not callable(inner) and inner not in INNERS:
        raise ValueError(f"inner is {inner!r}; allowed: {', '.join(map(repr, INNERS))} or a callable")
    if on_no_match not in ON_NO_MATCH:
        raise ValueError(f"on_no_match is {on_no_match!r}; allowed: {', '.join(map(repr, ON_NO_MATCH))}")
    if (mode is not None or options) and inner != "inductor":
        raise ValueError(f"mode and options are Inductor's; inner is {inner!r}")
    _check_options(mode, options)
    _refuse_caching_precompile()
    _compat.watch_recompile_limit(_give_up)
    if capture_scalars:
        _compat.enable_scalar_capture()
    if recompile_limit is not None:
        _compat.allow_recompiles(recompile_limit)
    return LuvcBackend(parsed, inner, mode, options, on_no_match, strict)


def prepare(model: torch.nn.Module) -> torch.nn.Module:
    """Make a fresh transformers model capture as one graph; returns it.

    Its output hooks are otherwise installed inside the first traced forward, which then falls into
    pieces. One eager forward does the same.
    """
    _compat.install_output_hooks(model)
    return model


def _check_options(mode: str | None, options: dict[str, Any] | None) -> None:
    """Raise `ValueError` for what Inductor does not know, whichever the inner compiler is."""
    for key in options or {}:
        if key.startswith("luvc."):
            raise ValueError(
                f"{key!r} is an option of backend='luvc_fx' (the name); here it is an argument of "
                "luvc_fx.backend(...)"
            )
    if mode is not None or options:
        _compat.inductor_options(mode, options)


def _give_up(compiler_fn: Any, function: str, limit: int) -> None:
    """Dynamo has reached its limit for a function while it compiled for `compiler_fn`."""
    found = getattr(compiler_fn, "compiler_fn", compiler_fn)  # torch.compile wraps a backend
    if hasattr(found, "from_options"):  # ours by its name
        found = found.from_options(None, compiler_fn.kwargs.get("options"))
    if isinstance(found, LuvcBackend):
        found.give_up(f"{function}, {limit} times,")


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


def _refuse_caching_precompile() -> None:
    if _compat.caching_precompile():
        raise RuntimeError(
            "torch._dynamo.config.caching_precompile is on. Its cache does not know about backends and "
            "would return a graph compiled for another schedule; switch it off to use luvc_fx"
        )
