"""`luvc_fx.compile` and what goes with it: one model instance, for `generate` and `forward`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from transformers.masking_utils import create_masks_for_generate

from luvc_fx import _compat
from luvc_fx.dynamo.backend import backend, prepare
from luvc_fx.dynamo.generate_warning import take_generate_warning_off
from luvc_fx.generate.calls import Calls
from luvc_fx.generate.families import family_of
from luvc_fx.generate.graphs import GraphSet
from luvc_fx.generate.hooks import HookedMethod, refuse_copies
from luvc_fx.generate.model_check import check_schedule, check_supported, wiring
from luvc_fx.methods.checks import check_bool, check_choice, check_module
from luvc_fx.report import LuvcWarning, NotRewritten, Reason, Refusal, Report
from luvc_fx.schedule import Schedule

_STATE = "_luvc_fx"

SIZES = ("static", "symbolic")

_OUTPUT_HOOKS = "_luvc_fx_output_hooks"
"""Where an instance holds what `prepare` put on it. No model with such hooks can be pickled."""


class FrontDoor:
    """The hooks and compiled graphs of one model instance; made by `compile`.

    `generate` encodes the image, prefills and decodes in separate calls, so no graph sees all of it. The
    instance gets hooks on `generate`, on `forward`, and on the encoders of the base model,
    `get_image_features` and `get_video_features`. Between encoder and prefill the prompt is cut to the
    placeholders whose tokens are left, so that the prefill graph sees a shorter but consistent prompt.

    Attributes:
        settings, dynamic: what `compile` was given.
        report: what happened to every graph, and what was refused.
        graphs: what is compiled, which other schedules of the model may share.
    """

    def __init__(self, model: Any, settings: dict[str, Any], dynamic: bool | None) -> None:
        base, family = model.base_model, family_of(model)
        self.settings = settings
        self.dynamic = dynamic
        self.report = Report()
        hooked = [
            HookedMethod(model, "forward"),
            HookedMethod(model, "generate"),
            HookedMethod(model, "create_masks_for_generate", create_masks_for_generate),
            *(HookedMethod(base, modality.method) for modality in family.modalities()),
        ]
        self._hooked = {method.name: method for method in hooked}
        traceable = family.traceable_methods()
        if settings["sizes"] == "symbolic":
            traceable |= family.symbolic_methods()
        self._replaced = {HookedMethod(base, name): method for name, method in traceable.items()}
        for instance in {id(hooked): hooked for hooked in (model, base)}.values():
            self._replaced[HookedMethod(instance, "__reduce_ex__")] = refuse_copies
        originals = {name: method.original for name, method in self._hooked.items()}
        self.graphs = GraphSet(model, originals, settings, dynamic, self.report)
        self._calls = Calls(model, originals, self.graphs, settings, self._refuse)

    @property
    def schedule(self) -> Schedule:
        """What is merged and pruned."""
        schedule: Schedule = self.settings["schedule"]
        return schedule

    def install(self) -> None:
        """Put the hooks on the instance."""
        for name, body in self._calls.bodies().items():
            self._hooked[name].hook(body)
        for method, replacement in self._replaced.items():
            method.replace(replacement)

    def remove(self) -> None:
        """Take the hooks off; what was on the instance before is there again."""
        for method in (*self._hooked.values(), *self._replaced):
            method.restore()

    def _refuse(self, refusal: Refusal) -> None:
        """Note why a call keeps its visual tokens; warn once, or raise each time, as the settings say.

        A schedule without merges and prunes asks for nothing that could be refused, but a call may fail.
        """
        if not (self.schedule.merge or self.schedule.prune or refusal.reason is Reason.FELL_BACK):
            return
        is_new = self.report.refuse(refusal)
        if self.settings["strict"] or self.settings["on_no_match"] == "raise":
            raise NotRewritten(str(refusal))
        if is_new and self.settings["on_no_match"] == "warn":
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
    sizes: str = "static",
) -> Any:
    """Compile `generate` and `forward` of one model instance with a schedule; returns that instance.

    The instance is changed in place, and only it: `restore` takes everything off again. Calling it
    twice with the same arguments changes nothing; with others, the later ones hold. A forward with
    `pixel_values` returns logits of the surviving rows and their original numbers in
    ``output.row_index`` ``[batch, rows]``.

    Args:
        model: a vision-language model of transformers that encodes its images by `get_image_features`
            (the documentation has a table of the families that tests cover), or a PEFT model around one.
        schedule, inner, mode, options, on_no_match, strict: as of `luvc_fx.backend`.
        dynamic: as of `torch.compile`, for the text.
        sizes: ``"static"`` compiles a prefill graph for each number of visual tokens; ``"symbolic"`` one for
            all, in which prunes are operators that are compiled by themselves. Where it cannot be symbolic
            (a gradient, a compiler of your own) it is static.

    Raises:
        ValueError: an argument that is not allowed, or a schedule that this model cannot follow.

    >>> model = luvc_fx.compile(model, "image")  # doctest: +SKIP
    >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))  # doctest: +SKIP
    """
    parsed = Schedule.of(schedule)
    if dynamic is not None:
        check_bool("", "dynamic", dynamic)
    outer, model = model, _hooked_instance(model)
    with wiring(model):
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
    check_choice("", "sizes", sizes, SIZES)
    # Only so that a wrong argument raises before anything changes.
    backend(**settings, capture_scalars=False, recompile_limit=None)
    settings["sizes"] = "static" if callable(inner) or dynamic is False else sizes
    door: FrontDoor | None = vars(model).get(_STATE)
    if door is not None and (door.settings, door.dynamic) == (settings, dynamic):
        return outer
    _remove_door(model)
    for instance in (outer, model):
        take_generate_warning_off(instance)
    had = _compat.output_hooks(model)
    prepare(model)
    if installed := _compat.output_hooks(model) - had:
        vars(model).setdefault(_OUTPUT_HOOKS, installed)
    with wiring(model):
        door = FrontDoor(model, settings, dynamic)
    door.install()
    vars(model)[_STATE] = door
    return outer


def _hooked_instance(model: Any) -> Any:
    """The instance that gets the hooks: of a PEFT model the one it adapts, to which it passes all calls.

    Raises:
        ValueError: for what is no module.
    """
    check_module(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def restore(model: Any) -> Any:
    """Take `compile` off a model instance; returns it. Without effect on one that was not compiled.

    The output hooks of transformers that `compile` installed go too, so that the model can be pickled if it
    could be before. (A forward of the stock model installs them as well, and takes that away.)
    """
    instance = _hooked_instance(model)
    _remove_door(instance)
    hooks = vars(instance).pop(_OUTPUT_HOOKS, None)
    if hooks:
        _compat.remove_output_hooks(instance, hooks)
    return model


def _remove_door(instance: Any) -> None:
    """What `restore` does, but for the output hooks, which the next `compile` would need again."""
    door: FrontDoor | None = vars(instance).pop(_STATE, None)
    if door is not None:
        door.remove()


def set_budget(model: Any, budget: float | None) -> Any:
    """Let a compiled model keep another share of its visual tokens from now on; returns it.

    Every `keep` of the schedule's prunes is multiplied with one factor (`Schedule.with_budget`). Nothing is
    compiled for it, unless a prune then does nothing. One call alone has it by
    ``model.generate(..., budget=0.3)``. Merges stay as they are.

    Args:
        model: compiled with ``sizes="symbolic"``, the default.
        budget: mean over the decoder layers of the visual tokens that enter, over the original; None is
            what the schedule says.

    Raises:
        ValueError: the model is not compiled, its graphs hold for one number of tokens each, or its schedule
            cannot have that budget.
    """
    graphs = door_of(model).graphs
    graphs.schedule = door_of(model).schedule if budget is None else graphs.schedule_of(budget)
    return model


@contextlib.contextmanager
def applied(model: Any, schedule: Schedule | str = "image", **settings: Any) -> Iterator[Any]:
    """`compile` for the length of a ``with`` block; what held before holds again afterwards."""
    state = vars(_hooked_instance(model))
    before: FrontDoor | None = state.get(_STATE)
    compile(model, schedule, **settings)
    try:
        yield model
    finally:
        if state.get(_STATE) is not before:
            _remove_door(_hooked_instance(model))
            if before is not None:
                put_on(model, before)


def take_off(model: Any) -> FrontDoor | None:
    """`restore`, keeping what was compiled: `put_on` brings it back."""
    door: FrontDoor | None = vars(_hooked_instance(model)).get(_STATE)
    _remove_door(_hooked_instance(model))
    return door


def put_on(model: Any, door: FrontDoor) -> None:
    """Bring back what `take_off` took off this model; whatever is on it now goes."""
    _remove_door(_hooked_instance(model))
    door.install()
    vars(_hooked_instance(model))[_STATE] = door


def report_of(model: Any) -> Report:
    """The report of a compiled model.

    Raises:
        ValueError: the model is not compiled by luvc_fx.
    """
    return door_of(model).report


def is_compiled(model: Any) -> bool:
    """Whether `compile` holds for this model."""
    return _STATE in vars(_hooked_instance(model))


def door_of(model: Any) -> FrontDoor:
    """The hooks on a compiled model. Raises `ValueError` as `report_of`."""
    door: FrontDoor | None = vars(_hooked_instance(model)).get(_STATE)
    if door is None:
        raise ValueError("this model is not compiled by luvc_fx; call luvc_fx.compile(model) first")
    return door
