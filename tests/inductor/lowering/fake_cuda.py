"""Inductor's CUDA code generation on a machine without a GPU: every private name that it takes is here.

`fake_cuda` makes torch and Triton believe in one device of a compute capability; `generate` hands a graph
on fake CUDA tensors to Inductor and keeps the source of the wrapper that it would load; `launches` and
`externs` read that source; `compile_kernels` takes each Triton kernel of it down to a cubin by Inductor's
own path, `ptxas` included. Nothing is ever launched.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._inductor import codecache, config
from torch._inductor import utils as inductor_utils
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints, triton_helpers
from torch._inductor.utils import fresh_cache
from torch.utils import _triton
from torch.utils._python_dispatch import TorchDispatchMode

AMPERE, HOPPER = (8, 0), (9, 0)

_SPECS = {
    AMPERE: {
        "name": "NVIDIA A100-SXM4-80GB",
        "multi_processor_count": 108,
        "max_threads_per_multi_processor": 2048,
        "shared_memory_per_block_optin": 166912,
        "shared_memory_per_multiprocessor": 167936,
        "L2_cache_size": 40 << 20,
    },
    HOPPER: {
        "name": "NVIDIA H100 80GB HBM3",
        "multi_processor_count": 132,
        "max_threads_per_multi_processor": 2048,
        "shared_memory_per_block_optin": 232448,
        "shared_memory_per_multiprocessor": 233472,
        "L2_cache_size": 50 << 20,
    },
}


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Inductor generates for a CUDA device of this capability; `torch.cuda.is_available` stays False."""
    import triton

    install_guard()
    properties = types.SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        regs_per_multiprocessor=65536,
        warp_size=32,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        total_memory=80 << 30,
        is_integrated=False,
        is_multi_gpu_board=False,
        gcnArchName="",
        uuid="fake",
        **_SPECS[capability],
    )
    interface = device_interface.CudaInterface
    folder = joint_graph.UniformValueConstantFolder
    fold = folder._deduce_value
    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: capability),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "current_device", lambda: 0),
        (interface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "is_bf16_supported", staticmethod(lambda including_emulation=True: True)),
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "device_count", staticmethod(lambda: 1)),
        (interface.Worker, "get_device_properties", staticmethod(lambda device=None: properties)),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        # Constant folding makes real one-element tensors on the device of the graph.
        (folder, "_deduce_value", lambda self, node: _on_the_host(fold, self, node)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in patches:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        before = triton.runtime.driver._active
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        triton.runtime.driver.set_active(_driver(capability))
        stack.callback(_forget_devices)
        _forget_devices()
        stack.enter_context(
            config.patch(
                compile_threads=1,
                fx_graph_cache=False,
                force_disable_caches=True,
                shape_padding=False,  # times products on the device
                use_static_triton_launcher=False,
            )
        )
        stack.enter_context(fresh_cache())
        yield


def generate(gm: fx.GraphModule, inputs: list[Any]) -> str:
    """The Python wrapper with its Triton kernels that Inductor writes for `gm` on fake CUDA tensors."""
    found: list[str] = []

    def keep(lowering: GraphLowering) -> Any:
        found.append(lowering.codegen()[0].value)
        return types.SimpleNamespace(__file__="<never loaded>", call=_not_loaded)

    with mock.patch.object(GraphLowering, "compile_to_module", keep), torch.no_grad():
        compile_fx(gm, inputs)
    assert len(found) == 1, f"{len(found)} graphs were generated, expected one"
    return found[0]


def _not_loaded(*_: Any) -> None:
    raise AssertionError("the wrapper was generated to be read, not to be called")


def launches(code: str) -> list[str]:
    """The Triton kernels that a wrapper launches, in order."""
    return re.findall(r"^\s*(\w+)\.run\(", _body(code), re.M)


def externs(code: str) -> list[str]:
    """Everything that a wrapper calls and Inductor did not generate, in order, without `torch.ops.`."""
    called = re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", _body(code))
    return [name.removeprefix("torch.ops.") for name in called]


def _body(code: str) -> str:
    """What one call of the wrapper runs."""
    start = code.index("def call(")
    return code[start:].split("def benchmark_compiled_module", 1)[0]


_KERNEL = re.compile(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.S)


def compile_kernels(code: str) -> dict[str, Any]:
    """Each Triton kernel of a wrapper, compiled for the capability that `fake_cuda` has; not loaded.

    Its ``asm["cubin"]`` is what a device would load, its ``asm["ptx"]`` names the target.
    """
    from torch._inductor.async_compile import _load_triton_kernel_from_source

    compiled = {}
    for name, source in _KERNEL.findall(code):
        kernel = _load_triton_kernel_from_source(name, source)
        kernel.configs = kernel.configs[:1]  # one of the block sizes that a device would choose from
        kernel.precompile(warm_cache_only=True)
        compiled[name] = kernel.compile_results[0].kernel
    return compiled


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin, by the disassembler in the Triton package."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


# --------------------------------------------------------------------------------------- stand-ins


def install_guard() -> None:
    """Let this process slice fake CUDA tensors."""
    source = Path(__file__).with_name("noop_guard.cpp")
    root = Path(torch.__file__).parent
    key = hashlib.sha256(torch.__version__.encode() + source.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"luvc_fx_noop_guard_{os.getuid()}_{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", str(source), "-o", str(made)]
        command += [f"-I{root}/include", f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"]
        subprocess.run(
            [*command, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"], check=True
        )
        made.replace(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).install_noop_cuda_guard()


def _driver(capability: tuple[int, int]) -> Any:
    """A Triton driver that knows what to compile for, and nothing else."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    shared = _SPECS[capability]["shared_memory_per_block_optin"]
    cores = _SPECS[capability]["multi_processor_count"]
    known = {"max_shared_mem": shared, "multiprocessor_count": cores, "max_num_regs": 65536, "warpSize": 32}

    class Driver(DriverBase):
        def __init__(self) -> None:
            self.utils = types.SimpleNamespace(get_device_properties=lambda device=0: known)

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            from triton.backends.nvidia.driver import ty_to_cpp

            return ty_to_cpp(ty)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: Any = None) -> int:
            return 0

        def get_device_capability(self, device: Any = None) -> tuple[int, int]:
            return capability

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_benchmarker(self) -> Callable[..., Any]:
            raise RuntimeError("there is no device to time kernels on")

    return Driver()


def _forget_devices() -> None:
    """Everything that torch has cached about devices."""
    cached = [
        _triton.has_triton,
        _triton.triton_backend,
        _triton.triton_hash_with_backend,
        _triton._device_supports_tma,
        _triton.has_triton_tma_device,
        _triton.has_triton_stable_tma_api,
        _triton.has_triton_experimental_host_tma,
        _triton.has_triton_tensor_descriptor_host_tma,
        _triton.has_triton_tma,
        _triton.has_datacenter_blackwell_tma_device,
        inductor_utils.is_big_gpu,
        inductor_utils.get_max_num_sms,
        inductor_utils.using_b200,
        inductor_utils.get_gpu_type,
        hints.DeviceProperties.create,
        codecache.CacheBase.get_system,
    ]
    for function in cached:
        getattr(function, "cache_clear", lambda: None)()
    device_interface.caching_worker_device_properties.pop("cuda", None)


class _OnTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(argument: Any) -> Any:
            cuda = isinstance(argument, torch.device) and argument.type == "cuda"
            return torch.device("cpu") if cuda else argument

        return func(*map(moved, args), **{name: moved(v) for name, v in (kwargs or {}).items()})


def _on_the_host(function: Callable[..., Any], *args: Any) -> Any:
    with _OnTheHost():
        return function(*args)


def fake(tensor: Tensor) -> Tensor:
    """One like it on the fake device; inside of a `FakeTensorMode`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
