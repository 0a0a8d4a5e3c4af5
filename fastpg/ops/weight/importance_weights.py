"""Importance weights for samples of another policy, such as the rollout engine's.

With d_t = logp − behavior_logp, and sums and means over the unmasked tokens of a sequence:

    level       ratio           outside [low, high]
    token       e^{d_t}         clamp   the nearest bound
    sequence    e^{Σ d}         zero    0
    geometric   e^{mean d}

Truncated importance sampling is token with high, IcePop token with low, high and zero, masked and
truncated sequence-level sampling are sequence or geometric. The weights are constants and multiply
into those of token_weights.

d_t and Σ d are clamped to ±20 before the exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import _C, DTYPE_CODE, address, contiguous, cpu_kernel, define, triton_kernels
from ..common import checks
from ..common.stats import ImportanceStats

LEVELS = {"token": 0, "sequence": 1, "geometric": 2}  # the codes of csrc/importance_weights.h
OUTSIDE = ("clamp", "zero")


def _ratios(d, mask, cu_seqlens, level):
    """Per token, or per sequence: the ratio, and whether it counts."""
    if level == "token":
        return d.exp(), mask
    total, tokens = (checks.to_sequences(x.double(), cu_seqlens) for x in (d, mask))
    if level == "geometric":
        total = total / tokens.clamp(min=1)
    return total.clamp(-20.0, 20.0).exp(), tokens > 0


def _stats(d, mask, ratio, weight, counts, below, above):
    """[11] in the order of ImportanceStats.FIELDS; what is masked is out of every field."""
    of_tokens = mask, -d, torch.where(mask, torch.expm1(d) - d, 0.0)
    of_weights = counts, ratio, weight, weight**2, below, above
    sums = [*of_tokens, *(torch.where(counts, x, 0) for x in of_weights)]
    padded = torch.nn.functional.pad  # an empty tensor has no minimum
    least = padded(ratio.masked_fill(~counts, math.inf).flatten(), (0, 1), value=math.inf).amin()
    most = padded(ratio.masked_fill(~counts, -math.inf).flatten(), (0, 1), value=-math.inf).amax()
    fields = [*(x.sum(dtype=torch.float64) for x in sums), least, most]
    return torch.stack([field.double() for field in fields])


def reference(logp, behavior_logp, mask, cu_seqlens, level, low, high, outside):
    """-> weight of the shape and dtype of logp, stats [11]"""
    checks.check_cu_seqlens("importance_weights", cu_seqlens, mask)
    d = torch.where(mask, logp - behavior_logp, 0.0).clamp(-20.0, 20.0)
    ratio, counts = _ratios(d, mask, cu_seqlens, level)
    below, above = ratio < low, ratio > high
    zero = outside == "zero"
    weight = ratio.masked_fill(below, 0.0 if zero else low)
    weight = weight.masked_fill(above, 0.0 if zero else high)
    stats = _stats(d, mask, ratio, weight, counts, below, above)
    weight = weight.to(logp.dtype)
    weight = weight if level == "token" else checks.to_tokens(weight, mask, cu_seqlens)
    return torch.where(mask, weight, 0.0).contiguous(), stats


_weights = define(
    "importance_weights(Tensor logp, Tensor behavior_logp, Tensor mask, Tensor? cu_seqlens, "
    "str level, float low, float high, str outside) -> (Tensor, Tensor)",
    fake=lambda logp, *_: (
        logp.new_empty(logp.shape),
        logp.new_empty(len(ImportanceStats.FIELDS), dtype=torch.float64),
    ),
    reference=reference,
)


@cpu_kernel(_weights)
def _weights_cpu(logp, behavior_logp, mask, cu_seqlens, level, low, high, outside):
    tensors = contiguous(cu_seqlens, logp, behavior_logp, mask)
    weight = torch.empty_like(tensors[1])
    stats = logp.new_empty(len(ImportanceStats.FIELDS), dtype=torch.float64)
    count = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    _C.importance_weights(
        DTYPE_CODE[logp.dtype], count, mask.shape[-1], *map(address, tensors), LEVELS[level],
        low, high, outside == "zero", weight.data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    return weight, stats


triton_kernels(__name__, _weights)


def _bounds(low, high):
    """As floats, infinite where there is no bound."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    checks.check_number("importance_weights", "low", low)
    checks.check_number("importance_weights", "high", high)
    if not (low <= high and high > 0):
        raise ValueError(
            f"importance_weights: low <= high and high > 0 must hold, got {low} and {high}"
        )
    return float(low), float(high)


def importance_weights(
    logp: Tensor,
    behavior_logp: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    low: float | None = None,
    high: float | None = None,
    outside: str = "clamp",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ImportanceStats]:
    """How much more likely each token, or its sequence, is now than when it was sampled.

    logp, behavior_logp: [B, T], or packed [N] with cu_seqlens (int32 [B + 1]); any float dtype. Of
    the policy whose expectation is wanted, and of the one that sampled; both are constants.
    mask: likewise, bool or 0/1. Masked slots are not read, and 0 in the output.
    level: "token" | "sequence" | "geometric", outside: "clamp" | "zero": see the tables above.
    low, high: bounds of the ratio; None: unbounded.
    Returns (weight, stats): like logp, fp32 (fp64 if an input is fp64), and ImportanceStats.
    """
    op = "importance_weights"
    checks.check_tensors(op, logp=logp, behavior_logp=behavior_logp, mask=mask)
    logp, behavior_logp = checks.alike(op, logp=logp, behavior_logp=behavior_logp)
    checks.sequence_count(op, "logp", logp, cu_seqlens)
    checks.check_shape(op, "mask", mask, logp, logp.shape)
    for name, value, known in (("level", level, LEVELS), ("outside", outside, OUTSIDE)):
        checks.check_choice(op, name, value, known)
    tensors = logp.detach(), behavior_logp.detach(), checks.as_bool(mask), cu_seqlens
    weight, stats = _weights(*tensors, level, *_bounds(low, high), outside)
    return weight, ImportanceStats(stats)
