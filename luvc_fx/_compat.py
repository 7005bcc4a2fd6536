"""Every private torch name that luvc_fx uses, with the torch versions in which it was seen to work."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher  # 2.11 - 2.13
from torch._dynamo.eval_frame import OptimizedModule  # 2.11 - 2.13
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # 2.11 - 2.13
from torch.fx.experimental.proxy_tensor import make_fx  # 2.11 - 2.13
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # 2.11 - 2.13

__all__ = [
    "NOT_ONE_GRAPH",
    "RECOMPILE_LIMIT",
    "FakeTensor",
    "FakeTensorMode",
    "InPlaceOfPixels",
    "OptimizedModule",
    "Shares",
    "allow_recompiles",
    "being_compiled",
    "cache_hits",
    "caching_precompile",
    "calls_flash_attn",
    "capture_end",
    "compile_id",
    "compile_inductor",
    "counters",
    "enable_scalar_capture",
    "encoder_output",
    "extra_features",
    "fake_run",
    "forget_shapes",
    "hint",
    "inductor_options",
    "install_output_hooks",
    "is_flash",
    "make_fx",
    "reads_one_position",
    "recompile_reason",
    "shares_of",
    "takes_varlen",
    "tracing_settings",
    "watch_recompile_limit",
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
    # Strides and offsets count, too: 2.11 does not multiply a row cut out of symbolically many without it.
    if any(tensor._has_symbolic_sizes_strides for tensor in tensors):  # 2.11 - 2.13
        stack.enter_context(enable_python_dispatcher())
    return stack


def _trace_tensor_checks() -> None:
    """Let Dynamo up to 2.12 trace `torch._check_tensor_all`, which transformers calls, as 2.13 does.

    There it is one call in the graph, whose fake run makes a symbol that nothing returns: with
    `capture_scalar_outputs` every model of transformers is an error.
    """
    from torch._dynamo.variables import BuiltinVariable, ConstantVariable  # 2.11 - 2.13
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable  # 2.11 - 2.13

    handlers = TorchInGraphFunctionVariable._get_handlers()
    if torch._check_tensor_all in handlers:
        return

    def check(self: Any, tx: Any, cond: Any, *message: Any) -> Any:
        # Of a bool they would learn that it is 1, and then see nothing left to check behind AOTAutograd.
        seen = cond.call_method(tx, "_is_all_true", [], {}).call_method(tx, "long", [], {})
        number = seen.call_method(tx, "item", [], {})
        holds = BuiltinVariable(operator.ge).call_function(tx, [number, ConstantVariable.create(1)], {})
        return TorchInGraphFunctionVariable(torch._check).call_function(tx, [holds, *message], {})

    handlers[torch._check_tensor_all] = check


def _trace_whether_exporting() -> None:
    """Let Dynamo of 2.11 know that it compiles and does not export, as 2.12 and 2.13 do.

    It takes `torch.compiler.is_exporting()` for true, and transformers (5.23) then makes a mask for each
    prompt, even for one that has none: attention that is causal by itself reads it, and flash kernels
    take none.
    """
    if not torch.__version__.startswith("2.11."):
        return
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def exporting(self: Any, tx: Any) -> Any:
        tx.mark_inconsistent_side_effects()
        return ConstantVariable.create(torch.compiler._is_exporting_flag)

    TorchInGraphFunctionVariable._get_handlers()[torch.compiler.is_exporting] = exporting


_trace_tensor_checks()
_trace_whether_exporting()

NOT_ONE_GRAPH = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)
"""What comes out of a call that must be one graph, and is not (2.11 - 2.13)."""


def caching_precompile() -> bool:
    """Whether Dynamo would hand out graphs compiled for another schedule (2.11 - 2.13)."""
    return bool(getattr(torch._dynamo.config, "caching_precompile", False))


RECOMPILE_LIMIT = 64
"""How often Dynamo may compile one function for us; its own default is 8."""


def enable_scalar_capture() -> None:
    """Switch `capture_scalar_outputs` on: for the process, and from torch 2.13 on for this thread only."""
    torch._dynamo.config.capture_scalar_outputs = True


def allow_recompiles(limit: int) -> None:
    """Raise `recompile_limit` to at least `limit`, as far as `enable_scalar_capture` reaches."""
    if torch._dynamo.config.recompile_limit < limit:
        torch._dynamo.config.recompile_limit = limit


def tracing_settings(dynamic_outputs: bool = False) -> Any:
    """A context manager that holds, for this thread only, what a call into Dynamo of ours needs.

    Scalars are captured, and the limit after which Dynamo runs a function eagerly, with only a line in
    the log, is out of the way of ordinary use (2.11 - 2.13).

    Args:
        dynamic_outputs: capture operations whose size depends on data, too. Some graphs that would break
            there become an error by it, so it is for those that are known to be written anew.
    """
    settings = {"capture_scalar_outputs": True, "recompile_limit": RECOMPILE_LIMIT}
    if dynamic_outputs:
        settings["capture_dynamic_output_shape_ops"] = True
    return torch._dynamo.config.patch(settings)


def with_own_code(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` with a code object of its own: Dynamo counts recompiles and caches per code object."""
    assert isinstance(body, types.FunctionType)
    own = types.FunctionType(
        body.__code__.replace(), body.__globals__, body.__name__, body.__defaults__, body.__closure__
    )
    own.__kwdefaults__ = body.__kwdefaults__
    return own


