"""The maths of one token of the policy loss, as csrc/policy_loss.h has it for the kernels.

A surrogate takes the ratio r, the advantage A, logp and the options, and returns the loss s of the
token, ds/dlogp = −c(r, A), and whether the lower and the upper bound of r are in force.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch

SURROGATES = {"ppo": 0, "reinforce": 1, "cispo": 2, "sapo": 3}  # the codes of csrc/policy_loss.h
KLS = {"k3": 0, "k3_naive": 1, "k2": 2}


class Options(NamedTuple):
    """The numbers of the loss: floats, or 0-d tensors in a graph that is compiled for any value."""

    low: float  # the bounds of r; infinite: none
    high: float
    dual_clip: float
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float


def ppo(ratio, advantages, logp, options):
    """s = −min(r A, clip(r) A), at most −dual_clip A where A < 0; c = r A, or 0 where r is held."""
    too_low = (advantages < 0) & (ratio < options.low)
    too_high = (advantages > 0) & (ratio > options.high)
    beyond = (advantages < 0) & (ratio > options.dual_clip)
    held = ratio.masked_fill(too_low, options.low).masked_fill(too_high, options.high)
    held = held.masked_fill(beyond, options.dual_clip)
    slope = torch.where(too_low | too_high | beyond, 0.0, -ratio * advantages)
    return -held * advantages, slope, too_low, too_high | beyond


def reinforce(ratio, advantages, logp, options):
    """s = −sg(r) A logp; c = r A."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    slope = -ratio * advantages
    return torch.where(advantages == 0, 0.0, slope * logp), slope, never, never


def cispo(ratio, advantages, logp, options):
    """s = −sg(clip(r)) A logp; c = clip(r) A: a token whose ratio is held keeps its gradient."""
    too_low = (advantages != 0) & (ratio < options.low)
    too_high = (advantages != 0) & (ratio > options.high)
    held = ratio.masked_fill(too_low, options.low).masked_fill(too_high, options.high)
    value, slope, *_ = reinforce(held, advantages, logp, options)
    return value, slope, too_low, too_high


def sapo(ratio, advantages, logp, options):
    """s = −4/τ σ(τ (r − 1)) A; c = 4 σ (1 − σ) r A. τ is tau_negative where A < 0."""
    one, never = torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
    tau = torch.where(advantages < 0, options.tau_negative * one, options.tau_positive * one)
    x = tau * (ratio - 1)
    value = -4 / tau * torch.sigmoid(x) * advantages
    return value, -4 * torch.sigmoid(x) * torch.sigmoid(-x) * ratio * advantages, never, never


def log_ratio(logp, other):
    return (logp - other).clamp(-20.0, 20.0)


def reference_kl(kl, d, ratio):
    """The KL term and its derivative by logp; d = logp − ref_logp."""
    if kl == "k2":
        return d * d / 2, d
    k3 = torch.expm1(-d) + d
    return (ratio * k3, ratio * d) if kl == "k3" else (k3, -torch.expm1(-d))


def check_options(clip, dual_clip, tau, surrogate, kl_coef, entropy_coef) -> Options:
    """The arguments of policy_loss as the kernels take them."""
    if not isinstance(surrogate, str) or surrogate not in SURROGATES:
        names = ", ".join(SURROGATES)
        raise ValueError(f"policy_loss: surrogate must be one of {names}, got {surrogate!r}")
    low, high = _pair("clip", clip)
    _check_numbers({"clip": clip, "dual_clip": (dual_clip,)}, (float, Real, type(None)))
    coefficients = {"kl_coef": (kl_coef,), "entropy_coef": (entropy_coef,)}
    _check_numbers({"tau": _pair("tau", tau), **coefficients}, (float, Real))
    if (low is not None and not low >= 0) or (high is not None and not high >= 0):
        raise ValueError(f"policy_loss: clip must be >= 0 or None on each side, got {clip}")
    if dual_clip is not None and surrogate != "ppo":
        raise ValueError(f"policy_loss: dual_clip={dual_clip} needs surrogate='ppo'")
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise ValueError(f"policy_loss: dual_clip must be finite and > 1, got {dual_clip}")
    if not all(0 < t < math.inf for t in tau):
        raise ValueError(f"policy_loss: tau must be finite and > 0, got {tau}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"policy_loss: kl_coef must be finite and >= 0, got {kl_coef}")
    if not -math.inf < entropy_coef < math.inf:
        raise ValueError(f"policy_loss: entropy_coef must be finite, got {entropy_coef}")
    return Options(
        -math.inf if low is None else 1.0 - low,
        math.inf if high is None else 1.0 + high,
        math.inf if dual_clip is None else dual_clip,
        *tau, kl_coef, entropy_coef,
    )  # fmt: skip


def _check_numbers(options, kind):
    for name, values in options.items():
        for value in values:
            if not isinstance(value, kind):
                got = type(value).__name__
                raise TypeError(f"policy_loss: {name} must be a number, got {got}")


def _pair(name, value):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"policy_loss: {name} must be a pair, got {value}")
    return value
