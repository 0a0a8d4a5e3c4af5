"""The policy loss of one token in Triton: the maths of csrc/loss/policy_loss.h.

Every function takes tensors of any shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton import INFINITY, exp_excess, held_log_ratio, number
from .surrogates import LossOptions


def place_of(option: str) -> tl.constexpr:
    """The place of an option among those of LossOptions, as they lie in memory."""
    return tl.constexpr(LossOptions._fields.index(option))


LOW = place_of("low")
HIGH = place_of("high")
DUAL_CLIP = place_of("dual_clip")
TAU_POSITIVE = place_of("tau_positive")
TAU_NEGATIVE = place_of("tau_negative")
KL_COEF = place_of("kl_coef")
ENTROPY_COEF = place_of("entropy_coef")
MAX_LOG_RATIO = place_of("max_log_ratio")
BEYOND = place_of("beyond")


@triton.jit
def options_of(like: tl.tensor, traced_options: tl.tensor, options: tl.tuple):
    """The options in the dtype of `like`, in groups: those in memory, where they were given there.

    Returns (low, high, dual_clip), (tau_positive, tau_negative), kl_coef, entropy_coef, and
    (max_log_ratio, beyond).
    """
    low, high, dual_clip = options[LOW], options[HIGH], options[DUAL_CLIP]
    tau_positive, tau_negative = options[TAU_POSITIVE], options[TAU_NEGATIVE]
    kl_coef, entropy_coef = options[KL_COEF], options[ENTROPY_COEF]
    max_log_ratio, beyond = options[MAX_LOG_RATIO], options[BEYOND]
    if traced_options is not None:
        low = tl.load(traced_options + LOW)
        high = tl.load(traced_options + HIGH)
        dual_clip = tl.load(traced_options + DUAL_CLIP)
        tau_positive = tl.load(traced_options + TAU_POSITIVE)
        tau_negative = tl.load(traced_options + TAU_NEGATIVE)
        kl_coef = tl.load(traced_options + KL_COEF)
        entropy_coef = tl.load(traced_options + ENTROPY_COEF)
        max_log_ratio = tl.load(traced_options + MAX_LOG_RATIO)
        beyond = tl.load(traced_options + BEYOND)
    # A Python float arrives as fp64, and would make everything that it meets fp64.
    bounds = number(low, like), number(high, like), number(dual_clip, like)
    taus = number(tau_positive, like), number(tau_negative, like)
    log_ratios = number(max_log_ratio, like), number(beyond, like)
    return bounds, taus, number(kl_coef, like), number(entropy_coef, like), log_ratios


@triton.jit
def ppo(ratio: tl.tensor, ratio_slope: tl.tensor, advantage: tl.tensor, bounds: tl.tuple):
    """-min(r A, clip(r) A), for A < 0 at most -dual_clip A: no gradient where r is held."""
    low, high, dual_clip = bounds
    # A = 0 is neither: its loss is exactly 0, and no bound of its ratio is in force.
    gain, penalty = advantage > 0, advantage < 0
    too_low, too_high = penalty & (ratio < low), gain & (ratio > high)
    dual = penalty & (ratio > dual_clip)
    above = tl.where(gain, high, dual_clip)
    bounded_ratio = tl.where(too_low, low, tl.where(too_high | dual, above, ratio))
    slope = tl.where(too_low | too_high | dual, 0.0, -(ratio_slope * advantage))
    return -(bounded_ratio * advantage), slope, too_low, too_high, dual


@triton.jit
def reinforce(ratio: tl.tensor, advantage: tl.tensor, logp: tl.tensor):
    """-r A logp with r a constant; 0 for a token of probability 0, which has no gradient."""
    impossible = logp == -INFINITY
    slope = tl.where(impossible, 0.0, -(ratio * advantage))
    # A = 0 is selected away, since logp may be infinite and 0 times it NaN.
    return tl.where((advantage == 0) | impossible, 0.0, slope * logp), slope


@triton.jit
def cispo(ratio: tl.tensor, advantage: tl.tensor, logp: tl.tensor, bounds: tl.tuple):
    """-clip(r) A logp with r a constant: a token whose ratio is held keeps its gradient."""
    low, high, _ = bounds
    too_low = (advantage != 0) & (ratio < low)
    too_high = (advantage != 0) & (ratio > high)
    bounded_ratio = tl.where(too_low, low, tl.where(too_high, high, ratio))
    value, slope = reinforce(bounded_ratio, advantage, logp)
    return value, slope, too_low, too_high, ratio < ratio


@triton.jit
def sapo(ratio: tl.tensor, ratio_slope: tl.tensor, advantage: tl.tensor, taus: tl.tuple):
    """-4/tau s A, s = sigmoid(x), x = tau (r - 1). With z = e^-|x|, s (1 - s) = z / (1 + z)^2."""
    # The temperature of a penalty may be larger, so that its gradient fades faster.
    tau = tl.where(advantage < 0, taus[1], taus[0])
    x = tau * (ratio - 1.0)
    z = tl.exp(tl.where(x < 0, x, -x))  # The exponent is never positive: nothing overflows.
    share = 1.0 / (1.0 + z)
    sigmoid = tl.where(x < 0, z * share, share)
    return -4.0 / tau * sigmoid * advantage, -4.0 * z * share * share * ratio_slope * advantage


@triton.jit
def surrogate(
    ratio: tl.tensor,
    ratio_slope: tl.tensor,
    advantage: tl.tensor,
    logp: tl.tensor,
    bounds: tl.tuple,
    taus: tl.tuple,
    KIND: tl.constexpr,
):
    """The term, its derivative by logp, and where the bounds of the ratio are in force."""
    if KIND == "ppo":
        return ppo(ratio, ratio_slope, advantage, bounds)
    elif KIND == "cispo":
        return cispo(ratio, advantage, logp, bounds)
    else:
        if KIND == "sapo":
            value, slope = sapo(ratio, ratio_slope, advantage, taus)
        else:
            value, slope = reinforce(ratio, advantage, logp)
        never = ratio < ratio  # false everywhere, NaN included
        return value, slope, never, never, never


@triton.jit
def token_loss(
    logp: tl.tensor,
    advantage: tl.tensor,
    old_logp: tl.tensor,
    sequence_log_ratio: tl.tensor,
    ref_logp: tl.tensor,
    bounds: tl.tuple,
    taus: tl.tuple,
    kl_coef: tl.tensor,
    log_ratios: tl.tuple,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
):
    """(value, too_low, too_high, dual) of the surrogate, (r, d, e^d - 1 - d), ref_kl, and dL/dlogp.

    r is what the surrogate took, d = logp - old_logp. old_logp, sequence_log_ratio and ref_logp may
    be None.
    """
    # Without old_logp it is logp itself, whose ratio is 1; that of a NaN shows.
    max_log_ratio, beyond = log_ratios
    other = logp if old_logp is None else old_logp
    d, d_slope = held_log_ratio(logp, other, max_log_ratio, beyond)
    token_ratio, excess = exp_excess(d)
    token_slope = token_ratio * d_slope
    r, r_slope = token_ratio, token_slope
    if sequence_log_ratio is not None:
        zero = tl.zeros_like(logp)
        mean, mean_slope = held_log_ratio(sequence_log_ratio, zero, max_log_ratio, beyond)
        r = tl.exp(mean)
        r_slope = tl.where(logp == -INFINITY, 0.0, r * mean_slope)
    value, slope, too_low, too_high, dual = surrogate(
        r, r_slope, advantage, logp, bounds, taus, SURROGATE
    )
    # The KL takes the token's own ratio, also where the surrogate takes that of its sequence.
    ref_kl = tl.zeros_like(logp)
    if ref_logp is not None:
        d_ref, ref_slope = held_log_ratio(logp, ref_logp, max_log_ratio, beyond)
        ref_kl, kl_slope = reference_kl(d_ref, ref_slope, token_ratio, token_slope, KL)
        slope += kl_coef * kl_slope
    return (value, too_low, too_high, dual), (r, d, excess), ref_kl, slope


@triton.jit
def reference_kl(
    d: tl.tensor,
    d_slope: tl.tensor,
    ratio: tl.tensor,
    ratio_slope: tl.tensor,
    KIND: tl.constexpr,
):
    """KL to the reference and its derivative, d = logp - ref_logp; r' = r: of r k3 it is r d."""
    # exp_excess has e^-d - 1 + d by its series near 0, where the subtractions would cancel.
    if KIND == "k2":
        return d * d * 0.5, d * d_slope
    else:
        _, k3 = exp_excess(-d)
        if KIND == "k3":
            return ratio * k3, ratio_slope * d * d_slope
        else:
            return k3, (d - k3) * d_slope
