"""Policy-gradient losses of tokens, with their KL and entropy terms, in one pass.

    L = Σ_t w_t (s_t + kl_coef · KL_t − entropy_coef · H_t)        r = exp(logp − old_logp)

    surrogate      s                                   c, with ds/dlogp = −c
    ppo            −min(r A, clip(r, lo, hi) A)        r A, or 0 where clipping is the minimum
    reinforce      −sg(r) A logp                       r A
    cispo          −sg(clip(r, lo, hi)) A logp         clip(r, lo, hi) A
    sapo           −4/τ σ(τ (r − 1)) A                 4 σ (1 − σ) r A

    kl, d = logp − ref_logp      value                 derivative by logp
    k3                           r (e^{−d} − 1 + d)    r d: the gradient of KL(policy ‖ reference)
    k3_naive                     e^{−d} − 1 + d        1 − e^{−d}: of KL(reference ‖ policy)
    k2                           d² / 2                d

Each is the KL of a token given its prefix. That earlier tokens decide over later prefixes is not in
the gradient; it is with k1 in the rewards, whose KL is that of the sequence.

With level="sequence" s and c take exp(mean_t (logp − old_logp)) of the token's sequence for r, as a
number that moves like the token's own ratio (GSPO-token). Tokens of weight 0 are not in that mean,
nor are those that importance_weights(outside="zero") has dropped.

Forward writes one coefficient per token, dL/dlogp_t; backward multiplies it by the incoming scalar.
Log-ratios are clamped to ±20, which bounds a gradient and does not stop it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import (
    _C,
    DTYPE_CODE,
    address,
    contiguous,
    cpu_kernel,
    cuda_kernel,
    define,
    scalar,
    scratch,
    triton_kernels,
)
from ..common.autograd import once_differentiable
from ..common.checks import (
    alike,
    check_cu_seqlens,
    constant,
    sequence_count,
    to_sequences,
    to_tokens,
)
from ..common.stats import PolicyStats, tally
from . import surrogates as _surrogates
from .surrogates import KLS, SURROGATES, Options, check_options, log_ratio, reference_kl


def reference(
    logp, advantages, weight, old_logp, ratio, ref_logp, entropy,
    surrogate, kl, options, device_options,
):  # fmt: skip
    """-> loss [], coefficient (dL/dlogp, of the shape of logp), stats [16].

    ratio: None, or what the surrogate takes in place of exp(logp − old_logp).
    options: the floats of Options, unless device_options holds them, fp64 [7].
    """
    options = Options(*(options if device_options is None else device_options.to(logp.dtype)))
    kept = weight != 0
    logp, advantages, weight, old_logp, ratio, ref_logp, entropy = (
        None if x is None else torch.where(kept, x, 0.0).contiguous()
        for x in (logp, advantages, weight, old_logp, ratio, ref_logp, entropy)
    )
    d = torch.zeros_like(logp) if old_logp is None else log_ratio(logp, old_logp)
    token_ratio = d.exp()
    ratio = token_ratio if ratio is None else ratio
    s, slope, too_low, too_high = getattr(_surrogates, surrogate)(ratio, advantages, logp, options)
    surrogate_loss, loss, ref_kl = weight * s, weight * s, None
    if ref_logp is not None:
        ref_kl, kl_slope = reference_kl(kl, log_ratio(logp, ref_logp), token_ratio)
        loss, slope = loss + weight * options.kl_coef * ref_kl, slope + options.kl_coef * kl_slope
    if entropy is not None:
        loss = loss - weight * options.entropy_coef * entropy
    real = torch.where(kept, ratio, 0.0)
    fields = {
        "count": kept,
        "weight": weight,
        "loss": loss,
        "surrogate": surrogate_loss,
        "ratio": real,
        "ratio_sq": real**2,
        "k1": -d,
        "k3": torch.expm1(d) - d,
        "clipped_low": too_low,
        "clipped_high": too_high,
        "ref_kl": torch.zeros_like(ratio) if ref_kl is None else ref_kl,
        "entropy": torch.zeros_like(ratio) if entropy is None else entropy,
        "ratio_min": ratio.masked_fill(~kept, math.inf),
        "has_ref_kl": ratio.new_full((), float(ref_logp is not None)),
        "has_entropy": ratio.new_full((), float(entropy is not None)),
        "ratio_max": ratio.masked_fill(~kept, -math.inf),
    }
    stats = tally(PolicyStats, fields)
    return stats[2].to(logp.dtype, copy=True), weight * slope, stats


def _fake(logp, *_):
    stats = logp.new_empty(16, dtype=torch.float64)
    return logp.new_empty(()), logp.new_empty(logp.shape), stats


_policy_loss = define(
    "policy_loss(Tensor logp, Tensor advantages, Tensor weight, Tensor? old_logp, "
    "Tensor? ratio, Tensor? ref_logp, Tensor? entropy, str surrogate, str kl, float[] options, "
    "Tensor? device_options) -> (Tensor loss, Tensor coefficient, Tensor stats)",
    fake=_fake,
    reference=reference,
)


def _launch(run, *args):
    logp, (surrogate, kl, options, device_options), scratch = args[0], args[7:11], args[11:]
    if logp.numel() == 0:  # an empty tensor has no address
        return reference(*args[:11])
    tensors = contiguous(*args[:7])
    out = _fake(logp)
    run(
        DTYPE_CODE[logp.dtype], logp.numel(), *map(address, tensors), SURROGATES[surrogate],
        KLS[kl], options, address(device_options), *map(address, out), *scratch,
    )  # fmt: skip
    return out


@cpu_kernel(_policy_loss)
def _policy_loss_cpu(*args):
    return _launch(_C.policy_loss, *args)


@cuda_kernel(_policy_loss)
def _policy_loss_cuda(run, *args):
    room, _alive = scratch(args[0], fields=16)
    return _launch(run, *args, room)


def reference_sequence_ratio(logp, old_logp, weight, cu_seqlens):
    """The ratio of each token's sequence, exp(mean (logp − old_logp)); 0 at masked tokens."""
    check_cu_seqlens("policy_loss", cu_seqlens, weight)
    kept = weight != 0
    d = torch.where(kept, logp.double() - old_logp.double(), 0.0)
    count = to_sequences(kept.double(), cu_seqlens).clamp(min=1)
    mean = to_sequences(d, cu_seqlens) / count
    ratio = mean.clamp(-20.0, 20.0).exp().to(logp.dtype)
    return torch.where(kept, to_tokens(ratio, logp, cu_seqlens), 0.0)


