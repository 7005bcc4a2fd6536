"""`generate` runs past what `torch.compile` compiled with a backend of ours, and says so."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from luvc_fx.report import LuvcWarning

GENERATE_HINT = (
    "this model was compiled with torch.compile(model, backend=luvc_fx.backend(...)), and generate() "
    "does not go through that: it runs the eager model with all visual tokens. Use "
    "luvc_fx.compile(model, schedule) for generate()."
)

COMPILE_CONFIG_HINT = (
    "generate() uses a CompileConfig for decoding alone, and runs the prompt, where visual tokens would be "
    "dropped, by the eager model with all of them. Use luvc_fx.compile(model, schedule); a CompileConfig may "
    "then stay, without this backend."
)


def warn_of_compile_config(wrapped: Any) -> None:
    """Say so, where `wrapped` is the call of a model that `generate` compiles by a `CompileConfig`."""
    model = getattr(wrapped, "__self__", None)
    if hasattr(model, "generate") and wrapped.__name__ in ("__call__", "_wrapped_call_impl", "_call_impl"):
        warnings.warn(COMPILE_CONFIG_HINT, LuvcWarning, stacklevel=2)


def warn_when_generating(model: torch.nn.Module) -> None:
    """Let `generate` of this instance say that it does not run what was compiled."""
    generate = getattr(model, "generate", None)
    if generate is None or "generate" in vars(model):
        return

    def warning_generate(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(GENERATE_HINT, LuvcWarning, stacklevel=2)
        return generate(*args, **kwargs)

    warning_generate.warns_for_luvc_fx = True  # type: ignore[attr-defined]
    model.generate = warning_generate  # type: ignore[assignment]


def take_generate_warning_off(model: torch.nn.Module) -> None:
    """Undo what `torch.compile` with a backend of ours did to `generate`, for a front door that wires it."""
    if hasattr(vars(model).get("generate"), "warns_for_luvc_fx"):
        del model.generate
