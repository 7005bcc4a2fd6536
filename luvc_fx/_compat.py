"""Every private torch name that luvc_fx uses, with the torch versions in which it was seen to work."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher  # 2.11 - 2.13
from torch._dynamo.eval_frame import OptimizedModule  # 2.11 - 2.13
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # 2.11 - 2.13
from torch.fx.experimental.proxy_tensor import make_fx  # 2.11 - 2.13

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OptimizedModule",
    "caching_precompile",
    "compile_inductor",
    "enable_scalar_capture",
    "encoder_output",
    "fake_run",
    "hint",
    "install_output_hooks",
    "make_fx",
    "model_being_compiled",
    "tracing_settings",
    "with_own_code",
]


def hint(value: int | torch.SymInt) -> int:
    """The size seen while tracing, without adding a guard (`SymNode.hint`, 2.11 - 2.13)."""
    if isinstance(value, int):
        return value
    found = value.node.hint
    if found is None:
        raise ValueError(f"{value} has no size at trace time")
    return int(found)


def fake_run(tensors: list[FakeTensor]) -> Any:
    """A context manager in which ops on these fake values make more of them.

    Symbolic sizes need the Python dispatcher, as while Dynamo traces; it is several times slower, so
    constant ones go without.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    if tensors:
        stack.enter_context(tensors[0].fake_mode)
    if any(isinstance(size, torch.SymInt) for tensor in tensors for size in tensor.shape):
        stack.enter_context(enable_python_dispatcher())
    return stack


def caching_precompile() -> bool:
    """Whether Dynamo would hand out graphs compiled for another schedule (2.11 - 2.13)."""
    return bool(getattr(torch._dynamo.config, "caching_precompile", False))


def enable_scalar_capture() -> None:
    """Switch `capture_scalar_outputs` on for the process."""
    torch._dynamo.config.capture_scalar_outputs = True


def tracing_settings() -> Any:
    """A context manager that holds, for this thread only, what a call into Dynamo of ours needs.

    Scalars are captured, and the limit after which Dynamo runs a function eagerly, with only a line in
    the log, is out of the way of ordinary use (2.11 - 2.13).
    """
    return torch._dynamo.config.patch(capture_scalar_outputs=True, recompile_limit=64)


def with_own_code(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` with a code object of its own: Dynamo counts recompiles and caches per code object."""
    assert isinstance(body, types.FunctionType)
    own = types.FunctionType(
        body.__code__.replace(), body.__globals__, body.__name__, body.__defaults__, body.__closure__
    )
    own.__kwdefaults__ = body.__kwdefaults__
    return own


def encoder_output(features: list[torch.Tensor] | torch.Tensor) -> Any:
    """Image features, `[N, dim]` each or `[images, N, dim]`, as `generate` passes them to `forward`."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]


def compile_inductor(
    gm: torch.fx.GraphModule, example_inputs: list[Any], mode: str | None, options: dict[str, Any] | None
) -> Any:
    """Inductor on a Dynamo graph; its result is returned unwrapped, so it can be serialised."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        patches.update(list_mode_options(mode))
    patches.update(options or {})
    return compile_fx(gm, example_inputs, config_patches=patches)


def install_output_hooks(model: torch.nn.Module) -> int:
    """Install transformers' lazy output-capturing hooks now; returns how many modules were asked.

    Without them the first traced forward of a fresh model meets a lock and falls into pieces
    (transformers 5.17 - 5.23). A model that is not a transformers one has none.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return 0
    asked = 0
    for module in model.modules():
        models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
        # Installing is recursive and does not look whether a part has its hooks: a second set would
        # collect every hidden state twice. A model with such a part gets its own on demand.
        if isinstance(module, PreTrainedModel) and not any(map(_has_output_hooks, models)):
            maybe_install_capturing_hooks(module)
            asked += 1
    return asked


def _has_output_hooks(model: torch.nn.Module) -> bool:
    return bool(getattr(model, "_output_capturing_hooks_installed", False))


def model_being_compiled() -> torch.nn.Module | None:
    """The module that a `torch.compile` call further up the stack is wrapping (2.11 - 2.13)."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.compile.__code__:
            model = frame.f_locals.get("model")
            return model if isinstance(model, torch.nn.Module) else None
        frame = frame.f_back  # type: ignore[assignment]
    return None
