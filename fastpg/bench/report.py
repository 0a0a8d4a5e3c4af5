"""Rows as a table, as three sentences, and as CSV."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from .problem import COMPILED, OURS, PLAIN
from .running import Row
from .torture import RIGHT

TEXTS = (
    "suite", "op", "case", "candidate", "wrong", "verdict", "left_out", "unit",
    "note", "machine", "device", "fastpg", "commit", "torch", "python", "extension", "date",
)  # fmt: skip
NAMES = TEXTS[:4]
NUMBERS = (
    "median_ms", "p10_ms", "p90_ms", "ratio", "extra_mib", "value_error", "gradient_error",
    "exponent", "memory_exponent", "rate", "bytes", "operations", "threads", "load",
)  # fmt: skip
NOISE = 1.05  # Less of a difference is none.
TIMED = ("token_logprobs", "linear", "gae", "losses", "step")  # suites of usual sizes
LINE = "{:60.60} {:>8} {:>8} {:>9} {:>11}  {}"
HEADER = LINE.format("", "fastpg", "PyTorch", "MiB", "error", "others")
OF_PAIR = "in both columns: fastpg / PyTorch; times of the others are multiples of fastpg's"


def time_text(ms: float) -> str:
    """A time in the unit that suits it."""
    if ms >= 1000:
        return f"{ms / 1e3:.3g} s"
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{ms * 1e3:.3g} µs"


def lines(rows: list[Row]) -> list[str]:
    """The rows of a case as lines of the terminal."""
    row = rows[0]
    title = ", ".join(part for part in (row["op"], row["case"]) if part)
    if "verdict" in row:
        return [verdict_line(title, rows)]
    if "exponent" in row:
        return [growth_line(title, row)]
    by_name = {row["candidate"]: row for row in rows if "median_ms" in row}
    wrong = [f"{row['candidate']} WRONG ({row['wrong']})" for row in rows if "wrong" in row]
    if OURS not in by_name:
        return [f"{title:60.60} {'; '.join(wrong)}"]
    ours, plain = by_name.pop(OURS), by_name.pop(PLAIN, {})
    others = [f"{name} {multiple(row)}" for name, row in by_name.items()]
    cells = [
        time_text(ours["median_ms"]),
        multiple(plain),
        pair(ours, plain, mib_text),
        pair(ours, plain, error_text),
        ", ".join(others + wrong),
    ]
    faster = [row for row in (plain, *by_name.values()) if row.get("ratio", 1.0) < 1.0]
    note = [f"  {'':58} {row['note']}" for row in rows[:1] if faster and row.get("note")]
    return [LINE.format(title, *cells).rstrip(), *note]


def multiple(row: Row) -> str:
    """The time of another candidate as a multiple of ours."""
    return f"{row['ratio']:.3g}x" if "ratio" in row else "-"


def pair(ours: Row, plain: Row, text: Callable[[Row], str]) -> str:
    """The same of both."""
    return f"{text(ours)}/{text(plain)}"


def mib_text(row: Row) -> str:
    """Memory beside the inputs and results."""
    mib = row.get("extra_mib")
    return "-" if mib is None else f"{mib:.0f}"


def error_text(row: Row) -> str:
    """The larger error."""
    error = worst_error(row)
    return "-" if math.isnan(error) else f"{error:.0e}".replace("e-0", "e-")


def verdict_line(title: str, rows: list[Row]) -> str:
    """Who is right on a hard input, and who is not."""
    right = [row["candidate"] for row in rows if row["verdict"] == RIGHT]
    wrong = [f"{row['candidate']} ({row['verdict']})" for row in rows if row["verdict"] != RIGHT]
    groups = [("right", right), ("WRONG", wrong)]
    told = "; ".join(f"{word}: {', '.join(names)}" for word, names in groups if names)
    return f"{title:60.60} {told}"


def growth_line(title: str, row: Row) -> str:
    """How time and memory grow."""
    letter = row["case"].split(" ")[0]
    told = f"{row['candidate']}'s time grows as {letter}^{row['exponent']:.2f}"
    if "memory_exponent" in row:
        told += f", its memory as {letter}^{row['memory_exponent']:.2f}"
    return f"{title:60.60} {time_text(row['median_ms']):>8}  {told}"


def worst_error(row: Row) -> float:
    """The larger error of a row; NaN where none was taken."""
    found = [row[key] for key in ("value_error", "gradient_error") if row.get(key) is not None]
    return max((x for x in found if not math.isnan(x)), default=math.nan)


def summaries(rows: list[Row]) -> list[str]:
    """For each candidate, on how many hard inputs it is right: a line."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["candidate"], []).append(row)
    found = []
    for candidate, group in groups.items():
        bad = [row["case"] for row in group if row["verdict"] != RIGHT]
        text = f"right on {len(group) - len(bad)} of {len(group)}"
        text += f"; wrong: {', '.join(dict.fromkeys(bad))}" if bad else ""
        found.append(f"{'hard inputs, ' + candidate:60.60} {text}")
    return found


