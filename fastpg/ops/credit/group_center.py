"""Scores relative to those of their group: the completions of one prompt.

With the n scores x of a group, their mean μ and s² = Σ (x − μ)² / (n − 1):

    baseline   centred                                       scale   y
    mean       x − μ                                         none    centred
    loo        x − (mean of the others) = n/(n − 1) (x − μ)  std     centred / (s + eps)
    none       x

A group of one has nothing to be compared with: its score stays as it is (centre 0, scale 1).

The mean is taken first, relative to the group's first score, so that equal ones are centred to 0;
then the squares of what is left, in fp64: never E[x²] − E[x]². There are a few scores for each
prompt, so the page has no kernel of its own: torch differentiates what it says.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..common import checks

BASELINES = ("mean", "loo", "none")
SCALES = ("none", "std")


class Groups(NamedTuple):
    """The group of each score."""

    key: Tensor  # int64 [B], in [0, B), equal where scores belong together
    first: Tensor  # int64 [B], the place of the first score of the group
    size: Tensor  # fp64 [B], the number of scores of the group


def groups_of(group: Tensor) -> Groups:
    """Brings any integers into the order in which groups can be added up."""
    ordered = group.sort(stable=True)
    # The key of a group is its first place in sorted order, and a stable sort puts its first score
    # there.
    key = torch.searchsorted(ordered.values, group.contiguous())
    size = group_sum(torch.ones(group.shape, dtype=torch.float64, device=group.device), key)
    return Groups(key, ordered.indices[key], size)


def group_sum(x: Tensor, key: Tensor) -> Tensor:
    """At each place, the sum of x over the places of the same key."""
    # Unlike index_add, index_put adds in a fixed order on the GPU too.
    return torch.zeros_like(x).index_put((key,), x, accumulate=True)[key]


def centred_and_scaled(x: Tensor, groups: Groups, baseline: str, scale: str, eps: float) -> Tensor:
    """The tables at the top of this page, in fp64."""
    alone, others = groups.size == 1, (groups.size - 1).clamp(min=1)
    # The shift is a constant and falls out of the centred scores, and so out of the gradient.
    shifted = x - x.detach()[groups.first]
    centred = shifted - group_sum(shifted, groups.key) / groups.size
    y = x
    if baseline != "none":
        factor = groups.size / others if baseline == "loo" else 1.0
        y = torch.where(alone, x, centred * factor)
    if scale == "std":
        variance = group_sum(centred.square(), groups.key) / others
        varies = variance > 0  # The root has no derivative at 0.
        spread = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
        y = torch.where(alone, y, y / (spread + eps))
    return y


def group_center(
    scores: Tensor,
    group: Tensor,
    *,
    baseline: Literal["mean", "loo", "none"] = "mean",
    scale: Literal["none", "std"] = "none",
    eps: float = 1e-6,
) -> Tensor:
    """Each score minus the baseline of its group, divided by the spread of the group if wanted.

    With the mean μ and the standard deviation s (of n − 1) of a group: (x − μ) / (s + eps) with
    baseline="mean" and scale="std".

    Args:
        scores: [B], such as the rewards of completions, of any float dtype; differentiable.
        group: [B] integers, equal where scores belong together, such as the number of the prompt;
            any numbers in any order.
        baseline: What is subtracted: "mean" the mean of the group, "loo" the mean of its other
            scores, "none" nothing.
        scale: What is divided by: "std" the standard deviation of the group, "none" nothing.
        eps: What is added to the standard deviation, finite and > 0.

    Returns:
        [B], fp32, or fp64 if scores are fp64. The score of a group of one stays as it is. No group
        shows in the results of another.

    Raises:
        TypeError: scores or group is no tensor, or has a dtype that it cannot have; eps is no
            number.
        ValueError: A shape or device does not fit, baseline or scale is unknown, or eps is not
            finite and > 0.

    Example:
        >>> scores, group = torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.tensor([0, 0, 1, 1])
        >>> fastpg.group_center(scores, group)
        tensor([ 0.5000, -0.5000, -2.5000,  2.5000])

    Reference:
        "mean" and "std": Shao et al. 2024 (GRPO), arXiv:2402.03300. "mean" alone: Liu et al. 2025
        (Dr. GRPO), arXiv:2503.20783. "loo": Kool et al. 2019, "Buy 4 REINFORCE samples, get a
        baseline for free!"; Ahmadian et al. 2024 (RLOO), arXiv:2402.14740.
    """
    op = "group_center"
    checks.check_tensors(op, scores=scores, group=group)
    dtype = checks.compute_dtype(op, scores=scores)
    if scores.dim() != 1:
        raise ValueError(f"{op}: scores must be [B], got {tuple(scores.shape)}")
    if group.dtype not in checks.INTEGERS:
        raise TypeError(f"{op}: group must be integers, uint8 or signed, got {group.dtype}")
    checks.check_shape(op, "group", group, scores, scores.shape)
    checks.check_choice(op, "baseline", baseline, BASELINES)
    checks.check_choice(op, "scale", scale, SCALES)
    checks.check_number(op, "eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and > 0, got {eps}")
    y = centred_and_scaled(scores.double(), groups_of(group), baseline, scale, eps)
    # Without the copy, fp64 scores of baseline="none" would be returned as the same tensor.
    return y.to(dtype, copy=True)
