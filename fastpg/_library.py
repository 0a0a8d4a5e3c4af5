"""The operator library: how an op is declared, how kernels attach to it, which one serves where.

It loads the C++ extensions; where one is missing, `_C` or `_cuda` is None.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled


def _extension(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or why there is none."""
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, str(error)


_C, _why_not = _extension("fastpg._C")
_cuda, _why_no_cuda = _extension("fastpg._cuda")
if torch.version.hip:
    _cuda, _why_no_cuda = None, "this torch is for AMD"

LIBRARY = torch.library.Library("fastpg", "DEF")

kernels: dict[str, dict[str, str]] = {}  # op -> device -> what serves it

# The codes of csrc/common/dtype.h.
DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def kernels_of() -> dict[str, dict[str, str]]:
    """Which kernel serves each op on each device: {"gae": {"CPU": "C++", "CUDA": "reference"}}."""
    return {name: dict(devices) for name, devices in sorted(kernels.items())}


def extension_status() -> str:
    """One line: what the C++ and CUDA kernels are built for, or why there are none."""
    if _C is None:
        cpu = f"not loaded ({_why_not}); every op runs on its PyTorch reference"
    else:
        cpu = f"loaded, instruction set {_C.instruction_set()}"
    if _cuda is None:
        return f"{cpu}; CUDA C++: not loaded ({_why_no_cuda})"
    here = "" if torch.cuda.is_available() else ", no GPU here"
    return f"{cpu}; CUDA C++: built for {_cuda.gpus}{here}"


REDUCE_TOKENS = 1024  # kReduceTokens of csrc/common/stream.h


def reduction_scratch(
    tokens: torch.Tensor, statistics: int
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """What a reduction of all tokens to so many statistics needs: parts, their number, a ticket."""
    blocks = max(1, -(-tokens.numel() // REDUCE_TOKENS))
    parts = tokens.new_empty(blocks, statistics, dtype=torch.float64)
    return parts, blocks, _ticket(tokens.device)


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor of the same shape and device, for an output; of the same dtype, or this.

    It takes half the time of new_empty with a shape; each keyword that is not passed, 0.7 us less.
    """
    if not tensor.is_contiguous():
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    if dtype is None:
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, dtype=dtype)


def _ticket(device: torch.device) -> torch.Tensor:
    """A counter at 0, where every launch leaves it: one a stream, whose launches never overlap.

    A graph may be replayed on any stream: there each launch has its own, cleared in the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    return _ticket_of_stream(device, torch._C._cuda_getCurrentRawStream(device.index))


@cache
def _ticket_of_stream(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int32, device=device)


def nothing_listens() -> bool:
    """Whether no mode, transform of torch.func, tracer or profiler takes part in ops now."""
    return not (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 0-d tensor of a number that changes from call to call, without compiling anew for each."""
    if torch.compiler.is_compiling():  # only arithmetic keeps a Python float symbolic there
        return torch.ones((), dtype=dtype, device=device) * value
    # A tensor that is kept must be a real one: a mode or a transform would make one of its own.
    if nothing_listens():
        if device.type == "cpu":
            return _kept_scalar(float(value), dtype, device, 0)
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            stream = torch._C._cuda_getCurrentRawStream(device.index)
            return _kept_scalar(float(value), dtype, device, stream)
    return torch.scalar_tensor(value, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _kept_scalar(
    value: float, dtype: torch.dtype, device: torch.device, stream: int
) -> torch.Tensor:
    """The same tensor for the same number: to make one takes a tenth of a small call.

    On a GPU it also takes a launch, which is over before whatever the same stream runs later.
    """
    with torch.inference_mode(False):  # it may be saved for backward later
        return torch.scalar_tensor(value, dtype=dtype, device=device)


def _share_thread_pool(extension: ModuleType) -> None:
    """Hands torch's parallel loop to the extension, so that torch.set_num_threads holds for it."""
    names = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
    name = names.get(sys.platform, "libtorch_cpu.so")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    extension.set_parallel_for(ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value)


if _C is not None:
    _share_thread_pool(_C)
