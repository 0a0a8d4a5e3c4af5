"""Every GPU kernel compiles on a machine without a GPU, and its machine code is within its bars."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastpg._library import _cuda

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRITON = importlib.util.find_spec("triton") is not None  # whose package brings cuobjdump
OLDEST = ROOT / ".triton-oldest"  # The oldest Triton that is supported: `make .triton-oldest`.

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


def run(*command, path=""):
    """What a module of bench prints; a module that fails is an error, with what it printed."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    print(done.stdout, done.stderr)  # the table: pytest -rP
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize("version", ["installed", "oldest"])
def test_triton_kernels_are_within_their_bars(version):
    """For sm_90, and the largest variants; `make aot` compiles all of them for every GPU."""
    if version == "oldest" and not OLDEST.exists():
        pytest.skip("there is no .triton-oldest: make .triton-oldest")
    printed = run("bench.aot", "--few", "90", path=OLDEST if version == "oldest" else "")
    assert printed.startswith("triton 3.6." if version == "oldest" else "triton ")
    assert "rows_kernel" in printed


@needs_triton
def test_the_predictions_are_of_todays_kernels():
    run("bench.predict", "--check")


@pytest.mark.skipif(_cuda is None or not TRITON, reason="no CUDA extension, or no cuobjdump")
def test_cuda_kernels_are_built_for_every_gpu_and_spill_nothing():
    printed = run("bench.aot_cuda")
    built = {line.split()[0] for line in printed.splitlines() if line.startswith("sm_")}
    assert built == set(_cuda.gpus.split())
