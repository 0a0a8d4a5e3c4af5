"""The curves of the page: where their points are, and the numbers beside them."""

import math
import re
from itertools import pairwise

import pytest
from made_up_run import make_run, steps

from fastpg.report.chart import LEFT, LINE, draw
from fastpg.report.numbers import change, duration, number, percent, tick_texts, ticks
from fastpg.report.panels import PANELS, REWARD, panels_of
from fastpg.report.run import Point, Run
from fastpg.report.series import MAX_POINTS, running_mean, thinned

SHARE = next(panel for panel in PANELS if panel.is_share)
VARIANCE = next(panel for panel in PANELS if panel.floor is not None)


def chart_of(tmp_path, rows, panel=REWARD):
    return draw(panel, [Run.read(make_run(tmp_path / "out", rows))], [""], 400, 200)


def vertices(path):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path) if pair]


def value_at(chart, y):
    """The value at a height, read off the marks of the axis as a reader does."""
    low, high = chart.y_ticks[0], chart.y_ticks[-1]
    first, last = (float(t.text.replace("−", "-").rstrip("%")) for t in (low, high))
    return first + (y - low.at) / (high.at - low.at) * (last - first)


def test_a_curve_goes_through_its_values(tmp_path):
    chart = chart_of(tmp_path, steps(40))
    (curve,) = chart.curves
    rewards = [step / 10 for step in range(1, 41)]
    for path, values in ((curve.each, rewards), (curve.mean, running_mean(rewards, 4))):
        drawn = vertices(path)
        assert [value_at(chart, y) for _, y in drawn] == pytest.approx(values, abs=0.02)
        xs = [x for x, _ in drawn]
        assert [b - a for a, b in pairwise(xs)] == pytest.approx(
            [(xs[-1] - xs[0]) / 39] * 39, abs=0.11
        )
    assert curve.label == "3.85"
    assert value_at(chart, curve.label_y) == pytest.approx(3.85, abs=0.02)
    assert [value_at(chart, mark.y) for mark in curve.marks] == pytest.approx(
        [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4], abs=0.02
    )
    assert curve.marks[1].text == "evaluation after step 5: 0.500"
    assert chart.x_ticks[-1] == (chart.right, "step 40")


def test_a_value_that_is_not_finite_is_a_gap(tmp_path):
    rows = steps(30)
    for step, value in ((10, math.nan), (11, None), (20, math.inf), (30, "1.0")):
        rows[step]["reward/mean"] = value
    del rows[25]["reward/mean"]
    (curve,) = chart_of(tmp_path, rows).curves
    pieces = [vertices(piece) for piece in curve.each.split("M") if piece]
    assert [len(piece) for piece in pieces] == [9, 8, 4, 4]
    assert curve.mean.count("M") == 1
    assert curve.label == "2.85"  # of steps 28 and 29


def test_a_lone_value_is_a_dot_and_none_is_said(tmp_path):
    rows = [{"step": step, "reward/mean": 2.0 if step == 2 else math.nan} for step in (1, 2, 3)]
    (curve,) = chart_of(tmp_path / "lone", rows).curves
    first, second = vertices(curve.mean)
    assert first == second
    none = [{"step": 1, "reward/mean": math.nan}]
    assert chart_of(tmp_path / "none", none).curves == []


def test_a_share_has_a_percent_sign_and_ends_at_all(tmp_path):
    rows = [{"step": step, "reward/mean": 0.0, SHARE.metric: step / 10} for step in range(11)]
    chart = chart_of(tmp_path, rows, SHARE)
    assert [tick.text for tick in chart.y_ticks] == ["0%", "25%", "50%", "75%", "100%"]
    assert chart.curves[0].label == "100%"


def test_values_below_the_floor_are_drawn_at_it(tmp_path):
    values = [-40.0, -1.0, 0.0, 0.5]
    rows = [{"step": i, "reward/mean": 0.0, VARIANCE.metric: x} for i, x in enumerate(values)]
    chart = chart_of(tmp_path, rows, VARIANCE)
    heights = [y for _, y in vertices(chart.curves[0].mean)]
    assert heights[0] == heights[1] == chart.height - chart.bottom
    assert heights[1] > heights[2] > heights[3]


