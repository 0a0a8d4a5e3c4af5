"""Interleaved timing: every candidate once per round, so that a busy machine is busy for all."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Case:
    """One problem, solved by several candidates; `ours` names the one that is fastpg's."""

    op: str
    name: str
    gate: Callable[[], None]  # raises AssertionError if ours is wrong on these very inputs
    candidates: dict[str, Callable[[], object]]
    ours: str = "fastpg"
    targets: dict[str, str] = field(default_factory=dict)  # candidate -> its time over ours
    calls: int = 1  # calls per timing, for what takes microseconds
    device: str = "cpu"
    results_mib: float = 0.0  # of what a call returns: any candidate must allocate that
    least: int = 5  # rounds
    memory_target: str = ""  # of ours, in MiB beside the results


@dataclass
class Timing:
    """Milliseconds of one candidate, and the median over rounds of (its time / time of ours)."""

    median: float
    p10: float
    p90: float
    ratio: float
    extra_mib: float | None


def measure(case: Case, *, rounds: int, seconds: float) -> dict[str, Timing]:
    """At most `rounds`, for about `seconds`, but the least of the case; after one not counted."""
    samples: dict[str, list[float]] = {name: [] for name in case.candidates}
    memory = {name: _extra_mib(call, case) for name, call in case.candidates.items()}
    end = time.perf_counter() + seconds
    while (done := len(samples[case.ours])) < rounds and (
        done < case.least or time.perf_counter() < end
    ):
        for name, call in case.candidates.items():
            samples[name].append(_time(call, case))
    ours = samples[case.ours]
    return {name: _summary(times, ours, memory[name]) for name, times in samples.items()}


def _extra_mib(call: Callable[[], object], case: Case) -> float | None:
    extra = peak_extra_mib(call, case.device)
    return None if extra is None else max(0.0, extra - case.results_mib)


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks for the next call, for the rest of the process.

    By default it gives them back to the system, and mapping 150 MB anew then takes longer than
    filling it. jemalloc, tcmalloc and torch's own allocator on CUDA keep them.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(-4, 0)  # M_MMAP_MAX


def _time(call: Callable[[], object], case: Case) -> float:
    _synchronise(case.device)
    start = time.perf_counter()
    for _ in range(case.calls):
        call()
    _synchronise(case.device)
    return (time.perf_counter() - start) / case.calls * 1e3


def _summary(times: list[float], ours: list[float], extra_mib: float | None) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
    return Timing(statistics.median(times), deciles[0], deciles[-1], ratio, extra_mib)


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_extra_mib(call: Callable[[], object], device: str) -> float | None:
    """How far a call's memory rises above what was held before it; None where nothing tells."""
    call()  # compilation, thread pools, kernels
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return _resident_rise(call)


def _resident_rise(call: Callable[[], object]) -> float | None:
    """On Linux the peak of the resident set can be reset; elsewhere it only ever grows."""
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")
    except OSError:
        return None
    status = Path("/proc/self/status")
    held = _kib(status, "VmRSS")
    call()
    return max(0.0, (_kib(status, "VmHWM") - held) / 1024)


def _kib(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])