_sequence_ratio = define(
    "policy_loss_sequence_ratio(Tensor logp, Tensor old_logp, Tensor weight, Tensor? cu_seqlens) "
    "-> Tensor",
    fake=lambda logp, *_: logp.new_empty(logp.shape),
    reference=reference_sequence_ratio,
)


def _launch_sequence_ratio(run, logp, old_logp, weight, cu_seqlens):
    tensors = contiguous(cu_seqlens, logp, old_logp, weight)
    ratio = logp.new_empty(logp.shape)
    count = len(logp) if cu_seqlens is None else len(cu_seqlens) - 1
    run(DTYPE_CODE[logp.dtype], count, logp.shape[-1], *map(address, [*tensors, ratio]))
    return ratio


@cpu_kernel(_sequence_ratio)
def _sequence_ratio_cpu(*args):
    return _launch_sequence_ratio(_C.policy_loss_sequence_ratio, *args)


cuda_kernel(_sequence_ratio)(_launch_sequence_ratio)
triton_kernels(__name__, _policy_loss, _sequence_ratio)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, constants, options):
        loss, coefficient, stats = _policy_loss(logp, *constants, entropy, *options)
        *_, (*_, ctx.entropy_coef), device_options = options
        wanted = ctx.needs_input_grad[1] and (device_options is not None or ctx.entropy_coef != 0)
        ctx.save_for_backward(coefficient, constants[1] if wanted else None, device_options)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # of stats: a launch on a GPU
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return None, None, None, None
        coefficient, weight, device_options = ctx.saved_tensors
        entropy_coef = ctx.entropy_coef if device_options is None else device_options[-1]
        by_entropy = None if weight is None else grad_loss * -entropy_coef * weight
        return grad_loss * coefficient, by_entropy, None, None


