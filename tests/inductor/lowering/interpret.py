"""Run a generated CUDA wrapper on CPU tensors: Triton kernels by Triton's interpreter, libraries by ATen.

For a process of its own, started with ``TRITON_INTERPRET=1``. What the interpreter of Triton 3.7 lacks is
filled in here: the device library has no bodies, and reductions and scans by a combine function of
Inductor's run a Python loop over all elements.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.hints import TRITON_MAX_BLOCK
from torch._inductor.runtime.triton_compat import libdevice
from triton.runtime import interpreter

_ELEMENTS = 1 << 16


def run(code: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a wrapper returns for inputs on the CPU."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "start this process with TRITON_INTERPRET=1"
    _fill_in_library()
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter.ScanOps.generic_scan = _scan
    module = PyCodeCache.load(_on_the_host(code))
    for name, kernel in vars(module).items():
        if name.startswith("triton_") and hasattr(kernel, "configs"):
            _grow_blocks(kernel)
    return list(module.call(list(inputs)))


def _on_the_host(code: str) -> str:
    code = code.replace("triton_helpers.set_driver_to_gpu()", "")
    code = code.replace(
        "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda",
        "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu",
    )
    code = code.replace(
        "from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda i: 0"
    )
    code = re.sub(r"with torch\.cuda\._DeviceGuard\(\d+\):", "if True:", code)
    code = re.sub(r"torch\.cuda\.set_device\(\d+\)", "pass", code)
    code = re.sub(r"device\(type='cuda', index=\d+\)", "device(type='cpu')", code)
    return re.sub(r"device='cuda:\d+'", "device='cpu'", code)


def _grow_blocks(kernel: Any) -> None:
    """Fewer and larger programs, as each costs Python's time; never above what Inductor drops masks for."""
    hints = kernel.size_hints or {}
    chosen = kernel.configs[0].kwargs
    width = 1
    for axis, size in hints.items():
        if axis.startswith("r"):
            width *= chosen.get(f"{axis.upper()}BLOCK", size)
    for axis, other in (("X", "Y"), ("Y", "X")):
        name = f"{axis}BLOCK"
        if name in chosen and axis.lower() in hints:
            room = max(1, _ELEMENTS // (chosen.get(f"{other}BLOCK", 1) * width))
            chosen[name] = max(chosen[name], min(TRITON_MAX_BLOCK[axis], hints[axis.lower()], room))


def _fill_in_library() -> None:
    same: dict[str, Callable[..., Any]] = {
        "exp": np.exp,
        "log": np.log,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "tanh": np.tanh,
        "sin": np.sin,
        "cos": np.cos,
        "floor": np.floor,
        "trunc": np.trunc,
        "rint": np.rint,
        "pow": np.power,
        "erf": np.vectorize(math.erf),
    }
    for name, body in same.items():
        setattr(libdevice, name, _elementwise(body, None))
    for name, body in {"isnan": np.isnan, "isinf": np.isinf}.items():
        setattr(libdevice, name, _elementwise(body, tl.int32))


def _elementwise(body: Callable[..., Any], result: Any) -> Callable[..., Any]:
    def call(*xs: Any, _semantic: Any = None, **_: Any) -> Any:
        first = next(x for x in xs if isinstance(x, tl.core.tensor))
        arrays = [
            x.handle.data if isinstance(x, tl.core.tensor) else np.asarray(getattr(x, "value", x)) for x in xs
        ]
        with np.errstate(all="ignore"):
            found = np.asarray(body(*arrays))
        kind = first.dtype if result is None else result
        found = found.astype(first.handle.data.dtype if result is None else np.int32)
        block = tl.block_type(kind, list(found.shape)) if first.type.is_block() else kind
        return tl.core.tensor(interpreter.TensorHandle(found, kind), block)

    return call


def _combine(op: Any, kinds: list[Any], low: list[Any], high: list[Any]) -> list[Any]:
    operands = [
        op.to_tensor(data, kind) for part in (low, high) for data, kind in zip(part, kinds, strict=True)
    ]
    found = op.combine_fn.fn(*operands)
    found = found if isinstance(found, tuple) else (found,)
    return [np.asarray(x.handle.data if isinstance(x, tl.core.tensor) else x) for x in found]


def _part(axis: int, rank: int, which: slice) -> tuple[slice, ...]:
    return tuple(which if i == axis else slice(None) for i in range(rank))


def _reduce(self: Any, given: Any) -> Any:
    """Halve the axis until one is left."""
    asked = self.axis
    given, axis = self.unravel(given, self.axis)
    data, kinds = [x.handle.data for x in given], [x.dtype for x in given]
    rank = data[0].ndim
    while data[0].shape[axis] > 1:
        length = data[0].shape[axis]
        even = length // 2 * 2
        low = [d[_part(axis, rank, slice(0, even, 2))] for d in data]
        high = [d[_part(axis, rank, slice(1, even, 2))] for d in data]
        new = _combine(self, kinds, low, high)
        new = [np.broadcast_to(x, d.shape).astype(d.dtype) for x, d in zip(new, low, strict=True)]
        if length % 2:
            rest = _part(axis, rank, slice(length - 1, length))
            new = [np.concatenate([x, d[rest]], axis) for x, d in zip(new, data, strict=True)]
        data = new
    if not self.keep_dims:
        data = [np.squeeze(d, axis) if asked is not None else np.squeeze(d, axis).item() for d in data]
    return [self.to_tensor(d, kind) for d, kind in zip(data, kinds, strict=True)]


def _scan(self: Any, given: Any) -> Any:
    """Hillis and Steele: each step doubles how far every element has seen."""
    data, kinds = [x.handle.data for x in given], [x.dtype for x in given]
    axis, rank, length = self.axis, data[0].ndim, data[0].shape[self.axis]
    place = np.arange(length).reshape([-1 if i == axis else 1 for i in range(rank)])
    step = 1
    while step < length:
        new = _combine(self, kinds, [np.roll(d, step, axis) for d in data], data)
        data = [np.where(place >= step, x, d).astype(d.dtype) for x, d in zip(new, data, strict=True)]
        step *= 2
    return [self.to_tensor(d, kind) for d, kind in zip(data, kinds, strict=True)]
