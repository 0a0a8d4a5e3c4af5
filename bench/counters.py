"""python -m bench.counters [--out DIR]: what a GPU counts while the vocabulary kernels run.

NVIDIA's profiler `ncu` runs each kernel several times and reads the hardware's counters: bytes
from and to memory, hits of the L2 cache, issue slots, occupied warps. A kernel is a row of results.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from .__main__ import Results

KERNELS = "regex:^(forward_kernel|backward_kernel|rows_kernel)$"
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "bytes read from memory",
    "dram__bytes_write.sum": "bytes written to memory",
    "lts__t_sector_op_read_hit_rate.pct": "reads that hit the L2 cache",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots in use",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps of those that would fit",
}


def command() -> list[str]:
    """The profiler's call."""
    watched = [sys.executable, "-m", "bench.once", "cuda", "vocabulary"]
    metrics = ["--metrics", ",".join(METRICS)]
    return ["ncu", "--csv", "--print-units", "base", "-k", KERNELS, *metrics, *watched]


def rows(printed: str) -> list[dict]:
    """A row for each kernel, from the table that ncu prints after its own messages."""
    lines = printed.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    kernels: dict[str, dict] = {}
    for cell in csv.DictReader(lines[header:]):
        case = f"{cell['Kernel Name']}, grid {cell['Grid Size']}"
        row = kernels.setdefault(cell["ID"], {"op": "ncu", "case": case, "counters": {}})
        name = METRICS.get(cell["Metric Name"], cell["Metric Name"])
        row["counters"][name] = f"{cell['Metric Value']} {cell['Metric Unit']}"
    return list(kernels.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="a second folder for the rows")
    args = parser.parse_args()
    done = subprocess.run(command(), capture_output=True, text=True)
    print(done.stdout, done.stderr)
    found = rows(done.stdout)
    Results("cuda", args.out).append(found)
    return int(not found)


if __name__ == "__main__":
    sys.exit(main())
