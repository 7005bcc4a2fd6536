"""The TorchDynamo backend: have each graph rewritten, and hand it on to the inner compiler."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from luvc_fx import _compat
from luvc_fx.dynamo.compiled_site import site_compiler
from luvc_fx.dynamo.fingerprint import depends_on_us, fingerprint
from luvc_fx.dynamo.generate_warning import warn_of_compile_config, warn_when_generating
from luvc_fx.dynamo.rewrite import rewrite
from luvc_fx.dynamo.untested import warn_of_untested_versions
from luvc_fx.methods.checks import check_bool, check_choice, check_module, check_whole, refuse
from luvc_fx.report import LuvcWarning, NotRewritten, Reason, Refusal, Report, telemetry
from luvc_fx.schedule import Schedule

log = logging.getLogger(__name__)

INNERS = ("inductor", "aot_eager", "eager")
ON_NO_MATCH = ("warn", "raise", "ignore")

_given_up: weakref.WeakSet[Any] = weakref.WeakSet()
"""What Dynamo compiles no more: classes of models, and code of functions."""


class LuvcBackend:
    """A callable that Dynamo hands its graphs to; `backend` makes one and sets Dynamo up for it.

    Two backends are equal when they would compile alike, so Dynamo does not recompile for a second one.

    Attributes:
        report: what happened to every graph so far.

    Args:
        schedule, inner, mode, options, on_no_match, strict: as of `backend`.
        report: a report to be filled, where several backends share one.
        front_door: whether `luvc_fx.compile` makes it.
        identity_sites: insert sites that keep all tokens, too (for tests).

    Raises:
        ValueError: for an argument that is not allowed.
    """

    def __init__(
        self,
        schedule: Schedule,
        inner: str | Callable[..., Any] = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        on_no_match: str = "warn",
        strict: bool = False,
        *,
        report: Report | None = None,
        front_door: bool = False,
        identity_sites: bool = False,
    ) -> None:
        if not callable(inner) and inner not in INNERS:
            refuse("", "inner", inner, f"{', '.join(map(repr, INNERS))} or a callable")
        check_choice("", "on_no_match", on_no_match, ON_NO_MATCH)
        check_bool("", "strict", strict)
        if mode is not None and not isinstance(mode, str):
            refuse("", "mode", mode, "a mode of Inductor")
        if options is not None and not _is_options(options):
            refuse("", "options", options, "a dictionary of Inductor's options")
        if (mode is not None or options) and inner != "inductor":
            raise ValueError(f"mode and options are Inductor's; inner is {inner!r}")
        _check_options(mode, options)
        self.schedule = schedule
        self.inner = inner
        self.mode = mode
        self.options = dict(options or {})
        self.on_no_match = on_no_match
        self.strict = strict
        self.report = Report() if report is None else report
        self.front_door = front_door
        self.identity_sites = identity_sites
        self._wrapped: Any = None

    def _key(self) -> tuple[Any, ...]:
        options = tuple(sorted((name, repr(option)) for name, option in self.options.items()))
        flags = (self.on_no_match, self.strict, self.identity_sites)
        return (self.schedule, self.inner, self.mode, options, *flags)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LuvcBackend) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

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
        rewriting = rewrite(
            gm,
            self.schedule,
            self.strict,
            self.front_door,
            self.identity_sites,
            self._site_compiler(mode, options),
        )
        graph_report = rewriting.report
        self.report.graphs.append(graph_report)
        telemetry.publish(gm, graph_report)
        self._complain(graph_report.refusals)
        started, hits = time.perf_counter(), _compat.cache_hits()
        try:
            compiled = self._compile(gm, example_inputs, mode or self.mode, options)
        except Exception as error:
            if rewriting.undo is None:
                raise
            known = len(graph_report.refusals)
            rewriting.undo(error)
            new = graph_report.refusals[known:]
            telemetry.count_refusals(new)
            self._complain(new)
            compiled = self._compile(gm, example_inputs, mode or self.mode, options)
        graph_report.compile_seconds = time.perf_counter() - started
        graph_report.cached = _compat.cache_hits() > hits
        log.info("compiled in %.1f s%s", graph_report.compile_seconds, " from caches" * graph_report.cached)
        return compiled

    def _site_compiler(self, mode: str | None, options: dict[str, Any]) -> str:
        """Of a compiler of the user's own nobody knows whether it can be asked from within a graph."""
        if callable(self.inner):
            return "eager"
        return site_compiler(str(self.inner), mode or self.mode, options)

    def _compile(
        self, gm: fx.GraphModule, example_inputs: list[Any], mode: str | None, options: dict[str, Any]
    ) -> Callable[..., Any]:
        if callable(self.inner):
            return self.inner(gm, example_inputs)
        if self.inner == "inductor":
            key = fingerprint(self.schedule) if depends_on_us(gm.graph) else ""
            return _compat.compile_inductor(gm, example_inputs, mode, options, key)
        if self.inner == "aot_eager":
            return _compat.lookup_backend("aot_eager")(gm, example_inputs)
        return gm.forward

    def reset(self) -> None:
        """What `torch._dynamo.reset` calls: Dynamo compiles everything afresh."""
        _given_up.clear()

    def on_torch_compile(self, wrapped: Any) -> None:
        """Note what `torch.compile` puts this backend on, before anything is compiled.

        So `generate` can warn that it runs past what was compiled, and so can a function that Dynamo has
        given up. Doing it again with the same object does nothing.
        """
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

    __name__ = _compat.NameForTorchCompile("luvc_fx", on_torch_compile)

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
    check_bool("", "capture_scalars", capture_scalars)
    if recompile_limit is not None:
        check_whole("", "recompile_limit", recompile_limit, 1)
    ours = LuvcBackend(Schedule.of(schedule), inner, mode, options, on_no_match, strict)
    _refuse_caching_precompile()
    warn_of_untested_versions()
    set_up_dynamo(capture_scalars, recompile_limit)
    return ours


