"""What the harness calls for each question of the task that `local_task.py` writes.

The harness loads this file from the folder of the task's YAML, so `local_task.py` puts a copy there, and
nothing of this repository can be imported here.
"""

from __future__ import annotations

from typing import Any

from PIL import Image


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of one question."""
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question, as the model was trained on it."""
    return str(doc["question"])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the word."""
    return {"exact_match": float(results[0].strip() == doc["answer"])}
