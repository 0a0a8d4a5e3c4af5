"""Writes the newest rows of bench/results/: in tables of README.md, and all beside the rows."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
HEADER = "| {} | fastpg | the others' time as a multiple of it |\n|---|---:|---|"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->"


def newest() -> dict[tuple, list[dict]]:
    """For each machine, op and case the last row of every candidate, ops in alphabetical order."""
    rows: dict[tuple, dict] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if "median_ms" in row:  # else it says what is wrong, or what a profiler counted
                rows[path.stem, row["op"], row["case"], row["candidate"]] = row
    cases: dict[tuple, list[dict]] = {}
    for (*case, _), row in rows.items():
        cases.setdefault(tuple(case), []).append(row)
    return dict(sorted(cases.items(), key=lambda item: item[0][:2]))


def time(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1e3:.3g} s"
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} µs"


def line(op: str, case: str, rows: list[dict]) -> str:
    """One case in one line: what ours takes, and the others as multiples of it."""
    ours = next(row for row in rows if row["ratio"] == 1)
    others = (f"{row['candidate']} **{row['ratio']:.3g}**" for row in rows if row is not ours)
    return f"| `{op}`, {case} | {time(ours['median_ms'])} | {', '.join(others)} |"


def table(op: str, case: str, rows: list[dict]) -> list[str]:
    """One case: a line for each candidate."""
    lines = [f"### `{op}`, {case}", ""]
    lines += ["| | median | p10 | p90 | time / ours | target | memory beside it |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        times = (time(row[f"{key}_ms"]) for key in ("median", "p10", "p90"))
        memory = "" if row["extra_mib"] is None else f"{row['extra_mib']:.3g} MiB"
        if target := row.get("memory_target"):  # which older rows do not have
            memory += f" (target {target})"
        cells = row["candidate"], *times, f"{row['ratio']:.2f}", row["target"], memory
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def write() -> None:
    """Replaces the table of README.md, and bench/results/README.md."""
    short: list[str] = []
    full = ["# Every case, newest rows", "", "Written by `python -m bench --readme`.", ""]
    machine = None
    for (where, op, case), rows in newest().items():
        if where != machine:
            full += [f"## {where}", ""]
            short += ["", *HEADER.format(where).splitlines()]
            machine = where
        full += table(op, case, rows)
        if op not in ("overhead", "hardware"):
            short.append(line(op, case, rows))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + "\n".join(short[1:]) + "\n" + END + after)
    (RESULTS / "README.md").write_text("\n".join(full).rstrip() + "\n")
