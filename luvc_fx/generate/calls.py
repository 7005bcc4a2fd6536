"""What the hooks on a model do with each call: decide what it may do, and which graph runs."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from luvc_fx import _compat
from luvc_fx.generate.cache import PrunedRows, is_empty, unsupported
from luvc_fx.generate.families import FeaturesInPlaceOfPixels, pixels_in
from luvc_fx.generate.graphs import GraphSet
from luvc_fx.generate.hooks import arguments_by_name
from luvc_fx.generate.last_resort import (
    CacheState,
    Failures,
    LostCacheError,
    PromptMismatch,
    RandomState,
    is_refusal,
    refusal_of,
)
from luvc_fx.generate.limits import (
    UNTOUCHED,
    CallLimits,
    Note,
    for_generate,
    for_images,
    refusal_of_forward,
    refusal_of_later_images,
)
from luvc_fx.generate.masks import over_pruned_cache
from luvc_fx.generate.prefill import prefill
from luvc_fx.generate.prompt import PromptState
from luvc_fx.report import GraphReport, NotRewritten, Reason, Refusal
from luvc_fx.schedule import Schedule

NO_FUSION = Refusal(
    Reason.NO_FUSION,
    "the place where image features enter the text was not found in this model's decoder: nothing is pruned",
)
NO_BLOCKS = Refusal(
    Reason.RESIDUAL_STREAM,
    "no encoder blocks with attention were found in front of this model's image features: nothing is merged",
)

NOT_APART = Refusal(
    Reason.INPUTS,
    "images enter this model's forward by an argument that none of its encoders takes: nothing is merged",
)


class _Failed:
    """What failed in our hands, by what it was."""

    def __init__(self) -> None:
        self.generate, self.encoder, self.prefill, self.step, self.unchanged = (Failures() for _ in range(5))


class Calls:
    """The bodies of the hooks on one model.

    Args:
        originals: the model's own methods by their names.
        settings: arguments of `luvc_fx.backend`, the schedule among them.
        refuse: notes why a call is not shortened or merged; it may raise.
    """

    def __init__(
        self,
        model: Any,
        originals: Mapping[str, Callable[..., Any]],
        graphs: GraphSet,
        settings: Mapping[str, Any],
        refuse: Note,
    ) -> None:
        self._model = model
        self._originals = originals
        self._graphs = graphs
        self._settings = settings
        self._refuse = refuse
        schedule: Schedule = settings["schedule"]
        self._merges = bool(schedule.merge)
        self._signatures = {name: inspect.signature(originals[name]) for name in ("forward", "generate")}
        self._cache_arguments = _compat.cache_arguments(originals["forward"])
        self._thread = threading.local()
        self._failed = _Failed()

    def bodies(self) -> dict[str, Callable[..., Any]]:
        """What each hook runs, by the name of the method that it stands for."""
        encoders = {
            encoder.modality.method: functools.partial(self.get_features, name)
            for name, encoder in self._graphs.encoders.items()
        }
        return {
            "forward": self.forward,
            "generate": self.generate,
            "create_masks_for_generate": self.create_masks_for_generate,
            **encoders,
        }

    @property
    def _limits(self) -> CallLimits | None:
        """Those of the `generate` that this thread is in, or None outside of one."""
        return getattr(self._thread, "limits", None)

    def _with_past_key_values(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call with the cache under the one name that all code behind the hooks reads."""
        return _compat.with_past_key_values(kwargs, self._cache_arguments)

    @contextlib.contextmanager
    def _within(self, limits: CallLimits, generating: dict[str, Any] | None = None) -> Iterator[None]:
        """All calls of this thread keep to these limits, for the length of a ``with`` block.

        Args:
            generating: the arguments of the `generate` that this is, if it is one.
        """
        outer = vars(self._thread).copy()
        self._thread.limits = limits
        self._thread.generating = generating
        try:
            yield
        finally:
            vars(self._thread).clear()
            vars(self._thread).update(outer)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, whose calls of the other hooks all keep to the limits of this one."""
        kwargs = arguments_by_name(self._signatures["generate"], args, kwargs)
        schedule = self._graphs.schedule_of(kwargs.pop("budget", None))
        limits, failed = UNTOUCHED, self._failed.generate
        if kwargs not in failed:
            try:
                limits = self._limits_of_generate(self._with_past_key_values(kwargs))
                limits = replace(limits, schedule=schedule) if limits.shorten else limits
            except Exception as error:
                if is_refusal(error):
                    raise
                self._fell_back(error, failed, kwargs)
        given = self._without_own_compilation(kwargs)
        cache = self._with_past_key_values(kwargs).get("past_key_values")
        empty = CacheState(cache) if is_empty(cache) else None  # what others hold would need its memory twice
        random = RandomState(self._model.device)
        failures = failed.total
        try:
            with self._within(limits, kwargs):
                output = self._originals["generate"](**given)
        except LostCacheError as error:
            # What a streamer was given cannot be taken back, nor what is in a cache of an earlier turn.
            if kwargs.get("streamer") is not None or empty is None or not empty.restore():
                raise
            random.restore()
            with self._within(UNTOUCHED):
                output = self._originals["generate"](**given)
            self._fell_back(error.cause, failed, kwargs)
        if limits.shorten and failed.total == failures:
            failed.succeeded()
        return output

    def _limits_of_generate(self, kwargs: dict[str, Any]) -> CallLimits:
        limits = for_generate(self._model, kwargs, self._refuse)
        if self._settings["inner"] != "inductor" or self._settings["mode"] or self._settings["options"]:
            limits = replace(limits, decode_mode=None)
        return limits

    @staticmethod
    def _without_own_compilation(kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments without transformers' own compilation, which would trace these hooks.

        It compiles decoding over a static cache, on a GPU.
        """
        config = kwargs.get("generation_config")
        if config is None or "disable_compile" in kwargs:
            return {**kwargs, "disable_compile": True}
        config = copy.copy(config)  # beside which transformers takes no options
        config.disable_compile = True
        return {**kwargs, "generation_config": config}

    def _fell_back(self, error: Exception, failed: Failures, kwargs: dict[str, Any]) -> None:
        """Note that a call failed in our hands, where the stock model did not; under `strict` this raises."""
        failed.add(kwargs)
        generating = getattr(self._thread, "generating", None)
        if generating is not None:
            self._failed.generate.add(generating)
        try:
            self._refuse(refusal_of(error, failed.given_up))
        except NotRewritten as refused:
            raise refused from error

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """The mask of a step over a static cache: as it was given, since each layer is to have its own.

        `generate` would make one, from the number of rows in layer 0.
        """
        limits, cache = self._limits, self._with_past_key_values(kwargs).get("past_key_values")
        # A step does not ask whether its cache is empty: of a static one that is a wait for the device.
        shortened = isinstance(cache, PrunedRows) or (
            limits is not None and limits.shorten and is_empty(cache)
        )
        if shortened and unsupported(cache) is None:
            return kwargs["attention_mask"]
        return self._originals["create_masks_for_generate"](*args, **kwargs)

    def get_features(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`get_image_features` or another encoder: compiled while `generate` runs, else the model's own."""
        encoder = self._graphs.encoders[name]
        original = self._originals[encoder.modality.method]
        pixels = kwargs.get(encoder.modality.pixels, args[0] if args else None)
        if isinstance(pixels, FeaturesInPlaceOfPixels):  # while the prefill is traced
            return pixels.encoder_output
        if torch.compiler.is_dynamo_compiling():  # one encoder calls another: videos as images
            return original(*args, **kwargs)
        limits = self._limits  # not read above: a traced call must know nothing of its thread
        if limits is None or not limits.shorten:
            return original(*args, **kwargs)
        named = arguments_by_name(encoder.signature, args, kwargs)
        options = {
            option: given for option, given in named.items() if given is not None and option != "return_dict"
        }
        pixels = options.pop(encoder.modality.pixels)
        try:
            output = self._encode(name, pixels, options, limits)
        except PromptMismatch as mismatch:
            self._thread.mismatch = mismatch  # for the forward that follows
            return original(*args, **kwargs)
        except Exception as error:
            if is_refusal(error):
                raise
            output = original(*args, **kwargs)
            self._fell_back(error, self._failed.encoder, named)
            self._thread.limits = UNTOUCHED  # for the rest of this `generate`
            return output
        representatives = getattr(output, "luvc_representatives", None)
        if representatives is not None and representatives.numel() < output.luvc_placeholders:
            output.luvc_unmerged = functools.partial(original, *args, **kwargs)
        return output

    @contextlib.contextmanager
    def _never_silent(
        self, asked: bool, found: Callable[[GraphReport], bool], refusal: Refusal
    ) -> Iterator[None]:
        """Note `refusal` where a block compiles graphs without a trace of what was asked for, nor a reason.

        Args:
            asked: whether the schedule asks for anything here.
            found: whether it could be done in a graph.
        """
        graphs = self._graphs.report.graphs
        before = len(graphs)
        yield
        new = graphs[before:]
        if asked and new and not any(found(graph) or graph.refusals for graph in new):
            self._refuse(refusal)

    def _encode(self, name: str, pixels: Any, options: dict[str, Any], limits: CallLimits) -> Any:
        """The output of a compiled encoder for a whole prompt.

        Raises:
            PromptMismatch: the prompt has not as many placeholders as there are features.
        """
        merge = limits.merge and self._merges
        with self._never_silent(merge, lambda graph: graph.encoder_blocks > 0, NO_BLOCKS):
            output = self._graphs.encoders[name](pixels, options, merge, limits.rows)
        if getattr(output, "luvc_representatives", None) is None:
            if merge:
                text = "the encoder's output has no `pooler_output` with a vector for each visual token"
                self._refuse(Refusal(Reason.NO_FUSION, f"{text}: tokens are pruned, but not merged"))
            return output
        tokens, features = limits.placeholders.get(name), output.luvc_placeholders
        if tokens is not None and tokens != features:
            raise PromptMismatch(tokens, features)
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, by the stock model where it fails in our hands."""
        given = arguments_by_name(self._signatures["forward"], args, kwargs)
        kwargs = self._with_past_key_values(given)
        limits, failed = self._limits, self._failed.step
        if pixels_in(kwargs) or kwargs.get("mm_encoder_outputs"):
            failed = self._failed.prefill
        if kwargs in failed:
            limits = UNTOUCHED
        if limits == UNTOUCHED:
            failed = self._failed.unchanged
            if kwargs in failed:
                return self._stock_forward(given)
        before = CacheState(kwargs.get("past_key_values"))
        try:
            mismatch = vars(self._thread).pop("mismatch", None)
            if mismatch is not None:
                raise mismatch
            output = self._forward(kwargs, limits)
        except Exception as error:
            if is_refusal(error):
                raise
            if not before.restore():
                if isinstance(error, NotImplementedError):  # in words of ours
                    raise
                raise LostCacheError(error) from error
            output = self._stock_forward(given)
            self._fell_back(error, failed, kwargs)
            return output
        failed.succeeded()
        return output

    def _stock_forward(self, kwargs: dict[str, Any]) -> Any:
        """What the stock model does with this call, images that were merged already encoded anew."""
        with self._within(UNTOUCHED):
            return self._originals["forward"](**_unmerged(kwargs))

    def _forward(self, kwargs: dict[str, Any], limits: CallLimits | None) -> Any:
        """Prefill where there are images, else a decode step, or the whole model unchanged."""
        cache = kwargs.get("past_key_values")
        refusal = refusal_of_forward(self._model, kwargs)
        if refusal is not None:
            self._refuse(refusal)
            limits = UNTOUCHED
        wants_row_index = limits is None  # outside of `generate`, which reads the last row only
        if pixels_in(kwargs):
            limits = limits or for_images(self._model, kwargs, self._refuse)
            if limits.shorten:
                kwargs = self._encode_pixels(kwargs, limits)
        encoder_outputs = kwargs.get("mm_encoder_outputs") or {}
        if limits is not None and not limits.shorten:
            run, kwargs = self._graphs.unchanged, _unmerged(kwargs)
        elif not encoder_outputs or refusal_of_later_images(self._model, kwargs) is not None:
            run = self._graphs.decode.in_mode(None if limits is None else limits.decode_mode)
            if not encoder_outputs:  # `generate` gives the first step of a later turn an empty one
                kwargs.pop("mm_encoder_outputs", None)
        else:
            without_images = () if limits is None else limits.rows_without_images
            prompt = PromptState.of({k: v for k, v in kwargs.items() if k != "mm_encoder_outputs"})
            with self._never_silent(
                self._graphs.prunes, lambda graph: bool(graph.tokens_per_layer), NO_FUSION
            ):
                return prefill(
                    self._model,
                    self._graphs,
                    prompt,
                    encoder_outputs,
                    without_images,
                    wants_row_index,
                    limits.schedule if limits is not None else None,
                )
        prompt, padding = over_pruned_cache(self._model, PromptState.of(kwargs), cache)
        merges = self._merges and (limits is None or limits.merge)
        with self._never_silent(merges, lambda graph: graph.kind != "prefill", NOT_APART):
            return run(prompt.as_kwargs(), padding)[0]

    def _encode_pixels(self, kwargs: dict[str, Any], limits: CallLimits) -> dict[str, Any]:
        """The call with features in place of pixels, and of all that steers an encoder.

        Positions are computed first: a prompt that was cut does not show the images' sizes any more.
        """
        rest = dict(kwargs)
        if kwargs.get("position_ids") is None:
            positions = self._graphs.family.positions(kwargs)
            if positions is not None:
                rest["position_ids"] = positions
        outputs, steering = {}, set()
        parameters = self._signatures["forward"].parameters
        for name, encoder in self._graphs.encoders.items():
            steering |= set(encoder.signature.parameters)
            pixels = kwargs.get(encoder.modality.pixels)
            if pixels is not None:
                outputs[name] = self._encode(name, pixels, encoder.options(kwargs), limits)
        required = {name for name, argument in parameters.items() if argument.default is argument.empty}
        rest = {name: given for name, given in rest.items() if name not in steering}
        # A forward that insists on pixels (BLIP-2) gets none.
        none = dict.fromkeys(required & steering)
        return {**none, **rest, "mm_encoder_outputs": outputs}


def _unmerged(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward with all features of its images, encoded anew where ours merged some."""
    outputs = kwargs.get("mm_encoder_outputs")
    if not outputs:
        return kwargs
    whole = {name: getattr(output, "luvc_unmerged", lambda o=output: o)() for name, output in outputs.items()}
    return {**kwargs, "mm_encoder_outputs": whole}
