"""What luvc_fx recognises in a model, and what a schedule would do to it: from one forward."""

from __future__ import annotations

import inspect as signatures
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import luvc_fx
from luvc_fx.apps.environment import hardware, versions
from luvc_fx.apps.inputs import read_image
from luvc_fx.apps.local_model import load
from luvc_fx.generate.chat_prompt import make_prompt
from luvc_fx.generate.model_check import check_supported
from luvc_fx.generate.sizes.synthetic_image import synthetic_image
from luvc_fx.report import Report
from luvc_fx.report.errors import InputError, brief, one_line
from luvc_fx.schedule import Schedule

log = logging.getLogger(__name__)

DEFAULT_PROMPT = "Describe the image."

PATCHES = "patches"
TOKENS = "visual tokens"


@dataclass(frozen=True, slots=True)
class PlannedInsertion:
    """One insertion as a line of the plan.

    Attributes:
        graph: number of the graph in the report, from 0.
        where: "after encoder block 2", "before decoder layer 6".
        what: "merge width 16 -> 12", "prune by spectrum".
        before, after: tokens on both sides of it, in units of `of`; None where tiles differ in size.
        of: "patches" (of one image or tile) or "visual tokens" (of one row).
    """

    graph: int
    where: str
    what: str
    before: int | None
    after: int | None
    of: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """One model, one prompt, one schedule.

    Attributes:
        images: files, or one line about the synthetic image.
        image_size: height and width of the first image, upright.
        image_notes: what reading the images did to them and may be unexpected (`read_image`).
        prompt_rows: text and visual tokens of the prompt; `visual_tokens` of them are visual.
        budget: mean over decoder layers of the visual tokens entering the layer, over `visual_tokens`;
            None where no graph has a decoder behind a fusion.
    """

    directory: str
    model: str
    processor: str
    images: list[str]
    synthetic: bool
    image_size: tuple[int, int]
    prompt: str
    prompt_rows: int
    visual_tokens: int
    schedule: Schedule
    plan: list[PlannedInsertion]
    tokens_per_layer: list[int]
    budget: float | None
    report: Report
    hardware: dict[str, Any]
    versions: dict[str, str]
    image_notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        if not self.image_notes:
            del own["image_notes"]
        return {
            **own,
            "schedule": json.loads(self.schedule.to_json()),
            "plan": [asdict(line) for line in self.plan],
            "report": self.report.to_dict(),
        }


def inspect(
    directory: Path,
    schedule: Schedule,
    images: Sequence[Path] = (),
    prompt: str = DEFAULT_PROMPT,
    say: Callable[[str], None] = lambda _: None,
) -> Inspection:
    """Load a model, run it once through `luvc_fx.compile` without a compiler, and read the report.

    Args:
        images: files; none for one synthetic image.
        say: called with one line about each slow step before it starts.

    Raises:
        InputError: a directory, an image, a prompt or a schedule that cannot be used, or a model that
            luvc_fx cannot wire or that fails in its forward.
    """
    notes: list[str] = []
    pictures = [read_image(path, notes.append) for path in images]
    for note in notes:
        say(note)
    say("loading the model")
    model, processor = load(directory)
    try:
        check_supported(model)
    except ValueError as error:
        raise InputError(one_line(error)) from None
    synthetic = not pictures
    if synthetic:
        pictures = [synthetic_image(model, processor)]
    inputs = make_prompt(model, processor, pictures, prompt)
    say("running it once, without a compiler")
    report = run_once(model, inputs, schedule)
    ids = inputs["input_ids"]
    visual = int((ids[0] == model.config.image_token_id).sum())
    tokens = report.tokens_per_layer()
    height, width = pictures[0].height, pictures[0].width
    return Inspection(
        directory=str(directory),
        model=type(model).__name__,
        processor=type(processor).__name__,
        images=["synthetic test image"] if synthetic else [str(path) for path in images],
        synthetic=synthetic,
        image_size=(height, width),
        prompt=prompt,
        prompt_rows=ids.shape[1],
        visual_tokens=visual,
        schedule=schedule,
        plan=plan_of(report),
        tokens_per_layer=tokens,
        budget=report.budget(visual) if tokens else None,
        report=report,
        hardware=hardware(model),
        versions=versions(),
        image_notes=tuple(notes),
    )


def run_once(model: Any, inputs: dict[str, Any], schedule: Schedule) -> Report:
    """The report of one forward with a schedule; the model is as it was afterwards.

    Raises:
        InputError: a schedule that the model cannot follow, or a forward that fails.
    """
    once = dict(inputs)
    if "logits_to_keep" in signatures.signature(model.forward).parameters:
        once["logits_to_keep"] = 1  # as generate asks for it: the head is not run on every row
    try:
        luvc_fx.compile(model, schedule, inner="eager", on_no_match="ignore")
    except ValueError as error:
        raise InputError(f"the schedule does not fit the model: {one_line(error)}") from None
    try:
        with torch.no_grad():
            model(**once)
        return luvc_fx.report_of(model)
    except Exception as error:
        log.debug("the forward failed", exc_info=error)
        what = f"{type(model).__name__} failed in its forward under luvc_fx"
        raise InputError(f"{what}: {brief(error)}") from error
    finally:
        luvc_fx.restore(model)


def plan_of(report: Report) -> list[PlannedInsertion]:
    """All insertions of all graphs, in the order in which they run."""
    plan = []
    for number, graph in enumerate(report.graphs):
        for insertion in graph.inserted:
            if insertion.kind == "merge":
                what, of = f"merge {'; '.join(map(str, insertion.steps))}", PATCHES
            else:
                what, of = f"prune by {insertion.method}", TOKENS
            plan.append(PlannedInsertion(number, insertion.site, what, insertion.before, insertion.after, of))
    return plan
