"""`luvc_hf`: a vision-language model of transformers in the harness lmms-eval, with or without luvc_fx.

Written against lmms-eval 0.7.3. The README beside this file has the commands, and says what was run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import luvc_fx
from luvc_fx.apps.environment import hardware, versions
from luvc_fx.apps.inputs import read_image, read_schedule
from luvc_fx.generate.rgb import to_rgb

MOST_SHAPES = 24
"""Shapes of images for which one set of graphs is compiled; then a new set is begun.

Dynamo stops compiling after 64 graphs of one function, and a shape takes at most two of the prefill.
"""


@dataclass(slots=True)
class Seen:
    """What was counted over the requests of one task.

    Attributes:
        budgets: of each request with visual tokens, the mean over decoder layers of the visual tokens that
            entered the layer, read from the KV cache, over those of the prompt.
        visual_tokens: of the same requests, those of the prompt.
    """

    requests: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    budgets: list[float] = field(default_factory=list)
    visual_tokens: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; ranges are smallest, mean, largest, or None without images."""
        return {
            "requests": self.requests,
            "requests_with_visual_tokens": len(self.budgets),
            "new_tokens": self.new_tokens,
            "generate_seconds": self.seconds,
            "budget": _range(self.budgets),
            "visual_tokens": _range(self.visual_tokens),
        }


