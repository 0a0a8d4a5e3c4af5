"""python -m bench.gpu: tests, sanitizer and benchmarks on a GPU, within nine minutes; then a table.

Every step runs whatever became of the one before; the exit code is 1 if any failed. They print to
bench/results/<gpu>.log, and their last lines here if they fail; rows go to <gpu>.jsonl beside it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastpg

from .__main__ import HERE, machine
from ._example import benchmarks

OPS = [name for name in benchmarks() if name != "trainer_step"]  # which is timed on a CPU
PYTHON, SANITIZER = sys.executable, "compute-sanitizer"
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a read beyond a tensor is a fault


def steps() -> list[tuple[str, list[str], int]]:
    """Name, command and seconds of each."""
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    on_gpu = "(cuda or triton) and not ahead_of_time"  # which needs no GPU
    # Another version of torch may warn of something: that fails no test here.
    tests = [PYTHON, "-m", "pytest", *parallel, "-W", "default", "--maxfail", "20", "-k", on_gpu]
    bench = [PYTHON, "-m", "bench", "--device", "cuda", "--seconds", "1", *OPS]
    once = [SANITIZER, "--error-exitcode", "1", "--tool"], [PYTHON, "-m", "bench.once"]
    checks = [(tool, [*once[0], tool, *once[1]], 60) for tool in ("memcheck", "racecheck")]
    return [("tests", tests, 210), *checks, ("benchmarks", bench, 180)]


def run(name: str, command: list[str], limit: int, log: Path) -> str:
    """ok, FAILED, or why not, after running it with its output in the log."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not here"
    print(f"{name}: {' '.join(command)}", flush=True)
    environment = os.environ | (UNCACHED if command[0] == SANITIZER else {})
    with open(log, "a") as file:
        at = file.tell()
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"still running after {limit} s"
    if code != 0:
        print("\n".join(log.read_text()[at:].splitlines()[-25:]))
    return "ok" if code == 0 else f"FAILED: {code}"


def table(rows: list[dict]) -> None:
    """Microseconds, the time as a multiple of ours, and the target of that, if there is one."""
    cases = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"]), []).append(row)
    for (op, case), group in cases.items():
        print(f"{op}: {case}")
        for row in group:
            if "wrong" in row:
                print(f"  WRONG: {row['wrong']}")
                continue
            cells = f"{row['median_ms'] * 1e3:10.1f} µs {row['ratio']:8.2f}  {row['candidate']}"
            print(cells + (f"  (target {row['target']})" if row["target"] else ""))


def main() -> int:
    results = HERE / "results" / f"{machine('cuda')}.jsonl"
    log = results.with_suffix(".log")
    log.unlink(missing_ok=True)
    known = len(results.read_text().splitlines()) if results.exists() else 0
    print(torch.cuda.get_device_name(), torch.__version__, fastpg.extension_status(), sep="; ")
    outcomes = []
    for name, command, limit in steps():
        begin = time.perf_counter()
        outcome = run(name, command, limit, log)
        outcomes.append(f"{name}: {outcome}, {time.perf_counter() - begin:.0f} s")
    lines = results.read_text().splitlines()[known:] if results.exists() else []
    table([json.loads(line) for line in lines])
    print(*outcomes, sep="\n")
    return int(any("FAILED" in outcome for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
