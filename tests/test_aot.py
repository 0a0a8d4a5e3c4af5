"""Every Triton kernel compiles for the GPUs of today, on a machine without one, and none spills."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_ahead_of_time_and_spill_nothing(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.aot", "--few"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout, done.stderr)  # registers, shared memory and spills: pytest -rP
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"sm_{capability}" in done.stdout for capability in (80, 90, 100))