def encoder_output(features: Any, extra: dict[str, list[torch.Tensor]] | None = None) -> Any:
    """Image features, `[N, dim]` each or `[images, N, dim]`, as `generate` passes them to `forward`.

    Args:
        extra: what `extra_features` found.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(pooler_output=features)
    for name, levels in (extra or {}).items():
        setattr(output, name, [(level,) for level in levels])
    return output


class InPlaceOfPixels(list[torch.Tensor]):
    """Features for a forward that takes none (5.17): it asks for those of its pixels, and has them back."""

    def __init__(self, features: Any, extra: dict[str, list[torch.Tensor]]) -> None:
        super().__init__([features] if isinstance(features, torch.Tensor) else features)
        self.extra = extra

    def size(self, axis: int) -> int:
        """LLaVA-NeXT wants to know whether there are any images."""
        return len(self)


def extra_features(output: Any) -> dict[str, list[torch.Tensor]]:
    """Features of an encoder's output that enter the decoder later, each level ``[N, dim]``.

    (deepstack, 5.17 - 5.23)
    """
    found = getattr(output, "deepstack_features", None)
    return {} if found is None else {"deepstack_features": [torch.cat(list(level)) for level in found]}


def compile_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    mode: str | None,
    options: dict[str, Any] | None,
    cache_key: str = "",
) -> Any:
    """Inductor on a Dynamo graph; its result is returned unwrapped, so it can be serialised.

    Args:
        cache_key: what its caches must know beside the graph; a user's own tag and passes stay as they are.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = inductor_options(mode, options)
    if not cache_key:
        return compile_fx(gm, example_inputs, config_patches=patches)
    # One public setting reaches every cache, and leaves all custom pass options to the user.
    tag = f"{torch.compiler.config.cache_key_tag}luvc_fx:{cache_key}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(gm, example_inputs, config_patches=patches)


def inductor_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """Inductor's settings for `mode` and `options`, checked as `torch.compile` checks them.

    Raises:
        ValueError: for a mode or an option that Inductor does not have, or a value of another type.
    """
    known = torch._inductor.list_options()
    for key in options or {}:
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"{key!r} is no option of Inductor{hint} (see torch._inductor.list_options())")
    try:
        wrapper = torch._TorchCompileInductorWrapper(mode, options, None)  # 2.11 - 2.13
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return dict(wrapper.config)


def counters() -> Any:
    """Our counters among Dynamo's (a `collections.Counter`)."""
    return torch._dynamo.utils.counters["luvc_fx"]


def cache_hits() -> int:
    """How many graphs AOTAutograd has found in its cache, in this process (2.11 - 2.13)."""
    return int(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])


def forget_shapes() -> None:
    """Let the next compilations start from the sizes they see (`pgo.reset_code_state`, 2.11 - 2.13).

    Dynamo makes symbolic what it saw in several sizes, and takes code from the same line for the same.
    """
    torch._dynamo.pgo.reset_code_state()


