"""Runs a case: every candidate is checked, and those that are right are timed in turn."""

from __future__ import annotations

from typing import Any

import torch

from .timing import Case, Timing, measure, under_graph

Row = dict[str, Any]
ROUNDS = 200  # at most


def run(case: Case, seconds: float) -> list[Row]:
    """The rows of one case, in the order of the candidates that are timed.

    A candidate that raises or does not match the reference is a row that says so: it is not timed,
    and the others are.
    """
    try:
        case.gate()
    except Exception as error:  # Whatever it is, the other cases are worth their time.
        return [wrong(case, error)]
    rows = prepare(case)
    if case.ours not in case.candidates:
        return rows
    try:
        timings = measure(case, rounds=ROUNDS, seconds=seconds)
    except Exception as error:
        return [*rows, wrong(case, error)]
    return [timed(case, name, timing) for name, timing in timings.items()] + rows


def prepare(case: Case) -> list[Row]:
    """Drops the candidates that raise or are wrong; returns a row for each of them."""
    rows = []
    for name, call in list(case.candidates.items()):
        try:
            if name in case.gates:
                case.gates[name]()
            if name in case.graphs:
                case.candidates[name] = under_graph(call)
            case.candidates[name]()
        except Exception as error:
            del case.candidates[name]
            rows.append(wrong(case, error) | {"candidate": name})
    return rows


def wrong(case: Case, error: Exception) -> Row:
    """The row of what is not timed, with the reason."""
    reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return {"op": case.op, "case": case.name, "wrong": reason[:500]}


def timed(case: Case, name: str, timing: Timing) -> Row:
    """The row of what is timed."""
    row = {
        "op": case.op,
        "case": case.name,
        "candidate": name,
        "median_ms": timing.median,
        "p10_ms": timing.p10,
        "p90_ms": timing.p90,
        "ratio": timing.ratio,
        "target": case.targets.get(name, ""),
        "extra_mib": timing.extra_mib,
        "memory_target": case.memory_target if name == case.ours else "",
        "threads": torch.get_num_threads(),
    }
    if name in case.rates:
        amount, unit = case.rates[name]
        row |= {"rate": amount / timing.median, "unit": unit}
    return row
