"""Writes the committed rows into README.md, docs/benchmarks.md and the page beside the rows.

Rows of `fastpg bench` are bench/results/<machine>.csv; those of `python -m bench`, which have a
target each, are bench/results/<machine>.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fastpg.bench import report
from fastpg.bench.plots import draw, draw_ops
from fastpg.bench.problem import COMPILED, OURS, PLAIN
from fastpg.bench.report import TIMED, time_text
from fastpg.bench.running import Row
from fastpg.bench.torture import RIGHT

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
PLOTS = ROOT / "docs/plots"
BEGIN, END = "<!-- bench -->\n", "<!-- /bench -->"
IN_README = 12  # rows at most

# What an op computes, in plain words.
WORDS = {
    "token_logprobs": "log-probs from logits",
    "linear_token_logprobs": "log-probs from hidden states",
    "linear_token_loss": "loss from hidden states",
    "gae": "advantages (GAE)",
    "policy_loss": "PPO's loss",
    "value_loss": "the critic's loss",
    "kl_estimate": "KL to a reference",
    "whiten": "whitening",
    "step": "a whole training step",
}


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


def table(op: str, case: str, rows: list[dict]) -> list[str]:
    """One case: a line for each candidate."""
    lines = [f"### `{op}`, {case}", ""]
    lines += ["| | median | p10 | p90 | time / ours | target | memory beside it |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        times = (time_text(row[f"{key}_ms"]) for key in ("median", "p10", "p90"))
        memory = "" if row["extra_mib"] is None else f"{row['extra_mib']:.3g} MiB"
        if target := row.get("memory_target"):  # which older rows do not have
            memory += f" (target {target})"
        cells = row["candidate"], *times, f"{row['ratio']:.2f}", row["target"], memory
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page_of_targets() -> str:
    """Every case of `python -m bench`."""
    lines = ["# Every case, newest rows", "", "Written by `python -m bench --readme`.", ""]
    machine = None
    for (where, op, case), rows in newest().items():
        if where != machine:
            lines += [f"## {where}", ""]
            machine = where
        lines += table(op, case, rows)
    return "\n".join(lines).rstrip() + "\n"


def grouped(rows: list[Row], suites: tuple[str, ...]) -> list[list[Row]]:
    """The rows of some suites, by op and case."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.get("suite") in suites and row.get("op") != "hardware":
            found.setdefault((row["suite"], row["op"], row.get("case", "")), []).append(row)
    return list(found.values())


def where(rows: list[Row]) -> str:
    """What the rows were measured on and with."""
    row = next(row for row in rows if row.get("machine"))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return (
        f"`{row['machine']}`, torch {row['torch']}, Python {row['python']}, "
        f"fastpg at {commits}, {row['date']}"
    )


def in_words(group: list[Row]) -> str:
    """A case in one line of plain words."""
    by_name = {row["candidate"]: row for row in group if "ratio" in row}
    ours, plain = by_name[OURS], by_name[PLAIN]
    memory = f"{ours['extra_mib']:.0f} MiB in place of {plain['extra_mib']:.0f}"
    if plain["extra_mib"] < 1:
        memory = "none"
    cells = [
        f"{WORDS[ours['op']]}: {ours['case']}",
        time_text(ours["median_ms"]),
        *(compared(by_name.get(name)) for name in (PLAIN, COMPILED)),
        compared(best_other(group), named=True),
        memory,
    ]
    return f"| {' | '.join(cells)} |"


def best_other(group: list[Row]) -> Row | None:
    """The fastest candidate that is neither ours nor plain PyTorch nor torch.compile."""
    known = (OURS, PLAIN, COMPILED)
    others = [r for r in group if "ratio" in r and not r["candidate"].startswith(known)]
    return min(others, key=lambda row: row["ratio"], default=None)


def compared(row: Row | None, *, named: bool = False) -> str:
    """3.2x faster; or 1.1x slower, which is as plain."""
    if row is None:
        return ""
    ratio = row["ratio"]
    who = f" than {row['candidate']}" if named else ""
    if 1 / report.NOISE < ratio < report.NOISE:
        return f"as fast, {row['candidate']}" if named else "as fast"
    if ratio < 1:
        return f"**{1 / ratio:.2g}x slower**{who}"
    return f"{ratio:.2g}x faster{who}" if ratio < 99.5 else f"{ratio:.0f}x faster{who}"


def in_readme(groups: list[list[Row]]) -> list[list[Row]]:
    """The first case of each op in each direction."""
    chosen: dict[tuple, list[Row]] = {}
    for group in groups:
        row = group[0]
        backward = "fwd + bwd" in row["case"]
        if any("ratio" in r and r["candidate"] == PLAIN for r in group):
            chosen.setdefault((row["op"], backward), group)
    return list(chosen.values())[:IN_README]


