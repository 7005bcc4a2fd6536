"""What answers depend on, as keys: of the model's files, of the code, and of one schedule under both."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import luvc_fx
from luvc_fx import passes
from luvc_fx.registry import selector_fingerprint
from luvc_fx.schedule import Schedule

# What draws, counts or prints has no part in an answer.
_FOLDERS = ("", "ops", "selectors")
_FILES = ("asking.py", "features.py", "prompts.py", "questions.py", "together.py")
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
    for name in sorted({prune.selector for prune in schedule.prune}):
        # Those of third parties are not among our files.
        hasher.update(f"{name}={selector_fingerprint(name)}\n".encode())
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    return hasher.hexdigest()[:24]


@cache
def code_key() -> str:
    """A hash of the files of luvc_fx that can change an answer, and of the versions below it."""
    versions = [f"{name}={_version(name)}" for name in _PACKAGES]
    hasher = hashlib.sha256(" ".join(versions).encode())
    root = Path(str(luvc_fx.__file__)).parent
    files = [path for folder in _FOLDERS for path in (root / folder).glob("*.py")]
    files += [root / "evaluation" / name for name in _FILES]
    files += Path(str(passes.__file__)).parent.rglob("*.py")  # lies elsewhere in a source tree
    for path in sorted(files):
        hasher.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}\n".encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
