"""The model families as data: inputs, what is expected of each, and one function that runs a cell.

A cell is a family, one of its inputs and a wiring: `luvc_fx.compile` (forward and `generate`) or
`torch.compile(model, backend=luvc_fx.backend(...))` (forward alone). Rows of the table of families are
made from what `run` returns, and tests compare it with what the cell declares. A new family is one entry of
`FAMILIES`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import luvc_fx
from luvc_fx import LuvcWarning, Merge, Prune, Schedule
from luvc_fx.report import Reason, Refusal, Report
from tests.support.models import inputs, tiny_internvl, tiny_llava
from tests.support.models_anyres import anyres_inputs, tiny_llava_next, tiny_onevision
from tests.support.models_qwen import qwen_inputs, tiny_qwen2_5_vl, tiny_qwen2_vl, tiny_qwen3_vl
from tests.support.oracle import OracleResult, oracle_forward, oracle_generate
from tests.support.replay import assert_close

Batch = dict[str, Tensor]

NEW_TOKENS = 8
TOLERANCE = 2e-5
MERGES = (Merge("width", keep=0.5, layer=0), Merge("height", keep=0.75, layer=1, feature="keys"))
PRUNES = (Prune(keep=0.5, layer=1), Prune(keep=0.25, layer=-1, energy="ratio"))
SCHEDULE = Schedule(merge=MERGES, prune=PRUNES)

# ----------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Input:
    """One kind of prompt, and what happens to it.

    Attributes:
        spec: what the family's `prompt` makes it from; the last of each row is text.
        other: the same with an image of another size or number of tiles, where there is such a thing.
        merged, pruned: whether tokens are; reasons: what the report says, in order, each once. A reason
            beside merged tokens is about one merge that stopped early.
        model: options of the model beside the family's own.
    """

    spec: Any
    other: Any = None
    merged: bool = True
    pruned: bool = True
    reasons: tuple[Reason, ...] = ()
    model: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Family:
    """A model class: how to make a tiny one, its prompts, and what `backend()` does with a forward.

    Attributes:
        prompt: ``(model, spec, more text, seed) -> inputs``.
        unit: patches on the side of a feature; last: the last encoder block that may merge.
        whole: the input under `backend()`: its graphs depend on whether the capture is whole.
        flex: whether the stock model takes ``attn_implementation="flex_attention"``.
    """

    title: str
    make: Callable[..., Any]
    size: dict[str, Any]
    prompt: Callable[[Any, Any, int, int], Batch]
    inputs: dict[str, Input]
    whole: Input
    flex: bool = True


def _plain(model: Any, spec: dict[str, Any], more: int, seed: int) -> Batch:
    return inputs(model, **spec, text=(3, 5 + more), seed=seed)


def _rows(made: Callable[..., Batch]) -> Callable[[Any, Any, int, int], Batch]:
    def prompt(model: Any, spec: list[list[Any]], more: int, seed: int) -> Batch:
        return made(model, [[*row[:-1], row[-1] + more] for row in spec], seed)

    return prompt


_QWEN: dict[str, tuple[Any, Any]] = {
    "an image": ([[3, ("image", 8, 8), 4]], [[3, ("image", 4, 12), 4]]),
    "images of two sizes": ([[2, ("image", 8, 4), 1, ("image", 4, 12), 3]], None),
    "a video": ([[2, ("video", 2, 4, 8), 2]], [[2, ("video", 3, 4, 8), 2]]),
    "an image and a video": ([[2, ("image", 4, 8), 3, ("video", 2, 8, 4), 2]], None),
    "two rows, left padding": ([[3, ("image", 8, 8), 4], [1, ("image", 8, 8), 3]], None),
    "two rows, images of other shapes": ([[3, ("image", 8, 12), 1], [2, ("image", 24, 4), 9]], None),
}
_DEEP = ("an image", "images of two sizes", "a video", "two rows, left padding")
_UNEVEN = Input([[3, ("image", 8, 8), 2], [12]], merged=False, pruned=False, reasons=(Reason.UNEVEN_BATCH,))
_UNEVEN_MERGED = Input(
    [[3, ("image", 8, 8), 1], [2, ("image", 4, 16), 9]], merged=False, reasons=(Reason.UNEVEN_BATCH,)
)
_TILED: dict[str, tuple[Any, Any]] = {
    "an image in tiles": ([[3, ("image", 16, 32), 4]], [[3, ("image", 32, 16), 4]]),
    "padding cropped": ([[3, ("image", 12, 32), 4]], None),
    "two images": ([[3, ("image", 16, 16), 2, ("image", 16, 27), 4]], None),
    "two rows, left padding": ([[3, ("image", 16, 32), 4], [1, ("image", 16, 32), 3]], None),
}
_UNEVEN_TILES = Input(
    [[3, ("image", 16, 32), 2], [3, ("image", 32, 32), 4]],
    merged=False,
    pruned=False,
    reasons=(Reason.UNEVEN_BATCH,),
)
# A merge leaves at least one place of every tile that is image: it stops early, and says so.
_CLAMPED = Input([[3, ("image", 16, 16), 2, ("image", 16, 27), 4]], reasons=(Reason.SCHEDULE,))
_BROKEN = (Reason.CAPTURE_ENDED_BEFORE_FUSION,)
_PIECES = (Reason.NO_ATTENTION, *_BROKEN)
"""Neither the decoder nor the encoder is in the graph with the fusion."""


def _inputs(specs: dict[str, tuple[Any, Any]]) -> dict[str, Input]:
    return {name: Input(spec, other) for name, (spec, other) in specs.items()}


FAMILIES: dict[str, Family] = {
    "llava": Family(
        "LLaVA-1.5",
        tiny_llava,
        {"decoder_layers": 3, "encoder_layers": 3, "grid": 4},
        _plain,
        {
            "an image": Input({}),
            "two images": Input({"images": 2}),
            "two rows, left padding": Input({"batch": 2, "padding": (0, 3)}),
        },
        whole=Input({}),
    ),
    "internvl": Family(
        "InternVL",
        tiny_internvl,
        {"decoder_layers": 3, "encoder_layers": 2},
        _plain,
        {
            "an image in tiles": Input({"tiles": 3}, {"tiles": 2}),
            "images of other tiles": Input({"images": 2, "tiles": (1, 2)}),
            "two rows, left padding": Input({"batch": 2, "padding": (0, 3)}),
        },
        whole=Input({"tiles": 3}),
    ),
    "qwen2": Family(
        "Qwen2-VL",
        tiny_qwen2_vl,
        {"decoder_layers": 3, "encoder_layers": 2},
        _rows(qwen_inputs),
        {
            **_inputs(_QWEN),
            "a batch that would keep unequal counts": _UNEVEN_MERGED,
            "a batch of unequal token counts": _UNEVEN,
        },
        whole=Input(_QWEN["an image"][0], merged=False, pruned=False, reasons=_PIECES),
        flex=False,
    ),
    "qwen2.5": Family(
        "Qwen2.5-VL",
        tiny_qwen2_5_vl,
        {"decoder_layers": 3, "encoder_layers": 2},
        _rows(qwen_inputs),
        {
            name: Input(*_QWEN[name], merged=False, reasons=(Reason.TOKEN_AXIS,))
            for name in ("an image", "images of two sizes", "an image and a video", "two rows, left padding")
        },
        whole=Input(_QWEN["an image"][0], merged=False, pruned=False, reasons=_PIECES),
        flex=False,
    ),
    "qwen3": Family(
        "Qwen3-VL",
        tiny_qwen3_vl,
        {"decoder_layers": 3, "encoder_layers": 3},
        _rows(qwen_inputs),
        {
            **{name: Input(*_QWEN[name]) for name in _DEEP},
            # Every tap's features enter the decoder beside those that merged.
            "merges behind the first deepstack tap": Input(
                _QWEN["an image"][0], merged=False, reasons=(Reason.SCHEDULE,), model=(("taps", (0, 1)),)
            ),
            "an image and a video": Input(
                _QWEN["an image and a video"][0], pruned=False, reasons=(Reason.TOKEN_AXIS,)
            ),
        },
        whole=Input(_QWEN["an image"][0], merged=False, pruned=False, reasons=_PIECES),
        flex=False,
    ),
    "onevision": Family(
        "LLaVA-OneVision",
        tiny_onevision,
        {"decoder_layers": 3, "encoder_layers": 2, "grid": 4},
        _rows(anyres_inputs),
        {
            **_inputs(_TILED),
            "features resampled": Input(
                [[3, ("image", 32, 32), 4]],
                merged=False,
                reasons=(Reason.TOKEN_AXIS,),
                model=(("most", 1),),
            ),
            "a video": Input([[3, ("video", 2), 4]], [[3, ("video", 3), 4]]),
            "an image and a video": Input([[3, ("image", 16, 32), 2, ("video", 2), 4]]),
            "a batch of unequal token counts": _UNEVEN_TILES,
        },
        whole=Input(_TILED["an image in tiles"][0], merged=False, reasons=_BROKEN),
    ),
    "next": Family(
        "LLaVA-NeXT",
        tiny_llava_next,
        {"decoder_layers": 3, "encoder_layers": 3, "grid": 4},
        _rows(anyres_inputs),
        {**_inputs(_TILED), "two images": _CLAMPED},
        whole=Input(_TILED["an image in tiles"][0], merged=False, reasons=_BROKEN),
    ),
}

BACKEND = "forward under `backend()`"
CELLS = [(family, name) for family, found in FAMILIES.items() for name in (*found.inputs, BACKEND)]


def cell(family: str, name: str) -> Input:
    """What the matrix says about an input of a family."""
    return FAMILIES[family].whole if name == BACKEND else FAMILIES[family].inputs[name]


def first_input(family: str) -> str:
    """The plainest input of a family."""
    return next(iter(FAMILIES[family].inputs))


@cache
def model_of(family: str, *options: tuple[str, Any]) -> Any:
    """A tiny model that captures whole where it can; do not change it."""
    return luvc_fx.prepare(FAMILIES[family].make(**{**FAMILIES[family].size, **dict(options)}))


def prompt_of(family: str, name: str, more: int = 0, seed: int = 0, other: bool = False) -> Batch:
    """A prompt; with `more` text, or with the other image."""
    given = cell(family, name)
    spec = given.other if other else given.spec
    return FAMILIES[family].prompt(model_of(family, *given.model), spec, more, seed)


# ------------------------------------------------------------------------------------------ running


@dataclass
class Outcome:
    """What happened to a cell.

    Attributes:
        forward, generate: graphs by kind that the first call compiled; `generate` came after `forward`,
            so it has that one's encoders already.
        repeated: graphs compiled by both again, for other values of the same shapes.
        longer, other: the same for more text and for another image; None where it was not tried.
        refusals: of the report, each once; warned: the texts of `LuvcWarning`.
        tokens_per_layer: of the first forward.
        differences: what is not as the oracle (or the stock model) has it, in words.
        gap: of the oracle's closest decision.
    """

    forward: Counter[str] = field(default_factory=Counter)
    generate: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    longer: int | None = None
    other: int | None = None
    refusals: list[Refusal] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    tokens_per_layer: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    gap: float = float("inf")

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Each reason once, in the order in which they came."""
        return tuple(dict.fromkeys(refusal.reason for refusal in self.refusals))


