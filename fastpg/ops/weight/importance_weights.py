"""Importance weights for samples of another policy, such as the rollout engine's.

With d_t = logp − behavior_logp, and sums and means over the unmasked tokens of a sequence:

    level       ratio           outside [low, high]
    token       e^{d_t}         clamp   the nearest bound
    sequence    e^{Σ d}         zero    0
    geometric   e^{mean d}

Truncated importance sampling is token with high, IcePop token with low, high and zero, masked and
truncated sequence-level sampling are sequence or geometric. The weights are constants and multiply
into those of token_weights.

d_t and Σ d are clamped to ±20 before the exponential. d of two log-probs of −inf, as where a label
is outside a kept set in both, is 0; of one alone it is ±20.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._library import empty_like
from ..._op import Op
from ..common import checks
from ..common.log_ratio import bounded, log_ratio
from ..common.sizes import SequenceSizes, sequence_sizes
from ..common.stats import ImportanceStats, tally

# The codes of csrc/weight/importance_weights.h.
LEVELS = {"token": 0, "sequence": 1, "geometric": 2}
OUTSIDE = {"clamp": 0, "zero": 1}


class Inputs(NamedTuple):
    logp: Tensor  # [B, T], or packed [N] with cu_seqlens; fp32 or fp64
    behavior_logp: Tensor  # like logp
    mask: Tensor  # bool, like logp
    cu_seqlens: Tensor | None  # int32 [B + 1]; None: padded
    level: str  # a key of LEVELS
    low: float  # -inf: no lower bound
    high: float  # inf: no upper bound
    outside: str  # a key of OUTSIDE


class Outputs(NamedTuple):
    weight: Tensor  # like logp
    stats: Tensor  # fp64 [11], in the order of ImportanceStats.FIELDS


def ratios_of(d: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """The ratio of each token, or of each sequence, and whether it counts: is not masked."""
    if x.level == "token":
        return d.exp(), x.mask
    exponent = checks.to_sequences(d.double(), x.cu_seqlens)
    tokens = checks.to_sequences(x.mask.double(), x.cu_seqlens)
    if x.level == "geometric":
        exponent = exponent / tokens.clamp(min=1)
    return bounded(exponent).exp(), tokens > 0


def token_fields(d: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What the statistics of the tokens are made of, by their names."""
    return {"tokens": mask, "k1": -d, "k3": torch.where(mask, torch.expm1(d) - d, 0.0)}


def weight_fields(
    ratio: Tensor, counts: Tensor, *, weight: Tensor, below: Tensor, above: Tensor
) -> dict[str, Tensor]:
    """What the statistics of the weights, one a token or one a sequence, are made of."""
    of_weights = {
        "count": counts,
        "ratio": ratio,
        "weight": weight,
        "weight_sq": weight**2,
        "low": below,
        "high": above,
    }
    sums = {name: torch.where(counts, value, 0) for name, value in of_weights.items()}
    extremes = {
        "ratio_min": ratio.masked_fill(~counts, math.inf),
        "ratio_max": ratio.masked_fill(~counts, -math.inf),
    }
    return sums | extremes


def reference(x: Inputs) -> Outputs:
    """The specification: the table at the top of this page."""
    checks.check_cu_seqlens("importance_weights", x.cu_seqlens, x.mask)
    d = torch.where(x.mask, bounded(log_ratio(x.logp, x.behavior_logp)), 0.0)
    ratio, counts = ratios_of(d, x)
    below, above = ratio < x.low, ratio > x.high
    zero = x.outside == "zero"
    weight = ratio.masked_fill(below, 0.0 if zero else x.low)
    weight = weight.masked_fill(above, 0.0 if zero else x.high)
    # The statistics see the weights of sequences in fp64, before they are rounded.
    of_weights = weight_fields(ratio, counts, weight=weight, below=below, above=above)
    stats = tally(ImportanceStats, token_fields(d, x.mask) | of_weights)
    weight = weight.to(x.logp.dtype)
    if x.level != "token":
        weight = checks.to_tokens(weight, x.mask, x.cu_seqlens)
    return Outputs(torch.where(x.mask, weight, 0.0).contiguous(), stats)


def allocate(x: Inputs) -> Outputs:
    """Makes empty weights and statistics."""
    stats = x.logp.new_empty(len(ImportanceStats.FIELDS), dtype=torch.float64)
    return Outputs(empty_like(x.logp), stats)


