"""The terms of one token of the policy loss, as csrc/loss/policy_loss.h has them for the kernels.

A surrogate takes the ratio r, the advantage A, logp and the options. It returns the loss s of the
token, ds/dlogp = −c(r, A), and which bounds of r are in force. A KL to the reference takes
d = logp − ref_logp and the token's r, and returns its value and its derivative.

Ratios and log-ratios come with their own derivatives by logp. That of r is r; it is 0 where r must
not carry a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._library import scalar
from ..common.checks import check_choice
from ..common.log_ratio import BEYOND, Moving, check_bound

Clip = tuple[float | None, float | None]
SurrogateName = Literal["ppo", "reinforce", "cispo", "sapo"]
KlName = Literal["k3", "k3_naive", "k2"]
Level = Literal["token", "sequence"]


class LossOptions(NamedTuple):
    """The numbers of the loss: floats, or 0-d tensors in a graph that is compiled for any value."""

    low: float  # the bounds of r; infinite: none
    high: float
    dual_clip: float
    tau_positive: float
    tau_negative: float
    kl_coef: float
    entropy_coef: float
    max_log_ratio: float  # the bound of log-ratios
    beyond: float  # the factor of a gradient beyond it: 1 holds it, 0 stops it


class SurrogateTerm(NamedTuple):
    value: Tensor  # s
    slope: Tensor  # ds/dlogp
    too_low: Tensor  # r is below its lower bound, which is in force
    too_high: Tensor  # r is above its upper bound, which is in force
    dual: Tensor  # r is above dual_clip, which is in force


def ppo(r: Moving, advantages: Tensor, _logp: Tensor, options: LossOptions) -> SurrogateTerm:
    """s = −min(r A, clip(r) A), at most −dual_clip A where A < 0; c = r A, or 0 where r is held."""
    # Where A = 0 no bound is in force: such tokens are not counted as clipped.
    too_low = (advantages < 0) & (r.value < options.low)
    too_high = (advantages > 0) & (r.value > options.high)
    dual = (advantages < 0) & (r.value > options.dual_clip)
    ratio = r.value.masked_fill(too_low, options.low).masked_fill(too_high, options.high)
    ratio = ratio.masked_fill(dual, options.dual_clip)
    slope = torch.where(too_low | too_high | dual, 0.0, -r.slope * advantages)
    return SurrogateTerm(-ratio * advantages, slope, too_low, too_high, dual)


def reinforce(r: Moving, advantages: Tensor, logp: Tensor, _options: LossOptions) -> SurrogateTerm:
    """s = −sg(r) A logp; c = r A. A token of probability 0 has no gradient: its s counts 0."""
    never = torch.zeros_like(logp, dtype=torch.bool)
    impossible = logp == -math.inf
    slope = torch.where(impossible, 0.0, -r.value * advantages)
    # An infinite logp would make 0 · inf = NaN of a term that does not count.
    value = torch.where((advantages == 0) | impossible, 0.0, slope * logp)
    return SurrogateTerm(value, slope, never, never, never)


def cispo(r: Moving, advantages: Tensor, logp: Tensor, options: LossOptions) -> SurrogateTerm:
    """s = −sg(clip(r)) A logp; c = clip(r) A: a token whose ratio is held keeps its gradient."""
    too_low = (advantages != 0) & (r.value < options.low)
    too_high = (advantages != 0) & (r.value > options.high)
    ratio = r.value.masked_fill(too_low, options.low).masked_fill(too_high, options.high)
    term = reinforce(Moving(ratio, ratio), advantages, logp, options)
    return term._replace(too_low=too_low, too_high=too_high)


def sapo(r: Moving, advantages: Tensor, _logp: Tensor, options: LossOptions) -> SurrogateTerm:
    """s = −4/τ σ(τ (r − 1)) A; c = 4 σ (1 − σ) r A. τ is tau_negative where A < 0."""
    one, never = torch.ones_like(r.value), torch.zeros_like(r.value, dtype=torch.bool)
    tau = torch.where(advantages < 0, options.tau_negative * one, options.tau_positive * one)
    x = tau * (r.value - 1)
    value = -4 / tau * torch.sigmoid(x) * advantages
    # σ(−x) is 1 − σ(x) without its cancellation at large x.
    slope = -4 * torch.sigmoid(x) * torch.sigmoid(-x) * r.slope * advantages
    return SurrogateTerm(value, slope, never, never, never)


def k3(d: Moving, r: Moving) -> Moving:
    """r (e^{−d} − 1 + d); its derivative, with r' = r, is r d; 0 where r or d has none."""
    return Moving(r.value * (torch.expm1(-d.value) + d.value), r.slope * d.value * d.slope)


