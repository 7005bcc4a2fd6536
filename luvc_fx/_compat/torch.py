"""Every private name of torch that luvc_fx uses, with the versions in which it was seen to work."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree  # 2.11 - 2.15
from torch._dispatch.python import enable_python_dispatcher  # 2.11 - 2.15
from torch._dynamo import lookup_backend  # 2.11 - 2.15
from torch._dynamo.eval_frame import OptimizedModule  # 2.11 - 2.15
from torch._logging import trace_structured  # 2.11 - 2.15
from torch._ops import OpOverload, OpOverloadPacket  # 2.11 - 2.15
from torch._subclasses import fake_tensor  # 2.11 - 2.15
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # 2.11 - 2.15
from torch.fx.experimental.proxy_tensor import make_fx  # 2.11 - 2.15
from torch.fx.experimental.symbolic_shapes import (  # 2.11 - 2.15
    GuardOnDataDependentSymNode,
    is_concrete_int,
)

__all__ = [
    "NOT_ONE_GRAPH",
    "RECOMPILE_LIMIT",
    "FakeTensor",
    "FakeTensorMode",
    "NameForTorchCompile",
    "OpOverload",
    "OpOverloadPacket",
    "OptimizedModule",
    "Shares",
    "allow_recompiles",
    "argument_names",
    "cache_hits",
    "caching_precompile",
    "capture_end",
    "compile_id",
    "compile_inductor",
    "copy_sources",
    "counters",
    "enable_scalar_capture",
    "fake_run",
    "forget_shapes",
    "hint",
    "inductor_options",
    "is_concrete_int",
    "known_constants",
    "lookup_backend",
    "make_fx",
    "recompile_reason",
    "shares_of",
    "trace_structured",
    "tracing_settings",
    "tree_leaves",
    "tree_map",
    "watch_recompile_limit",
    "with_own_code",
    "without_autograd",
]


tree_leaves, tree_map = pytree.tree_leaves, pytree.tree_map


def argument_names(operator: OpOverload) -> list[str]:
    """The names of an operator's arguments, in order (`_schema`, 2.11 - 2.15)."""
    return [argument.name for argument in operator._schema.arguments]


def copy_sources(old: torch.fx.Graph, new: torch.fx.Graph) -> None:
    """Give the placeholders of a copied graph what Dynamo hung on them (`_dynamo_source`, 2.11 - 2.15)."""
    for original, copied in zip(old.nodes, new.nodes, strict=True):
        if hasattr(original, "_dynamo_source"):
            copied._dynamo_source = original._dynamo_source


def hint(value: int | torch.SymInt) -> int:
    """The size seen while tracing, without adding a guard (`SymNode.hint`, 2.11 - 2.15)."""
    if isinstance(value, int):
        return value
    size = value.node.hint
    if size is None:
        raise ValueError(f"{value} has no size at trace time")
    return int(size)


def has_hint(value: int | torch.SymInt) -> bool:
    """Whether a size was seen while tracing: not that of what a mask picks, which the data decide."""
    return isinstance(value, int) or value.node.hint is not None


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
    if any(tensor._has_symbolic_sizes_strides for tensor in tensors):  # 2.11 - 2.15
        stack.enter_context(enable_python_dispatcher())
    return stack


NOT_ONE_GRAPH = (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode)
"""What comes out of a call that must be one graph, and is not (2.11 - 2.15)."""


def caching_precompile() -> bool:
    """Whether Dynamo would hand out graphs compiled for another schedule (2.11 - 2.15)."""
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


def tracing_settings(dynamic_outputs: bool = False, scalars: bool = True) -> Any:
    """A context manager that holds, for this thread only, what a call into Dynamo of ours needs.

    Scalars are captured, and the limit after which Dynamo runs a function eagerly, with only a line in
    the log, is out of the way of ordinary use (2.11 - 2.15).

    Args:
        scalars: capture them; without it a graph ends where a number is read, as it does without us.
        dynamic_outputs: capture operations whose size depends on data, too. Some graphs that would break
            there become an error by it, so it is for those that are known to be written anew.
    """
    settings = {"capture_scalar_outputs": scalars, "recompile_limit": RECOMPILE_LIMIT}
    if dynamic_outputs:
        settings["capture_dynamic_output_shape_ops"] = True
    return torch._dynamo.config.patch(settings)


_constants_lock = threading.Lock()
_constants_wanted = 0
_USUAL_LIMIT = fake_tensor.CONSTANT_NUMEL_LIMIT
_KNOWN_NUMBERS = 1 << 22  # in the largest tensor that is followed: tables of hundreds of thousands of patches


@contextlib.contextmanager
def without_autograd() -> Iterator[None]:
    """A context manager without gradients, in which Dynamo sees the same thread state at every call.

    Graphs run their operators below autograd at first and above it later, and Dynamo guards on that: what an
    operator calls would be compiled twice (`_AutoDispatchBelowAutograd`, `DispatchKeySet`, 2.11 - 2.15).
    """
    views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(views):
        yield


