"""Ask the shipped model about an image, without and with a token budget, and time both.

Both arms run the same callables: the front door wires two copies of the model, one with an empty
schedule (plain `inner`, nothing rewritten) and one with the schedule asked for.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import luvc_fx
from luvc_fx import _compat
from luvc_fx.apps.bench.timing import spread
from luvc_fx.apps.environment import hardware, versions
from luvc_fx.apps.inputs import read_image
from luvc_fx.apps.picture.kept_tokens import check_path
from luvc_fx.report import Reason, Report
from luvc_fx.report.errors import InputError
from luvc_fx.schedule import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL_DIR = Path(__file__).parent / "demo_model"
"""A small LlavaForConditionalGeneration with its processor, loaded offline by `from_pretrained`."""

WARM_UP = 3
"""Prefills of each arm that are not counted, after the first answer has compiled everything."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about which image.

    Attributes:
        expected: the right answer, which is known for the shipped questions only.
        notes: what reading the image did to it and may be unexpected (`read_image`).
    """

    image: Image
    source: str
    text: str
    expected: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of running the model.

    Attributes:
        prefill_ms: median time of `generate` to its first token: vision tower, prefill and
            generate's own bookkeeping.
        prefill_spread_ms: distance between the quartiles of the same runs.
        tokens_per_layer: visual tokens that enter each decoder layer, from the KV cache.
        kv_lengths: rows in each layer's KV cache after the prompt.
        compile_s: wall time of the first answer, compilation included. Caches on disk count.
    """

    answer: str
    prefill_ms: float
    prefill_spread_ms: float
    tokens_per_layer: list[int]
    kv_lengths: list[int]
    compile_s: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both arms and what follows from them.

    Attributes:
        prefill_speedup: baseline over luvc, or None where `obstacles` says why it would mislead.
        budget: mean over decoder layers of the visual tokens entering the layer, over the original.
        picture: where the kept tokens were drawn, if that was asked for.
    """

    question: Question
    schedule: Schedule
    inner: str
    runs: int
    baseline: Arm
    luvc: Arm
    visual_tokens: int
    budget: float
    prefill_speedup: float | None
    obstacles: list[str]
    report: Report
    hardware: dict[str, Any]
    versions: dict[str, str]
    picture: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "image": self.question.source,
            "question": self.question.text,
            "expected": self.question.expected,
            "baseline": asdict(self.baseline),
            "luvc": asdict(self.luvc),
            "prefill_speedup": self.prefill_speedup,
            "no_speedup_because": self.obstacles,
            "visual_tokens": self.visual_tokens,
            "budget": self.budget,
            "schedule": json.loads(self.schedule.to_json()),
            "inner": self.inner,
            "runs": self.runs,
            "report": self.report.to_dict(),
            "hardware": self.hardware,
            "versions": self.versions,
            **({} if self.picture is None else {"picture": str(self.picture)}),
            **({"image_notes": list(self.question.notes)} if self.question.notes else {}),
        }


def ask(image: Path | None = None, text: str | None = None) -> Question:
    """The question to run: the shipped image and its first question where nothing else is given.

    Raises:
        InputError: an image that cannot be read, or a question that the prompt cannot hold.
    """
    shipped = json.loads((MODEL_DIR / "examples.json").read_text(encoding="utf-8"))
    if text is not None and not text.strip():
        raise InputError("the question is empty")
    if text is not None and "<image>" in text:
        raise InputError("the question must not contain '<image>'; the prompt already has one image")
    if image is not None:
        notes: list[str] = []
        read = read_image(image, notes.append)
        text = shipped[0]["questions"][0]["text"] if text is None else text
        return Question(read, str(image), text, notes=tuple(notes))
    name, questions = shipped[0]["image"], shipped[0]["questions"]
    known = {question["text"]: question["answer"] for question in questions}
    text = questions[0]["text"] if text is None else text
    return Question(read_image(MODEL_DIR / name), name, text, known.get(text))


def load_model() -> tuple[Any, Any]:
    """The shipped model, ready to run, and its processor: float32 on a CPU, bfloat16 on a GPU."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, local_files_only=True, dtype=dtype)
    processor = AutoProcessor.from_pretrained(MODEL_DIR, local_files_only=True)
    return model.eval().to("cuda" if cuda else "cpu"), processor


def unknown_words(processor: Any, text: str) -> list[str]:
    """The words of `text` that are not in the model's vocabulary."""
    tokens = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return [
        text[start:end]
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        if token == processor.tokenizer.unk_token_id
    ]


