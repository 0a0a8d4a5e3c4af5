"""`fastpg bench`: suites by name, a table as they run, three sentences, CSV and plots."""

from __future__ import annotations

import argparse
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import fastpg
from fastpg.integrations.verify_command import available

from . import accuracy, report, scaling, step, suites, torture
from .problem import LEAST_ROUNDS, OURS, Errors, Problem
from .problems import Settings
from .provenance import busyness, cores, machine, processor, provenance
from .running import Row, run
from .timing import Case

BUSY = """Other programs keep this machine busy (load {load}). Threads then wait for each other, and
an op of many short parts waits longer than one of few: OMP_WAIT_POLICY=passive shortens that, and
OMP_NUM_THREADS=1 times the work alone.
"""

REJECTED, STOPPED = 2, 128 + signal.SIGINT

DESCRIPTION = """Time fastpg against the lines that people write in PyTorch, against torch.compile
of them, and against every other package that is installed. Whoever takes part is first compared
with double precision; who is wrong, or is not there, gets a line that says so."""
EXAMPLE = """example:
  fastpg bench --quick                    all suites on one screen, within a minute
  fastpg bench gae losses --csv rows.csv --plot plots
"""


def timed(problems: Callable[[Settings], Iterable[Problem]]) -> Callable[[Settings], Iterator]:
    """A suite that checks and times problems."""

    def rows(settings: Settings) -> Iterator[list[Row]]:
        for problem in problems(settings):
            yield rows_of(problem, settings)

    return rows


def rows_of(problem: Problem, settings: Settings) -> list[Row]:
    """The rows of a problem, with the errors of each candidate."""
    if not settings.quick:
        torch.compiler.reset()  # or a recompilation too many would run the plain lines instead
    found: dict[str, Errors] = {}
    case = problem.case(compiled=not settings.quick, found=found)
    rows = run(case, settings.seconds)
    for row in rows:
        row |= {"bytes": problem.least_bytes, "operations": problem.operations}
        row["note"] = problem.note
        if error := found.get(row.setdefault("candidate", OURS)):
            row |= {"value_error": error.value, "gradient_error": error.gradient}
    return rows


SUITES: dict[str, Callable[[Settings], Iterator[list[Row]]]] = {
    "token_logprobs": timed(suites.token_logprobs_suite),
    "linear": timed(suites.linear_suite),
    "gae": timed(suites.gae_suite),
    "losses": timed(suites.losses_suite),
    "overhead": timed(suites.overhead_suite),
    "step": step.rows,
    "accuracy": timed(accuracy.problems),
    "scaling": scaling.rows,
    "torture": torture.rows,
}


def hardware(settings: Settings) -> list[Row]:
    """What this machine does at best: the roof over every figure."""
    values = torch.zeros(2**26, device=settings.device)
    matrix = torch.zeros(1024, 1024, device=settings.device)
    case = Case(
        "hardware",
        "",
        lambda: None,
        {"reading memory": values.sum, "multiplying matrices": lambda: matrix @ matrix},
        ours="reading memory",
        device=settings.device,
        least=LEAST_ROUNDS,
        rates={
            "reading memory": (values.nbytes / 1e6, "GB/s"),
            "multiplying matrices": (2 * 1024**3 / 1e6, "GFLOP/s"),
        },
    )
    return run(case, settings.seconds)


