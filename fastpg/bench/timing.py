"""Interleaved timing: every candidate once per round, so that a busy machine is busy for all.

The order of a round is drawn at random: a call pays for what the one before it left in the caches.

On a GPU its own events tell the time of many calls in a row, so many that a sample takes 5 ms: less
than that and the clock, and the launches of one call, would show in the figure. On a CPU one thread
is timed by the clock of the process, which stands still while other programs have the core.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

SAMPLE_MS = 5.0  # at least, on a GPU


def suitable_clock() -> Callable[[], float]:
    """That of the process for one thread; what several threads save shows on the wall's alone."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass
class Case:
    """One problem, solved by several candidates; `ours` names the one that is fastpg's."""

    op: str
    name: str
    gate: Callable[[], None]  # raises AssertionError if ours is wrong on these very inputs
    candidates: dict[str, Callable[[], object]]
    ours: str = "fastpg"
    targets: dict[str, str] = field(default_factory=dict)  # candidate -> its time over ours
    calls: int = 1  # at least so many per timing, for what takes microseconds
    device: str = "cpu"
    results_mib: float = 0.0  # of what a call returns: any candidate must allocate that
    least: int = 5  # rounds
    memory_target: str = ""  # of ours, in MiB beside the results
    gates: dict[str, Callable[[], None]] = field(default_factory=dict)  # of other candidates
    graphs: tuple[str, ...] = ()  # candidates that a CUDA graph replays
    # What a candidate does in a call and its unit: 3000 MB and "GB/s" if that is what it moves.
    # Divided by milliseconds, megabytes are GB/s, and thousands of cycles are MHz.
    rates: dict[str, tuple[float, str]] = field(default_factory=dict)
    clock: Callable[[], float] = field(default_factory=suitable_clock)  # seconds; not on a GPU


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
    calls = {name: _calls(call, case) for name, call in case.candidates.items()}
    order, turns = random.Random(0), list(case.candidates.items())
    end = time.perf_counter() + seconds
    while (done := len(samples[case.ours])) < rounds and (
        done < case.least or time.perf_counter() < end
    ):
        for name, call in order.sample(turns, len(turns)):
            samples[name].append(_time(call, calls[name], case))
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
    _tune_malloc(trim_threshold=2**31 - 1, most_maps=0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """The same for a with block."""
    keep_freed_memory()
    try:
        yield
    finally:
        _tune_malloc(trim_threshold=128 * 1024, most_maps=65536)  # as glibc begins
        return_freed_memory()


def _tune_malloc(trim_threshold: int, most_maps: int) -> None:
    if platform.system() == "Linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-4, most_maps)  # M_MMAP_MAX


def return_freed_memory() -> None:
    """Has glibc give back what was freed: used again, it would not show in the peak."""
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def under_graph(call: Callable[[], object]) -> Callable[[], object]:
    """What a call launches, captured once in a CUDA graph. To replay it costs almost no Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # The first calls compile and allocate, which no graph can hold.
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _calls(call: Callable[[], object], case: Case) -> int:
    """How many calls a timing takes: on a GPU enough for a sample of SAMPLE_MS."""
    if case.device != "cuda":
        return case.calls
    pilot = _time(call, max(case.calls // 10, 2), case)
    return max(case.calls, math.ceil(SAMPLE_MS / max(pilot, 1e-4)))


def _time(call: Callable[[], object], calls: int, case: Case) -> float:
    """The milliseconds of one call, from `calls` in a row."""
    if case.device == "cuda":
        return _time_by_events(call, calls)
    start = case.clock()
    for _ in range(calls):
        call()
    return (case.clock() - start) / calls * 1e3


def _time_by_events(call: Callable[[], object], calls: int) -> float:
    """The same, from the moment the GPU begins until it has done the last call."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _summary(times: list[float], ours: list[float], extra_mib: float | None) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
    return Timing(statistics.median(times), deciles[0], deciles[-1], ratio, extra_mib)


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
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    status = Path("/proc/self/status")
    held = _kib(status, "VmRSS")
    call()
    return max(0.0, (_kib(status, "VmHWM") - held) / 1024)


def _kib(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])
