"""Writes the newest rows of bench/results/ into README.md, between the two `bench` comments."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->"


def newest() -> dict[tuple, dict]:
    """The last row of each machine, op, case and candidate, in the order of the files."""
    rows: dict[tuple, dict] = {}
    for path in sorted((ROOT / "bench/results").glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            rows[path.stem, row["op"], row["case"], row.get("candidate")] = row
    return rows


def table(title: str, rows: list[dict]) -> list[str]:
    """One case: a line for each candidate."""
    lines = [f"**{title}**", "", "| | median | time / fastpg's | target |", "|---|---:|---:|---:|"]
    for row in rows:
        ms = row["median_ms"]
        time = f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} µs"
        lines.append(f"| {row['candidate']} | {time} | {row['ratio']:.2f} | {row['target']} |")
    return [*lines, ""]


def write() -> None:
    """Replaces the tables."""
    cases: dict[tuple, list[dict]] = {}
    for (machine, op, case, _), row in newest().items():
        if "wrong" not in row:
            cases.setdefault((machine, op, case), []).append(row)
    lines: list[str] = []
    for (_, op, case), rows in cases.items():
        lines += table(f"`{op}`, {case}", rows)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + "\n".join(lines) + END + after)