def bench(argv: Sequence[str]) -> int:
    """Run `fastpg bench`.

    Args:
        argv: The arguments after it.

    Returns:
        The exit code: 0, 1 if fastpg is wrong in anything, 2 for input that cannot be used, 130
        for Ctrl-C.
    """
    options = parse(argv)
    if unknown := [name for name in options.suites if name not in SUITES]:
        return reject(f"there is no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if options.plot and find_spec("matplotlib") is None:
        return reject("--plot needs matplotlib: pip install matplotlib")
    if reason := cannot_write(options):
        return reject(reason)
    settings = Settings(options.device, options.quick, left_out={})
    rows: list[Row] = []
    code = 0
    try:
        for found in all_rows(options.suites or list(SUITES), settings):
            rows += found
    except KeyboardInterrupt:
        code = STOPPED
    finish(rows, options)
    failed = any(row.get("candidate") == OURS and is_wrong(row) for row in rows)
    return code or int(failed)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "fastpg bench",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help=f"any of {', '.join(SUITES)}; default all"
    )
    parser.add_argument(
        "--device", type=available, choices=("cpu", "cuda"), default="cpu", help="default cpu"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, without torch.compile")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every row there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw PNG and SVG there")
    return parser.parse_args(argv)


def reject(reason: str) -> int:
    """Say in one sentence what cannot be used."""
    print(f"fastpg bench: {reason}.", file=sys.stderr)
    return REJECTED


def cannot_write(options: argparse.Namespace) -> str:
    """Why a file that is asked for cannot be written, before hours are spent on what is in it."""
    try:
        if options.csv:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            options.csv.open("a").close()  # what is there stays until there are rows
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"what is asked for cannot be written: {error}"
    return ""


def all_rows(names: list[str], settings: Settings) -> Iterator[list[Row]]:
    """The rows of each case, printed as it is done."""
    load = busyness()
    facts = provenance() | {
        "machine": machine(settings.device),
        "device": settings.device,
        "python": platform.python_version(),
        "load": load,
    }

    def told(suite: str, rows: list[Row]) -> list[Row]:
        return [row | facts | {"suite": suite} for row in rows]

    roof = told("hardware", hardware(settings))
    print(introduction(roof, settings.device), flush=True)
    if settings.device == "cpu" and torch.get_num_threads() > 1 and load > cores() / 2:
        print(BUSY.format(load=load), end="")
    print(report.OF_PAIR, report.HEADER, sep="\n", flush=True)
    yield roof
    for name in names:
        yield from (told(name, rows) for rows in suite_rows(name, settings))
    reasons = [
        {"op": "", "case": "", "candidate": name, "left_out": reason}
        for name, reason in settings.left_out.items()
    ]
    print(*report.absent(reasons), sep="\n")
    yield told("", reasons)


def suite_rows(name: str, settings: Settings) -> Iterator[list[Row]]:
    """The rows of a suite. One that ends early, as without memory for its inputs, says so."""
    waiting: list[Row] = []  # verdicts, which are summed up
    try:
        for rows in SUITES[name](settings):
            if settings.quick and rows and "verdict" in rows[0]:
                waiting += rows
            elif rows:
                print(*report.lines(rows), sep="\n", flush=True)
            yield rows
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        rows = [{"op": name, "case": "", "candidate": OURS, "wrong": reason}]
        print(*report.lines(rows), sep="\n", flush=True)
        yield rows
    if waiting:
        print(*report.summaries(waiting), sep="\n", flush=True)


def introduction(roof: list[Row], device: str) -> str:
    """Where and with what this runs."""
    rates = [f"{row['rate']:.3g} {row['unit']} {row['candidate']}" for row in roof if "rate" in row]
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    return (
        f"fastpg {fastpg.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; {processor(device)}{threads}: {', '.join(rates)}"
    )


def is_wrong(row: Row) -> bool:
    """Whether a row says that its candidate is wrong."""
    return "wrong" in row or row.get("verdict", torture.RIGHT) != torture.RIGHT


def finish(rows: list[Row], options: argparse.Namespace) -> None:
    """Write the files that are asked for, and say what the rows mean."""
    if options.csv:
        report.write_csv(rows, options.csv)
        print(f"rows written to {options.csv}")
    if options.plot:
        from .plots import draw

        for path in draw(rows, options.plot):
            print(f"drawn: {path}")
    print("", *report.sentences(rows, quick=options.quick), sep="\n")