def k3_naive(d: Moving, _r: Moving) -> Moving:
    """e^{−d} − 1 + d, and its derivative."""
    return Moving(torch.expm1(-d.value) + d.value, -torch.expm1(-d.value) * d.slope)


def k2(d: Moving, _r: Moving) -> Moving:
    """d² / 2, and its derivative."""
    return Moving(d.value * d.value / 2, d.value * d.slope)


Surrogate = Callable[[Moving, Tensor, Tensor, LossOptions], SurrogateTerm]
SURROGATES: dict[str, Surrogate] = {
    "ppo": ppo,
    "reinforce": reinforce,
    "cispo": cispo,
    "sapo": sapo,
}
KLS: dict[str, Callable[[Moving, Moving], Moving]] = {
    "k3": k3,
    "k3_naive": k3_naive,
    "k2": k2,
}
# The integers that csrc/loss/policy_loss.h knows them by.
CODES = {
    "surrogate": {name: code for code, name in enumerate(SURROGATES)},
    "kl": {name: code for code, name in enumerate(KLS)},
}


def check_options(
    *,
    clip: Clip,
    dual_clip: float | None,
    tau: tuple[float, float],
    surrogate: str,
    kl: str,
    kl_coef: float,
    entropy_coef: float,
    max_log_ratio: float,
    beyond: str,
    ref_logp: Tensor | None,
) -> LossOptions:
    """The options of policy_loss as the kernels take them.

    Raises:
        TypeError: An option is no number.
        ValueError: An option has a value that it cannot have, or needs a ref_logp that is None.
    """
    check_choice("policy_loss", "surrogate", surrogate, SURROGATES)
    low, high = _pair("clip", clip)
    _check_numbers("clip", clip, (float, Real, type(None)))
    _check_numbers("dual_clip", (dual_clip,), (float, Real, type(None)))
    tau_positive, tau_negative = _pair("tau", tau)
    _check_numbers("tau", tau, (float, Real))
    _check_numbers("kl_coef", (kl_coef,), (float, Real))
    _check_numbers("entropy_coef", (entropy_coef,), (float, Real))
    check_bound("policy_loss", max_log_ratio, beyond)
    if (low is not None and not low >= 0) or (high is not None and not high >= 0):
        raise ValueError(f"policy_loss: clip must be >= 0 or None on each side, got {clip}")
    if dual_clip is not None and surrogate != "ppo":
        raise ValueError(f"policy_loss: dual_clip={dual_clip} needs surrogate='ppo'")
    if dual_clip is not None and not 1 < dual_clip < math.inf:
        raise ValueError(f"policy_loss: dual_clip must be finite and > 1, got {dual_clip}")
    if not (0 < tau_positive < math.inf and 0 < tau_negative < math.inf):
        raise ValueError(f"policy_loss: tau must be finite and > 0, got {tau}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"policy_loss: kl_coef must be finite and >= 0, got {kl_coef}")
    if not -math.inf < entropy_coef < math.inf:
        raise ValueError(f"policy_loss: entropy_coef must be finite, got {entropy_coef}")
    if kl == "k1":
        raise ValueError("policy_loss: kl='k1' has expected gradient 0; put k1 in the rewards")
    check_choice("policy_loss", "kl", kl, KLS)
    if ref_logp is None and kl_coef != 0:
        raise ValueError(f"policy_loss: kl_coef={kl_coef} needs ref_logp")
    return LossOptions(
        low=-math.inf if low is None else 1.0 - low,
        high=math.inf if high is None else 1.0 + high,
        dual_clip=math.inf if dual_clip is None else dual_clip,
        tau_positive=tau_positive,
        tau_negative=tau_negative,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        max_log_ratio=max_log_ratio,
        beyond=BEYOND[beyond],
    )


def as_traced(options: LossOptions, device: torch.device) -> tuple[LossOptions, Tensor | None]:
    """The options as the op takes them: in a graph a tensor, as floats compile anew for a value."""
    if not torch.compiler.is_compiling():
        return options, None
    numbers = [scalar(number, torch.float64, device) for number in options]
    return LossOptions(*[0.0] * len(options)), torch.stack(numbers)


def _check_numbers(name: str, values: Iterable[object], kinds: tuple[type, ...]) -> None:
    for value in values:
        if not isinstance(value, kinds):
            got = type(value).__name__
            raise TypeError(f"policy_loss: {name} must be a number, got {got}")


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"policy_loss: {name} must be a pair, got {value}")
    return value[0], value[1]