def sentences(rows: list[Row], *, quick: bool) -> list[str]:
    """What the rows say, to someone who has not read them."""
    found = [speed(rows), quality(rows), absences(rows, quick=quick)]
    return [sentence for sentence in found if sentence]


def speed(rows: list[Row]) -> str:
    """How much faster than plain PyTorch, and where anything is faster."""
    usual = [row for row in rows if row["suite"] in TIMED and row.get("ratio") is not None]
    plain = [row["ratio"] for row in usual if row["candidate"] == PLAIN]
    if not plain:
        return ""
    faster = [
        row for row in usual if row["ratio"] < 1 / NOISE and not row["candidate"].startswith(OURS)
    ]
    wins = sum(ratio > 1 for ratio in plain)
    text = (
        f"On this machine fastpg takes less time than the lines people write in PyTorch in {wins} "
        f"of {len(plain)} cases: their time is {min(plain):.3g} to {max(plain):.3g} times ours, "
        f"{statistics.median(plain):.3g} in the middle"
    )
    if faster:
        named = (f"{r['candidate']} at {r['op']}, {r['case']} ({r['ratio']:.2f})" for r in faster)
        return f"{text}; faster than fastpg is {'; '.join(named)}."
    return f"{text}; nothing that was timed here is faster by more than 5 %."


def quality(rows: list[Row]) -> str:
    """Errors, hard inputs and growth, as far as they were looked at."""
    parts = []
    errors = [worst_error(row) for row in rows if row.get("candidate") == OURS]
    errors = [error for error in errors if not math.isnan(error)]
    if errors:
        parts.append(f"its largest error against double precision is {max(errors):.0e}")
    for name in (OURS, PLAIN):
        verdicts = [r["verdict"] for r in rows if r.get("verdict") and r["candidate"] == name]
        if verdicts:
            subject = "it" if name == OURS else "plain PyTorch"
            parts.append(
                f"{subject} is right on {verdicts.count(RIGHT)} of {len(verdicts)} hard inputs"
            )
    grown = [r for r in rows if r.get("exponent") and not r["case"].startswith("threads")]
    exponents = [row["exponent"] for row in grown if row["candidate"] == OURS]
    if exponents:
        low, high = min(exponents), max(exponents)
        parts.append(f"twice the work takes {2**low:.2f} to {2**high:.2f} times as long")
    text = ", ".join(parts[:-1]) + (" and " if parts[:-1] else "") + parts[-1] if parts else ""
    return text[:1].upper() + text[1:] + "." if text else ""


def absences(rows: list[Row], *, quick: bool) -> str:
    """What is nowhere in the rows. A peer that has one op and not another is there."""
    present = {row["candidate"] for row in rows if not row.get("left_out")}
    names = sorted({row["candidate"] for row in rows if row.get("left_out")} - present)
    text = f"Not timed, for a reason each: {', '.join(names)}" if names else ""
    if quick:
        compiled = f"{COMPILED} is left out, as it compiles for longer than this run takes"
        text = f"{text}; {compiled}" if text else compiled[:1].upper() + compiled[1:]
        text += ": `fastpg bench`, without --quick, times it too"
    return f"{text}." if text else ""


def absent(rows: Iterable[Row]) -> list[str]:
    """A line for each reason, with the packages that it keeps out."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("left_out"):
            reasons.setdefault(reason, []).append(row["candidate"])
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def write_csv(rows: list[Row], path: Path) -> None:
    """Writes every row, with all that it depends on."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*TEXTS, *NUMBERS], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file; what is empty there is left out, except for what names a row."""
    with open(path, newline="") as file:
        return [
            {k: float(v) if k in NUMBERS else v for k, v in row.items() if v != "" or k in NAMES}
            for row in csv.DictReader(file)
        ]
