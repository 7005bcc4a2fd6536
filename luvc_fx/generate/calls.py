"""What the hooks on a model do with each call: decide what it may do, and which graph runs."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from luvc_fx import _compat
from luvc_fx.generate.cache import PrunedRows, is_empty, unsupported
from luvc_fx.generate.families import FeaturesInPlaceOfPixels, pixels_in
from luvc_fx.generate.graphs import GraphSet
from luvc_fx.generate.hooks import arguments_by_name
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
from luvc_fx.schedule import Schedule


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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, whose calls of the other hooks all keep to the limits of this one."""
        kwargs = arguments_by_name(self._signatures["generate"], args, kwargs)
        outer = self._limits
        limits = for_generate(self._model, self._with_past_key_values(kwargs), self._refuse)
        if self._settings["inner"] != "inductor" or self._settings["mode"] or self._settings["options"]:
            limits = replace(limits, decode_mode=None)
        self._thread.limits = limits
        # transformers' own compilation (of decoding over a static cache, on a GPU) would trace these hooks.
        config = kwargs.get("generation_config")
        if config is None or "disable_compile" in kwargs:
            kwargs["disable_compile"] = True
        else:  # beside which transformers takes no options
            kwargs["generation_config"] = copy.copy(config)
            kwargs["generation_config"].disable_compile = True
        try:
            return self._originals["generate"](**kwargs)
        finally:
            self._thread.limits = outer

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
            return pixels.encoder_output()
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
        return encoder(pixels, options, limits.merge and self._merges, limits.rows)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`: prefill where there are images, else a decode step, or the whole model unchanged."""
        kwargs = self._with_past_key_values(arguments_by_name(self._signatures["forward"], args, kwargs))
        limits, cache = self._limits, kwargs.get("past_key_values")
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
            run = self._graphs.unchanged
        elif not encoder_outputs or refusal_of_later_images(self._model, kwargs) is not None:
            run = self._graphs.decode.in_mode(None if limits is None else limits.decode_mode)
            if not encoder_outputs:  # `generate` gives the first step of a later turn an empty one
                kwargs.pop("mm_encoder_outputs", None)
        else:
            without_images = () if limits is None else limits.rows_without_images
            prompt = PromptState.of({k: v for k, v in kwargs.items() if k != "mm_encoder_outputs"})
            return prefill(
                self._model, self._graphs, prompt, encoder_outputs, without_images, wants_row_index
            )
        prompt, padding = over_pruned_cache(self._model, PromptState.of(kwargs), cache)
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
        merge = limits.merge and self._merges
        outputs, steering = {}, set()
        for name, encoder in self._graphs.encoders.items():
            steering |= set(encoder.signature.parameters)
            pixels = kwargs.get(encoder.modality.pixels)
            if pixels is not None:
                outputs[name] = encoder(pixels, encoder.options(kwargs), merge, limits.rows)
        rest = {name: given for name, given in rest.items() if name not in steering}
        return {**rest, "mm_encoder_outputs": outputs}
