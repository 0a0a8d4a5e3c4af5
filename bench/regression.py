"""make bench-compare BASE=<revision>: fails where a call has become more than a tenth slower.

For every example of every op, forward alone and with its backward: the two trees are timed in turn,
each in a process of its own, so that a busy machine is busy for both. pytest-benchmark keeps and
shows the times of this tree; the ratio of the medians decides.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench._example import examples
from bench._worker import UNKNOWN

HERE = Path(__file__).parent
ALLOWED = 1.10  # the most that a call may take, of what it took before
ROUNDS, CALLS = 21, 100
CASES = [
    (str(example), direction)
    for example in examples()
    for direction in ("forward", "backward")
    if direction == "forward" or example.differentiable
]


class Worker:
    """A process that times the package of one tree."""

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, str(HERE / "_worker.py"), str(tree)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the worker has ended; what it printed tells why"
        return line

    def close(self) -> None:
        """Ends the process, which waits for nothing else."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def time(self, name: str, direction: str) -> float:
        """Seconds of one call of an example."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, direction, CALLS]) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        if answer == UNKNOWN:
            pytest.skip("one of the two trees does not know this example")
        return float(answer)


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Worker, Worker]]:
    """One for this tree, one for the tree in FASTPG_BASE."""
    pair = Worker(HERE.parent), Worker(Path(os.environ["FASTPG_BASE"]))
    yield pair
    for worker in pair:
        worker.close()


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_a_call_is_no_slower_than_before(name, direction, workers, benchmark):
    here, base = workers
    times: dict[Worker, list[float]] = {here: [], base: []}

    def run(worker: Worker) -> None:
        times[worker].append(worker.time(name, direction))

    run(here)  # Nothing of the first call counts: caches fill.
    benchmark.pedantic(run, args=(here,), setup=lambda: run(base), rounds=ROUNDS)
    ratio = statistics.median(times[here][1:]) / statistics.median(times[base])
    benchmark.extra_info["ratio"] = ratio
    benchmark.extra_info["microseconds"] = statistics.median(times[here][1:]) * 1e6
    print(f"\n{name}, {direction}: {ratio:.3f} of the time before")
    assert ratio <= ALLOWED
