"""Every op's tests run once per implementation: reference, C++ on each instruction set, GPU.

A test file names the op that it tests, `OP = "gae"`; its fixture `kernel` is each kind of kernel
that the op has on this machine (see kernels.py).
"""

import importlib
import os
from contextlib import contextmanager, nullcontext

import kernels
import pytest
import torch

import fastpg
from fastpg._library import _C

if not kernels.GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # It is read when Triton is imported, at its first launch.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # The tests ask for determinism.


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


def pytest_generate_tests(metafunc):
    """`kernel` is each implementation of the file's OP."""
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", kernels.kinds_of(metafunc.module.OP), indirect=True)


@pytest.fixture
def kernel(request, monkeypatch):
    """The kind of kernel under test; the public function is called as a user would."""
    kind, module = request.param, request.module
    kernels.run_with(monkeypatch, kind, module.OP, request.config.cache)
    with kernels.instruction_set(kind), surroundings(kind, monkeypatch, module):
        yield kind


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiler(request):
    """A backend of torch.compile: both trace forward and backward; inductor also makes C++ of them,
    which it compiles for seconds."""
    torch._dynamo.reset()
    return request.param


def surroundings(kind, monkeypatch, module):
    """Where the tests of a kind of kernel run: on the GPU, if it needs one and there is one."""
    if kind == "triton" and not kernels.GPU:
        numpy = importlib.import_module("numpy")  # The interpreter computes with it, and warns.
        return numpy.errstate(all="ignore")
    return on_gpu(monkeypatch, module) if kind in ("cuda", "triton") else nullcontext()


@contextmanager
def on_gpu(monkeypatch, module):
    """Moves the tensors of a test file to the GPU, and what its tests make."""

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
