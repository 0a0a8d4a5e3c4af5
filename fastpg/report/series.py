"""Curves: their running means, and fewer points of those that have too many to be drawn."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from fastpg.report.run import Point

MAX_POINTS = 400
"""A curve is drawn with so many points at most: there are no more pixels."""


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it, `window` at most."""
    sums = [0.0, *accumulate(values)]
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def smoothing_window(count: int) -> int:
    """Return how many of `count` steps a running mean takes: a tenth of them."""
    return max(1, count // 10)


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return the lowest and the highest of every few points, if there are more than `MAX_POINTS`.

    The curve through them covers the same range as that through all points.
    """
    if len(points) <= MAX_POINTS:
        return list(points)
    bins = MAX_POINTS // 2
    edges = [len(points) * i // bins for i in range(bins + 1)]
    kept = []
    for i, j in pairwise(edges):
        ends = {min(points[i:j], key=_value), max(points[i:j], key=_value)}
        kept += sorted(ends)
    return kept


def _value(point: Point) -> float:
    return point.value