def set_up_dynamo(
    capture_scalars: bool = True, recompile_limit: int | None = _compat.RECOMPILE_LIMIT
) -> None:
    """Change what this process's Dynamo has to be for us, as `backend` says; doing it again changes nothing.

    Everything that luvc_fx changes of Dynamo is changed here, and nothing by an import. Beside the two
    settings: Dynamo of torch 2.11 and 2.12 is taught to trace transformers as 2.13 does, and its log is
    watched for functions that it gives up.
    """
    _compat.dynamo_patches.install()
    _compat.watch_recompile_limit(_give_up)
    if capture_scalars:
        _compat.enable_scalar_capture()
    if recompile_limit is not None:
        _compat.allow_recompiles(recompile_limit)


def prepare(model: torch.nn.Module) -> torch.nn.Module:
    """Make a fresh transformers model capture as one graph; returns it.

    Its output hooks are otherwise installed inside the first traced forward, which then falls into
    pieces. One eager forward does the same.

    Raises:
        ValueError: for what is no module.
    """
    check_module(model)
    _compat.install_output_hooks(model)
    return model


def _is_options(options: object) -> bool:
    return isinstance(options, Mapping) and all(isinstance(key, str) for key in options)


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
    given = getattr(compiler_fn, "compiler_fn", compiler_fn)  # torch.compile wraps a backend
    if hasattr(given, "from_options"):  # ours by its name
        given = given.from_options(None, compiler_fn.kwargs.get("options"))
    if isinstance(given, LuvcBackend):
        given.give_up(f"{function}, {limit} times,")


def _refuse_caching_precompile() -> None:
    if _compat.caching_precompile():
        raise RuntimeError(
            "torch._dynamo.config.caching_precompile is on. Its cache does not know about backends and "
            "would return a graph compiled for another schedule; switch it off to use luvc_fx"
        )
