"""The operator library: how an op is declared, how kernels attach to it, which one serves where.

The only file that knows whether the C++ extension exists.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch


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


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the same shape, dtype and device, for an output. It is the fastest."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


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


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 0-d tensor of a number that changes from call to call, without compiling anew for each."""
    if torch.compiler.is_compiling():  # only arithmetic keeps a Python float symbolic there
        return torch.ones((), dtype=dtype, device=device) * value
    if device.type == "cpu" and not torch._C._len_torch_dispatch_stack():  # no fake tensors now
        return _cpu_scalar(float(value), dtype)
    return torch.scalar_tensor(value, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _cpu_scalar(value: float, dtype: torch.dtype) -> torch.Tensor:
    """The same tensor for the same number: to make one takes a tenth of a small call."""
    with torch.inference_mode(False):  # it may be saved for backward later
        return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def _share_thread_pool() -> None:
    """Hands torch's parallel loop to the extension, so that torch.set_num_threads holds for it."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    _C.set_parallel_for(ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value)


if _C is not None:
    _share_thread_pool()


# --- old way, to be deleted when the last page is converted ---

LIB, _kernels = LIBRARY, kernels
REFERENCES: dict[torch._ops.OpOverload, Callable] = {}
CUDA_LAUNCHERS: dict[torch._ops.OpOverload, Callable] = {}


def define(schema: str, *, fake: Callable, reference: Callable) -> torch._ops.OpOverload:
    """Declares `fastpg::<schema>`. The reference serves every device without its own kernel."""
    name = schema.partition("(")[0]
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, reference, "CompositeExplicitAutograd")
    LIB.impl(name, partial(_refuse_vmap, name), "FuncTorchBatched")
    torch.library.register_fake(f"fastpg::{name}", fake, lib=LIB)
    op = getattr(torch.ops.fastpg, name).default
    REFERENCES[op] = reference
    _kernels[name] = {"CPU": "reference", "CUDA": "reference"}
    return op


def _refuse_vmap(name: str, *_: object) -> None:
    raise RuntimeError(f"{name}: torch.vmap is not supported")  # torch would loop over the batch


def kernel(op: torch._ops.OpOverload, device: str, label: str) -> Callable[[Callable], Callable]:
    """Attaches the decorated function to a dispatch key; `label` is what kernels_of() says."""

    def attach(function: Callable) -> Callable:
        LIB.impl(op._opname, function, device)
        _kernels[op._opname][device] = label
        return function

    return attach


def cpu_kernel(op: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """Attaches the decorated function, which calls the extension, where there is an extension."""
    return kernel(op, "CPU", "C++") if _C is not None else lambda function: function


def cuda_kernel(op: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """Attaches the decorated launcher(run, *args), where there is a CUDA extension.

    `run` is the extension's function of the op's name, bound to the current stream of the device of
    the first argument, which is then the current device.
    """

    def attach(launcher: Callable) -> Callable:
        CUDA_LAUNCHERS[op] = launcher
        if _cuda is not None:
            run = getattr(_cuda, op._opname)
            kernel(op, "CUDA", "CUDA C++")(lambda *args: _on_device(launcher, run, args))
        return launcher

    return attach


def cpp_kernels(op: torch._ops.OpOverload, launcher: Callable) -> None:
    """Attaches launcher(run, *args) for both extensions, which hold a function of the op's name."""
    if _C is not None:
        cpu_kernel(op)(partial(launcher, getattr(_C, op._opname)))
    cuda_kernel(op)(launcher)


def _on_device(launcher: Callable, run: Callable, args: tuple) -> object:
    device = args[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _on_device(launcher, run, args)
    return launcher(partial(run, torch._C._cuda_getCurrentRawStream(device)), *args)


def triton_kernels(page: str, *ops: torch._ops.OpOverload) -> None:
    """Attaches to each op the function of its name in `<page>_triton.py`, where there is Triton.

    That file, and Triton, are imported when the first CUDA tensor arrives. An op that CUDA C++
    serves, attached before, stays with it.
    """
    if find_spec("triton") is None:
        return
    launchers = cache(lambda: import_module(f"{page}_triton"))
    for op in ops:
        name = op._opname
        if _kernels[name]["CUDA"] == "CUDA C++":
            continue
        kernel(op, "CUDA", "Triton")(lambda *args, name=name: getattr(launchers(), name)(*args))


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as a C++ kernel takes them, by address; the caller keeps them alive."""
    return [x if x is None else x.contiguous() for x in tensors]


def address(tensor: torch.Tensor | None) -> int:
    """The data pointer of a tensor; 0 for an absent one."""
    return 0 if tensor is None else tensor.data_ptr()


def scratch(tokens: torch.Tensor, fields: int) -> tuple[tuple[int, int, int], torch.Tensor]:
    """Scratch of csrc/stream.h for statistics of so many fields, and what must outlive the call."""
    blocks = max(1, -(-tokens.numel() // REDUCE_TOKENS))
    parts = tokens.new_empty(blocks, fields, dtype=torch.float64)
    ticket = _ticket(tokens.device)
    return (parts.data_ptr(), blocks, ticket.data_ptr()), (parts, ticket)
