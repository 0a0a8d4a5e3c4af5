"""What the GPU itself does, in the same run as the kernels: bandwidth, clock, cost of a launch.

The targets of the kernels are shares of these figures.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastpg.bench.timing import Case

BYTES = 2**30  # of a tensor: many times what a cache holds
CYCLES = 10_000_000


def _gate() -> None:
    """There is nothing of ours here to be wrong."""


def cases(device: str) -> Iterator[Case]:
    if device != "cuda":
        return
    source = torch.zeros(BYTES // 4, device="cuda")
    target, one = torch.empty_like(source), torch.zeros(1, device="cuda")
    yield Case(
        "hardware",
        "bandwidth, clock of a multiprocessor, launch",
        _gate,
        {
            "copying 1 GiB": lambda: target.copy_(source),
            "summing 1 GiB": source.sum,
            "spinning for ten million cycles": lambda: torch.cuda._sleep(CYCLES),
            "launching one kernel": lambda: one.add_(1.0),
            "launching one kernel, under a CUDA graph": lambda: one.add_(1.0),
        },
        ours="copying 1 GiB",
        device="cuda",
        graphs=("launching one kernel, under a CUDA graph",),
        rates={
            "copying 1 GiB": (2 * BYTES / 1e6, "GB/s"),
            "summing 1 GiB": (BYTES / 1e6, "GB/s"),
            "spinning for ten million cycles": (CYCLES / 1e3, "MHz"),
        },
    )
