"""The one bound of log-ratios, before they are exponentiated."""

from __future__ import annotations

from torch import Tensor

MAX_LOG_RATIO = 20.0  # kMaxLogRatio of csrc/common/elementary.h; e^20 is about 5e8


def log_ratio(logp: Tensor, other: Tensor) -> Tensor:
    """logp − other, within ±MAX_LOG_RATIO; NaN passes through."""
    return (logp - other).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