def run(
    question: Question,
    schedule: Schedule,
    inner: str = "inductor",
    runs: int = 20,
    say: Callable[[str], None] = lambda _: None,
    picture: Path | None = None,
) -> DemoResult:
    """Ask the shipped model once plainly and once with `schedule`; time both prefills in turns.

    Args:
        runs: timed prefills of each arm, at least 1.
        say: called with one line about each slow step before it starts.
        picture: a file for `luvc_fx.picture` of the question's image.

    Raises:
        InputError: a schedule that the model cannot follow, or a picture that cannot be saved there.
    """
    if picture is not None:
        try:
            check_path(picture)
        except ValueError as error:
            raise InputError(str(error)) from None
    for note in question.notes:
        say(note)
    say("loading the model")
    plain, processor = load_model()
    if unknown := unknown_words(processor, question.text):
        say(f"the model does not know these words of the question: {', '.join(unknown)}")
    budgeted, _ = load_model()
    inputs = _prompt(processor, question, plain)
    prompt = inputs["input_ids"]
    visual = int((prompt == plain.config.image_token_id).sum())

    luvc_fx.compile(plain, Schedule(), inner=inner, on_no_match="ignore")
    try:
        luvc_fx.compile(budgeted, schedule, inner=inner, on_no_match="ignore")
    except ValueError as error:
        raise InputError(f"the schedule does not fit the model: {error}") from None
    answers, compiled, lengths = [], [], []
    for name, model in (("plain", plain), ("luvc_fx", budgeted)):
        say(f"compiling and answering: {name}")
        started = _now(model)
        output = model.generate(**inputs)
        compiled.append(_now(model) - started)
        words = output[0, prompt.shape[1] :]
        answers.append(processor.tokenizer.decode(words, skip_special_tokens=True).strip())
        lengths.append(_kv_lengths(model, inputs))
    report = luvc_fx.report_of(budgeted)
    for refusal in report.all_refusals():
        if refusal.reason is Reason.SCHEDULE:
            raise InputError(f"the schedule does not fit the model: {refusal.text}")

    say(f"timing {runs} prefills of each")
    times = _interleaved((plain, budgeted), inputs, runs)
    arms = []
    for answer, timed, kv, seconds in zip(answers, times, lengths, compiled, strict=True):
        tokens = [length - (prompt.shape[1] - visual) for length in kv]
        arms.append(Arm(answer, statistics.median(timed), spread(timed), tokens, kv, seconds))
    baseline, luvc = arms
    if picture is not None:
        say(f"drawing {picture}")
        _draw(picture, budgeted, inputs, processor)
    obstacles = why_no_speedup(schedule, luvc_fx.report_of(plain), baseline, report, luvc, visual)
    return DemoResult(
        question=question,
        schedule=schedule,
        inner=inner,
        runs=runs,
        baseline=baseline,
        luvc=luvc,
        visual_tokens=visual,
        budget=sum(luvc.tokens_per_layer) / (len(luvc.tokens_per_layer) * visual),
        prefill_speedup=None if obstacles else baseline.prefill_ms / luvc.prefill_ms,
        obstacles=obstacles,
        report=report,
        hardware=hardware(plain),
        versions=versions(),
        picture=picture,
    )


def _draw(path: Path, model: Any, inputs: Mapping[str, Any], processor: Any) -> None:
    try:
        luvc_fx.picture(model, inputs, processor=processor, path=path)
    except OSError as error:
        raise InputError(f"picture '{path}' cannot be written: {error.strerror or error}") from None


def _prompt(processor: Any, question: Question, model: Any) -> dict[str, torch.Tensor]:
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return dict(inputs.to(model.device, model.dtype))


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _kv_lengths(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[int]:
    """Rows in each layer's cache behind the prompt: the first new token is not in it yet."""
    output = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    return [layer.keys.shape[-2] for layer in _compat.cache_of(output).layers]


def _interleaved(models: tuple[Any, ...], inputs: Mapping[str, torch.Tensor], runs: int) -> list[list[float]]:
    """Milliseconds to the first token, per model; who goes first changes from round to round."""
    times: list[list[float]] = [[] for _ in models]
    gc.collect()
    for number in range(-WARM_UP, runs):
        order = range(len(models))
        for which in order if number % 2 else reversed(order):
            started = _now(models[which])
            models[which].generate(**inputs, max_new_tokens=1)
            elapsed = (_now(models[which]) - started) * 1e3
            if number >= 0:
                times[which].append(elapsed)
    return times


def why_no_speedup(
    schedule: Schedule, plain: Report, baseline: Arm, report: Report, luvc: Arm, visual: int
) -> list[str]:
    """Why a speed-up would mislead; empty where both arms are what they claim to be."""
    obstacles = [f"plain: {refusal}" for refusal in plain.all_refusals()]
    obstacles += [str(refusal) for refusal in report.all_refusals()]
    if not plain.of_kind("prefill"):
        obstacles.append("plain: no prefill graph was compiled, so it ran eagerly")
    if any(tokens != visual for tokens in baseline.tokens_per_layer):
        obstacles.append(f"plain: not all {visual} visual tokens enter every layer")
    if not schedule.merge and not schedule.prune:
        return [*obstacles, "the schedule does nothing"]
    if not report.of_kind("prefill"):
        obstacles.append("no prefill graph was compiled, so it ran eagerly")
    kinds = {insertion.kind for graph in report.graphs for insertion in graph.inserted}
    for kind, wanted in (("merge", schedule.merge), ("prune", schedule.prune)):
        if wanted and kind not in kinds:
            obstacles.append(f"no graph was rewritten to {kind}")
    planned = report.tokens_per_layer()
    if planned != luvc.tokens_per_layer:
        obstacles.append(f"the report says {planned} visual tokens per layer, the KV cache another number")
    return obstacles
