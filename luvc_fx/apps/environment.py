"""Where something was run: versions and hardware, as a result's JSON states them."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a graph looks like."""
    names = ("luvc-fx", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware(model: Any) -> dict[str, Any]:
    """The model's device and dtype, torch's number of threads, and the platform."""
    cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if cuda else _cpu_name(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
