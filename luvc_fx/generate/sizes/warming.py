"""`luvc_fx.warmup`: compile the graphs of the sizes to come before the first request needs them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from luvc_fx import _compat
from luvc_fx.generate.chat_prompt import make_prompt
from luvc_fx.generate.constants import as_text
from luvc_fx.generate.families import STEERING, modalities
from luvc_fx.generate.frontdoor import report_of
from luvc_fx.generate.sizes.buckets import SizeBuckets, checked_sizes
from luvc_fx.generate.sizes.longer_prompts import can_lengthen, can_pad, longer
from luvc_fx.generate.sizes.synthetic_image import synthetic_image
from luvc_fx.methods.checks import check_whole, refuse
from luvc_fx.report import GraphReport, LuvcWarning, Reason, Report

LENGTHS = (0, 3, 7, 12)
"""Tokens by which prompts are made longer, one after the other, until a prompt compiles nothing new.

Measured: the first size of all needs two lengths (the second makes the text axis symbolic), each later
one a single length; the next length of each only shows that nothing is left to compile."""

MOST_IMAGES = 1 << 16
"""Of one call of `generate`; more than that is a slip."""

KINDS = ("vision", "prefill", "decode", "other")


@dataclass(frozen=True, slots=True)
class WarmedSize:
    """What one size cost.

    Attributes:
        size: (height, width) in pixels; None for ready `inputs`.
        what: what the model is told about its images, as ``image_grid_thw 1,16,16``.
        seconds: wall time of all its `generate` calls, compilation included. Caches on disk count.
        vision, prefill, decode, other: new graphs of each kind (see `luvc_fx.report.GraphReport`).
        prompts: `generate` calls made.
        settled: whether the last of them compiled nothing new.
    """

    size: tuple[int, int] | None
    what: str
    seconds: float
    vision: int
    prefill: int
    decode: int
    other: int
    prompts: int
    settled: bool

    @property
    def graphs(self) -> int:
        """New graphs of all kinds."""
        return self.vision + self.prefill + self.decode + self.other


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What `warmup` did, size by size; ``str()`` is a table.

    Attributes:
        left_out: sizes that were not run because Dynamo had reached its limit of recompiles.
    """

    sizes: tuple[WarmedSize, ...]
    left_out: int = 0

    @property
    def seconds(self) -> float:
        """Wall time of all sizes."""
        return sum(size.seconds for size in self.sizes)

    @property
    def graphs(self) -> int:
        """New graphs of all sizes and kinds."""
        return sum(size.graphs for size in self.sizes)

    @property
    def settled(self) -> bool:
        """Whether every size ended with a prompt that compiled nothing new."""
        return not self.left_out and all(size.settled for size in self.sizes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        own = {"seconds": self.seconds, "graphs": self.graphs, "settled": self.settled}
        return {**own, "left_out": self.left_out, "sizes": [asdict(size) for size in self.sizes]}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("size", "seconds", *KINDS, "prompts", "")]
        for one in self.sizes:
            name = one.what if one.size is None else f"{one.size[0]} x {one.size[1]}"
            counts = (str(getattr(one, kind)) for kind in KINDS)
            note = "" if one.settled else "not settled"
            rows.append((name, f"{one.seconds:.1f}", *counts, str(one.prompts), note))
        totals = (str(sum(getattr(one, kind) for one in self.sizes)) for kind in KINDS)
        prompts = sum(one.prompts for one in self.sizes)
        rows.append(("total", f"{self.seconds:.1f}", *totals, str(prompts), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        if self.left_out:
            lines.append(f"{self.left_out} sizes left out: Dynamo has reached its limit of recompiles")
        return "\n".join(lines)


def warmup(
    model: Any,
    sizes: Iterable[Sequence[int]] | SizeBuckets | None = None,
    processor: Any = None,
    *,
    inputs: Iterable[Mapping[str, Any]] | None = None,
    images_per_prompt: int = 1,
    batch: int = 1,
    prompt: str = "Describe the image.",
    new_tokens: int = 2,
) -> WarmUp:
    """Compile what requests with images of these sizes will need, by asking about a synthetic one of each.

    Afterwards a request with an image of one of these sizes, with as many images and rows, compiles
    nothing: another image, another text and another number of new tokens are in no graph. For that each
    size is asked with prompts of growing length until one compiles nothing new (`LENGTHS`), and a batch
    also with its rows padded on the left.

    What is not warmed: other options of `generate` that change what the model is called with (beams,
    caches), and another grad mode: warm up inside the ``torch.inference_mode()`` that requests run in.

    Args:
        model: compiled by `luvc_fx.compile`.
        sizes: (height, width) of the images as the processor gets them, or `SizeBuckets`.
        processor: of the model; makes the prompts as `luvc-fx inspect` does.
        inputs: in place of `sizes` and `processor`: keyword arguments of `generate`, one mapping for
            each size. They are lengthened by text behind the prompt where all that has a place for each
            token is `input_ids` and what is shaped like it; else they are run as they are, twice.
        images_per_prompt: images in each row, all of the same size.
        batch: rows of the prompt.
        prompt: the text behind the images.
        new_tokens: tokens to generate, at least 2: the second runs the decode graph.

    Raises:
        ValueError: a model that luvc_fx has not compiled, or an argument that is not allowed.
        InputError: a prompt that the processor cannot make (a ValueError too).

    Warns:
        LuvcWarning: more sizes than Dynamo compiles one function for; those beyond would run eagerly
            with all visual tokens. Sizes are left out from the moment that it has given up.

    >>> print(luvc_fx.warmup(model, [(448, 448), (336, 588)], processor))  # doctest: +SKIP
    """
    try:
        report = report_of(model)
    except ValueError:
        raise ValueError(
            f"this {type(model).__name__} is not compiled by luvc_fx; call luvc_fx.compile(model) first"
        ) from None
    for name, value, least in (
        ("images_per_prompt", images_per_prompt, 1),
        ("batch", batch, 1),
        ("new_tokens", new_tokens, 2),
    ):
        check_whole("", name, value, least)
    if images_per_prompt * batch > MOST_IMAGES:
        refuse("", "images_per_prompt times batch", images_per_prompt * batch, f"at most {MOST_IMAGES}")
    cases: list[_Case]
    if inputs is not None:
        if sizes is not None or processor is not None:
            raise ValueError("inputs are ready: give either them, or sizes and a processor")
        cases = [_Ready(model, given) for given in _ready(inputs)]
    else:
        if sizes is None or processor is None:
            raise ValueError("sizes and a processor are both needed, or ready inputs in place of them")
        wanted = sizes.sizes if isinstance(sizes, SizeBuckets) else checked_sizes("sizes", sizes)
        cases = [
            _Sized(model, size, processor, images_per_prompt, batch, prompt) for size in dict.fromkeys(wanted)
        ]
    _warn_of_limit(model, cases)
    warmed: list[WarmedSize] = []
    for case in cases:
        # Beyond the limit a size would only be run eagerly, which warms nothing.
        if _gave_up(report):
            break
        warmed.append(_run(model, case, report, new_tokens))
    return WarmUp(tuple(warmed), len(cases) - len(warmed))


# ------------------------------------------------------------------------------------------- one size


class _Case:
    """One size, and how to make its prompt; made again when it is needed, so that only one holds pixels."""

    size: tuple[int, int] | None = None

    def make(self) -> dict[str, Any]:
        raise NotImplementedError


class _Sized(_Case):
    def __init__(
        self, model: Any, size: tuple[int, int], processor: Any, images: int, batch: int, text: str
    ) -> None:
        self.model, self.size, self.processor = model, size, processor
        self.images, self.batch, self.text = images, batch, text

    def make(self) -> dict[str, Any]:
        image = synthetic_image(self.model, self.processor, self.size)
        row = make_prompt(self.model, self.processor, [image] * self.images, self.text)
        if self.batch == 1:
            return row
        # Everything that a processor returns has its rows, images or patches in front.
        return {
            name: torch.cat([value] * self.batch) if isinstance(value, Tensor) else value
            for name, value in row.items()
        }


class _Ready(_Case):
    def __init__(self, model: Any, given: Mapping[str, Any]) -> None:
        self.model, self.given = model, given

    def make(self) -> dict[str, Any]:
        return {
            name: value.to(self.model.device) if isinstance(value, Tensor) else value
            for name, value in self.given.items()
        }


def _ready(inputs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not isinstance(inputs, Iterable):
        refuse("", "inputs", inputs, "mappings, one for each size")
    prompts = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    for given in prompts:
        ids = given.get("input_ids") if isinstance(given, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError("inputs hold something without input_ids [batch, tokens]; allowed: mappings")
    if not prompts:
        raise ValueError("inputs is empty; at least one mapping is needed")
    return prompts


def _run(model: Any, case: _Case, report: Report, new_tokens: int) -> WarmedSize:
    given = case.make()
    first = len(report.graphs)
    prompts, settled = 0, True
    started = time.perf_counter()
    # Rows that are padded come first: their mask makes graphs of their own, as do those without one.
    for padded in (True, False) if can_pad(model, given) else (False,):
        for more in LENGTHS if can_lengthen(model, given) else (0, 0):
            before = len(report.graphs)
            _generate(model, longer(model, given, more, padded), new_tokens)
            prompts += 1
            if len(report.graphs) == before or _gave_up(report):
                break
        settled = settled and len(report.graphs) == before
    seconds = time.perf_counter() - started
    new = [_kind(graph) for graph in report.graphs[first:]]
    counts = {kind: new.count(kind) for kind in KINDS}
    what = _guarded_on(model, given)
    settled = settled and not _gave_up(report)
    return WarmedSize(size=case.size, what=what, seconds=seconds, prompts=prompts, settled=settled, **counts)


def _generate(model: Any, given: dict[str, Any], new_tokens: int) -> None:
    devices = [model.device] if model.device.type == "cuda" else []
    # A model whose generation config samples would otherwise move the caller's random numbers on.
    with torch.random.fork_rng(devices):
        model.generate(**given, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _kind(graph: GraphReport) -> str:
    return graph.kind if graph.kind in KINDS else "other"


def _gave_up(report: Report) -> bool:
    return any(refusal.reason is Reason.RECOMPILE_LIMIT for refusal in report.refusals)


# ---------------------------------------------------------------------------------------- the limit


def _guarded_on(model: Any, given: Mapping[str, Any]) -> str:
    """What graphs of this size are guarded on: what the model is told about its images, or their shape."""
    sizes = [f"{name} {as_text(given[name])}" for name in STEERING if given.get(name) is not None]
    shapes = [
        f"{modality.pixels} {tuple(given[modality.pixels].shape)}"
        for modality in modalities(model)
        if isinstance(given.get(modality.pixels), Tensor)
    ]
    return "; ".join(sizes or shapes)


def _warn_of_limit(model: Any, cases: list[_Case]) -> None:
    limit = _compat.RECOMPILE_LIMIT
    if len(cases) < limit:
        return
    # Several sizes may be one grid to the model; only then is it worth making all prompts first.
    distinct = len({_guarded_on(model, case.make()) for case in cases})
    if distinct + 1 > limit:
        warnings.warn(
            f"{distinct} sizes of images need up to {distinct + 1} prefill graphs, and Dynamo compiles one "
            f"function {limit} times at most; beyond that it runs eagerly, with all visual tokens. "
            "luvc_fx.SizeBuckets brings images to fewer sizes",
            LuvcWarning,
            stacklevel=3,
        )
