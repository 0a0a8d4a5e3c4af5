"""python -m bench [op ...] [--device cuda] [--seconds S] [--out DIR]: check, time and record.

The rows of a case go to bench/results/<machine>.jsonl, and to DIR, as soon as it is timed.

python -m bench --readme: writes the newest rows into the table of README.md and their own page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

import fastpg

from . import readme
from ._example import benchmarks
from ._timing import Case, Timing, keep_freed_memory, measure, under_graph

HERE = Path(__file__).parent
BENCHMARKS = benchmarks()
COLUMNS = "{:40} {:>10} {:>10} {:>10} {:>8} {:>9} {:>9}"


def machine(device: str) -> str:
    """The processor's name, as a file name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = (
            Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
        )
        models = [line.split(":")[1] for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def provenance() -> dict[str, str]:
    """What a figure depends on besides the code of the case."""
    return {
        "fastpg": fastpg.__version__,
        "commit": revision(),
        "torch": torch.__version__,
        "extension": fastpg.extension_status(),
        "date": time.strftime("%Y-%m-%d"),
    }


def revision() -> str:
    """The commit of this tree; "unknown" in a copy of the files alone, or without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


class Results:
    """The files that rows are appended to, as they come.

    Args:
        device: The device that the rows are about; its name names the files.
        out: A second folder for them, which need not exist.
    """

    def __init__(self, device: str, out: Path | None = None) -> None:
        folders = [HERE / "results", *([out] if out else [])]
        self.paths = [folder / f"{machine(device)}.jsonl" for folder in folders]
        self.facts = provenance()

    def append(self, rows: list[dict]) -> None:
        """Adds rows, with what they depend on."""
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.writelines(json.dumps(row | self.facts) + "\n" for row in rows)

    def rows(self) -> list[dict]:
        """Every row of the first file."""
        path = self.paths[0]
        return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []


def run(case: Case, seconds: float, keep_memory: bool) -> list[dict]:
    """The rows of one case; a candidate that does not match the reference is not timed."""
    case.name += ", freed memory kept" if keep_memory else ""
    print(f"\n{case.op}: {case.name}")
    try:
        case.gate()
    except Exception as error:  # Whatever it is, the other cases are worth their time.
        return [_wrong(case, error)]
    rows = prepare(case)
    if case.ours not in case.candidates:
        return rows
    print("  " + COLUMNS.format("", "median ms", "p10", "p90", "x ours", "target", "extra MiB"))
    try:
        timings = measure(case, rounds=200, seconds=seconds)
    except Exception as error:
        return [*rows, _wrong(case, error)]
    return rows + [_row(case, name, timing) for name, timing in timings.items()]


def prepare(case: Case) -> list[dict]:
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
            rows.append(_wrong(case, error) | {"candidate": name})
    return rows


def _wrong(case: Case, error: Exception) -> dict:
    """The row of what is not timed, with the reason."""
    reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    print(f"  WRONG: {reason}")
    return {"op": case.op, "case": case.name, "wrong": reason[:500]}


def select(case: Case, compiled: str) -> Case:
    """The case with, without, or beside ours only those candidates that torch.compile makes."""
    if compiled != "with":
        case.candidates = {
            name: call
            for name, call in case.candidates.items()
            if name == case.ours or ("torch.compile" in name) == (compiled == "only")
        }
    return case


def _row(case: Case, name: str, timing: Timing) -> dict:
    target = case.targets.get(name, "")
    cells = [f"{v:.4g}" for v in (timing.median, timing.p10, timing.p90)]
    cells += [f"{timing.ratio:.2f}", target]
    cells += ["" if timing.extra_mib is None else f"{timing.extra_mib:.1f}"]
    memory_target = case.memory_target if name == case.ours else ""
    print("  " + COLUMNS.format(name, *cells) + (memory_target and f"  (target {memory_target})"))
    row = {
        "op": case.op, "case": case.name, "candidate": name, "median_ms": timing.median,
        "p10_ms": timing.p10, "p90_ms": timing.p90, "ratio": timing.ratio, "target": target,
        "extra_mib": timing.extra_mib, "memory_target": memory_target,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if name in case.rates:
        amount, unit = case.rates[name]
        row |= {"rate": amount / timing.median, "unit": unit}
        print(f"  {'':40} {row['rate']:.4g} {unit}")
    return row


def run_op(op: str, args: argparse.Namespace, results: Results) -> None:
    """Runs every case of a benchmark, and appends its rows."""
    cases = importlib.import_module(BENCHMARKS[op]).cases(args.device)
    for case in (select(case, args.compiled) for case in cases):
        if args.compiled == "only" and len(case.candidates) == 1:
            continue
        torch.compiler.reset()  # or a recompilation too many would run the eager code instead
        results.append(run(case, args.seconds, args.keep_memory))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "ops", nargs="*", metavar="op", help=f"any of {', '.join(BENCHMARKS)}; default all"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each case")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a second folder for the rows")
    parser.add_argument(
        "--compiled",
        choices=["with", "without", "only"],
        default="with",
        help="whether to time what torch.compile makes, which takes it seconds to do",
    )
    parser.add_argument("--keep-memory", action="store_true", help="as jemalloc does: Linux only")
    parser.add_argument("--readme", action="store_true", help="rewrite the tables of the results")
    args = parser.parse_args()
    if unknown := set(args.ops) - set(BENCHMARKS):
        parser.error(
            f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    if args.readme:
        return readme.write()
    if args.keep_memory:
        keep_freed_memory()
    results, failed = Results(args.device, args.out), []
    for op in args.ops or BENCHMARKS:
        try:
            run_op(op, args, results)
        except Exception as error:  # such as no memory for the inputs of a case
            traceback.print_exc()
            results.append([{"op": op, "case": "", "wrong": f"{type(error).__name__}: {error}"}])
            failed.append(op)
    print("\nrows added to", *results.paths)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
