"""The GPU that tests play on a CPU shows the faults that it is there to show."""

import shutil
import subprocess

import cuda_on_cpu
import pytest

from bench import once

SOURCE = """
#include <stdio.h>
#include "common/cuda.h"

__global__ void reverse(int* x, char barrier) {  // through shared memory
  __shared__ int copy[64];
  copy[threadIdx.x] = x[threadIdx.x];
  const bool whole = barrier == 'b' || (barrier == 'd' && threadIdx.x % 2);
  if (whole) __syncthreads();
  if (barrier == 'w' || (barrier == 'd' && !whole)) __shfl_sync(~0u, 0, 0);
  x[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void number(int* x, int* next) { x[blockIdx.x] = (*next)++; }

int main(int, char** arguments) {
  int x[64], wrong = 0;
  if (arguments[1][0] == 'o') {  // the order in which blocks run
    int next = 0;
    fpg::launch(number, 8, 32, nullptr, x, &next);
    for (int i = 0; i < 8; ++i) printf("%d ", x[i] / 32);
    return 0;
  }
  for (int i = 0; i < 64; ++i) x[i] = i;
  try {
    fpg::launch(reverse, 1, 64, nullptr, x, arguments[1][0]);
  } catch (const std::logic_error& error) {
    return puts(error.what());
  }
  for (int i = 0; i < 64; ++i) wrong += x[i] != 63 - i;
  puts(wrong ? "wrong" : "right");
}
"""


@pytest.fixture(scope="module")
def reverse(tmp_path_factory):
    """The program above; its argument is the barrier that the kernel has."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("reverse")
    (folder / "reverse.cu").write_text(SOURCE)
    include = [f"-I{path}" for path in (cuda_on_cpu.HERE, cuda_on_cpu.CSRC)]
    flags = ["-std=c++17", "-x", "c++", "-w"]
    subprocess.run(["c++", *flags, *include, "reverse.cu", "-o", "reverse"], cwd=folder, check=True)
    return folder / "reverse"


@pytest.mark.parametrize(
    ("barrier", "outcome"),
    [
        ("block", "right"),
        ("warp", "wrong"),
        ("none", "wrong"),
        ("divergent", "a barrier that not every thread reaches"),
    ],
)
def test_a_wrong_barrier_shows(reverse, barrier, outcome):
    done = subprocess.run([reverse, barrier], capture_output=True, text=True, check=False)
    assert done.stdout == outcome + "\n", done.stderr


def test_blocks_run_in_another_order_than_their_numbers(reverse):
    done = subprocess.run([reverse, "order"], capture_output=True, text=True, check=True)
    order = [int(number) for number in done.stdout.split()]
    assert sorted(order) == list(range(8)) != order


def test_the_script_for_the_sanitizer_runs():
    once.main("cpu")
