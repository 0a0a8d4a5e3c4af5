"""Scores relative to those of their group: the completions of one prompt.

With n scores x of a group, their mean μ and s² = Σ (x − μ)² / (n − 1):

    baseline   centred                                       scale   y
    mean       x − μ                                         none    centred
    loo        x − (mean of the others) = n/(n − 1) (x − μ)  std     centred / (s + eps)
    none       x

A group of one has nothing to be compared with: its score stays as it is (centre 0, scale 1).

The mean is taken first, relative to the group's first score, so that equal ones are centred to 0;
then the squares of what is left, in fp64: never E[x²] − E[x]².
Mean and std: Shao et al. 2024 (GRPO); mean alone: Liu et al. 2025 (Dr.GRPO); loo: Kool et al. 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common import checks

BASELINES = ("mean", "loo", "none")
SCALES = ("none", "std")


def _group_sum(x: Tensor, index: Tensor) -> Tensor:
    """At each place, the sum of x over the places of the same index."""
    # Unlike index_add, index_put adds in a fixed order on the GPU too.
    return torch.zeros_like(x).index_put((index,), x, accumulate=True)[index]


def group_center(
    scores: Tensor,
    group: Tensor,
    *,
    baseline: str = "mean",
    scale: str = "none",
    eps: float = 1e-6,
) -> Tensor:
    """Each score minus the baseline of its group, divided by the spread of its group if wanted.

    scores: [B], bf16, fp16, fp32 or fp64; differentiable.
    group: [B] integers, equal where scores belong together; any numbers in any order.
    baseline: "mean" | "loo" | "none", scale: "none" | "std": the rows of the tables above.
    Returns [B], fp32 (fp64 for fp64). A group never shows in the scores of another.
    """
    op = "group_center"
    checks.check_tensors(op, scores=scores, group=group)
    dtype = checks.compute_dtype(op, scores=scores)
    if scores.dim() != 1:
        raise ValueError(f"{op}: scores must be [B], got {tuple(scores.shape)}")
    if group.dtype not in checks.INTEGERS:
        raise TypeError(f"{op}: group must be integers, uint8 or signed, got {group.dtype}")
    checks.check_shape(op, "group", group, scores, scores.shape)
    for name, value, known in (("baseline", baseline, BASELINES), ("scale", scale, SCALES)):
        checks.check_choice(op, name, value, known)
    checks.check_number(op, "eps", eps)
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and > 0, got {eps}")
    x = scores.double()
    ordered = group.sort(stable=True)
    index = torch.searchsorted(ordered.values, group.contiguous())  # of the group's first
    count = _group_sum(torch.ones_like(x), index)
    alone, others = count == 1, (count - 1).clamp(min=1)
    shifted = x - x.detach()[ordered.indices[index]]
    centred = shifted - _group_sum(shifted, index) / count
    out = x
    if baseline != "none":
        out = torch.where(alone, x, centred * (count / others if baseline == "loo" else 1.0))
    if scale == "std":
        variance = _group_sum(centred.square(), index) / others
        varies = variance > 0  # the root has no derivative at 0
        spread = torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)
        out = torch.where(alone, out, out / (spread + eps))
    return out.to(dtype, copy=True)
