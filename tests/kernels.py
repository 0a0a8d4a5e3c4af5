"""Which kernels an op has, and how a test makes one of them the one that runs.

Where there is no GPU, Triton kernels run in Triton's interpreter and those of CUDA C++ in
`cuda_on_cpu`, on tensors of the CPU.
"""

import importlib
import importlib.util
import pkgutil
from contextlib import contextmanager

import cuda_on_cpu
import torch

import fastpg
import fastpg.ops
from fastpg._library import _C
from fastpg._op import OPS

GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
INSTRUCTION_SETS = _C.instruction_sets() if _C is not None else []

# The module of each page, by the name of its op.
PAGES = {
    module.name.rpartition(".")[2]: module.name
    for module in pkgutil.walk_packages(fastpg.ops.__path__, "fastpg.ops.")
}


def ops_of(page_name):
    """The operators that a page defines: those of its forward and of its backward."""
    return [op for op in OPS.values() if op.page == PAGES[page_name]]


def kinds_of(page_name):
    """The kinds of kernel that a page's ops have on this machine."""
    ops = ops_of(page_name)
    on_gpu = {fastpg.kernels_of()[op.name]["CUDA"] for op in ops} - {"reference"}
    kinds = ["reference", *INSTRUCTION_SETS]
    if TRITON and f"{page_name}_triton" in PAGES and not (GPU and "Triton" in on_gpu):
        kinds.append("triton")
    if not GPU and any(cuda_on_cpu.CSRC.rglob(f"{page_name}.cu")):
        kinds.append("cuda-on-cpu")
    if GPU and on_gpu:
        kinds.append("cuda")
    return kinds


def run_with(monkeypatch, kind, page_name, cache):
    """Makes this kind of kernel the one that runs; the public function is called as a user would.

    With "reference" every op of the package runs on its reference, so that no kernel stands behind
    another op. `cache` is pytest's, in which the emulated CUDA module is kept.
    """
    if kind == "reference":
        for op in OPS.values():
            use(monkeypatch, op, op.reference)
    elif kind == "triton":
        if not GPU:
            importlib.import_module("interpreter").make_fast()
        launchers = importlib.import_module(f"{PAGES[page_name]}_triton")
        for op in ops_of(page_name):
            use(monkeypatch, op, getattr(launchers, op.name))
    elif kind == "cuda-on-cpu":
        module = cuda_on_cpu.load(cache.mkdir("cuda_on_cpu"))
        for op in ops_of(page_name):
            if hasattr(module, op.name):
                op.check_fields(module)
                use(monkeypatch, op, op.cpp_kernel(module, on_gpu=True))


def use(monkeypatch, op, kernel):
    """Makes a function from record to record the kernel of an op on every device."""
    if op.mutates is not None:
        kernel = op.marking_as_changed(kernel)
    monkeypatch.setattr(op, "overload", op.flat(kernel))
    monkeypatch.setattr(op, "kernels", {})


@contextmanager
def instruction_set(kind):
    """Runs the C++ kernels on one of the machine's instruction sets, if `kind` is one."""
    if kind not in INSTRUCTION_SETS:
        yield
        return
    best = _C.instruction_set()
    _C.use_instruction_set(kind)
    try:
        yield
    finally:
        _C.use_instruction_set(best)