def table_in_words(groups: list[list[Row]]) -> list[str]:
    """A line for each case."""
    titles = ("", "fastpg takes", "than PyTorch", f"than {COMPILED}", "than the best other")
    header = f"| {' | '.join([*titles, 'extra memory'])} |"
    table = [header, "|---|---:|---:|---:|---|---|", *map(in_words, groups)]
    return [*table, *(f"\n{text}" for group in groups for text in why_slower(group))]


def why_slower(group: list[Row]) -> Iterator[str]:
    """A sentence where anyone is faster than fastpg."""
    row = next(row for row in group if row["candidate"] == OURS)
    if any(r.get("ratio", 1.0) < 1 / report.NOISE for r in group):
        yield f"Slower at {WORDS[row['op']]}, {row['case']}: {row['note'].strip('()')}"


def verdicts(rows: list[Row]) -> list[str]:
    """Who is right on which hard input."""
    lines = ["| | right | wrong |", "|---|---|---|"]
    for group in grouped(rows, ("torture",)):
        right = ", ".join(r["candidate"] for r in group if r["verdict"] == RIGHT)
        wrong = ", ".join(
            f"{r['candidate']} ({r['verdict']})" for r in group if r["verdict"] != RIGHT
        )
        lines.append(f"| `{group[0]['op']}`, {group[0]['case']} | {right} | {wrong} |")
    return lines


def listed(rows: list[Row], suites: tuple[str, ...]) -> list[str]:
    """A line for each candidate of some suites."""
    lines = [
        "| | | median | p10 to p90 | time / ours | MiB | error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for group in grouped(rows, suites):
        for i, row in enumerate(group):
            title = "" if i else f"`{row['op']}`, {row['case']}"
            if "wrong" in row:
                lines.append(f"| {title} | {row['candidate']} | {row['wrong']} | | | | |")
                continue
            spread = " to ".join(time_text(row[f"{key}_ms"]) for key in ("p10", "p90"))
            error = report.error_text(row)
            mib = report.mib_text(row)
            cells = [title, row["candidate"], time_text(row["median_ms"]), spread]
            cells += [f"{row['ratio']:.2f}", mib, error]
            lines.append(f"| {' | '.join(cells)} |")
            slower = row["ratio"] < 1 and row.get("note")
            if slower:
                lines.append(f"| | {row['note']} | | | | | |")
    return lines


def growth(rows: list[Row]) -> list[str]:
    """A line for each size that grows."""
    lines = [
        "| | | time at the largest | time grows as | memory grows as |",
        "|---|---|---:|---:|---:|",
    ]
    for group in grouped(rows, ("scaling",)):
        for row in group:
            letter = row["case"].split(" ")[0]
            memory = f"{letter}^{row['memory_exponent']:.2f}" if "memory_exponent" in row else ""
            time = f"{letter}^{row['exponent']:.2f}"
            cells = f"`{row['op']}`, {row['case']}", row["candidate"], time_text(row["median_ms"])
            lines.append(f"| {' | '.join([*cells, time, memory])} |")
    return lines


def page_of_benchmarks(rows: list[Row]) -> list[str]:
    """All of a run."""
    sections = [
        ("Usual sizes", listed(rows, TIMED)),
        ("A call on almost nothing", listed(rows, ("overhead",))),
        ("Errors against double precision", listed(rows, ("accuracy",))),
        ("How it grows", growth(rows)),
        ("Who is right on hard inputs", verdicts(rows)),
    ]
    lines = [
        f"Measured on {where(rows)}.",
        *(f"\n{text}" for text in report.sentences(rows, quick=False)),
    ]
    for title, body in sections:
        lines += ["", f"## {title}", "", *body]
    lines += ["", "## Who was left out, and why", ""]
    return [*lines, *(f"- {line}" for line in report.absent(rows))]


def between(text: str, lines: list[str]) -> str:
    """A page with other lines between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def pages() -> dict[Path, str]:
    """What every generated page should say."""
    readme, benchmarks = ROOT / "README.md", ROOT / "docs/benchmarks.md"
    found = {RESULTS / "README.md": page_of_targets()}
    short, full = [], []
    for path in sorted(RESULTS.glob("*.csv")):
        rows = report.read_csv(path)
        short += [f"Measured on {where(rows)}:", ""]
        short += table_in_words(in_readme(grouped(rows, TIMED)))
        full += page_of_benchmarks(rows)
    found[readme] = between(readme.read_text(), short)
    found[benchmarks] = between(benchmarks.read_text(), full)
    return found


def write() -> None:
    """Replaces the generated pages, and draws the pictures."""
    for path, text in pages().items():
        path.write_text(text)
    for path in sorted(RESULTS.glob("*.csv")):
        rows = report.read_csv(path)
        draw(rows, PLOTS)
        draw_ops(rows, PLOTS / "ops")
