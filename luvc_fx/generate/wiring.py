"""The hooks on one model instance: vision, prefill and decode graphs of `generate`.

`generate` encodes the image, prefills and decodes in separate calls, so no graph sees all of it. The
instance gets hooks on the encoders of the base model, `get_image_features` and `get_video_features`
(while `generate` runs), on `forward`, and on `generate` itself. Between vision and prefill the prompt is
cut to the placeholders whose tokens survived, so that the prefill graph sees a shorter but consistent
prompt. No class and no source is changed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from luvc_fx import _compat
from luvc_fx.dynamo.backend import LuvcBackend, LuvcWarning, NotRewritten
from luvc_fx.generate import constants as controls
from luvc_fx.generate import prompt as prompts
from luvc_fx.generate.cache import PrunedRows, adopt, fill, follow, is_empty, unsupported
from luvc_fx.generate.compiled_encoder import Encoder, modalities
from luvc_fx.generate.limits import (
    NOTHING,
    Allowed,
    for_generate,
    for_images,
    makes_own_masks,
    pixels_in,
    refusal_of_forward,
    refusal_of_later_images,
)
from luvc_fx.graph import flash, markers
from luvc_fx.report import Refusal, Report
from luvc_fx.schedule import Schedule


class Hook:
    """A wrapper on one instance; `inspect.signature` sees the wrapped callable's."""

    def __init__(self, body: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self._body = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._body(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ValueError(
            "a model compiled by luvc_fx cannot be copied: its hooks belong to one instance; "
            "call luvc_fx.restore(model) first"
        )

    def __reduce__(self) -> Any:
        raise ValueError("a model compiled by luvc_fx cannot be pickled; call luvc_fx.restore(model) first")


class FrontDoor:
    """The hooks and compiled callables of one model; made by `compile`."""

    def __init__(self, model: Any, settings: dict[str, Any], dynamic: bool | None) -> None:
        self.model = model
        self.settings = settings
        self.dynamic = dynamic
        self.schedule: Schedule = settings["schedule"]
        self.report = Report()
        self.prunes = bool(self.schedule.prune)
        self.local = threading.local()
        self.kinds = modalities(model)
        hooked = [(model, "forward"), (model, "generate")]
        hooked += [(model.base_model, kind.method) for kind in self.kinds]
        self.originals = {(owner, name): getattr(owner, name) for owner, name in hooked}
        masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        self.originals[model, "create_masks_for_generate"] = masks
        self.replaced = controls.numpy_free(model.base_model)
        kept = [*self.originals, *((model.base_model, name) for name in self.replaced)]
        self.on_instance = {key: vars(key[0])[key[1]] for key in kept if key[1] in vars(key[0])}
        self.signature = inspect.signature(self.original("forward"))
        unmerged = Schedule(prune=self.schedule.prune)
        self.encoders = {
            kind.name: Encoder(
                model,
                kind,
                self.original(kind.method),
                # A plan is for one number of images of one shape: nothing of it may become symbolic.
                lambda body, merge: self._compiled(body, self.schedule if merge else unmerged, False),
            )
            for kind in self.kinds
        }
        self.prefill = self._compiled(self._forward_body(), unmerged, dynamic)
        self.decode = self._compiled(self._forward_body(), unmerged, dynamic)
        self.decoders: dict[str | None, Callable[..., Any]] = {None: self.decode}
        self.plain = self._compiled(self._forward_body(), Schedule(), dynamic)

    def original(self, name: str) -> Callable[..., Any]:
        """What `model.<name>` was before the hooks."""
        return next(found for (_, key), found in self.originals.items() if key == name)

    def install(self) -> None:
        """Put the hooks on the instance."""
        bodies: dict[str, Callable[..., Any]] = {
            "forward": self._forward,
            "generate": self._generate,
            "create_masks_for_generate": self._masks_for_generate,
        }
        for kind in self.kinds:
            bodies[kind.method] = functools.partial(self._get_features, kind.name)
        for (owner, name), wrapped in self.originals.items():
            setattr(owner, name, Hook(bodies[name], wrapped))
        for name, method in self.replaced.items():
            setattr(self.model.base_model, name, method)

    def remove(self) -> None:
        """Take the hooks off; what was on the instance before is there again."""
        for owner, name in [*self.originals, *((self.model.base_model, name) for name in self.replaced)]:
            if (owner, name) in self.on_instance:
                setattr(owner, name, self.on_instance[owner, name])
            else:
                delattr(owner, name)

    # -- compiled callables ------------------------------------------------------------------

    def _backend(self, schedule: Schedule, settings: dict[str, Any]) -> LuvcBackend:
        return LuvcBackend(**{**settings, "schedule": schedule}, report=self.report, front_door=True)

    def _compiled(
        self,
        body: Callable[..., Any],
        schedule: Schedule,
        dynamic: bool | None,
        settings: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        made = self._backend(schedule, settings or self.settings)
        compiled = torch.compile(body, backend=made, dynamic=dynamic)

        def call(*args: Any, deepstack: bool = False, **kwargs: Any) -> Any:
            with _compat.tracing_settings(dynamic_outputs=deepstack):
                return compiled(*args, **kwargs)

        return call

    def _forward_body(self) -> Callable[..., Any]:
        forward = self.original("forward")
        takes_features = "mm_encoder_outputs" in self.signature.parameters
        pixels = {kind.name: kind.pixels for kind in self.kinds}
        text_config = self.model.config.get_text_config()

        def body(
            kwargs: dict[str, Any],
            padding: Tensor | None = None,
            encoded: dict[str, tuple[Any, str, dict[str, Any]]] | None = None,
            rows: bool = False,
        ) -> tuple[Any, Tensor | None]:
            if padding is not None:
                length = kwargs["input_ids"].shape[1]
                if _compat.is_flash(text_config):
                    kwargs = {**kwargs, **flash.segments(markers.CACHE_MASK(padding), length)}
                else:
                    kwargs = {**kwargs, "attention_mask": markers.CACHE_MASK(padding, length)}
            outputs = {}
            for name, (features, grid, extra) in (encoded or {}).items():
                if grid:
                    ((height, width),) = controls.rows_of(grid)
                    parts = [features] if isinstance(features, Tensor) else features
                    parts = [markers.IMAGE_GRID(part, height, width) for part in parts]
                    features = parts[0] if isinstance(features, Tensor) else parts
                if takes_features:
                    outputs[name] = _compat.encoder_output(features, extra)
                else:
                    kwargs = {**kwargs, pixels[name]: _compat.InPlaceOfPixels(features, extra)}
            if outputs:
                kwargs = {**kwargs, "mm_encoder_outputs": outputs}
            places = markers.PROMPT_ROWS(kwargs["input_ids"]) if rows else None
            return forward(**kwargs), places

        return _compat.with_own_code(body)

    # -- hooks -------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = _by_name(inspect.signature(self.original("generate")), args, kwargs)
        before = getattr(self.local, "call", None)
        allowed = for_generate(self.model, kwargs, self._refuse)
        if self.settings["inner"] != "inductor" or self.settings["mode"] or self.settings["options"]:
            allowed = dataclasses.replace(allowed, decode_mode=None)
        self.local.call = allowed
        # Its own compilation (of decoding over a static cache, on a GPU) would trace into these hooks.
        config = kwargs.get("generation_config")
        if config is None:
            kwargs["disable_compile"] = True
        else:  # which transformers does not want to see beside options of its own
            kwargs["generation_config"] = copy.copy(config)
            kwargs["generation_config"].disable_compile = True
        try:
            return self.original("generate")(**kwargs)
        finally:
            self.local.call = before

    def _masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """For a static cache `generate` makes one mask, of layer 0; here each layer has its own."""
        call: Allowed | None = getattr(self.local, "call", None)
        cache = kwargs.get("past_key_values")
        ours = isinstance(cache, PrunedRows) or (call is not None and call.shorten and is_empty(cache))
        if ours and unsupported(cache) is None:
            return kwargs["attention_mask"]
        return self.original("create_masks_for_generate")(*args, **kwargs)

    def _get_features(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        encoder = self.encoders[kind]
        given = kwargs.get(encoder.kind.pixels, args[0] if args else None)
        if isinstance(given, _compat.InPlaceOfPixels):  # this is being traced
            return _compat.encoder_output(given[0] if encoder.whole else [*given], given.extra)
        if torch.compiler.is_dynamo_compiling():  # one encoder calls another: videos as images
            return self.original(encoder.kind.method)(*args, **kwargs)
        call: Allowed | None = getattr(self.local, "call", None)
        if call is None or not call.shorten:
            return self.original(encoder.kind.method)(*args, **kwargs)
        bound = _by_name(encoder.signature, args, kwargs)
        options = {k: v for k, v in bound.items() if v is not None and k != "return_dict"}
        pixels = options.pop(encoder.kind.pixels)
        return encoder(pixels, options, call.merge and bool(self.schedule.merge), call.rows)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = _by_name(self.signature, args, kwargs)
        call: Allowed | None = getattr(self.local, "call", None)
        cache = kwargs.get("past_key_values")
        refusal = refusal_of_forward(self.model, cache)
        if refusal is not None:
            self._refuse(refusal)
            call = NOTHING
        tell_rows = call is None
        if pixels_in(kwargs):
            call = call or for_images(self.model, kwargs, self._refuse)
            if call.shorten:
                kwargs = self._encode_inputs(kwargs, call)
        outputs = kwargs.get("mm_encoder_outputs") or {}
        if call is not None and not call.shorten:
            run = self.plain
        elif not outputs or refusal_of_later_images(self.model, kwargs) is not None:
            run = self._decoder(call)
            if not outputs:  # which `generate` gives the first step of a later turn, and no other
                kwargs.pop("mm_encoder_outputs", None)
        else:
            return self._prefill(kwargs, outputs, tell_rows, () if call is None else call.textual)
        kwargs, padding = self._over_cache(kwargs, cache)
        return run(kwargs, padding)[0]

    def _decoder(self, call: Allowed | None) -> Callable[..., Any]:
        """The compiled decode step, in the mode that this call of `generate` asks for."""
        mode = None if call is None else call.decode_mode
        if mode not in self.decoders:
            unmerged, settings = Schedule(prune=self.schedule.prune), {**self.settings, "mode": mode}
            self.decoders[mode] = self._compiled(self._forward_body(), unmerged, self.dynamic, settings)
        return self.decoders[mode]

    def _prefill(
        self, kwargs: dict[str, Any], outputs: dict[str, Any], tell_rows: bool, textual: tuple[int, ...]
    ) -> Any:
        start = 0
        rows, past = kwargs["input_ids"].shape[1], 0
        places: Tensor | None = None
        kwargs = {k: v for k, v in kwargs.items() if k != "mm_encoder_outputs"}
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StaticCache):
            # How long each layer's rows are is known afterwards: then they are written to the static cache.
            kwargs["past_key_values"] = DynamicCache(config=self.model.config.get_text_config())
        elif cache is not None and not is_empty(cache):
            past = cache.get_seq_length()
            follow(cache)
        elif cache is None and makes_own_masks(self.model) and self._uses_cache(kwargs):
            # Its decoder would make the same one, but too late for the masks.
            fresh = DynamicCache(config=self.model.config.get_text_config())
            kwargs["past_key_values"] = fresh if unsupported(fresh) is None else None
        kwargs, padding = self._over_cache(kwargs, cache)
        segments = padding is None and self._takes_segments()
        # Without mask and cache transformers reads gaps in the position ids as packed rows.
        bare = makes_own_masks(self.model) or not self._uses_cache(kwargs)
        masked = kwargs.get("past_key_values") is None and bare and not segments
        if past == 0 and not masked:
            kwargs = prompts.without_full_mask(kwargs)
        encoded = {}
        for kind in self.kinds:
            output = outputs.get(kind.name)
            if output is None:
                continue
            features, grid = output.pooler_output, ""
            extra = _compat.extra_features(output)
            slots: Tensor | None = getattr(output, "luvc_slots", None)
            if slots is not None:
                count, token = output.luvc_placeholders, getattr(self.model.config, kind.token)
                if textual:
                    made = prompts.Encoded(features, slots, count, extra)
                    ids, made = prompts.stand_in(kwargs["input_ids"], start, token, made, textual)
                    kwargs = {**kwargs, "input_ids": ids}
                    start += made.placeholders // ids.shape[0]
                    features, slots, count, extra = made.features, made.slots, made.placeholders, made.extra
                # Each size of the features is a plan of its own, so it must not become symbolic.
                for part in [features] if isinstance(features, Tensor) else features:
                    torch._dynamo.mark_static(part)
                if slots.shape[1] > 1 and slots.shape[0] > 0:
                    grid = controls.as_text([slots.shape[1:]])
                if slots.numel() < count:
                    visual = kwargs["input_ids"] == token
                    kwargs, found = prompts.compact(kwargs, visual, slots, count, masked, past)
                    places = found if places is None else places.gather(1, found)
            encoded[kind.name] = (features, grid, extra)
        if segments:
            padding = prompts.left_padding(kwargs["input_ids"], kwargs.get("attention_mask"), textual)
            kwargs = {**kwargs, "attention_mask": None}
        # Of one modality, luvc_fx writes additions by a mask anew; of two, they end the graph.
        deepstack = len(encoded) == 1 and any(extra for _, _, extra in encoded.values())
        out, final = self.prefill(kwargs, padding, encoded, tell_rows, deepstack=deepstack and self.prunes)
        if isinstance(cache, StaticCache):
            fill(cache, out.past_key_values, rows)
            out.past_key_values = cache
        adopt(out.past_key_values, past + rows)
        if textual and isinstance(out.past_key_values, PrunedRows):
            out.past_key_values.textual = textual
        if final is not None:
            out.row_index = final if places is None else places.gather(1, final)
        return out

    def _uses_cache(self, kwargs: dict[str, Any]) -> bool:
        given = kwargs.get("use_cache")
        return bool(self.model.config.get_text_config().use_cache if given is None else given)

    def _over_cache(self, kwargs: dict[str, Any], cache: object) -> tuple[dict[str, Any], Tensor | None]:
        """Over a shortened cache every layer needs its own mask: the padding of each row, to build it from.

        One query without padding needs none, but transformers 5.17 makes one all the same, for the rows of
        layer 0.
        """
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(cache, PrunedRows):
            return kwargs, None
        if ids is None:
            raise NotImplementedError("luvc_fx: inputs_embeds over a cache with dropped visual tokens")
        rest = {**kwargs, "attention_mask": None}
        if mask is None and not cache.textual:
            if not self._takes_segments():
                # Of no row: then nothing has to be compared with it, and one query needs no mask.
                return rest, torch.zeros(0, dtype=torch.int64, device=ids.device)
            if ids.shape[1] == 1 and (ids.shape[0] > 1 or not _compat.reads_one_position()):
                return rest, None
        return rest, prompts.left_padding(ids, mask, cache.textual)

    def _takes_segments(self) -> bool:
        return _compat.calls_flash_attn(self.model.config.get_text_config())

    def _encode_inputs(self, kwargs: dict[str, Any], call: Allowed) -> dict[str, Any]:
        """Encode each modality that came as pixels; positions are computed from the whole prompt first."""
        rest = prompts.with_positions(self.model, kwargs)
        merge, rows = call.merge and bool(self.schedule.merge), call.rows
        outputs = {}
        for kind in self.kinds:
            encoder, pixels = self.encoders[kind.name], kwargs.get(kind.pixels)
            if pixels is not None:
                outputs[kind.name] = encoder(pixels, encoder.options(kwargs), merge, rows)
        steering = {name for encoder in self.encoders.values() for name in encoder.signature.parameters}
        rest = {k: v for k, v in rest.items() if k not in steering}
        return {**rest, "mm_encoder_outputs": outputs}

    def _refuse(self, refusal: Refusal) -> None:
        if not self.report.refuse(refusal):
            return
        if self.settings["strict"] or self.settings["on_no_match"] == "raise":
            raise NotRewritten(str(refusal))
        if self.settings["on_no_match"] == "warn":
            warnings.warn(f"luvc_fx left this alone: {refusal}", LuvcWarning, stacklevel=5)


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names, those that the signature does not name among them."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    more = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in more:
        given.update(given.pop(name, {}))
    return given