def sizes(x: Inputs) -> SequenceSizes:
    """Tells C++ the dtype, how many sequences there are, and their length."""
    return sequence_sizes(x.logp, x.cu_seqlens, x.logp)


importance_weights_op = Op(
    "importance_weights",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    codes={"level": LEVELS, "outside": OUTSIDE},
)


def bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Checks the bounds and returns them as floats, infinite where there is none."""
    # Infinite bounds let the kernels compare always, with no case for a bound that is missing.
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    checks.check_number("importance_weights", "low", low)
    checks.check_number("importance_weights", "high", high)
    if not (low <= high and low < math.inf and high > 0):
        needs = "low <= high, low < inf and high > 0 must hold"
        raise ValueError(f"importance_weights: {needs}, got {low} and {high}")
    return float(low), float(high)


def importance_weights(
    logp: Tensor,
    behavior_logp: Tensor,
    mask: Tensor,
    *,
    level: Literal["token", "sequence", "geometric"] = "token",
    low: float | None = None,
    high: float | None = None,
    outside: Literal["clamp", "zero"] = "clamp",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ImportanceStats]:
    """How much more likely each token, or its sequence, is now than when it was sampled.

    With d = logp − behavior_logp the ratio is e^{d_t} at level "token", e^{Σ d} at "sequence" and
    e^{mean d} at "geometric"; its exponent is clamped to ±20.

    Args:
        logp: Log-probs of the sampled tokens under the policy whose expectation is wanted, in nats.
            [B, T], or packed [N] with cu_seqlens; any float dtype. It is taken as a constant.
        behavior_logp: The same under the policy that sampled, of the same shape; a constant too.
            Where both are −inf, as for a label outside a kept set, d is 0; where one is, ±20.
        mask: Like logp, bool or 0/1. A masked token is not read, and its weight is 0.
        level: "token" weighs each token by its own ratio; "sequence" each by the ratio of its whole
            sequence; "geometric" by the mean of that over the tokens, taken of the logarithms.
        low: The lower bound of the ratio, < inf; None: none.
        high: The upper bound of the ratio, > 0 and >= low; None: none.
        outside: What a ratio outside the bounds becomes: "clamp" the nearest bound, "zero" 0.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.

    Returns:
        (weight, stats): the weight of each token, like logp, fp32, or fp64 if an input is fp64; and
        ImportanceStats, for merge_stats. Neither has a gradient.

    Raises:
        TypeError: An argument is no tensor or number, or has a dtype that it cannot have.
        ValueError: A shape or device does not fit, level or outside is unknown, or the bounds are
            in the wrong order.

    Example:
        >>> behavior_logp, mask = torch.tensor([[0.5, 0.25]]).log(), torch.ones(1, 2)
        >>> logp = torch.tensor([[0.25, 0.75]]).log()
        >>> weight, stats = fastpg.importance_weights(logp, behavior_logp, mask, high=2.0)
        >>> weight
        tensor([[0.5000, 2.0000]])
        >>> fastpg.merge_stats(stats)["outside_high"]
        0.5

    Reference:
        Truncated importance sampling: Espeholt et al. 2018, arXiv:1802.01561. "geometric": Zheng et
        al. 2025 (GSPO), arXiv:2507.18071.
    """
    op = "importance_weights"
    checks.check_tensors(op, logp=logp, behavior_logp=behavior_logp, mask=mask)
    logp, behavior_logp = checks.alike(op, logp=logp, behavior_logp=behavior_logp)
    checks.sequence_count(op, "logp", logp, cu_seqlens)
    checks.check_shape(op, "mask", mask, logp, logp.shape)
    checks.check_choice(op, "level", level, LEVELS)
    checks.check_choice(op, "outside", outside, OUTSIDE)
    low, high = bounds(low, high)
    inputs = Inputs(
        logp=logp.detach() if logp.requires_grad else logp,
        behavior_logp=behavior_logp.detach() if behavior_logp.requires_grad else behavior_logp,
        mask=checks.as_bool(op, "mask", mask),
        cu_seqlens=cu_seqlens,
        level=level,
        low=low,
        high=high,
        outside=outside,
    )
    weight, stats = importance_weights_op(inputs)
    return weight, ImportanceStats(stats)
