"""The policy loss of one token in Triton: the maths of csrc/loss/policy_loss.h.

Every function takes tensors of any shape; the numbers are in the order of LossOptions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton import bounded, exp_excess, number


@triton.jit
def options_of(
    like: tl.tensor,
    traced_options: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dual_clip: tl.tensor,
    tau_positive: tl.tensor,
    tau_negative: tl.tensor,
    kl_coef: tl.tensor,
    entropy_coef: tl.tensor,
):
    """The seven numbers in the dtype of `like`; from memory where they were given there."""
    if traced_options is not None:
        low, high = tl.load(traced_options), tl.load(traced_options + 1)
        dual_clip = tl.load(traced_options + 2)
        tau_positive, tau_negative = tl.load(traced_options + 3), tl.load(traced_options + 4)
        kl_coef, entropy_coef = tl.load(traced_options + 5), tl.load(traced_options + 6)
    # A Python float arrives as fp64, and would make everything that it meets fp64.
    bounds = number(low, like), number(high, like), number(dual_clip, like)
    taus = number(tau_positive, like), number(tau_negative, like)
    return bounds, taus, number(kl_coef, like), number(entropy_coef, like)


@triton.jit
def log_ratio(logp: tl.tensor, other: tl.tensor):
    """logp - other within +-MAX_LOG_RATIO; NaN passes through."""
    return bounded(logp - other)


@triton.jit
def ppo(ratio: tl.tensor, advantage: tl.tensor, bounds: tl.tuple):
    """-min(r A, clip(r) A), for A < 0 at most -dual_clip A: no gradient where r is held."""
    low, high, dual_clip = bounds
    # A = 0 is neither: its loss is exactly 0, and no bound of its ratio is in force.
    gain, penalty = advantage > 0, advantage < 0
    most = tl.where(gain, high, dual_clip)
    too_low = penalty & (ratio < low)
    too_high = (gain | penalty) & (ratio > most)
    held = tl.where(too_low, low, tl.where(too_high, most, ratio))
    slope = tl.where(too_low | too_high, 0.0, -(ratio * advantage))
    return -(held * advantage), slope, too_low, too_high


@triton.jit
def reinforce(ratio: tl.tensor, advantage: tl.tensor, logp: tl.tensor):
    """-r A logp with r a constant."""
    slope = -(ratio * advantage)
    # A = 0 is selected away, since logp may be -inf and 0 times it NaN.
    return tl.where(advantage == 0, 0.0, slope * logp), slope


@triton.jit
def cispo(ratio: tl.tensor, advantage: tl.tensor, logp: tl.tensor, bounds: tl.tuple):
    """-clip(r) A logp with r a constant: a token whose ratio is held keeps its gradient."""
    low, high, _ = bounds
    too_low = (advantage != 0) & (ratio < low)
    too_high = (advantage != 0) & (ratio > high)
    held = tl.where(too_low, low, tl.where(too_high, high, ratio))
    value, slope = reinforce(held, advantage, logp)
    return value, slope, too_low, too_high


@triton.jit
def sapo(ratio: tl.tensor, advantage: tl.tensor, taus: tl.tuple):
    """-4/tau s A, s = sigmoid(x), x = tau (r - 1). With z = e^-|x|, s (1 - s) = z / (1 + z)^2."""
    # The temperature of a penalty may be larger, so that its gradient fades faster.
    tau = tl.where(advantage < 0, taus[1], taus[0])
    x = tau * (ratio - 1.0)
    z = tl.exp(tl.where(x < 0, x, -x))  # The exponent is never positive: nothing overflows.
    share = 1.0 / (1.0 + z)
    sigmoid = tl.where(x < 0, z * share, share)
    return -4.0 / tau * sigmoid * advantage, -4.0 * z * share * share * ratio * advantage


@triton.jit
def surrogate(
    ratio: tl.tensor,
    advantage: tl.tensor,
    logp: tl.tensor,
    bounds: tl.tuple,
    taus: tl.tuple,
    KIND: tl.constexpr,
):
    """The term, its derivative by logp, and where the bounds of the ratio are in force."""
    if KIND == "ppo":
        return ppo(ratio, advantage, bounds)
    elif KIND == "cispo":
        return cispo(ratio, advantage, logp, bounds)
    else:
        if KIND == "sapo":
            value, slope = sapo(ratio, advantage, taus)
        else:
            value, slope = reinforce(ratio, advantage, logp)
        never = ratio < ratio  # false everywhere, NaN included
        return value, slope, never, never


@triton.jit
def token_loss(
    logp: tl.tensor,
    advantage: tl.tensor,
    old_logp: tl.tensor,
    ratio: tl.tensor,
    ref_logp: tl.tensor,
    bounds: tl.tuple,
    taus: tl.tuple,
    kl_coef: tl.tensor,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
):
    """(value, too_low, too_high) of the surrogate, (r, d, e^d - 1 - d), ref_kl, and dL/dlogp.

    r is what the surrogate took, d = logp - old_logp. old_logp, ratio and ref_logp may be None.
    """
    # Without old_logp the policy sampled itself: the ratio is 1, its logarithm 0. A NaN must show.
    zero = tl.zeros_like(logp)
    d = tl.where(logp == logp, zero, logp)
    excess, token_ratio = d, d + 1.0
    if old_logp is not None:
        d = log_ratio(logp, old_logp)
        token_ratio, excess = exp_excess(d)
    r = token_ratio if ratio is None else ratio
    value, slope, too_low, too_high = surrogate(r, advantage, logp, bounds, taus, SURROGATE)
    # The KL takes the token's own ratio, also where the surrogate takes that of its sequence.
    ref_kl = zero
    if ref_logp is not None:
        ref_kl, kl_slope = reference_kl(log_ratio(logp, ref_logp), token_ratio, KL)
        slope += kl_coef * kl_slope
    return (value, too_low, too_high), (r, d, excess), ref_kl, slope


@triton.jit
def reference_kl(d: tl.tensor, ratio: tl.tensor, KIND: tl.constexpr):
    """KL to the reference and its derivative, d = logp - ref_logp; r' = r: of r k3 it is r d."""
    # exp_excess has e^-d - 1 + d by its series near 0, where the subtractions would cancel.
    if KIND == "k2":
        return d * d * 0.5, d
    else:
        _, k3 = exp_excess(-d)
        if KIND == "k3":
            return ratio * k3, ratio * d
        else:
            return k3, d - k3
