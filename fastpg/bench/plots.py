"""Rows as pictures: how much longer the others take, and a roofline.

The pictures have no background: their grey text reads on white paper and on a dark page alike, and
hatches and hollow marks tell apart in print what colours do on a screen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fastpg

from .problem import COMPILED, OURS, PLAIN
from .report import TIMED
from .running import Row

GREY = "#7d8590"  # 3.8 : 1 and more against white and against #0d1117
STYLES = {PLAIN: ("#e08a1e", ""), COMPILED: ("#4f8fea", "//"), "another package": ("#a371f7", "..")}
WIDTH = 6.0  # inches: on a telephone the text is still read
MARKS = "os^Dvph*<>XP"


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draw what there are rows for.

    Args:
        rows: Of `fastpg bench`.
        folder: Where PNG and SVG go; it is made if need be.

    Returns:
        The files.
    """
    with style():
        figures = {"speed": speed(rows), "roofline": roofline(rows)}
        return saved(figures, folder, ("png", "svg"))


def draw_ops(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the bars of each op alone.

    Args:
        rows: Of `fastpg bench`.
        folder: Where <op>.svg go; it is made if need be.

    Returns:
        The files.
    """
    ops = dict.fromkeys(op for op, _ in cases(rows) if hasattr(fastpg, op))  # a step is none
    with style():
        figures = {op: speed([row for row in rows if row["op"] == op]) for op in ops}
        return saved(figures, folder, ("svg",))


def style() -> AbstractContextManager[None]:
    """How the figures look that are made and saved in a with block."""
    import matplotlib

    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    # A salt makes the same rows the same file, byte for byte.
    other = {
        "svg.hashsalt": "fastpg",
        "font.size": "9.5",
        "figure.titlesize": "10",
        "hatch.linewidth": "0.6",
    }
    settings: Any = dict.fromkeys(grey, GREY) | other
    return matplotlib.rc_context(settings)


def saved(figures: dict[str, Any], folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Writes the figures that there are under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        for suffix in suffixes if figure else ():
            path = folder / f"{name}.{suffix}"
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(path, transparent=True, dpi=160, metadata=metadata)
            written.append(path)
    return written


def cases(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The timed rows of usual sizes, by op and case."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get("suite") in TIMED and row.get("ratio") is not None:
            found.setdefault((row["op"], row["case"]), []).append(row)
    return found


def shown(group: list[Row]) -> Iterator[tuple[str, Row]]:
    """The bars of a case: plain PyTorch, torch.compile, and the fastest other package."""
    by_name = {row["candidate"]: row for row in group}
    for name in (PLAIN, COMPILED):
        if name in by_name:
            yield name, by_name[name]
    others = [row for row in group if not row["candidate"].startswith((OURS, PLAIN, COMPILED))]
    if others:
        yield "another package", min(others, key=lambda row: row["ratio"])


def shown_ratio(row: Row) -> str:
    """Two digits, or all before the point."""
    return f"{row['ratio']:.2g}" if row["ratio"] < 99.5 else f"{row['ratio']:.0f}"


def speed(rows: list[Row]) -> Any:
    """Bars: the time of the others as a multiple of fastpg's; None where there are no rows."""
    from matplotlib.figure import Figure

    groups = {case: list(shown(group)) for case, group in cases(rows).items()}
    groups = {case: group for case, group in groups.items() if group}
    if not groups:
        return None
    height = 1.2 + 0.24 * sum(len(group) + 1.5 for group in groups.values())
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    at, seen = 0.0, set()
    for (op, case), group in groups.items():
        axes.text(0.01, at, f"{op}, {case}", transform=axes.get_yaxis_transform(), va="center")
        axes.vlines(1, at + 0.5, at + len(group) + 0.5, color=GREY, linewidth=1.5)
        for kind, row in group:
            at += 1
            draw_bar(axes, at, kind, row, labelled=kind not in seen)
            seen.add(kind)
        at += 1.5
    axes.set_ylim(at - 0.8, -0.8)
    finish_bars(axes, max(row["ratio"] for group in groups.values() for _, row in group))
    figure.suptitle(f"Time as a multiple of fastpg's: longer is slower\n{where(rows)}")
    return figure


def draw_bar(axes: Any, at: float, kind: str, row: Row, *, labelled: bool) -> None:
    """A bar from 1 to the ratio, its number, and for another package its name."""
    colour, hatch = STYLES[kind]
    style = {"color": colour, "hatch": hatch, "edgecolor": GREY}
    axes.barh(at, row["ratio"] - 1, 0.85, 1, label=kind if labelled else None, **style)
    name = f"  {row['candidate']}" if kind == "another package" else ""
    right = max(row["ratio"], 1.0) * 1.06
    axes.text(right, at, f"{shown_ratio(row)}×{name}", va="center")


def finish_bars(axes: Any, largest: float) -> None:
    """The scale and the legend."""
    axes.set_xscale("log")
    axes.set_xlim(0.5, largest * 4)
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= largest * 2]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.set_yticks([])
    axes.minorticks_off()
    axes.figure.legend(loc="outside lower center", framealpha=0, ncols=3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def roofline(rows: list[Row]) -> Any:
    """Operations a second over operations a byte; None where the roof was not measured."""
    from matplotlib.figure import Figure

    roof = {row["unit"]: row["rate"] for row in rows if row.get("rate")}
    groups = {case: g for case, g in cases(rows).items() if g[0].get("operations")}
    if not groups or set(roof) != {"GB/s", "GFLOP/s"}:
        return None
    figure = Figure(figsize=(WIDTH, 6), layout="constrained")
    axes = figure.subplots()
    intensities: list[float] = []
    named: set[str] = set()
    marks = dict(zip(dict.fromkeys(op for op, _ in groups), MARKS, strict=False))
    for (op, _), group in groups.items():
        for row in group:
            if row["candidate"] not in (OURS, PLAIN):
                continue
            intensity = row["operations"] / row["bytes"]
            ours = row["candidate"] == OURS
            axes.plot(
                intensity, row["operations"] / row["median_ms"] / 1e6, marks[op],
                color="#3fb950" if ours else STYLES[PLAIN][0],
                fillstyle="full" if ours else "none", markersize=9,
                label=op if ours and op not in named else None,
            )  # fmt: skip
            named.add(op)
            intensities.append(intensity)
    low, high = min(intensities) / 3, max(max(intensities), roof["GFLOP/s"] / roof["GB/s"]) * 4
    bend = roof["GFLOP/s"] / roof["GB/s"]
    axes.plot([low, bend, high], [low * roof["GB/s"], *[roof["GFLOP/s"]] * 2], color=GREY)
    axes.text(bend, roof["GFLOP/s"] * 1.15, f"{roof['GFLOP/s']:.3g} GFLOP/s of matrix products")
    axes.text(low * 1.1, low * roof["GB/s"] * 1.6, f"{roof['GB/s']:.3g} GB/s read", rotation=35)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that has to be moved",
             ylabel="billions of operations a second")  # fmt: skip
    figure.legend(loc="outside lower center", framealpha=0, ncols=2)
    figure.suptitle(f"Full: fastpg. Hollow: plain PyTorch. Line: this machine\n{where(rows)}")
    return figure


def where(rows: list[Row]) -> str:
    """The machine and the version of torch."""
    row = next(row for row in rows if row.get("machine"))
    return f"{row['machine'].replace('-', ' ')}, torch {row['torch']}"
