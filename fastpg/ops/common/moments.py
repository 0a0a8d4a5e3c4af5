"""Mean and spread of values that come in parts, without the cancellation of E[x²] − E[x]².

    M2 = Σ (x − mean)²      of all parts together:  M2 = Σ_i M2_i + n_i (mean_i − mean)²

The second formula is Chan's (Chan, Golub and LeVeque 1983); csrc/common/moments.h and
common/triton.py have it for the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    n: Tensor  # how many values there are
    mean: Tensor  # 0 where n is 0
    m2: Tensor  # Σ (x − mean)²


def moments_of(x: Tensor, kept: Tensor) -> Moments:
    """The moments of the kept x, each 0-d in fp64. What is not kept may hold NaN."""
    x, n = x.double(), kept.sum().double()
    # Two passes, the mean first: deviations from it lose no digits, whatever the mean is.
    mean = torch.where(kept, x, 0.0).sum() / n.clamp(min=1)
    return Moments(n, mean, torch.where(kept, x - mean, 0.0).square().sum())


def merge_moments(parts: Moments) -> Moments:
    """The moments of all parts together. The parts lie along the first axis of each field."""
    n = parts.n.sum(0)
    mean = (parts.n * parts.mean).sum(0) / n.clamp(min=1)
    m2 = (parts.m2 + parts.n * (parts.mean - mean) ** 2).sum(0)
    return Moments(n, mean, m2)