def check_terms(kl, kl_coef, ref_logp):
    if kl == "k1":
        raise ValueError("policy_loss: kl='k1' has expected gradient 0; put k1 in the rewards")
    if not isinstance(kl, str) or kl not in KLS:
        raise ValueError(f"policy_loss: kl must be one of {', '.join(KLS)}, got {kl!r}")
    if ref_logp is None and kl_coef != 0:
        raise ValueError(f"policy_loss: kl_coef={kl_coef} needs ref_logp")


def on_device(options, device):
    """As the op takes them: in a graph as a tensor, since a float compiles anew for each value."""
    if not torch.compiler.is_compiling():
        return options, None
    return [0.0] * len(options), torch.stack(
        [scalar(number, torch.float64, device) for number in options]
    )


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    clip: tuple[float | None, float | None] = (0.2, 0.2),
    dual_clip: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    surrogate: str = "ppo",
    level: str = "token",
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Σ weight · (surrogate + kl_coef · KL − entropy_coef · entropy), and what was counted.

    All tensors have the shape of logp and any float dtype. logp and entropy are differentiable, the
    others are constants. Weight 0 masks a token: not read, no gradient, not counted.
    old_logp: None means that logp was sampled from: the ratio is exactly 1.
    clip: "ppo" and "cispo" bound the ratio by 1 - low and 1 + high, None on a side: unbounded.
    dual_clip: > 1, bounds the ratio of "ppo" where A < 0, and so the loss by -dual_clip A.
    tau: > 0, of "sapo": where A >= 0, where A < 0; the larger, the faster the gradient fades.
    ref_logp: with kl_coef = 0 its KL is counted and no more.
    level: "sequence" takes the mean log-ratio of each sequence; tokens are [B, T], or packed [N]
    with cu_seqlens (int32 [B + 1]), which no other level reads.
    Returns (loss, stats): a scalar, fp32 (fp64 if an input is fp64), and PolicyStats.
    """
    logp, advantages, weight, old_logp, ref_logp, entropy = alike(
        "policy_loss", ("old_logp", "ref_logp", "entropy"), logp=logp, advantages=advantages,
        weight=weight, old_logp=old_logp, ref_logp=ref_logp, entropy=entropy,
    )  # fmt: skip
    options = check_options(clip, dual_clip, tau, surrogate, kl_coef, entropy_coef)
    check_terms(kl, kl_coef, ref_logp)
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"policy_loss: entropy_coef={entropy_coef} needs entropy")
    ratio = None
    if level == "sequence":
        sequence_count("policy_loss", "logp", logp, cu_seqlens)
        if old_logp is not None:
            ratio = _sequence_ratio(logp.detach(), old_logp.detach(), weight.detach(), cu_seqlens)
        elif not torch.compiler.is_compiling():  # a graph cannot branch on values
            check_cu_seqlens("policy_loss", cu_seqlens, logp)
    elif level != "token":
        raise ValueError(f"policy_loss: level must be token or sequence, got {level!r}")
    constants = advantages, weight, old_logp, ratio, ref_logp
    options = surrogate, kl, *on_device(options, logp.device)
    if constant(logp, *constants, entropy):
        loss, _, stats = _policy_loss(logp, *constants, entropy, *options)
    else:
        loss, stats = _PolicyLoss.apply(logp, entropy, constants, options)
    return loss, PolicyStats(stats)
