"""python -m bench.gpu [step ...] [--out DIR] [--seconds S]: all that a GPU can tell in ten minutes.

The steps run in the order of their worth, each in a process of its own and within its own limit,
whatever became of those before. The rows of the benchmarks are appended to
bench/results/<gpu>.jsonl, and to DIR, as they come; what the steps print goes to <gpu>.log. A short
table ends the run. Steps that found no time are named: ask for them in a second call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import torch

import fastpg

from .__main__ import Results

PYTHON, SANITIZER = sys.executable, "compute-sanitizer"
SECONDS = 570  # of all steps: ten minutes, less what the build takes where nothing is built
LEAST = 10  # seconds: a step that has fewer left is not begun
GRACE = 5  # seconds between asking a step to end and ending it
TABLE_LINES = 25

VOCABULARY = ["token_logprobs", "policy_loss_from_logits"]
TOKENS = ["gae", "policy_loss", "value_loss", "overhead"]
FROM_HIDDEN = ["linear_token_loss", "linear_token_logprobs"]
COMPILED = [*VOCABULARY, "gae", "policy_loss", "value_loss", "whiten", "importance_weights"]


class Step(NamedTuple):
    """A command, and how long it may take.

    Attributes:
        name: What the table calls it.
        command: The program and its arguments.
        seconds: The limit; then the program ends, with every process that it has started.
        environment: Variables that are set for it.
    """

    name: str
    command: list[str]
    seconds: int
    environment: tuple[tuple[str, str], ...] = ()


def steps(out: Path | None) -> list[Step]:
    """Every step, the most valuable first."""
    to = ["--out", str(out)] if out else []

    def bench(ops: list[str], seconds: float, compiled: str = "without") -> list[str]:
        given = ["--device", "cuda", "--seconds", str(seconds), "--compiled", compiled]
        return [PYTHON, "-m", "bench", *ops, *given, *to]

    return [
        Step("smoke", [PYTHON, "-m", "bench.smoke", "cuda", *to], 60),
        Step("tests", tests(), 200),
        Step("vocabulary", bench(["hardware", *VOCABULARY], 1.0), 60),
        Step("counters", [PYTHON, "-m", "bench.counters", *to], 60),
        Step("tokens", bench(TOKENS, 0.5), 60),
        Step("from hidden states", bench(FROM_HIDDEN, 2.0), 60),
        Step("peers", bench(["peers"], 1.0), 60),
        Step("torch.compile", bench(COMPILED, 0.5, "only"), 90),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]


def tests() -> list[str]:
    """The tests of the GPU. A file that cannot be imported does not keep the others from it."""
    command = [PYTHON, "-m", "pytest", "-vv", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "12"]
    if not importlib.util.find_spec("pytest_benchmark"):
        command += ["-o", "addopts="]  # They have options of that plugin.
    # Another version of torch may warn of something: that fails no test here.
    return [
        *command,
        "-W",
        "default",
        "--ignore",
        "tests/house/test_aot.py",
        "-k",
        "cuda or triton",
    ]


def sanitizer(tool: str) -> Step:
    """One tool of NVIDIA's sanitizer on the kernels in CUDA C++, each on every path it has."""
    kernels = [
        part for name in ("gae", "loss", "ratio") for part in ("--kernel-regex", f"kns={name}")
    ]
    command = [SANITIZER, "--error-exitcode", "1", "--tool", tool, *kernels]
    # Without torch's cache of freed memory a read beyond a tensor is a fault.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Step(tool, [*command, PYTHON, "-m", "bench.once", "cuda", "paths"], 120, uncached)