def done_to(given: Input) -> Schedule | None:
    """The part of `SCHEDULE` that is left after the refusals; None for nothing at all."""
    if not given.merged and not given.pruned:
        return None
    return Schedule(merge=MERGES if given.merged else (), prune=PRUNES if given.pruned else ())


def refused(report: Report) -> list[Refusal]:
    """Everything refused, each once."""
    graphs = [refusal for graph in report.graphs for refusal in graph.refusals]
    return list(dict.fromkeys([*report.refusals, *graphs]))


@torch.no_grad()
def compare_forward(model: Any, schedule: Schedule | None, batch: Batch, out: Any, told: Outcome) -> None:
    """Note where `out` is not the oracle's forward (without a schedule: the stock model's)."""
    if schedule is None:
        _close(out.logits, model(**batch).logits, told, "logits")
        return
    want = oracle_forward(model, schedule, **batch)
    told.gap = min(told.gap, want.gap)
    note_rows(out, want, told)


def note_rows(out: Any, want: OracleResult, told: Outcome) -> None:
    """Note where logits and rows of a forward are not the oracle's."""
    if out.logits.shape == want.logits.shape:
        _close(out.logits[want.mask], want.logits[want.mask], told, "logits")
    else:
        told.differences.append(f"logits {tuple(out.logits.shape)}, expected {tuple(want.logits.shape)}")
    rows = getattr(out, "row_index", None)
    if rows is not None and not torch.equal(rows, want.rows):
        told.differences.append(f"rows {rows.tolist()}, expected {want.rows.tolist()}")
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    if lengths != want.kv_lengths:
        told.differences.append(f"lengths of the caches {lengths}, expected {want.kv_lengths}")


