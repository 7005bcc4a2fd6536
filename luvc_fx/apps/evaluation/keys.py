"""Hashes of all that answers depend on: the model's files, the code, and one schedule with both."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from luvc_fx.dynamo.fingerprint import COMPILE_TIME, hash_of_sources, methods_key
from luvc_fx.schedule import Schedule

# Files that can change an answer; those that plot, score or print cannot.
_PLACES = (
    "generate",
    "downsample.py",
    "apps/images_only.py",
    "apps/inputs.py",
    "apps/local_model.py",
    *(f"apps/evaluation/{name}.py" for name in ("asking", "features", "prompts", "questions", "together")),
)
# Processors read and resize images by the first three, where those are installed.
_PACKAGES = ("pillow", "torchvision", "numpy", "tokenizers", "torch", "transformers")
_CHUNK = 1 << 24


def model_key(directory: Path) -> str:
    """A hash of all files of a model directory, their names and bytes."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        hasher.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
    return hasher.hexdigest()[:24]


def run_key(model: str, schedule: Schedule, **settings: Any) -> str:
    """A hash of what decides the answers to a question, apart from the question.

    The seed of a random selector is part of the schedule.

    Args:
        model: its `model_key`.
        settings: device, inner compiler, dtype, batch, number of new tokens: anything that JSON can hold.
    """
    hasher = hashlib.sha256(f"{model}\n{code_key()}\n{schedule.to_json()}\n".encode())
    hasher.update(methods_key(schedule).encode())
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    return hasher.hexdigest()[:24]


@cache
def code_key() -> str:
    """A hash of the files of luvc_fx that can change an answer, and of the versions below it."""
    versions = [f"{name}={_version(name)}" for name in _PACKAGES]
    hasher = hashlib.sha256(" ".join(versions).encode())
    hasher.update(hash_of_sources(*COMPILE_TIME, *_PLACES).encode())
    return hasher.hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
