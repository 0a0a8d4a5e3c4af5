"""Every op's tests run once per implementation: reference, C++ on each instruction set, GPU.

Where there is no GPU, Triton kernels run in Triton's interpreter and those of CUDA C++ in
`cuda_on_cpu`, on tensors of the CPU.
"""

import importlib
import importlib.util
import os
import pkgutil
from contextlib import contextmanager, nullcontext
from functools import partial

import cuda_on_cpu
import pytest
import torch

import fastpg.ops
from fastpg._library import _C, CUDA_LAUNCHERS, REFERENCES
from fastpg._op import OPS

MODULES = {
    m.name.rpartition(".")[2]: m.name
    for m in pkgutil.walk_packages(fastpg.ops.__path__, "fastpg.ops.")
}
PAGES = [importlib.import_module(m) for n, m in MODULES.items() if "triton" not in n]
INSTRUCTION_SETS = _C.instruction_sets() if _C is not None else []
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, at its first launch
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic, as the tests demand
TRITON = importlib.util.find_spec("triton") is not None


def pytest_configure():
    """Without the extension the C++ tests would vanish, and the rest pass."""
    if _C is None and os.environ.get("FASTPG_TEST_REFERENCES") != "1":
        raise pytest.UsageError(
            "the C++ extension is missing: build it, or set "
            "FASTPG_TEST_REFERENCES=1 to test the references alone"
        )


@pytest.fixture(autouse=True)
def deterministic():
    """Fills every `empty` with NaN, inside the kernels too: an unwritten output shows.

    One thread, unless a test asks for more: on a busy machine torch's threads spin.
    """
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def op_of(module):
    """The op under test: the file's OP."""
    if hasattr(module, "OP"):
        return module.OP
    return module.__name__.removeprefix("test_").removesuffix("_laws")


def served_on_gpu(op):
    if op in ("linear_token_loss", "adapted_head"):
        op = "linear_token_logprobs"  # which they are made of
    return fastpg.kernels_of().get(op, {"CUDA": "reference"})["CUDA"]


def pytest_generate_tests(metafunc):
    """`kernel` is each implementation of the op that the file is named after."""
    if "kernel" not in metafunc.fixturenames:
        return
    op = op_of(metafunc.module)
    kernels, on_gpu = ["reference", *INSTRUCTION_SETS], served_on_gpu(op)
    if TRITON and f"{op}_triton" in MODULES and not (GPU and on_gpu == "Triton"):
        kernels.append("triton")
    if not GPU and any(cuda_on_cpu.CSRC.rglob(f"{op}.cu")):
        kernels.append("cuda-on-cpu")
    if GPU and on_gpu != "reference":
        kernels.append("cuda")
    metafunc.parametrize("kernel", kernels, indirect=True)


def run_with(monkeypatch, op, kind, config):
    """Makes this kind of kernel the one that an op runs, if the op has one of that kind."""
    if kind == "reference":
        monkeypatch.setattr(op, "overload", op.flat(op.reference))
    elif kind == "triton":
        launchers = importlib.import_module(f"{op.page}_triton")
        if hasattr(launchers, op.name):
            monkeypatch.setattr(op, "overload", op.flat(getattr(launchers, op.name)))
    elif kind == "cuda-on-cpu":
        module = cuda_on_cpu.load(config.cache.mkdir("cuda_on_cpu"))
        if hasattr(module, op.name):
            monkeypatch.setattr(op, "overload", op.cpp_kernel(module, on_gpu=True))


def replace_ops(monkeypatch, page, implementation):
    """The ops that a page calls, by what `implementation` gives for each; None leaves one alone."""
    for name, op in list(vars(page).items()):
        if isinstance(op, torch._ops.OpOverload) and implementation(op) is not None:
            monkeypatch.setattr(page, name, implementation(op))


def cuda_launcher(op, module):
    """The launcher of an op in CUDA C++, on this module instead of fastpg._cuda; or None."""
    if op not in CUDA_LAUNCHERS:
        return None
    run = partial(getattr(module, op._opname), 0)
    return partial(CUDA_LAUNCHERS[op], run)


@pytest.fixture
def kernel(request, monkeypatch):
    """The implementation under test; the public function is called as a user would."""
    kind, op = request.param, op_of(request.module)
    for each in OPS.values():
        if kind == "reference" or each.page == MODULES[op]:
            run_with(monkeypatch, each, kind, request.config)
    if kind == "reference":
        for page in PAGES:
            replace_ops(monkeypatch, page, REFERENCES.get)
    elif kind == "triton":
        launchers = vars(importlib.import_module(MODULES[f"{op}_triton"]))
        page = importlib.import_module(MODULES[op])
        replace_ops(monkeypatch, page, lambda op: launchers.get(op._opname))
    elif kind == "cuda-on-cpu":
        module = cuda_on_cpu.load(request.config.cache.mkdir("cuda_on_cpu"))
        page = importlib.import_module(MODULES[op])
        replace_ops(monkeypatch, page, lambda op: cuda_launcher(op, module))
    elif kind in INSTRUCTION_SETS:
        best = _C.instruction_set()
        _C.use_instruction_set(kind)
        request.addfinalizer(partial(_C.use_instruction_set, best))
    with surroundings(kind, monkeypatch, request.module):
        yield kind


def surroundings(kind, monkeypatch, module):
    """Where the tests of a kind of kernel run: on the GPU, if it needs one and there is one."""
    if kind == "triton" and not GPU:
        numpy = importlib.import_module("numpy")  # which interprets, and warns
        return numpy.errstate(all="ignore")
    return on_gpu(monkeypatch, module) if kind in ("cuda", "triton") else nullcontext()


@contextmanager
def on_gpu(monkeypatch, module):
    """Moves the tensors of a test file there, and what its tests make."""

    class Generator(torch.Generator):
        def __new__(cls, device="cuda"):
            return super().__new__(cls, device)

    monkeypatch.setattr(torch, "Generator", Generator)
    for name, x in list(vars(module).items()):
        if isinstance(x, torch.Tensor):
            monkeypatch.setattr(module, name, x.cuda())
    with torch.device("cuda"):
        yield
    fastpg.check()
