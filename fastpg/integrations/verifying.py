"""Stock against patched on the user's own install: errors, time and peak memory of both.

A `Case` is a call of the other package, looked up by its name: made while nothing is patched it is
the package's own, made within `patched()` it is fastpg's. Both are compared with fp64.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastpg.bench.timing import return_freed_memory

from .patching import PatchReport

# Ours is worse where its error is twice the stock one's and beyond this, relative to the largest
# value; or where it takes a tenth more time, or a tenth and a MiB more memory.
ERROR, MORE, MIB = 1e-5, 1.1, 1.0
CALLS = 3

Results = Sequence[Tensor | None]


class Sizes(NamedTuple):
    """How large the case is whose time and memory are taken."""

    vocab: int = 151936
    hidden: int = 896
    tokens: int = 256


class Case(NamedTuple):
    """A call of the other package.

    name: What is special about it.
    inputs: Tensors by name. Those that require a gradient get one.
    run: Takes the inputs by name; returns the results. None stands for one that is not asked for.
    exact: The same in plain torch. It is given the inputs in fp64. None: only time and memory are
        taken, at a size where fp64 would take too much of them.
    """

    name: str
    inputs: dict[str, Tensor]
    run: Callable[..., Results]
    exact: Callable[..., Results] | None = None


class Side(NamedTuple):
    """What was found of the stock call or of ours."""

    value: float = math.nan  # largest error of a result, relative to the largest value
    gradient: float = math.nan  # that of a gradient; 0 where there is none
    seconds: float = math.nan
    mib: float | None = None
    failure: str = ""  # the error that it raised


class Row(NamedTuple):
    """A case, and what was found of both sides."""

    case: str
    stock: Side
    ours: Side

    @property
    def worse(self) -> str:
        """In what ours is worse; empty if in nothing."""
        stock, ours = self.stock, self.ours
        if ours.failure:
            return "" if stock.failure else f"it raises {ours.failure}"
        if stock.failure:
            return ""
        for name in ("value", "gradient"):
            theirs, error = getattr(stock, name), getattr(ours, name)
            if error > max(2 * theirs, ERROR):
                return f"the error of a {name}"
        if ours.seconds > MORE * stock.seconds:
            return "time"
        if ours.mib is not None and stock.mib is not None and ours.mib > MORE * stock.mib + MIB:
            return "memory"
        return ""


class VerifyReport(NamedTuple):
    """What was replaced, and how it compares."""

    patch: PatchReport
    rows: list[Row]

    @property
    def ok(self) -> bool:
        """Whether something is replaced, and ours is worse in nothing."""
        replaced = any(row.state == "replaced" for row in self.patch.rows)
        return replaced and not any(row.worse for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return str(self.patch)
        lines = [["", "error of values", "", "of gradients", "", "seconds", "", "peak MiB", "", ""]]
        lines.append(["case", *["stock", "fastpg"] * 4, ""])
        for row in self.rows:
            cells = [row.case]
            for name in ("value", "gradient", "seconds", "mib"):
                cells += [_text(getattr(side, name), name) for side in (row.stock, row.ours)]
            failed = f"stock raises {row.stock.failure}" if row.stock.failure else ""
            lines.append([*cells, f"WORSE: {row.worse}" if row.worse else failed])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([str(self.patch), "", *table])


def _text(x: float | None, name: str) -> str:
    if x is None or math.isnan(x):
        return "-"
    return {"seconds": f"{x:.3f}", "mib": f"{x:.0f}"}.get(name, f"{x:.1e}")


def compare(
    cases: Callable[[], Iterable[Case]], patched: Callable[[], AbstractContextManager[PatchReport]]
) -> VerifyReport:
    """Runs each case as it is and patched.

    Args:
        cases: Makes what to run, where something can be replaced.
        patched: Patches the package for a with block.

    Returns:
        The report.
    """
    with patched() as report:
        pass
    if not any(row.state == "replaced" for row in report.rows):
        return VerifyReport(report, [])
    rows = []
    for case in cases():
        rows.append(_timed(case, patched) if case.exact is None else _judged(case, patched))
    return VerifyReport(report, rows)


def _judged(case: Case, patched: Callable[[], AbstractContextManager]) -> Row:
    """A case whose errors are taken."""
    assert case.exact is not None
    doubles = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in case.inputs.items()
    }
    expected = _results(case.exact, doubles)
    sides = []
    for context in (nullcontext, patched):
        with context():
            try:
                found = _results(case.run, _leaves(case.inputs))
            except Exception as error:
                sides.append(failed(error))
                continue
        value, gradient = (_errors(a, b) for a, b in zip(found, expected, strict=True))
        sides.append(Side(value, gradient))
    return Row(case.name, *sides)


def failed(error: Exception) -> Side:
    """What is found of a call that raises."""
    return Side(failure=f"{type(error).__name__}: {error}")


def _timed(case: Case, patched: Callable[[], AbstractContextManager]) -> Row:
    """A case whose time and memory are taken, in turn, after a first call that is not."""
    contexts = (nullcontext, patched)
    on_gpu = any(x.is_cuda for x in case.inputs.values())

    def run() -> object:
        return _results(case.run, _leaves(case.inputs))

    sides = [Side(seconds=math.inf), Side(seconds=math.inf)]
    for call in range(1 + CALLS):
        for i, context in enumerate(contexts):
            if sides[i].failure:
                continue
            with context():
                try:
                    seconds, mib = _measured(run, on_gpu=on_gpu)
                except Exception as error:
                    sides[i] = failed(error)
                    continue
            if call:
                sides[i] = Side(seconds=min(sides[i].seconds, seconds), mib=mib)
    return Row(case.name, *sides)


def _leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, none of which has a history or a gradient yet."""
    return {name: x.detach().requires_grad_(x.requires_grad) for name, x in inputs.items()}