def _close(got: Tensor, want: Tensor, told: Outcome, what: str) -> None:
    try:
        assert_close(got, want, TOLERANCE, what)
    except AssertionError as error:
        told.differences.append(str(error))


@contextmanager
def _heard(told: Outcome) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LuvcWarning)
        yield
    told.warned += [str(w.message) for w in caught if issubclass(w.category, LuvcWarning)]


@torch.no_grad()
def run(
    family: str, name: str, longer: bool = False, other: bool = False, inner: Any = "eager", **settings: Any
) -> Outcome:
    """Run a cell: forward, `generate`, both again; with `longer` text and the `other` image if wanted."""
    if name == BACKEND:
        return _run_backend(family, inner)
    given = cell(family, name)
    model = model_of(family, *given.model)
    told = Outcome()
    schedule = done_to(given)
    batches = [("forward", prompt_of(family, name)), ("repeated", prompt_of(family, name, seed=1))]
    if longer:
        batches.append(("longer", prompt_of(family, name, more=3)))
    if other and given.other is not None:
        batches.append(("other", prompt_of(family, name, other=True)))
    torch._dynamo.reset()
    results = []
    with _heard(told), luvc_fx.applied(model, SCHEDULE, inner=inner, **settings):
        report = luvc_fx.report_of(model)
        for step, batch in batches:
            before = len(report.graphs)
            out = model(**batch)
            middle = len(report.graphs)
            said = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
            results.append((batch, out, said))
            if step == "forward":
                told.forward = Counter(graph.kind for graph in report.graphs[:middle])
                told.generate = Counter(graph.kind for graph in report.graphs[middle:])
                told.tokens_per_layer = report.tokens_per_layer()
            else:
                setattr(told, step, len(report.graphs) - before)
        told.refusals = refused(report)
    for batch, out, said in results:
        compare_forward(model, schedule, batch, out, told)
        if schedule is None:
            wanted = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        else:
            wanted = oracle_generate(model, schedule, NEW_TOKENS, **batch)
        if not torch.equal(said, wanted):
            told.differences.append(f"generated {said.tolist()}, expected {wanted.tolist()}")
        if schedule is not None and getattr(out, "row_index", None) is None:
            told.differences.append("no row_index")
    return told


@torch.no_grad()
def _run_backend(family: str, inner: Any) -> Outcome:
    """A forward through `torch.compile`, twice."""
    given, model, told = cell(family, BACKEND), model_of(family), Outcome()
    torch._dynamo.reset()
    backend = luvc_fx.backend(SCHEDULE, inner=inner)
    compiled = torch.compile(model, backend=backend)
    results = []
    with _heard(told):
        for seed in (0, 1):
            batch = prompt_of(family, BACKEND, seed=seed)
            results.append((batch, compiled(**batch)))
            if seed == 0:
                told.forward = Counter(graph.kind for graph in backend.report.graphs)
                told.tokens_per_layer = backend.report.tokens_per_layer()
    told.repeated = len(backend.report.graphs) - told.forward.total()
    told.refusals = refused(backend.report)
    for batch, out in results:
        compare_forward(model, done_to(given), batch, out, told)
    return told
