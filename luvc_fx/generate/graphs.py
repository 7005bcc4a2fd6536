"""The compiled callables of one model under one schedule: encoders, prefill, decode step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.dynamo.backend import LuvcBackend
from luvc_fx.generate.compiled_encoder import CompiledEncoder, EncoderBody, compile_encoder
from luvc_fx.generate.constants import rows_of
from luvc_fx.generate.encoder_outputs import with_features
from luvc_fx.generate.families import STEERING, Family, family_of
from luvc_fx.generate.symbolic_images import SymbolicEncoder
from luvc_fx.graph import flash, markers
from luvc_fx.report import Report
from luvc_fx.schedule import Schedule

GraphFeatures = tuple[Any, str]
"""What an encoder returned as the prefill graph takes it.

The output, whose late features are one tensor ``[N, D]`` a level; and the text of the height and width of the
grid that its features lie on (``""`` without one).
"""


class DecodeGraphs:
    """Compiled decode steps, one for each Inductor mode that is asked for; several models may share them.

    Args:
        compile: compiles the decode step in a mode; None is the mode of `luvc_fx.compile`.
    """

    def __init__(self, compile: Callable[[str | None], Callable[..., Any]]) -> None:
        self._compile = compile
        self._by_mode: dict[str | None, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def in_mode(self, mode: str | None) -> Callable[..., Any]:
        """The decode step in `mode`, made at the first request, once for all threads."""
        with self._lock:
            if mode not in self._by_mode:
                self._by_mode[mode] = self._compile(mode)
            return self._by_mode[mode]


class GraphSet:
    """The compiled callables of one model under one schedule. Each compiles when it is first called.

    Args:
        originals: the model's own methods by their names: `forward` and the encoders.
        settings: arguments of `luvc_fx.backend`, the schedule among them.
        dynamic: as of `torch.compile`, for the text.
        report: where each graph is reported.

    Attributes:
        report: as given.
        family: what is known of the model.
        prunes: whether the schedule prunes.
        schedule: what prunes; its counts may be changed (see `luvc_fx.schedule.row_counts`).
        symbolic: whether one prefill graph is to serve all numbers of tokens.
        encoders: by the modality's name.
        prefill: a forward whose images are encoded already; prunes, and merges nothing.
        prefill_of_merged: the same for a prompt that merged images made shorter. It is one graph or an error:
            of a decoder in pieces nothing is pruned, and no step could go on over its shortened cache.
        decode: a forward without images, over the cache that prefill left.
        unchanged: a forward with all visual tokens.
    """

    def __init__(
        self,
        model: Any,
        originals: Mapping[str, Callable[..., Any]],
        settings: Mapping[str, Any],
        dynamic: bool | None,
        report: Report,
    ) -> None:
        self._settings = dict(settings)
        self.report = report
        schedule: Schedule = settings["schedule"]
        self.prunes = bool(schedule.prune)
        self.schedule = schedule
        self.symbolic = settings.get("sizes") == "symbolic"
        unmerged = Schedule(prune=schedule.prune)
        self.family = family_of(model)

        def forward_graph(
            schedule: Schedule, mode: str | None = None, fullgraph: bool = False
        ) -> Callable[..., Any]:
            body = _forward_body(self.family, originals["forward"])
            return self._compile(body, schedule, dynamic, mode, fullgraph)

        def encoder_graph(body: EncoderBody, merges: bool) -> EncoderBody:
            # A plan is for one number of images of one shape: nothing of it may become symbolic.
            return self._compile(body, schedule if merges else unmerged, dynamic=False)

        self.encoders: dict[str, CompiledEncoder] = {
            modality.name: compile_encoder(
                self.family,
                modality,
                originals[modality.method],
                encoder_graph,
                SymbolicEncoder(self.symbolic, schedule, report.note),
            )
            for modality in self.family.modalities()
        }
        self.prefill = forward_graph(unmerged)
        self.prefill_of_merged = forward_graph(unmerged, fullgraph=True)
        self.decode = DecodeGraphs(lambda mode: forward_graph(unmerged, mode))
        self.unchanged = forward_graph(Schedule())

    def schedule_of(self, budget: float | None) -> Schedule:
        """The schedule whose prunes leave that share of the visual tokens, or the one that holds anyway.

        Raises:
            ValueError: the schedule cannot have that budget, or graphs hold for one number of tokens each.
        """
        if budget is None:
            return self.schedule
        if not self.symbolic:
            raise ValueError(
                f"budget is {budget!r}; allowed: None, as this model was compiled with sizes='static' (or "
                "dynamic=False, or a compiler of your own): each number of tokens is a graph of its own there"
            )
        layers = self.family.model.config.get_text_config().num_hidden_layers
        schedule: Schedule = self._settings["schedule"]
        return schedule.with_budget(budget, layers)

    def share_decoding(self, decode: DecodeGraphs) -> None:
        """Decode with the graphs of another `GraphSet` of this model from now on.

        Both schedules must prune, or neither: a decode graph of one that does not has no masks rebuilt.
        """
        self.decode = decode

    def wrap_unmerged_encoders(self, wrap: Callable[[str, EncoderBody], EncoderBody]) -> None:
        """Let `wrap(modality, run)` stand for each encoder that merges nothing; `run` is the compiled one."""
        self.encoders = {
            name: replace(encoder, unmerged=wrap(name, encoder.unmerged))
            for name, encoder in self.encoders.items()
        }

    def _compile(
        self,
        body: Callable[..., Any],
        schedule: Schedule,
        dynamic: bool | None,
        mode: str | None = None,
        fullgraph: bool = False,
    ) -> Callable[..., Any]:
        settings = {**self._settings, "schedule": schedule}
        settings.pop("sizes", None)
        if mode is not None:
            settings["mode"] = mode
        rewriting = LuvcBackend(**settings, report=self.report, front_door=True)
        compiled = torch.compile(body, backend=rewriting, dynamic=dynamic, fullgraph=fullgraph)

        def call(*args: Any, late_features: bool = False, **kwargs: Any) -> Any:
            # Sizes of images that are tensors: code that they steer is traced as it is without us.
            steered = args and isinstance(args[0], dict) and not args[0].keys().isdisjoint(STEERING)
            # Features that enter late are added by a mask, which a pass writes anew without its dynamic size.
            with _compat.tracing_settings(dynamic_outputs=late_features, scalars=not steered):
                try:
                    return compiled(*args, **kwargs)
                except Exception:
                    _compat.compile_anew(body)
                    raise

        return call


def _forward_body(family: Family, forward: Callable[..., Any]) -> Callable[..., tuple[Any, Tensor | None]]:
    """What is compiled for a forward: the model's own, with markers for what its graph cannot show."""
    enter = family.feature_entry()
    known = {modality.name: modality for modality in family.modalities()}
    text_config = family.model.config.get_text_config()
    cache_name = _compat.cache_argument(forward)

    def body(
        kwargs: dict[str, Any],
        padding: Tensor | None = None,
        encoded: dict[str, GraphFeatures] | None = None,
        wants_row_index: bool = False,
        wants_last_logits: bool = False,
        row_counts: tuple[str, list[Tensor]] | None = None,
    ) -> tuple[Any, Tensor | None]:
        if padding is not None:
            length = kwargs["input_ids"].shape[1]
            if _compat.is_flash(text_config):
                kwargs = {**kwargs, **flash.segments(markers.CACHE_MASK(padding), length)}
            else:
                kwargs = {**kwargs, "attention_mask": markers.CACHE_MASK(padding, length)}
        for name, (output, grid) in (encoded or {}).items():
            if grid:
                output = _on_grid(output, grid)
            if row_counts is not None:
                output = _with_row_counts(output, *row_counts)
                row_counts = None
            kwargs = enter(kwargs, known[name], output)
        if wants_last_logits:  # as an argument, the number would be a symbol once there was another one
            kwargs = {**kwargs, "logits_to_keep": 1}
        row_index = markers.PROMPT_ROWS(kwargs["input_ids"]) if wants_row_index else None
        if cache_name != "past_key_values" and "past_key_values" in kwargs:
            kwargs = {**kwargs, cache_name: kwargs["past_key_values"]}
            del kwargs["past_key_values"]
        return forward(**kwargs), row_index

    return _compat.with_own_code(body)


def _with_row_counts(output: Any, form: str, sizes: list[Tensor]) -> Any:
    """An encoder's output whose features say how many rows each prune leaves. Dynamo traces this."""
    features, numbers = output.pooler_output, [size.shape[0] for size in sizes]
    if isinstance(features, Tensor):
        return with_features(output, markers.ROW_COUNTS(features, form, numbers), {})
    first, *others = features
    return with_features(output, [markers.ROW_COUNTS(first, form, numbers), *others], {})


def _on_grid(output: Any, grid: str) -> Any:
    """An encoder's output whose features say that they lie on this grid. Dynamo traces this."""
    ((height, width),) = rows_of(grid)
    features = output.pooler_output
    if isinstance(features, Tensor):
        return with_features(output, markers.IMAGE_GRID(features, height, width), {})
    return with_features(output, [markers.IMAGE_GRID(part, height, width) for part in features], {})
