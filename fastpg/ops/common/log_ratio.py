"""Log-ratios of the log-probs of two policies, within a bound, before they are exponentiated."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .checks import check_choice, check_number

Beyond = Literal["stop", "hold"]

MAX_LOG_RATIO = 20.0  # kMaxLogRatio of csrc/common/log_ratio.h; e^20 is about 5e8
MOST_LOG_RATIO = 40.0  # Statistics have the square of a ratio, which must be finite in fp32.
BEYOND = {"stop": 0, "hold": 1}  # the codes of csrc/loss/kl_estimate.h, and the factors of a slope


class Moving(NamedTuple):
    """A number of each token, and its derivative by the token's log-prob."""

    value: Tensor
    slope: Tensor


def log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """logp − other; 0 where they are equal, as two −inf are; NaN passes through."""
    return torch.where(logp == other, 0.0, logp - other)


def bounded(x: Tensor, bound: float | Tensor = MAX_LOG_RATIO) -> Tensor:
    """x within ±bound; NaN passes through."""
    return x.clamp(-bound, bound)  # type: ignore[arg-type]  # it takes both


def held_log_ratio(
    logp: Tensor, other: Tensor, bound: float | Tensor, beyond: float | Tensor
) -> Moving:
    """logp − other at its bound, if it is beyond; its slope is then the factor `beyond`.

    It does not move with a log-prob of −inf.
    """
    size = (logp - other).abs()  # infinite if one of them is, NaN if both are
    slope = torch.zeros_like(size).masked_fill(size < math.inf, beyond)
    slope = slope.masked_fill(size <= bound, 1.0)
    return Moving(bounded(log_ratio(logp, other), bound), slope)


def ratio_of(d: Moving) -> Moving:
    """e^d, and its derivative."""
    ratio = d.value.exp()
    return Moving(ratio, ratio * d.slope)


def check_bound(op: str, max_log_ratio: float, beyond: str) -> None:
    """Raises unless these are the bound of log-ratios and what happens to a gradient beyond it."""
    check_number(op, "max_log_ratio", max_log_ratio)
    if not 0 < max_log_ratio <= MOST_LOG_RATIO:
        most = f"{MOST_LOG_RATIO:g}"
        raise ValueError(f"{op}: max_log_ratio must be > 0 and <= {most}, got {max_log_ratio}")
    check_choice(op, "beyond", beyond, BEYOND)
