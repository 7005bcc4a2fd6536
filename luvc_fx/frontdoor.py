"""`luvc_fx.compile`: vision, prefill and decode graphs of `generate`, wired on one model instance.

`generate` encodes the image, prefills and decodes in separate calls, so no graph sees all of it. The
instance gets three hooks: `get_image_features` of the base model (while `generate` runs), `forward`, and
`generate` itself. Between vision and prefill the prompt is cut to the placeholders whose tokens survived,
so that the prefill graph sees a shorter but consistent prompt. No class and no source is changed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat, markers
from luvc_fx.backend import (
    LuvcBackend,
    LuvcWarning,
    NotRewritten,
    backend,
    prepare,
    take_generate_warning_off,
)
from luvc_fx.cache import PrunedCache, adopt, unsupported
from luvc_fx.model_check import check_schedule, check_supported
from luvc_fx.ops import gather_rows, surviving_rows
from luvc_fx.report import Reason, Refusal, Report
from luvc_fx.schedule import Schedule

_STATE = "_luvc_fx"


@dataclass(frozen=True, slots=True)
class _Call:
    """What one `generate` call may do."""

    merge: bool
    shorten: bool


class _Hook:
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
            setattr(owner, name, _Hook(bodies[name], wrapped))

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
        self.local.call = self._decide(kwargs)
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
        call: _Call | None = getattr(self.local, "call", None)
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
        call: _Call | None = getattr(self.local, "call", None)
        cache = kwargs.get("past_key_values")
        refusal = self._forward_refusal(kwargs, cache)
        if refusal is not None:
            self._refuse(refusal)
            call = _Call(merge=False, shorten=False)
        empty = cache is None or cache.get_seq_length() == 0
        tell_rows = call is None
        if kwargs.get("pixel_values") is not None:
            call = call or self._images_allow(kwargs)
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

    # -- what is allowed ---------------------------------------------------------------------

    def _decide(self, kwargs: dict[str, Any]) -> _Call:
        """What this `generate` call may do; each limit is noted in the report."""
        config = kwargs.get("generation_config") or self.model.generation_config

        def option(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        for name, plain_values in (
            ("prefill_chunk_size", (None,)),
            ("assistant_model", (None,)),
            ("prompt_lookup_num_tokens", (None,)),
            ("cache_implementation", (None, "dynamic")),
            ("use_cache", (None, True)),
        ):
            if option(name) not in plain_values:
                self._refuse(Refusal(Reason.INPUTS, f"{name}={option(name)!r}: all visual tokens stay"))
                return _Call(merge=False, shorten=False)
        if (option("num_beams") or 1) > 1 or (option("num_return_sequences") or 1) > 1:
            text = "num_beams or num_return_sequences above 1: transformers expands unmerged features only"
            self._refuse(Refusal(Reason.INPUTS, text + "; pruned, but not merged"))
            return _Call(merge=False, shorten=True)
        cache = kwargs.get("past_key_values")
        call = self._images_allow(kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            return _Call(merge=False, shorten=call.shorten)
        return call

    def _images_allow(self, kwargs: dict[str, Any]) -> _Call:
        """Whether each row has the same number of visual tokens, and a prompt that can be cut."""
        ids, mask = kwargs.get("input_ids", kwargs.get("inputs")), kwargs.get("attention_mask")
        if ids is None:
            self._refuse(Refusal(Reason.INPUTS, "inputs_embeds without input_ids: all visual tokens stay"))
            return _Call(merge=False, shorten=False)
        counts = (ids == self.model.config.image_token_id).sum(1)
        if ids.shape[0] > 1 and int(counts.min()) != int(counts.max()):
            text = "rows with different numbers of visual tokens: all visual tokens stay"
            self._refuse(Refusal(Reason.UNEVEN_BATCH, text))
            return _Call(merge=False, shorten=False)
        if mask is not None and mask.dim() != 2:
            self._refuse(Refusal(Reason.INPUTS, "an attention_mask that is not 2-D: pruned, but not merged"))
            return _Call(merge=False, shorten=True)
        return _Call(merge=True, shorten=True)

    def _forward_refusal(self, kwargs: dict[str, Any], cache: object) -> Refusal | None:
        refused = unsupported(cache)
        if refused is not None:
            return refused
        if self.model.training:
            return Refusal(Reason.TRAINING, "the model is in training mode; call model.eval()")
        return None

    def _refuse(self, refusal: Refusal) -> None:
        if not self.report.refuse(refusal):
            return
        if self.settings["strict"] or self.settings["on_no_match"] == "raise":
            raise NotRewritten(str(refusal))
        if self.settings["on_no_match"] == "warn":
            warnings.warn(f"luvc_fx left this alone: {refusal}", LuvcWarning, stacklevel=5)


def compile(
    model: Any,
    schedule: Schedule | str = "image",
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    on_no_match: str = "warn",
    strict: bool = False,
    dynamic: bool | None = None,
) -> Any:
    """Compile `generate` and `forward` of one model instance with a schedule; returns that instance.

    The instance is changed in place, and only it: `restore` takes everything off again. Calling it
    twice with the same arguments changes nothing; with others, the later ones hold. A forward with
    `pixel_values` returns logits of the surviving rows and their original numbers in
    ``output.row_index`` ``[batch, rows]``.

    Args:
        model: a transformers model, `LlavaForConditionalGeneration` today.
        schedule, inner, mode, options, on_no_match, strict: as of `luvc_fx.backend`.
        dynamic: as of `torch.compile`.

    Raises:
        ValueError: an argument that is not allowed, or a schedule that this model cannot follow.

    >>> model = luvc_fx.compile(model, "image")  # doctest: +SKIP
    >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))  # doctest: +SKIP
    """
    parsed = Schedule.of(schedule)
    given, model = model, _wired(model)
    check_supported(model)
    check_schedule(model, parsed)
    settings: dict[str, Any] = {
        "schedule": parsed,
        "inner": inner,
        "mode": mode,
        "options": options,
        "on_no_match": on_no_match,
        "strict": strict,
    }
    backend(
        **settings, capture_scalars=False, recompile_limit=None
    )  # so that a wrong argument raises before anything changes
    door: FrontDoor | None = vars(model).get(_STATE)
    if door is not None and (door.settings, door.dynamic) == (settings, dynamic):
        return given
    restore(model)
    for instance in (given, model):
        take_generate_warning_off(instance)
    prepare(model)
    door = FrontDoor(model, settings, dynamic)
    door.install()
    vars(model)[_STATE] = door
    return given


def _wired(model: Any) -> Any:
    """The instance that gets the hooks: a PEFT model passes all calls on to the one it adapts."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def restore(model: Any) -> Any:
    """Take `compile` off a model instance; returns it. Without effect on one that was not compiled."""
    door: FrontDoor | None = vars(_wired(model)).pop(_STATE, None)
    if door is not None:
        door.remove()
    return model


@contextlib.contextmanager
def applied(model: Any, schedule: Schedule | str = "image", **settings: Any) -> Iterator[Any]:
    """`compile` for the length of a ``with`` block; what held before holds again afterwards."""
    state = vars(_wired(model))
    before: FrontDoor | None = state.get(_STATE)
    compile(model, schedule, **settings)
    try:
        yield model
    finally:
        if state.get(_STATE) is not before:
            restore(model)
            if before is not None:
                before.install()
                state[_STATE] = before


def report_of(model: Any) -> Report:
    """The report of a compiled model.

    Raises:
        ValueError: the model is not compiled by luvc_fx.
    """
    door: FrontDoor | None = vars(_wired(model)).get(_STATE)
    if door is None:
        raise ValueError("this model is not compiled by luvc_fx; call luvc_fx.compile(model) first")
    return door.report
