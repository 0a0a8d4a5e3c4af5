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

Log-ratios are clamped to ±max_log_ratio; `beyond` says whether that stops their gradient. One of
two log-probs of −inf, as of a label outside a kept set, is 0; one of −inf alone is at its bound.
Neither has a gradient, nor has a token with logp = −inf.

Forward writes one coefficient per token, dL/dlogp_t; backward multiplies it by the incoming scalar.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..._op import Op
from ..common import checks
from ..common.log_ratio import (
    MAX_LOG_RATIO,
    Beyond,
    Moving,
    bounded,
    held_log_ratio,
    log_ratio,
    ratio_of,
)
from ..common.sizes import ElementSizes, SequenceSizes, element_sizes, sequence_sizes
from ..common.stats import PolicyStats, tally
from . import surrogates
from .surrogates import Clip, KlName, Level, LossOptions, SurrogateName

ENTROPY_COEF = LossOptions._fields.index("entropy_coef")


class Inputs(NamedTuple):
    logp: Tensor  # any shape, fp32 or fp64
    advantages: Tensor  # like logp
    weight: Tensor  # like logp; 0 masks a token
    old_logp: Tensor | None  # like logp; None: logp itself, as a constant
    sequence_log_ratio: Tensor | None  # like logp: for the surrogate; None: logp − old_logp
    ref_logp: Tensor | None  # like logp; None: there is no KL term
    entropy: Tensor | None  # like logp; None: there is no entropy term
    surrogate: str  # a key of SURROGATES
    kl: str  # a key of KLS
    options: LossOptions
    traced_options: Tensor | None  # fp64 [9]: the options in a compiled graph; None: they are above


class Outputs(NamedTuple):
    loss: Tensor  # [], in the dtype of logp
    coefficient: Tensor  # dL/dlogp, like logp
    stats: Tensor  # fp64, in the order of PolicyStats.FIELDS


class LogRatioInputs(NamedTuple):
    logp: Tensor  # [B, T], or packed [N] with cu_seqlens; fp32 or fp64
    old_logp: Tensor  # like logp
    weight: Tensor  # like logp; 0 masks a token
    cu_seqlens: Tensor | None  # int32 [B + 1]; None: padded


class LogRatio(NamedTuple):
    log_ratio: Tensor  # like logp: that of the token's sequence


class Saved(NamedTuple):
    """What backward needs."""

    coefficient: Tensor
    weight: Tensor | None  # None: the entropy gets no gradient
    traced_options: Tensor | None
    entropy_coef: float  # not read with traced_options


class Gradients(NamedTuple):
    grad_logp: Tensor
    grad_entropy: Tensor | None


def reference(x: Inputs) -> Outputs:
    """The specification: the tables at the top of this page."""
    options = x.options
    if x.traced_options is not None:
        options = LossOptions(*x.traced_options.to(x.logp.dtype))
    kept = x.weight != 0
    logp, weight = checks.where_kept(x.logp, kept), checks.where_kept(x.weight, kept)
    old_logp, ref_logp = checks.where_kept(x.old_logp, kept), checks.where_kept(x.ref_logp, kept)
    entropy = checks.where_kept(x.entropy, kept)
    # Without old_logp it is logp itself, whose ratio is 1; that of a NaN shows.
    d = held(logp, logp if old_logp is None else old_logp, options)
    # The KL of a token takes the token's own ratio, also where the surrogate takes another.
    token_ratio = ratio_of(d)
    ratio = token_ratio
    if x.sequence_log_ratio is not None:
        zero = torch.zeros_like(logp)
        mean = held(checks.where_kept(x.sequence_log_ratio, kept), zero, options)
        # A log-prob of −inf does not move the mean.
        ratio = ratio_of(Moving(mean.value, mean.slope.masked_fill(logp == -math.inf, 0.0)))
    surrogate = surrogates.SURROGATES[x.surrogate]
    term = surrogate(ratio, checks.where_kept(x.advantages, kept), logp, options)
    loss, slope, ref_kl = weight * term.value, term.slope, None
    if ref_logp is not None:
        kl = surrogates.KLS[x.kl](held(logp, ref_logp, options), token_ratio)
        loss = loss + weight * options.kl_coef * kl.value
        slope = slope + options.kl_coef * kl.slope
        ref_kl = kl.value
    if entropy is not None:
        loss = loss - weight * options.entropy_coef * entropy
    fields = {
        "loss": loss,
        "surrogate": weight * term.value,
        "clipped_low": term.too_low,
        "clipped_high": term.too_high,
        "clipped_dual": term.dual,
    }
    stats = tally(PolicyStats, fields | ratio_fields(kept, ratio.value, d.value, ref_kl, entropy))
    # torch wants outputs of their own memory, so the loss is a copy of the statistic.
    total = stats[PolicyStats.FIELDS.index("loss")].to(logp.dtype, copy=True)
    return Outputs(total, weight * slope, stats)


