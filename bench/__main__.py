"""python -m bench [op ...] [--device cuda] [--seconds S] [--out DIR]: check, time and record.

The rows of a case go to bench/results/<machine>.jsonl, and to DIR, as soon as it is timed.

python -m bench --readme: writes the committed rows, and those of `fastpg bench`, into their pages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch

from fastpg.bench.provenance import machine, provenance
from fastpg.bench.running import run
from fastpg.bench.timing import Case, keep_freed_memory

from . import readme
from ._example import benchmarks

HERE = Path(__file__).parent
BENCHMARKS = benchmarks()
COLUMNS = "{:40} {:>10} {:>10} {:>10} {:>8} {:>9} {:>9}"
HEADER = COLUMNS.format("", "median ms", "p10", "p90", "x ours", "target", "extra MiB")


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


def shown(row: dict) -> list[str]:
    """A row as lines of the terminal."""
    if "wrong" in row:
        return [f"  WRONG: {row.get('candidate', '')} {row['wrong']}"]
    cells = [f"{row[key]:.4g}" for key in ("median_ms", "p10_ms", "p90_ms")]
    cells += [f"{row['ratio']:.2f}", row["target"]]
    cells += ["" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"]
    target = f"  (target {row['memory_target']})" if row["memory_target"] else ""
    rate = [f"  {'':40} {row['rate']:.4g} {row['unit']}"] if "rate" in row else []
    return ["  " + COLUMNS.format(row["candidate"], *cells) + target, *rate]


def select(case: Case, compiled: str) -> Case:
    """The case with, without, or beside ours only those candidates that torch.compile makes."""
    if compiled != "with":
        case.candidates = {
            name: call
            for name, call in case.candidates.items()
            if name == case.ours or ("torch.compile" in name) == (compiled == "only")
        }
    return case


def run_op(op: str, args: argparse.Namespace, results: Results) -> None:
    """Runs every case of a benchmark, and appends its rows."""
    cases = importlib.import_module(BENCHMARKS[op]).cases(args.device)
    for case in (select(case, args.compiled) for case in cases):
        if args.compiled == "only" and len(case.candidates) == 1:
            continue
        torch.compiler.reset()  # or a recompilation too many would run the eager code instead
        case.name += ", freed memory kept" if args.keep_memory else ""
        print(f"\n{case.op}: {case.name}\n  {HEADER}")
        rows = run(case, args.seconds)
        print(*(line for row in rows for line in shown(row)), sep="\n")
        results.append(rows)


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
