"""A picture of curves as coordinates, which the template draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastpg.report.numbers import number, percent, tick_texts, ticks
from fastpg.report.panels import Panel
from fastpg.report.run import Point, Run
from fastpg.report.series import running_mean, smoothing_window, thinned

LEFT, TOP, BOTTOM = 46, 12, 24  # room for the marks of the axes
LETTER = 7.8  # the width of a letter of a label
LINE = 14  # the height of a label
LABEL = len("−0.123")  # pictures whose labels have no more letters are aligned with each other


class Tick(NamedTuple):
    """A mark of an axis: where it is, and what it says."""

    at: float
    text: str


class Mark(NamedTuple):
    """An evaluation in a picture, and what it says when it is pointed at."""

    x: float
    y: float
    text: str


class Curve(NamedTuple):
    """A run in a picture.

    Args:
        run: The number of the run, from 0.
        each: The path through the values of each step; empty if `mean` is that.
        mean: The path through their running mean.
        marks: The evaluations.
        label: What is written at its end.
        label_y: Where it is written.
        end: The end of the curve, from which a line leads to the label.
    """

    run: int
    each: str
    mean: str
    marks: list[Mark]
    label: str
    label_y: float
    end: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A picture.

    Args:
        panel: What it shows.
        width: Its width, in units of about a pixel.
        height: Its height.
        right: Where the curves end.
        x_ticks: The marks of the axis of steps.
        y_ticks: The marks of the axis of values; empty if there is no value.
        curves: The runs that have values.
    """

    panel: Panel
    width: int
    height: int
    right: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    left: int = LEFT
    top: int = TOP
    bottom: int = BOTTOM


@dataclass(frozen=True)
class _Scale:
    """Turns a number into a coordinate."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def draw(panel: Panel, runs: Sequence[Run], names: Sequence[str], width: int, height: int) -> Chart:
    """Lay out a picture.

    Args:
        panel: What it shows.
        runs: The runs.
        names: What the labels call each of them; empty for a single run, which needs no name.
        width: The width of the picture.
        height: Its height.
    """
    ends = [_last_mean(run.known(panel.metric) or run.known(panel.evaluated)) for run in runs]
    write = percent if panel.is_share else number
    labels = [
        "" if end is None else f"{name} {write(end)}".strip()
        for end, name in zip(ends, names, strict=True)
    ]
    right = width - 12 - LETTER * max(LABEL + len(names[0]), *map(len, labels))
    values = [
        max(point.value, panel.floor) if panel.floor is not None else point.value
        for run in runs
        for metric in (panel.metric, panel.evaluated)
        for point in run.known(metric)
    ]
    first, last = min(run.rows[0]["step"] for run in runs), max(run.last_step for run in runs)
    # A single step is at the beginning of an axis that goes on to the next one.
    x = _Scale(first, max(last, first + 1), LEFT + 6, right)
    low, high = _range(values, panel)
    y = _Scale(low, high, height - BOTTOM, TOP)
    y_values = ticks(low, high, 4)
    y_texts = tick_texts(y_values, share=panel.is_share)
    curves = [
        _curve(panel, i, run, label, end, x, y)
        for i, (run, label, end) in enumerate(zip(runs, labels, ends, strict=True))
        if end is not None
    ]
    return Chart(
        panel=panel,
        width=width,
        height=height,
        right=right,
        x_ticks=_step_ticks(x, last, int((right - LEFT) / 90)),
        y_ticks=[Tick(y(v), text) for v, text in zip(y_values, y_texts, strict=True)],
        curves=_apart(curves, TOP, height - BOTTOM),
    )


def _range(values: list[float], panel: Panel) -> tuple[float, float]:
    """Return the lowest and the highest value of an axis, with some air between."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if low == high:
        air = abs(low) / 2 or 0.5
        return (low, low + air) if low == 0 else (low - air, high + air)
    # An axis of what cannot be negative begins at 0, unless all of it is far from there.
    if 0 <= low < 0.5 * high:
        low = 0.0
    air = 0.06 * (high - low)
    bottom, top = low - (air if low else 0.0), high + air
    # No share is more than all.
    if panel.is_share and high <= 1:
        top = min(top, 1.0)
    return bottom if panel.floor is None else max(bottom, panel.floor), top


def _step_ticks(x: _Scale, last: int, count: int) -> list[Tick]:
    """Return round steps and the last one, which names the axis."""
    end = Tick(x(last), f"step {last:,}")
    values = ticks(x.low, x.high, max(1, count), whole=True)
    marks = [Tick(x(v), text) for v, text in zip(values, tick_texts(values), strict=True)]
    # A mark any closer would run into the words of the last one, which end there.
    free = end.at - LETTER * (len(end.text) + 2)
    return [*(mark for mark in marks if mark.at < free), end]


def _last_mean(points: list[Point]) -> float | None:
    """Return the mean of the last points, where the curve ends."""
    window = smoothing_window(len(points))
    last = [point.value for point in points[-window:]]
    return sum(last) / len(last) if last else None


def _curve(
    panel: Panel, index: int, run: Run, label: str, end: float, x: _Scale, y: _Scale
) -> Curve:
    known = run.known(panel.metric)
    window = smoothing_window(len(known))
    means = running_mean([point.value for point in known], window)
    smooth = [Point(point.step, mean) for point, mean in zip(known, means, strict=True)]
    write = percent if panel.is_share else number
    return Curve(
        run=index,
        each=_path(run.points(panel.metric), x, y) if window > 1 else "",
        mean=_path(smooth if window > 1 else run.points(panel.metric), x, y),
        marks=[
            Mark(x(step), y(value), f"evaluation after step {step}: {write(value)}")
            for step, value in thinned(run.known(panel.evaluated))
        ],
        label=label,
        label_y=y(end),
        end=(x(smooth[-1].step if smooth else run.last_step), y(end)),
    )


def _path(points: Sequence[Point], x: _Scale, y: _Scale) -> str:
    """Return the path through points, with a gap at each that has no value."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.value):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in filter(None, pieces):
        coordinates = [f"{x(step)} {y(value)}" for step, value in thinned(piece)]
        # A line of no length is a dot, by its round ends.
        drawn.append("M" + "L".join(coordinates if len(coordinates) > 1 else coordinates * 2))
    return "".join(drawn)


def _apart(curves: list[Curve], top: float, bottom: float) -> list[Curve]:
    """Move labels that would cover each other, in the order of their heights."""
    order = sorted(range(len(curves)), key=lambda i: curves[i].label_y)
    heights = {}
    free = top
    for i in order:
        heights[i] = free = max(curves[i].label_y, free)
        free += LINE
    # What has come too low pushes the others up again.
    room = bottom
    for i in reversed(order):
        heights[i] = room = min(heights[i], room)
        room -= LINE
    return [curve._replace(label_y=heights[i]) for i, curve in enumerate(curves)]