def compile_id() -> str:
    """Number of the function and of its compilation, ``"3/1"``; empty outside of one (2.11 - 2.13)."""
    return str(torch._guards.CompileContext.current_compile_id() or "")


def recompile_reason() -> str:
    """Why Dynamo compiles this function again; empty the first time (`recompile_reason`, 2.11 - 2.13)."""
    context = torch._dynamo.utils.get_metrics_context()
    reason = getattr(context, "_metrics", {}).get("recompile_reason") if context.in_progress() else None
    return str(reason or "")


def capture_end(gm: torch.fx.GraphModule) -> tuple[str, str]:
    """Where in the source Dynamo ended a graph, ``"file.py:12"``, and what broke it there.

    The second is empty where the code returned, and both without a word of Dynamo's
    (`compile_subgraph_reason`, 2.11 - 2.13).
    """
    found = getattr(gm, "compile_subgraph_reason", None)
    if found is None:
        return "", ""
    place = ""
    if found.user_stack:
        frame = found.user_stack[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
    return place, found.reason.partition("\n")[0].strip() if found.graph_break else ""


def watch_recompile_limit(tell: Callable[[Any, str, int], None]) -> None:
    """Call ``tell(backend, function, limit)`` when Dynamo gives up on a function.

    From then on it runs what it has compiled of that function and everything new eagerly. It only logs
    so (2.11 - 2.13), so this listens to that log. What `tell` raises comes out of the compiled call.
    """
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(handler, _LimitWatch) for handler in logger.handlers):
        logger.addHandler(_LimitWatch(tell))


class _LimitWatch(logging.Handler):
    def __init__(self, tell: Callable[[Any, str, int], None]) -> None:
        super().__init__(logging.WARNING)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(record.args, tuple):
            return
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals:
                backend = frame.f_locals["compiler_fn"]
                while hasattr(backend, "_torchdynamo_orig_backend"):
                    backend = backend._torchdynamo_orig_backend
                self.tell(backend, str(record.args[2]), int(record.args[1]))  # type: ignore[call-overload]
                return
            frame = frame.f_back


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


def being_compiled() -> Any:
    """The model or function that a `torch.compile` call further up the stack is wrapping (2.11 - 2.13)."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.compile.__code__:
            return frame.f_locals.get("model")
        frame = frame.f_back
    return None


@dataclass(frozen=True, slots=True)
class Shares:
    """A last axis of `length`, in shares on the processes of a group."""

    processes: int
    group: str
    length: int


def shares_of(local: Any, whole: Any) -> Shares | None:
    """What the fake `DTensor`s `local` and `whole` say of an exchange that puts a last axis together.

    None for any other exchange (`DTensor`, 2.11 - 2.13).
    """
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(local, DTensor) or not isinstance(whole, DTensor):
        return None
    mesh = local.device_mesh
    split = local.placements in ((Shard(-1),), (Shard(local.dim() - 1),))
    if not split or whole.placements != (Replicate(),) or mesh.ndim != 1:
        return None
    return Shares(mesh.size(), mesh.get_group().group_name, local.shape[-1])


def takes_varlen(base: Any) -> bool:
    """Whether the vision encoder's attention wants its segments as a tensor (flash attention)."""
    return is_flash(getattr(getattr(base, "visual", None), "config", None))


def is_flash(config: Any) -> bool:
    """Whether a part of a model with this config calls FlashAttention (transformers 5.17 - 5.23)."""
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def calls_flash_attn(config: Any) -> bool:
    """Whether a decoder with this config calls the package flash-attn 2, as operators that graphs keep.

    Where it is missing, transformers (5.17 - 5.23) takes kernels of the hub; the operators came with 2.7.
    """
    return getattr(config, "_attn_implementation", "") == "flash_attention_2" and _has_flash_attn()


def _has_flash_attn() -> bool:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return False
    importlib.import_module("flash_attn")
    return hasattr(torch.ops.flash_attn, "_flash_attn_varlen_forward")


def reads_one_position() -> bool:
    """Whether FlashAttention on one query reads if its position is one of packed rows (5.17, not 5.23).

    In a batch of one row that is a wait for the device in each layer, and the end of a graph.
    """
    from transformers import modeling_flash_attention_utils as utils

    return utils._is_packed_sequence(torch.zeros(1, 1, dtype=torch.int64), 1) is not False
