"""python -m bench [op ...] [--device cuda] [--seconds S]: check, time, print and record.

python -m bench --readme: writes the newest rows into the table of README.md and their own page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import fastpg

from . import readme
from ._example import benchmarks
from ._timing import Case, Timing, keep_freed_memory, measure

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
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE
    )
    return {
        "fastpg": fastpg.__version__,
        "commit": git.stdout.strip(),
        "torch": torch.__version__,
        "extension": fastpg.extension_status(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run(case: Case, seconds: float, keep_memory: bool) -> list[dict]:
    """The rows of one case; a candidate that does not match the reference is not timed."""
    case.name += ", freed memory kept" if keep_memory else ""
    print(f"\n{case.op}: {case.name}")
    try:
        case.gate()
    except AssertionError as error:
        print(f"  WRONG: {error}")
        return [{"op": case.op, "case": case.name, "wrong": str(error)}]
    print("  " + COLUMNS.format("", "median ms", "p10", "p90", "x ours", "target", "extra MiB"))
    timings = measure(case, rounds=200, seconds=seconds)
    return [_row(case, name, timing) for name, timing in timings.items()]


def _row(case: Case, name: str, timing: Timing) -> dict:
    target = case.targets.get(name, "")
    cells = [f"{v:.4g}" for v in (timing.median, timing.p10, timing.p90)]
    cells += [f"{timing.ratio:.2f}", target]
    cells += ["" if timing.extra_mib is None else f"{timing.extra_mib:.1f}"]
    memory_target = case.memory_target if name == case.ours else ""
    print("  " + COLUMNS.format(name, *cells) + (memory_target and f"  (target {memory_target})"))
    return {
        "op": case.op, "case": case.name, "candidate": name, "median_ms": timing.median,
        "p10_ms": timing.p10, "p90_ms": timing.p90, "ratio": timing.ratio, "target": target,
        "extra_mib": timing.extra_mib, "memory_target": memory_target,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "ops", nargs="*", metavar="op", help=f"any of {', '.join(BENCHMARKS)}; default all"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each case")
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
    facts, results = provenance(), HERE / "results" / f"{machine(args.device)}.jsonl"
    results.parent.mkdir(exist_ok=True)
    for op in args.ops or BENCHMARKS:
        for case in importlib.import_module(BENCHMARKS[op]).cases(args.device):
            rows = run(case, args.seconds, args.keep_memory)
            with open(results, "a") as file:
                file.writelines(json.dumps(row | facts) + "\n" for row in rows)
    print(f"\nrows added to {results.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