class LuvcHf(lmms):
    """Any `AutoModelForImageTextToText`, greedy unless the task samples, one request at a time.

    Args:
        pretrained: a directory or a name on the hub, with a processor that has a chat template.
        schedule: a preset, a JSON file of a `Schedule`, or empty for the stock model, which is not compiled.
        report: a JSON file to write after each task: settings, budget, and the report of every graph. Needed
            with a schedule, so that no table is without it.
        inner: what compiles behind luvc_fx. ``"eager"`` runs the rewritten graphs without a compiler, which
            is right for accuracy: each new size of images is then seconds, not minutes.
        device: of torch; the first GPU where there is one.
        dtype: as of `from_pretrained`, ``"auto"`` or a torch dtype's name.
        attn_implementation: as of `from_pretrained`.
        max_frames: frames of a video, evenly spaced from the first to the last. A processor without videos
            gets them as that many images.
        max_pixels: of one image, for processors that take it (the Qwen family).
        batch_size: 1. max_batch_size: what the harness passes; unused.

    Raises:
        ValueError: an argument that is not allowed, or a schedule that the model cannot follow.
        luvc_fx.NotRewritten: as soon as one merge or prune of the schedule is left undone.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        schedule: str = "",
        report: str = "",
        inner: str = "eager",
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        max_frames: int = 32,
        max_pixels: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size is {batch_size!r}; allowed: 1")
        if type(max_frames) is not int or max_frames < 1:
            raise ValueError(f"max_frames is {max_frames!r}; allowed: a whole number of at least 1")
        if schedule and not report:
            raise ValueError(
                "report is empty; with a schedule it is needed: a JSON file beside --output_path, so that a "
                "table comes with what was compiled"
            )
        self.schedule = read_schedule(schedule) if schedule else None
        self.settings = {
            "pretrained": pretrained,
            "schedule": None if self.schedule is None else json.loads(self.schedule.to_json()),
            "inner": inner if schedule else None,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "max_frames": max_frames,
            "max_pixels": max_pixels,
        }
        self.inner = inner
        self.report = Path(report) if report else None
        self.max_frames = max_frames
        local = os.environ.get("LOCAL_RANK", "0")
        self.device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        options = {} if max_pixels is None else {"max_pixels": max_pixels}
        self.processor = AutoProcessor.from_pretrained(pretrained, **options)
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"pretrained is {pretrained!r}, whose processor has no chat template")
        self.takes_videos = getattr(self.processor, "video_processor", None) is not None
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model = model.eval().to(self.device)
        self.tokens = [
            getattr(self.model.config, name, None) for name in ("image_token_id", "video_token_id")
        ]
        self.shapes: set[object] = set()
        self.reports: list[luvc_fx.Report] = []
        self.seen: list[Seen] = []
        self._compile()

    # -- what the harness calls ---------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests; then the report is written.

        `until` of a task is not looked at, as by the harness's own `huggingface` model: the model ends its
        answer itself, or `max_new_tokens` does.
        """
        # Requests of one size after another, so that each size is compiled once. Media are read again then.
        sizes = [_sizes(self._messages(request)) for request in tqdm(requests, desc="Sizes")]
        order = sorted(range(len(requests)), key=sizes.__getitem__)
        seen = Seen()
        answers: dict[int, GenerationResult] = {}
        for number in tqdm(order, desc="Model Responding", disable=self.rank != 0):
            options = requests[number].args[2]
            inputs = self._inputs(self._messages(requests[number]))
            answers[number] = self._answer(inputs, options, seen)
        self.seen.append(seen)
        self._log(seen)
        if self.report is not None:
            self._write(self.report)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: with dropped rows, logits are of those that are left."""
        raise NotImplementedError("luvc_hf generates; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: none of the tasks in the README asks twice."""
        raise NotImplementedError("luvc_hf answers one turn; tasks of several rounds are not supported")

    # -- prompts -----------------------------------------------------------------------------

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages: list[dict[str, Any]] = doc_to_messages(self.task_dict[task][split][doc_id])
        return messages

    def _inputs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The processor's inputs for one conversation, on the device; pixels in the dtype of the model."""
        images: list[Image.Image] = []
        videos: list[np.ndarray] = []
        facts: list[dict[str, Any]] = []
        turns = []
        for message in messages:
            content = []
            for part in message["content"]:
                if part["type"] == "text":
                    content.append({"type": "text", "text": part["text"]})
                elif part["type"] == "image":
                    images.append(_image(part["url"]))
                    content.append({"type": "image"})
                elif part["type"] == "video":
                    frames, fact = read_frames(part["url"], self.max_frames)
                    if self.takes_videos:
                        videos.append(frames)
                        facts.append(fact)
                        content.append({"type": "video"})
                    else:
                        images += [Image.fromarray(frame) for frame in frames]
                        content += [{"type": "image"}] * len(frames)
                else:
                    raise ValueError(f"a prompt holds {part['type']!r}; allowed: text, image, video")
            turns.append({"role": message["role"], "content": content})
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        start = self.processor.tokenizer.bos_token
        options: dict[str, Any] = {"add_special_tokens": not (start and text.startswith(start))}
        if images:
            options["images"] = images
        if videos:
            options.update(videos=videos, video_metadata=facts, do_sample_frames=False)
        inputs = self.processor(text=text, return_tensors="pt", **options)
        return dict(inputs.to(self.device, self.model.dtype))

    # -- answers -----------------------------------------------------------------------------

    def _compile(self) -> None:
        """Begin a set of graphs; the reports of those before stay."""
        if self.schedule is None:
            return
        luvc_fx.restore(self.model)
        luvc_fx.compile(self.model, self.schedule, inner=self.inner, on_no_match="raise")
        self.reports.append(luvc_fx.report_of(self.model))
        self.shapes.clear()

    def _answer(self, inputs: dict[str, Any], options: dict[str, Any], seen: Seen) -> GenerationResult:
        ids = inputs["input_ids"]
        shape = _shape(inputs)
        if shape not in self.shapes and len(self.shapes) == MOST_SHAPES:
            self._compile()
        self.shapes.add(shape)
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(**inputs, **_generation(options), return_dict_in_generate=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        seen.seconds += time.perf_counter() - started
        new = output.sequences[0, ids.shape[1] :]
        seen.requests += 1
        seen.new_tokens += len(new)
        visual = sum(int((ids == token).sum()) for token in self.tokens if token is not None)
        if visual:
            # The last new token has not been through the layers.
            rows = ids.shape[1] + len(new) - 1
            cache = output.cache if hasattr(output, "cache") else output.past_key_values  # up to 5.23
            kept = [visual - rows + layer.keys.shape[-2] for layer in cache.layers]
            seen.visual_tokens.append(visual)
            seen.budgets.append(sum(kept) / (len(kept) * visual))
        text = self.processor.decode(new, skip_special_tokens=True).strip()
        return GenerationResult(text=text, token_counts=TokenCounts(output_tokens=len(new)))

    # -- what is told ------------------------------------------------------------------------

    def _log(self, seen: Seen) -> None:
        """To the harness, which puts it under `throughput` of its results."""
        speed = seen.new_tokens / seen.seconds if seen.seconds else 0.0
        more = {}
        if seen.budgets:
            more = {"budget": _mean(seen.budgets), "visual_tokens": _mean(seen.visual_tokens)}
        log_metrics(seen.seconds, seen.new_tokens, speed, more)

    def _write(self, path: Path) -> None:
        """All that a table should come with, as one JSON object."""
        if self.world_size > 1:
            path = path.with_name(f"{path.stem}.{self.rank}{path.suffix}")
        body = {
            "settings": self.settings,
            "asked": [seen.to_dict() for seen in self.seen],
            "reports": [report.to_dict() for report in self.reports],
            "hardware": hardware(self.model),
            "versions": {**versions(), "lmms-eval": version("lmms-eval")},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def read_frames(source: Any, most: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames of a video file, at most `most`, evenly spaced from the first to the last.

    Returns:
        ``[frames, height, width, 3]`` uint8, and what transformers calls the metadata of the video.

    Raises:
        ValueError: not a path, or a file without a frame.
    """
    if not isinstance(source, str | Path):
        raise ValueError(f"a video is {type(source).__name__}; allowed: the path of a file")
    import av

    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 24)
        total = stream.frames or sum(1 for _ in container.decode(stream))
    wanted = set(np.linspace(0, total - 1, min(total, most), dtype=int).tolist()) if total else set()
    with av.open(str(source)) as container:
        decoded = enumerate(container.decode(video=0))
        found = {number: frame.to_ndarray(format="rgb24") for number, frame in decoded if number in wanted}
    if not found:
        raise ValueError(f"video '{source}' holds no frame that can be decoded")
    facts = {"total_num_frames": total, "fps": rate, "duration": total / rate, "frames_indices": [*found]}
    return np.stack([*found.values()]), facts


def _image(source: Any) -> Image.Image:
    return read_image(Path(source)) if isinstance(source, str | Path) else to_rgb(source)


def _sizes(messages: list[dict[str, Any]]) -> str:
    """Something to sort requests by: equal where their images have the same sizes."""
    parts = [part for message in messages for part in message["content"] if part["type"] != "text"]
    return str([_image(p["url"]).size if p["type"] == "image" else str(p["url"]) for p in parts])


def _shape(inputs: dict[str, Any]) -> object:
    """What of the inputs graphs depend on: shapes of pixels, and the sizes and grids beside them."""
    length = inputs["input_ids"].shape
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.shape != length}
    return tuple(
        (name, tuple(x.shape), None if x.is_floating_point() else str(x.tolist()))
        for name, x in sorted(tensors.items())
    )


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from those of a task: greedy where it says nothing else."""
    chosen = {"max_new_tokens": options.get("max_new_tokens", 1024), "num_beams": options.get("num_beams", 1)}
    temperature = options.get("temperature") or 0.0
    if not options.get("do_sample", temperature > 0) or temperature == 0:
        # The model's own configuration may hold them, and warns of them without sampling.
        return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {**chosen, "do_sample": True, "temperature": temperature, "top_p": options.get("top_p")}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"least": min(values), "mean": _mean(values), "most": max(values)} if values else None
