"""Policy-gradient losses of tokens, with their KL and entropy terms, in one pass.

    L = Σ_t w_t (s_t + kl_coef · KL_t − entropy_coef · H_t)        r = exp(logp − old_logp)

    surrogate      s                                   c, with ds/dlogp = −c
    ppo            −min(r A, clip(r, lo, hi) A)        r A, or 0 where clipping is the minimum
    reinforce      −sg(r) A logp                       r A

    kl, d = logp − ref_logp      value                 derivative by logp
    k3                           r (e^{−d} − 1 + d)    r d: the gradient of KL(policy ‖ reference)
    k3_naive                     e^{−d} − 1 + d        1 − e^{−d}: of KL(reference ‖ policy)
    k2                           d² / 2                d

Forward writes one coefficient per token, dL/dlogp_t; backward multiplies it by the incoming scalar.
Log-ratios are clamped to ±20, which bounds a gradient and does not stop it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import _C, DTYPE_CODE, address, contiguous, cpu_kernel, define, scalar
from ._checks import alike, constant
from ._stats import PolicyStats

SURROGATES = {"ppo": 0, "reinforce": 1}  # the codes of csrc/policy_loss.h
KLS = {"k3": 0, "k3_naive": 1, "k2": 2}


def _log_ratio(logp, other):
    return (logp - other).clamp(-20.0, 20.0)


def _ppo(ratio, advantages, logp, low, high):
    """s, ds/dlogp, and where each bound is in force."""
    too_low = (advantages < 0) & (ratio < low)
    too_high = (advantages > 0) & (ratio > high)
    bounded = ratio.masked_fill(too_low, low).masked_fill(too_high, high)
    slope = torch.where(too_low | too_high, 0.0, -ratio * advantages)
    return -bounded * advantages, slope, too_low, too_high


def _reinforce(ratio, advantages, logp, low, high):
    never = torch.zeros_like(ratio, dtype=torch.bool)
    slope = -ratio * advantages
    return torch.where(advantages == 0, 0.0, slope * logp), slope, never, never


def _reference_kl(kl, d, ratio):
    """The KL term and its derivative by logp."""
    if kl == "k2":
        return d * d / 2, d
    k3 = torch.expm1(-d) + d
    return (ratio * k3, ratio * d) if kl == "k3" else (k3, -torch.expm1(-d))


def _stats(kept, weight, loss, surrogate, ratio, d, too_low, too_high, ref_kl, entropy):
    """[16] in the order of PolicyStats.FIELDS; masked tokens are out of every field."""
    real = torch.where(kept, ratio, 0.0)
    sums = [kept, weight, loss, surrogate, real, real**2, -d, torch.expm1(d) - d, too_low, too_high]
    zero = torch.zeros_like(ratio)
    sums += [zero if x is None else x for x in (ref_kl, entropy)]
    flags = [ratio.new_full((), float(x is not None)) for x in (ref_kl, entropy)]
    padded = torch.nn.functional.pad  # an empty tensor has no minimum
    least = padded(ratio.masked_fill(~kept, math.inf).flatten(), (0, 1), value=math.inf).amin()
    most = padded(ratio.masked_fill(~kept, -math.inf).flatten(), (0, 1), value=-math.inf).amax()
    fields = [*(x.sum(dtype=torch.float64) for x in sums), least, *flags, most]
    return torch.stack([field.double() for field in fields])


def reference(
    logp, advantages, weight, old_logp, ref_logp, entropy,
    low, high, surrogate, kl, kl_coef, entropy_coef, coefs=None,
):  # fmt: skip
    """-> loss [], coefficient (dL/dlogp, of the shape of logp), stats [16]. low, high bound r.

    coefs: None, or (kl_coef, entropy_coef) as fp64 [2], in place of the floats.
    """
    kl_coef, entropy_coef = (kl_coef, entropy_coef) if coefs is None else coefs.to(logp.dtype)
    kept = weight != 0
    logp, advantages, weight, old_logp, ref_logp, entropy = (
        None if x is None else torch.where(kept, x, 0.0).contiguous()
        for x in (logp, advantages, weight, old_logp, ref_logp, entropy)
    )
    d = torch.zeros_like(logp) if old_logp is None else _log_ratio(logp, old_logp)
    ratio = d.exp()
    term = _ppo if surrogate == "ppo" else _reinforce
    value, slope, too_low, too_high = term(ratio, advantages, logp, low, high)
    surrogate_loss, loss, ref_kl = weight * value, weight * value, None
    if ref_logp is not None:
        ref_kl, kl_slope = _reference_kl(kl, _log_ratio(logp, ref_logp), ratio)
        loss, slope = loss + weight * kl_coef * ref_kl, slope + kl_coef * kl_slope
    if entropy is not None:
        loss = loss - weight * entropy_coef * entropy
    stats = _stats(
        kept, weight, loss, surrogate_loss, ratio, d, too_low, too_high, ref_kl, entropy
    )  # fmt: skip
    return stats[2].to(logp.dtype), weight * slope, stats


def _fake(logp, *_):
    stats = logp.new_empty(16, dtype=torch.float64)
    return logp.new_empty(()), logp.new_empty(logp.shape), stats


_policy_loss = define(
    "policy_loss(Tensor logp, Tensor advantages, Tensor weight, Tensor? old_logp, "
    "Tensor? ref_logp, Tensor? entropy, float low, float high, str surrogate, str kl, "
    "float kl_coef, float entropy_coef, Tensor? coefs=None) -> "
    "(Tensor loss, Tensor coefficient, Tensor stats)",
    fake=_fake,
    reference=reference,
)


@cpu_kernel(_policy_loss)
def _policy_loss_cpu(*args):
    logp, (low, high, surrogate, kl, kl_coef, entropy_coef), coefs = args[0], args[6:12], args[12:]
    if logp.numel() == 0:  # an empty tensor has no address
        return reference(*args)
    if coefs and coefs[0] is not None:
        kl_coef, entropy_coef = coefs[0].tolist()
    tensors = contiguous(*args[:6])
    loss, coefficient = logp.new_empty(()), torch.empty_like(tensors[0])
    stats = logp.new_empty(16, dtype=torch.float64)
    _C.policy_loss(
        DTYPE_CODE[logp.dtype], logp.numel(), *map(address, tensors), low, high,
        SURROGATES[surrogate], KLS[kl], kl_coef, entropy_coef,
        loss.data_ptr(), coefficient.data_ptr(), stats.data_ptr(),
    )  # fmt: skip
    return loss, coefficient, stats


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, constants, options):
        loss, coefficient, stats = _policy_loss(logp, *constants, entropy, *options)
        *_, ctx.entropy_coef, coefs = options
        wanted = ctx.needs_input_grad[1] and (coefs is not None or ctx.entropy_coef != 0)
        ctx.save_for_backward(coefficient, constants[1] if wanted else None, coefs)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        coefficient, weight, coefs = ctx.saved_tensors
        entropy_coef = ctx.entropy_coef if coefs is None else coefs[1]
        by_entropy = None if weight is None else grad_loss * -entropy_coef * weight
        return grad_loss * coefficient, by_entropy, None, None


def _bounds(clip):
    """(1 - low, 1 + high), infinite where there is no bound."""
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"policy_loss: clip must be a pair (low, high), got {clip}")
    low, high = clip
    if (low is not None and not low >= 0) or (high is not None and not high >= 0):
        raise ValueError(f"policy_loss: clip must be >= 0 or None on each side, got {clip}")
    return -math.inf if low is None else 1.0 - low, math.inf if high is None else 1.0 + high


def _check_kl(kl, kl_coef, ref_logp):
    if kl == "k1":
        raise ValueError("policy_loss: kl='k1' has expected gradient 0; put k1 in the rewards")
    if kl not in KLS:
        raise ValueError(f"policy_loss: kl must be one of {', '.join(KLS)}, got {kl!r}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"policy_loss: kl_coef must be finite and >= 0, got {kl_coef}")
    if ref_logp is None and kl_coef != 0:
        raise ValueError(f"policy_loss: kl_coef={kl_coef} needs ref_logp")
    if ref_logp is not None and kl_coef == 0:
        raise ValueError("policy_loss: ref_logp needs kl_coef > 0, got 0")


def _coefficients(kl_coef, entropy_coef, device):
    """As the op takes them: in a graph as a tensor, since a float compiles anew for each value."""
    if not torch.compiler.is_compiling():
        return kl_coef, entropy_coef, None
    pair = [scalar(coef, torch.float64, device) for coef in (kl_coef, entropy_coef)]
    return 0.0, 0.0, torch.stack(pair)


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    clip: tuple[float | None, float | None] = (0.2, 0.2),
    surrogate: str = "ppo",
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, PolicyStats]:
    """Σ weight · (surrogate + kl_coef · KL − entropy_coef · entropy), and what was counted.

    All tensors have the shape of logp and any float dtype. logp and entropy are differentiable, the
    others are constants. Weight 0 masks a token: not read, no gradient, not counted.
    old_logp: None means that logp was sampled from: the ratio is exactly 1.
    clip: the ratio is bounded by 1 - low and 1 + high, None on a side: unbounded; for "ppo" only.
    Returns (loss, stats): a scalar, fp32 (fp64 if an input is fp64), and PolicyStats.
    """
    logp, *constants, entropy = alike(
        "policy_loss", logp=logp, advantages=advantages, weight=weight, old_logp=old_logp,
        ref_logp=ref_logp, entropy=entropy,
    )  # fmt: skip
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"policy_loss: entropy_coef={entropy_coef} needs entropy")
    if not -math.inf < entropy_coef < math.inf:
        raise ValueError(f"policy_loss: entropy_coef must be finite, got {entropy_coef}")
    if surrogate not in SURROGATES:
        names = ", ".join(SURROGATES)
        raise ValueError(f"policy_loss: surrogate must be one of {names}, got {surrogate!r}")
    low, high = _bounds(clip)
    _check_kl(kl, kl_coef, ref_logp)
    options = low, high, surrogate, kl, *_coefficients(kl_coef, entropy_coef, logp.device)
    if constant(logp, *constants, entropy):
        loss, _, stats = _policy_loss(logp, *constants, entropy, *options)
    else:
        loss, stats = _PolicyLoss.apply(logp, entropy, constants, options)
    return loss, PolicyStats(stats)