def held(logp: Tensor, other: Tensor, options: LossOptions) -> Moving:
    """logp − other within the bound of the options, and its derivative by logp."""
    return held_log_ratio(logp, other, options.max_log_ratio, options.beyond)


def ratio_fields(
    kept: Tensor, ratio: Tensor, d: Tensor, ref_kl: Tensor | None, entropy: Tensor | None
) -> dict[str, Tensor]:
    """What the statistics of the ratios, the KL and the entropy are made of, by their names."""
    real = torch.where(kept, ratio, 0.0)  # e^0 = 1 of a masked token must not be summed.
    return {
        "count": kept,
        "ratio": real,
        "ratio_sq": real**2,
        "k1": -d,
        "k3": torch.expm1(d) - d,
        "ref_kl": torch.zeros_like(ratio) if ref_kl is None else ref_kl,
        "entropy": torch.zeros_like(ratio) if entropy is None else entropy,
        "ratio_min": ratio.masked_fill(~kept, math.inf),
        "has_ref_kl": ratio.new_full((), float(ref_kl is not None)),
        "has_entropy": ratio.new_full((), float(entropy is not None)),
        "ratio_max": ratio.masked_fill(~kept, -math.inf),
    }


def allocate(x: Inputs) -> Outputs:
    """Makes an empty loss, empty coefficients and empty statistics."""
    return Outputs(
        x.logp.new_empty(()),
        empty_like(x.logp),
        x.logp.new_empty(len(PolicyStats.FIELDS), dtype=torch.float64),
    )


def sizes(x: Inputs) -> ElementSizes:
    """Tells C++ the dtype and the number of tokens."""
    return element_sizes(x.logp)


def reference_log_ratio(x: LogRatioInputs) -> LogRatio:
    """The mean of logp − old_logp over each token's sequence; 0 at masked tokens."""
    checks.check_cu_seqlens("policy_loss", x.cu_seqlens, x.weight)
    kept = x.weight != 0
    d = torch.where(kept, log_ratio(x.logp.double(), x.old_logp.double()), 0.0)
    # The mean is bounded later, not its terms: those of a long sequence cancel in it.
    d = torch.where(d.isinf(), bounded(d), d)
    count = checks.to_sequences(kept.double(), x.cu_seqlens).clamp(min=1)
    mean = (checks.to_sequences(d, x.cu_seqlens) / count).to(x.logp.dtype)
    return LogRatio(
        torch.where(kept, checks.to_tokens(mean, x.logp, x.cu_seqlens), 0.0).contiguous()
    )


def allocate_log_ratio(x: LogRatioInputs) -> LogRatio:
    """Makes empty log-ratios."""
    return LogRatio(empty_like(x.logp))


def log_ratio_sizes(x: LogRatioInputs) -> SequenceSizes:
    """Tells C++ the dtype, and the number and length of the sequences."""
    return sequence_sizes(x.logp, x.cu_seqlens, x.logp)