def test_labels_do_not_cover_each_other_and_stay_in_the_picture(tmp_path):
    runs = [
        Run.read(make_run(tmp_path / str(i), [{"step": 1, "reward/mean": value}]))
        for i, value in enumerate([1.0, 1.0, 1.01, 0.0, 0.001, 0.5, 1.0])
    ]
    chart = draw(REWARD, runs, list("ABCDEFG"), 400, 200)
    heights = sorted(curve.label_y for curve in chart.curves)
    assert all(b - a >= LINE for a, b in pairwise(heights))
    assert heights[0] >= chart.top and heights[-1] <= chart.height - chart.bottom
    for better, worse in ((0, 5), (5, 3)):
        assert chart.curves[better].label_y < chart.curves[worse].label_y


def test_several_rewards_have_pictures_and_one_has_not(tmp_path):
    one = Run.read(make_run(tmp_path / "one", steps(**{"rewards/a/mean": 1.0})))
    more = {"rewards/a/mean": 1.0, "rewards/b/mean": 2.0}
    two = Run.read(make_run(tmp_path / "two", steps(**more)))
    assert [panel.title for panel in panels_of([one])] == ["KL to the start"]
    assert [panel.title for panel in panels_of([one, two])] == ["a", "b", "KL to the start"]


def test_a_running_mean_looks_back():
    assert running_mean([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    assert running_mean([1, 2], 1) == [1, 2]


def test_a_thinned_curve_keeps_its_extremes_and_its_order():
    points = [Point(step, math.sin(step / 7) + (step == 777) * 9) for step in range(5000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS
    assert kept == sorted(kept) and {*kept} < {*points}
    for extreme in (max, min):
        value = extreme(point.value for point in points)
        assert value in [point.value for point in kept]
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


@pytest.mark.parametrize("low", [0.0, -1.0, 0.93, 1e-9, -700.0])
@pytest.mark.parametrize("size", [1e-3, 0.31, 1.0, 4.999, 80.0, 3e9])
def test_ticks_are_round_even_and_inside(low, size):
    marks = ticks(low, low + size, 4)
    assert 2 <= len(marks) <= 6
    assert low - 1e-6 * size <= marks[0] and marks[-1] <= low + size * (1 + 1e-6)
    gap = marks[1] - marks[0]
    assert [b - a for a, b in pairwise(marks)] == pytest.approx([gap] * (len(marks) - 1), rel=1e-3)
    assert f"{gap:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")
    assert len({*tick_texts(marks)}) == len(marks)


def test_steps_have_whole_ticks():
    assert ticks(0, 2, 6, whole=True) == [0, 1, 2]
    assert ticks(0, 1, 6, whole=True) == [0, 1]


def test_numbers_have_few_digits_and_a_minus_sign():
    values = [0.0, 0.12345, 1.2345, 12.345, 123.45, 12345.6, 1.5e7, -0.5, 1e-6, -2.5e-4]
    assert [number(value) for value in values] == [
        "0.000", "0.123", "1.23", "12.3", "123", "12,346", "1.5e7", "−0.500", "1.0e−6", "−2.5e−4",
    ]  # fmt: skip
    assert [percent(x) for x in (0.0, 0.0123, 0.5, 1.0)] == ["0%", "1.2%", "50%", "100%"]
    assert [change(x) for x in (0.5, -0.5, 0.0)] == ["+0.500", "−0.500", "0.000"]
    assert [duration(s) for s in (0.25, 59.4, 61, 7265)] == [
        "0.2 s", "59 s", "1 min 01 s", "2 h 01 min",
    ]  # fmt: skip
    assert tick_texts([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_texts([-1.0, 0.0, 1.0]) == ["−1", "0", "1"]
    assert tick_texts([0.0, 50_000.0, 100_000.0]) == ["0k", "50k", "100k"]
    assert tick_texts([1200.0, 1400.0]) == ["1,200", "1,400"]
    assert tick_texts([0.0, 0.005, 0.01], share=True) == ["0.0%", "0.5%", "1.0%"]
    assert tick_texts([0.0, 2e-5, 4e-5]) == ["0", "2.0e−5", "4.0e−5"]


def test_there_is_room_for_the_marks_of_the_axis(tmp_path):
    chart = chart_of(tmp_path, steps())
    assert all(x >= LEFT for x, _ in vertices(chart.curves[0].mean))
