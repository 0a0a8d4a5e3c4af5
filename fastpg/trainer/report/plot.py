"""The plot of a run: reward and evaluations, and below them the KL, if there is one."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastpg.report.series import running_mean, smoothing_window


def training_plot(
    title: str, steps: Sequence[dict[str, Any]], evaluations: Sequence[tuple[int, float]]
) -> Figure:
    """Draw what a run has learned.

    Args:
        title: The title.
        steps: The metrics of each step, and its number as "step".
        evaluations: The steps after which there was an evaluation, and its mean reward.

    Returns:
        The figure.
    """
    steps = [row for row in steps if "reward/mean" in row]
    has_kl = any("objective/kl" in row for row in steps)
    # A Figure of its own, without pyplot, needs no display and stays out of global state.
    figure = Figure(figsize=(7, 6 if has_kl else 4), layout="tight")
    ratios = [2, 1] if has_kl else [1]
    axes = figure.subplots(len(ratios), squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
    # A directory with two dollar signs is no formula.
    axes[0].set_title(title, parse_math=False)
    axes[0].set(ylabel="mean reward")
    _draw(axes[0], steps, "reward/mean", "tab:blue")
    numbers, rewards = zip(*evaluations, strict=True)
    axes[0].plot(numbers, rewards, "o", color="tab:green", label="evaluation")
    axes[0].legend()
    if has_kl:
        axes[1].set(ylabel="KL to the start,\nnats per completion")
        _draw(axes[1], steps, "objective/kl", "tab:orange")
        axes[1].legend()
    axes[-1].set(xlabel="step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw(axes: Axes, steps: Sequence[dict[str, Any]], metric: str, color: str) -> None:
    """Draw a metric pale, and its running mean."""
    known = [row for row in steps if math.isfinite(row.get(metric, math.nan))]
    numbers = [row["step"] for row in known]
    values = [row[metric] for row in known]
    window = smoothing_window(len(values))
    pale = 1.0 if window == 1 else 0.3
    axes.plot(numbers, values, color=color, alpha=pale, label="each step")
    if window > 1:
        label = f"mean of {window} steps"
        axes.plot(numbers, running_mean(values, window), color=color, label=label)
