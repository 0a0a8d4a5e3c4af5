"""The curves of the page: which metric each shows, and what it says."""

from collections.abc import Sequence
from typing import NamedTuple

from fastpg.report.run import Run


class Panel(NamedTuple):
    """A picture with a curve of each run.

    Args:
        title: Its title.
        metric: The metric of the steps.
        meaning: What the metric says, in a few words.
        is_share: Whether it is a share, which is written as a percentage.
        floor: Lower values are drawn at this one. None: there is no floor.
    """

    title: str
    metric: str
    meaning: str
    is_share: bool = False
    floor: float | None = None

    @property
    def evaluated(self) -> str:
        """The metric of evaluations that is marked beside the curve."""
        return f"eval/{self.metric}"


REWARD = Panel("Reward", "reward/mean", "Mean score of a step's completions.")
PANELS = (
    Panel(
        "KL to the start", "objective/kl",
        "How far the policy has gone from the starting model, in nats per completion.",
    ),
    Panel(
        "Entropy", "policy/entropy",
        "Nats per token. Near 0 the policy has stopped trying anything else.",
    ),
    Panel(
        "Clipped", "policy/clip_frac",
        "Share of tokens whose ratio was held at the clip range.", is_share=True,
    ),
    Panel(
        "Explained variance", "value/explained_variance",
        "Of the returns, by the critic. 1 is perfect, 0 no better than a constant; what is below "
        "−1 is drawn at −1.", floor=-1.0,
    ),
    Panel("Completion length", "completions/mean_length", "Tokens, the EOS included."),
    Panel(
        "Finished", "completions/finished", "Share of completions with an EOS.", is_share=True
    ),
    Panel(
        "Distinct completions", "completions/distinct",
        "Share of different ones. Its fall is the first sign of a collapse.", is_share=True,
    ),
    Panel("Gradient norm", "grad_norm", "Before clipping, a mean over the optimiser steps."),
    Panel("Speed", "tokens_per_second", "Tokens of completions a second, all told."),
)  # fmt: skip


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels besides that of the reward: those of which a run has the metric.

    Args:
        runs: The runs. Where one has several reward functions, each has a panel.
    """
    metrics = {metric for run in runs for metric in run.metrics()}
    names = dict.fromkeys(
        metric for run in runs for metric in run.metrics() if metric.startswith("rewards/")
    )
    rewards = [
        Panel(
            metric.removeprefix("rewards/").removesuffix("/mean"),
            metric,
            "Mean of this reward function, unweighted.",
        )
        for metric in names
    ]
    # A single reward function is the reward itself.
    shown = rewards if len(rewards) > 1 else []
    return shown + [panel for panel in PANELS if panel.metric in metrics]