def run(step: Step, limit: float, log: Path) -> str:
    """ok, FAILED, or why not, after running a step with its output in the log."""
    if shutil.which(step.command[0]) is None:
        return f"{step.command[0]} is not here"
    print(f"{step.name}: {' '.join(step.command)}", flush=True)
    with open(log, "a") as file:
        at = file.tell()
        try:
            code: int | str = run_group(step, limit, file)
        except subprocess.TimeoutExpired:
            code = f"still running after {limit:.0f} s"
        except Exception as error:  # The steps after it are worth their time all the same.
            code = f"{type(error).__name__}: {error}"
    if code != 0:
        print("\n".join(log.read_text(errors="replace")[at:].splitlines()[-25:]))
    return "ok" if code == 0 else f"FAILED: {code}"


def run_group(step: Step, limit: float, file: IO[str]) -> int:
    """Runs a command in a process group of its own, and ends that group whatever happens.

    The workers of pytest outlive a pytest that is killed, and would disturb every later timing.
    """
    process = subprocess.Popen(
        step.command,
        stdout=file,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=os.environ | dict(step.environment),
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says what has failed so far.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):  # if every process of the group has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(
    wanted: list[Step], seconds: float, log: Path, record: Callable[[str, str], None]
) -> dict[str, str]:
    """Runs the steps in turn, and records what became of each and how long it took."""
    outcomes, end = {}, time.perf_counter() + seconds
    for step in wanted:
        begin = time.perf_counter()
        if end - begin < LEAST:
            outcomes[step.name] = "no time was left"
            continue
        outcome = run(step, min(step.seconds, end - begin), log)
        outcomes[step.name] = f"{outcome}, {time.perf_counter() - begin:.0f} s"
        record(step.name, outcomes[step.name])
    return outcomes


def table(rows: list[dict]) -> list[str]:
    """A line for each case, what is wrong first, then what has a target; not more than fit."""
    cases: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"]), []).append(row)
    lines = [(rank(group), line(*case, group)) for case, group in cases.items()]
    shown = [text for _, text in sorted(lines, key=lambda item: item[0])]
    if len(shown) > TABLE_LINES:
        left_out = len(shown) - TABLE_LINES + 1
        shown = [*shown[: TABLE_LINES - 1], f"and {left_out} cases more"]
    return shown


def rank(rows: list[dict]) -> int:
    """0 for a case in which something is wrong, 1 for one with a target, 2 for the others."""
    if any("wrong" in row for row in rows):
        return 0
    return 1 if any(row.get("target") for row in rows) else 2


def line(op: str, case: str, rows: list[dict]) -> str:
    """What is wrong with a case; else our time, and the others as multiples of it."""
    wrong = [
        f"WRONG {row.get('candidate', '')}: {row['wrong']}"[:150] for row in rows if "wrong" in row
    ]
    parts = [*wrong, *(part(row) for row in rows if "median_ms" in row)]
    parts += [f"{name} {value}" for row in rows for name, value in row.get("counters", {}).items()]
    return f"{op}, {case}: {'; '.join(parts)}"


def part(row: dict) -> str:
    """One candidate: its time, the multiple of ours that it is, its rate and its target."""
    text = f"{row['candidate']} {row['median_ms'] * 1e3:.4g} µs"
    if row["ratio"] != 1:
        text += f" ({row['ratio']:.2f})"
    if "rate" in row:
        text += f" = {row['rate']:.4g} {row['unit']}"
    return text + (f" [target {row['target']}]" if row["target"] else "")


def main() -> int:
    known = [step.name for step in steps(None)]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {known}; default all")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a second folder for the rows")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time for all steps")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(known):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no GPU")
    results = Results("cuda", args.out)
    for path in results.paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    log = results.paths[-1].with_suffix(".log")
    log.unlink(missing_ok=True)
    before = len(results.rows())
    print(torch.cuda.get_device_name(), torch.__version__, fastpg.extension_status(), sep="; ")
    wanted = [step for step in steps(args.out) if not args.steps or step.name in args.steps]

    def record(step: str, outcome: str) -> None:
        results.append([{"op": "make gpu", "case": step, "outcome": outcome}])

    outcomes = run_all(wanted, args.seconds, log, record)
    print(*table([row for row in results.rows()[before:] if "outcome" not in row]), sep="\n")
    print("; ".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