def _results(run: Callable[..., Results], inputs: dict[str, Tensor]) -> tuple[Results, Results]:
    """The results, and the gradients of a weighted sum of those that have one."""
    results = run(**inputs)
    total: Tensor | None = None
    for i, x in enumerate(results):
        if x is not None and x.requires_grad:
            weights = torch.linspace(0.5 + i, 1.5 + i, x.numel(), device=x.device, dtype=x.dtype)
            part = (x.flatten() * weights).sum()
            total = part if total is None else total + part
    if total is not None:
        total.backward()
    return results, [x.grad for x in inputs.values() if x.requires_grad]


def _errors(found: Results, expected: Results) -> float:
    """The largest error, each relative to the largest value of its tensor.

    NaN is an error without bounds.
    """
    worst = 0.0
    for x, exact in zip(found, expected, strict=True):
        if x is None or exact is None:
            continue
        error = (x.double() - exact.double()).abs()
        error = torch.where(x.double() == exact, 0.0, error)  # -inf is exact where it should be
        scale = exact.double()[exact.double().isfinite()].abs()
        if error.numel():
            part = error.max() / scale.max().clamp(min=1e-30) if scale.numel() else error.max()
            worst = max(worst, math.inf if part.isnan() else part.item())
    return worst


def _measured(call: Callable[[], object], *, on_gpu: bool) -> tuple[float, float | None]:
    """The seconds that a call takes, and how far it raises the memory, in MiB."""
    gc.collect(1)  # what the call before this one left; all there is would take a second
    if on_gpu:
        return _measured_on_gpu(call)
    return_freed_memory()
    held = _reset_peak()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds, None if held is None else (_kib("VmHWM") - held) / 1024


def _measured_on_gpu(call: Callable[[], object]) -> tuple[float, float | None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**20


def _reset_peak() -> int | None:
    """Resets the peak of the resident memory; returns what is held, in KiB. None: not on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _kib("VmRSS")


def _kib(key: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
