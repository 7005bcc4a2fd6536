"""The hooks on one model instance: vision, prefill and decode graphs of `generate`.

`generate` encodes the image, prefills and decodes in separate calls, so no graph sees all of it. The
instance gets three hooks: `get_image_features` of the base model (while `generate` runs), `forward`, and
`generate` itself. Between vision and prefill the prompt is cut to the placeholders whose tokens survived,
so that the prefill graph sees a shorter but consistent prompt. No class and no source is changed.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat, markers
from luvc_fx.allowance import NOTHING, Allowed, for_generate, for_images, refusal_of_forward
from luvc_fx.backend import LuvcBackend, LuvcWarning, NotRewritten, backend
from luvc_fx.cache import PrunedCache, adopt
from luvc_fx.ops import gather_rows, surviving_rows
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
        self.stacked = False  # whether this model's encoder gives one tensor for all images, not a list
        self.local = threading.local()
        self.originals = {
            (owner, name): getattr(owner, name)
            for owner, name in (
                (model, "forward"),
                (model, "generate"),
                (model.base_model, "get_image_features"),
            )
        }
        self.on_instance = {key: key[1] in vars(key[0]) for key in self.originals}
        self.signature = inspect.signature(self.original("forward"))
        unmerged = Schedule(prune=self.schedule.prune)
        self.vision = self._compiled(self._encode_body(), self.schedule)
        self.vision_unmerged = self._compiled(self._encode_body(), unmerged)
        self.prefill = self._compiled(self._forward_body(), unmerged)
        self.decode = self._compiled(self._forward_body(), unmerged)
        self.plain = self._compiled(self._forward_body(), Schedule())

    def original(self, name: str) -> Callable[..., Any]:
        """What `model.<name>` was before the hooks."""
        return next(found for (_, key), found in self.originals.items() if key == name)

    def install(self) -> None:
        """Put the hooks on the instance."""
        bodies = {
            "forward": self._forward,
            "generate": self._generate,
            "get_image_features": self._get_image_features,
        }
        for (owner, name), wrapped in self.originals.items():
            setattr(owner, name, Hook(bodies[name], wrapped))

    def remove(self) -> None:
        """Take the hooks off; what was on the instance before is there again."""
        for (owner, name), wrapped in self.originals.items():
            if self.on_instance[owner, name]:
                setattr(owner, name, wrapped)
            else:
                delattr(owner, name)

    # -- compiled callables ------------------------------------------------------------------

    def _backend(self, schedule: Schedule) -> LuvcBackend:
        made = backend(**{**self.settings, "schedule": schedule}, capture_scalars=False, recompile_limit=None)
        made.report = self.report
        made.warn_on_generate = False
        return made

    def _compiled(self, body: Callable[..., Any], schedule: Schedule) -> Callable[..., Any]:
        compiled = torch.compile(body, backend=self._backend(schedule), dynamic=self.dynamic)

        def call(*args: Any, **kwargs: Any) -> Any:
            with _compat.tracing_settings():
                return compiled(*args, **kwargs)

        return call

    def _encode_body(self) -> Callable[..., Any]:
        encode = self.original("get_image_features")

        def body(pixel_values: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, int, bool]:
            features = encode(pixel_values=pixel_values, return_dict=True, **options).pooler_output
            stacked = torch.stack(list(features))
            # Dynamo takes this size for a constant, so a merge does not change it: the placeholders.
            return stacked, markers.SLOTS(stacked), stacked.shape[1], isinstance(features, Tensor)

        return _compat.with_own_code(body)

    def _forward_body(self) -> Callable[..., Any]:
        forward = self.original("forward")
        takes_features = "mm_encoder_outputs" in self.signature.parameters

        def body(
            kwargs: dict[str, Any],
            padding: Tensor | None = None,
            features: list[Tensor] | None = None,
            stacked: bool = False,
            grid: tuple[int, int] | None = None,
            rows: bool = False,
        ) -> tuple[Any, Tensor | None]:
            if padding is not None:
                mask = markers.CACHE_MASK(padding, kwargs["input_ids"].shape[1])
                kwargs = {**kwargs, "attention_mask": mask}
            if features is not None:
                if grid is not None:
                    features = [markers.IMAGE_GRID(feature, grid[0], grid[1]) for feature in features]
                if takes_features:
                    found = _compat.encoder_output(torch.stack(features) if stacked else features)
                    kwargs = {**kwargs, "mm_encoder_outputs": {"image": found}}
                else:
                    kwargs = {**kwargs, "pixel_values": features}
            places = markers.PROMPT_ROWS(kwargs["input_ids"]) if rows else None
            return forward(**kwargs), places

        return _compat.with_own_code(body)

    # -- hooks -------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        before = getattr(self.local, "call", None)
        self.local.call = for_generate(self.model, kwargs, self._refuse)
        try:
            return self.original("generate")(*args, **kwargs)
        finally:
            self.local.call = before

    def _get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("pixel_values"), list):
            # Before transformers 5.2x a forward takes no features: it gets them in the place of pixels,
            # asks here, and (this is being traced) has them back.
            features = kwargs["pixel_values"]
            return _compat.encoder_output(torch.stack(features) if self.stacked else features)
        call: Allowed | None = getattr(self.local, "call", None)
        if call is None or not call.shorten or len(args) > 1:
            return self.original("get_image_features")(*args, **kwargs)
        pixel_values = args[0] if args else kwargs.pop("pixel_values")
        options = {k: v for k, v in kwargs.items() if v is not None and k != "return_dict"}
        return self._encode(pixel_values, options, call.merge)

    def _encode(self, pixel_values: Tensor, options: dict[str, Any], merge: bool) -> Any:
        """The encoder's output with one feature tensor an image, and what the prefill must know."""
        run = self.vision if merge and self.schedule.merge else self.vision_unmerged
        features, slots, patches, self.stacked = run(pixel_values, options)
        output = _compat.encoder_output(features if self.stacked else list(features))
        output.luvc_slots, output.luvc_patches = slots, patches
        return output

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        kwargs.update(kwargs.pop("kwargs", {}))
        call: Allowed | None = getattr(self.local, "call", None)
        cache = kwargs.get("past_key_values")
        refusal = refusal_of_forward(self.model, cache)
        if refusal is not None:
            self._refuse(refusal)
            call = NOTHING
        empty = cache is None or cache.get_seq_length() == 0
        tell_rows = call is None
        if kwargs.get("pixel_values") is not None:
            call = call or for_images(self.model, kwargs, self._refuse)
            if call.shorten:
                kwargs = self._encode_inputs(kwargs, merge=empty and call.merge)
        output = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if call is not None and not call.shorten:
            run = self.plain
        elif output is None or not empty:
            run = self.decode
        else:
            return self._prefill(kwargs, output, tell_rows)
        kwargs, padding = self._over_cache(kwargs, cache)
        return run(kwargs, padding)[0]

    def _prefill(self, kwargs: dict[str, Any], output: Any, tell_rows: bool) -> Any:
        features = list(output.pooler_output)
        slots: Tensor | None = getattr(output, "luvc_slots", None)
        rows = kwargs["input_ids"].shape[1]
        places: Tensor | None = None
        grid: tuple[int, int] | None = None
        kwargs = {k: v for k, v in kwargs.items() if k != "mm_encoder_outputs"}
        if slots is not None:
            if slots.shape[1] > 1 and slots.shape[0] == len(features):
                grid = (slots.shape[1], slots.shape[2])
            if slots.shape[1] * slots.shape[2] < output.luvc_patches:
                kwargs, places = self._compact_prompt(kwargs, slots, output.luvc_patches)
        stacked = isinstance(output.pooler_output, Tensor)
        out, final = self.prefill(kwargs, None, features, stacked, grid, tell_rows)
        adopt(out.past_key_values, rows)
        if final is not None:
            out.row_index = final if places is None else places.gather(1, final)
        return out

    def _compact_prompt(
        self, kwargs: dict[str, Any], slots: Tensor, patches: int
    ) -> tuple[dict[str, Any], Tensor]:
        """The prompt without the placeholders that were merged away, and each row's old number."""
        ids = kwargs["input_ids"]
        visual = ids == self.model.config.image_token_id
        places, ascending = surviving_rows(visual, slots, patches)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        short = {
            **kwargs,
            "input_ids": ids.gather(1, ascending),
            "position_ids": gather_rows(positions, places, 1),
        }
        if kwargs.get("labels") is not None:
            short["labels"] = kwargs["labels"].gather(1, places)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            short["attention_mask"] = mask.gather(1, ascending)
        elif kwargs.get("past_key_values") is None and not self._uses_cache(kwargs):
            # Without mask and cache transformers reads gaps in the position ids as packed sequences.
            short["attention_mask"] = torch.ones_like(short["input_ids"])
        return short, places

    def _uses_cache(self, kwargs: dict[str, Any]) -> bool:
        given = kwargs.get("use_cache")
        return bool(self.model.config.get_text_config().use_cache if given is None else given)

    def _over_cache(self, kwargs: dict[str, Any], cache: object) -> tuple[dict[str, Any], Tensor | None]:
        """Over a shortened cache every layer needs its own mask: the padding of each row, to build it from.

        One query without padding needs no mask at all.
        """
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(cache, PrunedCache) or (mask is None and ids is not None and ids.shape[1] == 1):
            return kwargs, None
        if ids is None:
            raise NotImplementedError("luvc_fx: inputs_embeds over a cache with dropped visual tokens")
        if mask is None:
            padding = torch.zeros(ids.shape[0], dtype=torch.int64, device=ids.device)
        elif mask.dim() == 2:
            seen = mask != 0
            padding = (seen.cumsum(1) == 0).sum(1)
            rows = torch.arange(mask.shape[1], device=mask.device)
            torch._assert_async(
                (seen == (rows >= padding.unsqueeze(1))).all(),
                "luvc_fx: over a cache with dropped visual tokens only left padding can be masked",
            )
        else:
            raise NotImplementedError(
                f"luvc_fx: a {mask.dim()}-D attention_mask cannot be followed over a cache with dropped "
                "visual tokens; pass a 2-D mask with left padding, or none"
            )
        return {**kwargs, "attention_mask": None}, padding

    def _encode_inputs(self, kwargs: dict[str, Any], merge: bool) -> dict[str, Any]:
        names = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
        options = {k: kwargs[k] for k in names[1:] if kwargs.get(k) is not None}
        output = self._encode(kwargs["pixel_values"], options, merge)
        rest = {k: v for k, v in kwargs.items() if k not in names}
        return {**rest, "mm_encoder_outputs": {"image": output}}

    def _refuse(self, refusal: Refusal) -> None:
        if not self.report.refuse(refusal):
            return
        if self.settings["strict"] or self.settings["on_no_match"] == "raise":
            raise NotRewritten(str(refusal))
        if self.settings["on_no_match"] == "warn":
            warnings.warn(f"luvc_fx left this alone: {refusal}", LuvcWarning, stacklevel=5)
