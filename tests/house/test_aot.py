"""Every GPU kernel compiles for the GPUs of today, on a machine without one, and none spills."""

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


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_triton_kernels_compile_ahead_of_time_and_spill_nothing(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.aot", "--few"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout, done.stderr)  # registers, shared memory and spills: pytest -rP
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"sm_{capability}" in done.stdout for capability in (80, 90, 100))


@pytest.mark.skipif(_cuda is None or not TRITON, reason="no CUDA extension, or no cuobjdump")
def test_cuda_kernels_are_built_for_every_gpu_and_spill_nothing():
    command = [sys.executable, "-m", "bench.aot_cuda"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    built = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("sm_")}
    assert built == set(_cuda.gpus.split())
