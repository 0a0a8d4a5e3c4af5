"""How time and memory grow with tokens, vocabulary, length and threads, with the exponent."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .problem import LEAST_ROUNDS, OURS, PLAIN, Problem
from .problems import Settings, advantages, clipped_surrogate, head_cross_entropy, log_probs
from .running import Row
from .timing import Case, freed_memory_kept, measure, peak_extra_mib

LEAST_MIB = 4.0  # Less than that of extra memory is scratch, and has no exponent.


class Growth(NamedTuple):
    """Problems that differ in one size.

    Attributes:
        op: What is computed.
        what: The size that grows.
        sizes: Its values.
        problem: Makes the problem of a size.
    """

    op: str
    what: str
    sizes: list[int]
    problem: Callable[[int], Problem]


def growths(settings: Settings) -> Iterator[Growth]:
    """What is made to grow: by factors of 2, from where a call's own cost is small beside it.

    No size is a power of 2 itself: rows that begin so many bytes apart share few sets of a cache,
    and how much that costs is no law of growth.
    """
    more = 4 if settings.device == "cuda" else 2 if settings.quick else 3

    def sizes(first: int, count: int = 3 if settings.quick else 4) -> list[int]:
        return [3 * 2 ** (first + more + i) for i in range(count)]

    def of_rows(rows: int) -> Problem:
        return log_probs(settings, rows, 32768, torch.float32, backward=True)

    def of_vocab(vocab: int) -> Problem:
        return log_probs(settings, 64, vocab, torch.float32, backward=True)

    def head_of_rows(rows: int) -> Problem:
        return head_cross_entropy(settings, rows, 64, 16384, torch.float32)

    def head_of_vocab(vocab: int) -> Problem:
        return head_cross_entropy(settings, 256, 64, vocab, torch.float32)

    yield Growth("token_logprobs", "N", sizes(4), of_rows)
    yield Growth("gae", "T", sizes(10), lambda length: advantages(settings, 64, length, 0.95))
    yield Growth("policy_loss", "N", sizes(16), lambda tokens: clipped_surrogate(settings, tokens))
    if not settings.quick:
        yield Growth("token_logprobs", "V", sizes(13), of_vocab)
        yield Growth("linear_token_loss", "N", sizes(6, 3), head_of_rows)
        yield Growth("linear_token_loss", "V", sizes(11, 3), head_of_vocab)


def exponent(sizes: list[int], amounts: list[float]) -> float:
    """The slope of log amount over log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(a) for a in amounts]
    return statistics.linear_regression(x, y).slope


def rows(settings: Settings) -> Iterator[list[Row]]:
    """A row for each growth, of fastpg and of plain PyTorch."""
    names = (OURS,) if settings.quick else (OURS, PLAIN)
    for growth in growths(settings):
        problems = [growth.problem(size) for size in growth.sizes]
        for name in names:
            calls = [problem.call(problem.solutions[name]) for problem in problems]
            yield [grown(settings, growth, name, calls)]
    most = torch.get_num_threads()
    if settings.device == "cpu" and most > 1:
        counts = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
        problem = log_probs(settings, 64, 65536, torch.float32, backward=False)
        growth = Growth("token_logprobs", "threads", counts, lambda _: problem)
        for name in names:
            call = problem.call(problem.solutions[name])
            yield [grown(settings, growth, name, [on_threads(n, call) for n in counts])]
        torch.set_num_threads(most)


def grown(settings: Settings, growth: Growth, name: str, calls: list[Callable[[], object]]) -> Row:
    """Times every size in turn, and fits the exponents.

    A sample of every size does the work of the largest one, in as many calls in a row: the first
    call after one that has filled the caches takes half a millisecond more, which is no growth.
    On a CPU the time is that of its cores, for a long call is interrupted more often than a short
    one; and the fit takes the tenth percentile, for what else the machine does only ever adds. More
    threads spend no less of it: what they save is asked of the clock on the wall.

    The allocator keeps what is freed, so that the time is that of the work: from 32 MiB on glibc
    would map fresh memory at every call. What the work needs is measured before, without that.
    """
    sizes = growth.sizes
    in_a_row = [sizes[-1] // size for size in sizes]
    memory = [peak_extra_mib(call, settings.device) for call in calls]
    case = Case(
        growth.op,
        f"{growth.what} from {sizes[0]} to {sizes[-1]}",
        lambda: None,
        {
            str(size): repeated(call, times)
            for size, call, times in zip(sizes, calls, in_a_row, strict=True)
        },
        ours=str(sizes[-1]),
        device=settings.device,
        least=LEAST_ROUNDS,
        clock=time.perf_counter if growth.what == "threads" else time.process_time,
    )
    with freed_memory_kept():
        timings = measure(case, rounds=100, seconds=settings.seconds)
    timing = timings[case.ours]
    spent = [timings[str(size)].p10 / times for size, times in zip(sizes, in_a_row, strict=True)]
    row = {
        "op": case.op,
        "case": case.name,
        "candidate": name,
        "median_ms": timing.median,
        "p10_ms": timing.p10,
        "p90_ms": timing.p90,
        "extra_mib": memory[-1],
        "threads": torch.get_num_threads(),
        "exponent": exponent(sizes, spent),
    }
    known = [mib for mib in memory if mib is not None and mib > LEAST_MIB]
    if growth.what != "threads" and len(known) == len(sizes):
        row["memory_exponent"] = exponent(sizes, known)
    return row


def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    """So many calls in a row."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def on_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """A call on so many threads."""

    def run() -> object:
        torch.set_num_threads(count)
        return call()

    return run