@contextlib.contextmanager
def known_constants() -> Iterator[None]:
    """A context manager in which tracing follows the values of tensors that are written out in the code.

    What is computed from them alone is computed while tracing, and what reads their numbers (`tolist`,
    `repeat_interleave`) gets them, instead of ending the graph or making symbols. Tracing does that by itself
    for tensors of one number (`CONSTANT_NUMEL_LIMIT`, 2.13). The limit is the process's: another
    thread that traces meanwhile follows more values than it would, to the same results.
    """
    global _constants_wanted
    with _constants_lock:
        _constants_wanted += 1
        if _constants_wanted == 1:
            fake_tensor.CONSTANT_NUMEL_LIMIT = _KNOWN_NUMBERS
    try:
        yield
    finally:
        with _constants_lock:
            _constants_wanted -= 1
            if _constants_wanted == 0:
                fake_tensor.CONSTANT_NUMEL_LIMIT = _USUAL_LIMIT


def with_own_code(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` with a code object of its own: Dynamo counts recompiles and caches per code object."""
    assert isinstance(body, types.FunctionType)
    own = types.FunctionType(
        body.__code__.replace(), body.__globals__, body.__name__, body.__defaults__, body.__closure__
    )
    own.__kwdefaults__ = body.__kwdefaults__
    return own


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
        wrapper = torch._TorchCompileInductorWrapper(mode, options, None)  # 2.11 - 2.15
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return dict(wrapper.config)


def counters() -> Any:
    """Our counters among Dynamo's (a `collections.Counter`)."""
    return torch._dynamo.utils.counters["luvc_fx"]


def cache_hits() -> int:
    """How many graphs AOTAutograd has found in its cache, in this process (2.11 - 2.15)."""
    return int(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])


def forget_shapes() -> None:
    """Let the next compilations start from the sizes they see (`pgo.reset_code_state`, 2.11 - 2.15).

    Dynamo makes symbolic what it saw in several sizes, and takes code from the same line for the same.
    """
    torch._dynamo.pgo.reset_code_state()


def compile_id() -> str:
    """Number of the function and of its compilation, ``"3/1"``; empty outside of one (2.11 - 2.15)."""
    return str(torch._guards.CompileContext.current_compile_id() or "")


def recompile_reason() -> str:
    """Why Dynamo compiles this function again; empty the first time (`recompile_reason`, 2.11 - 2.15)."""
    context = torch._dynamo.utils.get_metrics_context()
    reason = getattr(context, "_metrics", {}).get("recompile_reason") if context.in_progress() else None
    return str(reason or "")


def capture_end(gm: torch.fx.GraphModule) -> tuple[str, str]:
    """Where in the source Dynamo ended a graph, ``"file.py:12"``, and what broke it there.

    The second is empty where the code returned, and both without a word of Dynamo's
    (`compile_subgraph_reason`, 2.11 - 2.15).
    """
    end = getattr(gm, "compile_subgraph_reason", None)
    if end is None:
        return "", ""
    place = ""
    if end.user_stack:
        frame = end.user_stack[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
    return place, end.reason.partition("\n")[0].strip() if end.graph_break else ""


def compile_anew(function: Callable[..., Any]) -> None:
    """Let Dynamo compile a function again that it has decided to run as it is; what it compiled stays.

    It decides so, for good, when the function raises while it is traced (2.11 - 2.15): one call with wrong
    arguments would otherwise keep every later one from being compiled.
    """
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    code = function.__code__
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT))


def graph_break(error: BaseException) -> tuple[str, str] | None:
    """Where a graph that had to be whole ended, ``"file.py:12"``, and what broke it; None of other errors.

    (`Unsupported`, with its `real_stack`, 2.11 - 2.15.)
    """
    if not isinstance(error, torch._dynamo.exc.Unsupported):
        return None
    frames = getattr(error, "real_stack", None)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return place, str(error).partition("\n")[0].strip()


def watch_recompile_limit(tell: Callable[[Any, str, int], None]) -> None:
    """Call ``tell(backend, function, limit)`` when Dynamo gives up on a function.

    From then on it runs what it has compiled of that function and everything new eagerly. It only logs
    so (2.11 - 2.15), so this listens to that log. What `tell` raises comes out of the compiled call.
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


class NameForTorchCompile:
    """The attribute ``__name__`` of a backend, by which it learns what `torch.compile` is put on.

    A backend has no hook for that: `torch.compile` wraps a model, and only asks the backend for its name
    (in `_TorchCompileWrapper`, 2.11 - 2.15). When it asks, and then only, ``listener(backend, wrapped)`` is
    called with the model or function; whoever else reads the name gets it, and nothing happens.
    """

    def __init__(self, name: str, listener: Callable[[Any, Any], None]) -> None:
        self.name = name
        self.listener = listener

    def __get__(self, backend: Any, owner: type | None = None) -> str:
        frame: types.FrameType | None = sys._getframe(1)
        if frame is None or frame.f_code is not torch._TorchCompileWrapper.__init__.__code__:
            return self.name
        while frame is not None and frame.f_code is not torch.compile.__code__:
            frame = frame.f_back
        wrapped = None if frame is None else frame.f_locals.get("model")
        if backend is not None and wrapped is not None:
            self.listener(backend, wrapped)
        return self.name


@dataclass(frozen=True, slots=True)
class Shares:
    """A last axis of `length` that is split over the processes of a group."""

    processes: int
    group: str
    length: int


def shares_of(local: Any, whole: Any) -> Shares | None:
    """What the fake `DTensor`s `local` and `whole` say of an exchange that puts a last axis together.

    None for any other exchange (`DTensor`, 2.11 - 2.15).
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