policy_loss_op = Op(
    "policy_loss",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    codes=surrogates.CODES,
    statistics=len(PolicyStats.FIELDS),
)
sequence_log_ratio_op = Op(
    "policy_loss_sequence_log_ratio",
    LogRatioInputs,
    LogRatio,
    page=__name__,
    reference=reference_log_ratio,
    allocate=allocate_log_ratio,
    sizes=log_ratio_sizes,
)


def _forward(x: Inputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    outputs = policy_loss_op(x)
    entropy_coef = x.options.entropy_coef
    # The weights are kept for backward only where a gradient goes to the entropy.
    has_gradient = x.entropy is not None and x.entropy.requires_grad
    counts = has_gradient and (x.traced_options is not None or entropy_coef != 0)
    weight = x.weight if counts else None
    saved = Saved(outputs.coefficient, weight, x.traced_options, entropy_coef)
    return (outputs.loss, outputs.stats), saved


def _backward(saved: Saved, grad_loss: Tensor) -> Gradients:
    grad_logp, grad_entropy = grad_loss * saved.coefficient, None
    if saved.weight is not None:
        entropy_coef: float | Tensor = saved.entropy_coef
        if saved.traced_options is not None:
            entropy_coef = saved.traced_options[ENTROPY_COEF]
        grad_entropy = grad_loss * -entropy_coef * saved.weight
    return Gradients(grad_logp, grad_entropy)


_policy_loss = Differentiable(
    "policy_loss",
    inputs=Inputs,
    saved=Saved,
    differentiable=("logp", "entropy"),
    forward=_forward,
    backward=_backward,
    constants=1,
)


def _sequence_log_ratio(
    level: str, logp: Tensor, old_logp: Tensor | None, weight: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
    """The log-ratio of each token's sequence; None at another level, or where every one is 0."""
    if level == "token":
        return None
    if level != "sequence":
        raise ValueError(f"policy_loss: level must be token or sequence, got {level!r}")
    checks.sequence_count("policy_loss", "logp", logp, cu_seqlens)
    if old_logp is not None:
        tokens = LogRatioInputs(logp.detach(), old_logp.detach(), weight.detach(), cu_seqlens)
        return sequence_log_ratio_op(tokens).log_ratio
    if not torch.compiler.is_compiling():  # A graph cannot branch on values.
        checks.check_cu_seqlens("policy_loss", cu_seqlens, logp)
    return None


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    old_logp: Tensor | None = None,
    clip: Clip = (0.2, 0.2),
    dual_clip: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    surrogate: SurrogateName = "ppo",
    level: Level = "token",
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KlName = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    max_log_ratio: float = MAX_LOG_RATIO,
    beyond: Beyond = "stop",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """The policy-gradient loss of tokens, weighted and summed, with its KL and entropy terms.

    L = Σ weight · (s + kl_coef · KL − entropy_coef · H), with r = exp(logp − old_logp) and s by the
    surrogate. "sg" holds what it is given constant.

    Args:
        logp: Log-probs of the sampled tokens, in nats; any shape and float dtype; differentiable.
            The other tensors have its shape, and any float dtype.
        advantages: A, a constant.
        weight: w, a constant, as from token_weights. Weight 0 masks a token: it is not read, gets
            no gradient and is not counted.
        old_logp: The log-probs when the tokens were sampled, a constant. None: logp itself; the
            ratio is then exactly 1.
        clip: (low, high), each >= 0: "ppo" and "cispo" bound r by 1 − low and 1 + high; None on a
            side leaves it unbounded, as does a low of 1 or more, for r is positive.
        dual_clip: > 1; bounds r of "ppo" where A < 0, and so the loss by −dual_clip · A.
        tau: > 0, of "sapo": where A >= 0, and where A < 0. The larger, the faster the gradient
            fades as r leaves 1.
        surrogate: "ppo" is −min(r A, clip(r) A); "reinforce" is −sg(r) A logp, and never clips;
            "cispo" is −sg(clip(r)) A logp: clipped tokens keep a gradient; "sapo" is
            −4/τ σ(τ (r − 1)) A, a gate in place of a clip.
        level: "token" takes the token's own r; "sequence" takes exp(mean of logp − old_logp) over
            the unmasked tokens of its sequence (GSPO), for tokens [B, T], or [N] with cu_seqlens.
        ref_logp: The log-probs under the reference policy, a constant. With kl_coef = 0 its KL is
            counted and no more.
        kl_coef: >= 0; needs ref_logp.
        kl: How KL(policy ‖ reference) is estimated, with d = logp − ref_logp. "k3" is
            r (e^{−d} − 1 + d), whose gradient is that of the KL, off policy too; "k3_naive" is the
            same without r, whose gradient is that of KL(reference ‖ policy); "k2" is d² / 2.
        entropy: H of each token's distribution in nats, as from token_logprobs; differentiable.
        entropy_coef: Any finite number; needs entropy.
        max_log_ratio: The bound, > 0 and <= 40, of logp − old_logp (of its mean at level
            "sequence") and of logp − ref_logp. GSPO in verl has 10.
        beyond: What the gradient is where a log-ratio is beyond that bound. "stop": none, as in
            verl, OpenRLHF and whatever clamps in torch, since 20 nats are no step of a policy but a
            fault of data or engines, whose gradient would be e^20 times that of another token.
            "hold": that at the bound, so that "k2" and "k3" still pull a policy back from afar.
            "reinforce" and "cispo" differentiate no ratio: their gradient is the same either way.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end; read by level="sequence".

    Returns:
        (loss, stats): a scalar, fp32, or fp64 if an input is fp64; and `PolicyStats`.

    Raises:
        TypeError: An argument is no tensor or number, or has a dtype that it cannot have.
        ValueError: A shape, a device or a value does not fit; the message names it.

    Example:
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> advantages, weight = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5])
        >>> loss, stats = fastpg.policy_loss(logp, advantages, weight, surrogate="reinforce")
        >>> loss.backward()
        >>> logp.grad
        tensor([-0.5000,  0.5000])

    Reference:
        PPO: Schulman et al. 2017, arXiv:1707.06347. Dual clip: Ye et al. 2020, arXiv:1912.09729.
        CISPO: MiniMax 2025, arXiv:2506.13585. GSPO: Zheng et al. 2025, arXiv:2507.18071. SAPO: Gao
        et al. 2025, arXiv:2511.20347. KL: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    logp, advantages, weight, old_logp, ref_logp, entropy = checks.alike(
        "policy_loss",
        ("old_logp", "ref_logp", "entropy"),
        logp=logp,
        advantages=advantages,
        weight=weight,
        old_logp=old_logp,
        ref_logp=ref_logp,
        entropy=entropy,
    )
    options = surrogates.check_options(
        clip=clip,
        dual_clip=dual_clip,
        tau=tau,
        surrogate=surrogate,
        kl=kl,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        max_log_ratio=max_log_ratio,
        beyond=beyond,
        ref_logp=ref_logp,
    )
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"policy_loss: entropy_coef={entropy_coef} needs entropy")
    options, traced = surrogates.as_traced(options, logp.device)
    inputs = Inputs(
        logp=logp,
        advantages=advantages,
        weight=weight,
        old_logp=old_logp,
        sequence_log_ratio=_sequence_log_ratio(level, logp, old_logp, weight, cu_seqlens),
        ref_logp=ref_logp,
        entropy=entropy,
        surrogate=surrogate,
        kl=kl,
        options=options,
        traced_options=traced,
    )
    loss, stats = _policy_loss(inputs)
    return loss, PolicyStats(stats)
