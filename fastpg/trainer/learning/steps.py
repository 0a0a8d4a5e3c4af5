"""The optimiser steps on a rollout, and the metrics of them all."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fastpg
from fastpg.trainer.rewards.episodes import Episodes


class Step(NamedTuple):
    """One optimiser step: the statistics of its parts, and the norm of its gradient."""

    policy_stats: list[fastpg.PolicyStats]
    value_stats: list[fastpg.ValueStats]  # empty without a critic
    kl: Tensor  # 0-d, the sum of k1 to the reference; 0 without one
    grad_norm: Tensor  # 0-d, before clipping


def step_metrics(steps: Sequence[Step], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Merge the statistics of the steps on a rollout into numbers.

    Args:
        steps: At least one step.
        group: The processes whose steps they are. None: this one's.

    Returns:
        Metrics over all steps and processes, by name.
    """
    # A ratio of the first step that is not 1 shows that sampling and training disagree.
    first = fastpg.merge_stats(steps[0].policy_stats, process_group=group)
    policy = fastpg.merge_stats(
        [part for step in steps for part in step.policy_stats], process_group=group
    )
    metrics = {f"policy/{name}": value for name, value in policy.items()}
    # A loss is a sum over the parts of a step, so its mean is over steps and not over parts.
    metrics["policy/loss"] = policy["loss"] / len(steps)
    metrics["policy/clip_frac"] = policy["clip_frac_low"] + policy["clip_frac_high"]
    deviation = max(first["ratio_max"] - 1, 1 - first["ratio_min"])
    metrics["policy/first_ratio_deviation"] = deviation
    metrics["grad_norm"] = torch.stack([step.grad_norm for step in steps]).mean().item()
    value_stats = [part for step in steps for part in step.value_stats]
    if value_stats:
        value = fastpg.merge_stats(value_stats, process_group=group)
        metrics["value/loss"] = value["loss"] / len(steps)
        metrics["value/clip_frac"] = value["clip_frac"]
    return metrics


def pace_metrics(seconds: Mapping[str, float], episodes: Episodes) -> dict[str, float]:
    """Say how fast a step was.

    Args:
        seconds: The seconds of each of its phases.
        episodes: The episodes of all processes.

    Returns:
        Metrics by name: tokens per second, and seconds.
    """
    total = sum(seconds.values())
    metrics = {"tokens_per_second": episodes.lengths.sum().item() / total, "time/step": total}
    return metrics | {f"time/{phase}": value for phase, value in seconds.items()}
