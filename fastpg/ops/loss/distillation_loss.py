"""The divergence of a student from its teacher over kept tokens, with the others as one bucket.

    L = Σ_t w_t D_t        p, q: probabilities of student and teacher; m = (1 − β) p + β q

    divergence   D                                        u, with dD/dlogp_k = p_k (u_k − u_tail)
    forward_kl   Σ q log(q / p)                           −q / p
    reverse_kl   Σ p log(p / q)                           log(p / q)
    jsd          β Σ q log(q / m) + (1 − β) Σ p log(p / m)  (1 − β) log(p / m)

Sums go over the K tokens and the tail, 1 − Σ_k. All of it is in fp64. The tail begins with 1 − p of
the likeliest token, by expm1, so that it keeps its digits as it goes to 0; log-probs that sum to
more than 1 leave a tail of 0.

A bucket of probability 0 in both counts 0. Of one alone its log-ratio, which is infinite, is ±20,
so that a token which only one of them has kept costs a finite number. A log-prob of −inf of the
student has no gradient. p_k u_k of forward_kl is −q_k, also where p_k underflows to 0.

Forward writes one coefficient per log-prob, dL/dlogp; backward multiplies it by the incoming
scalar.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import DTYPE_CODE, empty_like
from ..._op import Op
from ..common.checks import alike, cast, check_choice, check_number, check_shape, compute_dtype
from ..common.log_ratio import bounded, log_ratio
from ..common.stats import DistillationStats

OP = "distillation_loss"
DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}  # codes of csrc/loss/distillation_loss.h


class Inputs(NamedTuple):
    logp: Tensor  # [..., K], fp32 or fp64
    teacher_logp: Tensor  # like logp
    weight: Tensor  # [...], in the dtype of logp; 0 masks a token
    divergence: str  # a key of DIVERGENCES
    beta: float  # in (0, 1), of jsd


class Outputs(NamedTuple):
    loss: Tensor  # [], in the dtype of logp
    coefficient: Tensor  # dL/dlogp, like logp
    stats: Tensor  # fp64, in the order of DistillationStats.FIELDS


class Saved(NamedTuple):
    """What backward needs."""

    coefficient: Tensor


class Gradients(NamedTuple):
    grad_logp: Tensor


class Buckets(NamedTuple):
    """A distribution [..., K + 1], its tail the last."""

    p: Tensor
    log_p: Tensor


def with_tail(logp: Tensor) -> Buckets:
    """The K tokens and their tail."""
    p = logp.exp()
    likeliest, place = logp.max(-1, keepdim=True)
    others = p.scatter(-1, place, 0.0).sum(-1, keepdim=True)
    tail = (-torch.expm1(likeliest) - others).clamp(min=0)
    return Buckets(torch.cat([p, tail], -1), torch.cat([logp, tail.log()], -1))


def finite_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(p / q), ±20 where only one of them is 0."""
    d = log_ratio(log_p, log_q)
    return torch.where(d.isinf(), bounded(d), d)


def divergence_of(student: Buckets, teacher: Buckets, x: Inputs) -> tuple[Tensor, Tensor]:
    """D of each token, and u of each bucket."""
    p, q = student.p, teacher.p
    if x.divergence == "forward_kl":
        terms = q * finite_log_ratio(teacher.log_p, student.log_p)
        # No gradient comes through a tail that is empty: p times q / p would be NaN.
        return terms.sum(-1), torch.where(p == 0, 0.0, -q / p)
    if x.divergence == "reverse_kl":
        d = finite_log_ratio(student.log_p, teacher.log_p)
        return (p * d).sum(-1), d
    log_m = ((1 - x.beta) * p + x.beta * q).log()
    d = finite_log_ratio(student.log_p, log_m)
    of_teacher = q * finite_log_ratio(teacher.log_p, log_m)
    return (x.beta * of_teacher + (1 - x.beta) * p * d).sum(-1), (1 - x.beta) * d


def reference(x: Inputs) -> Outputs:
    """The specification: the table at the top of this page."""
    kept = x.weight != 0
    weight = torch.where(kept, x.weight, 0.0).double()
    student, teacher = (
        with_tail(torch.where(kept[..., None], logp, -math.inf).double())
        for logp in (x.logp, x.teacher_logp)
    )
    value, u = divergence_of(student, teacher, x)
    pull = -teacher.p if x.divergence == "forward_kl" else student.p * u
    slope = pull[..., :-1] - student.p[..., :-1] * u[..., -1:]
    slope = torch.where(x.logp == -math.inf, 0.0, slope)
    loss = (weight * value).sum()
    fields = {
        "count": kept,
        "loss": loss,
        "divergence": torch.where(kept, value, 0.0),
        "student_tail": torch.where(kept, student.p[..., -1], 0.0),
        "teacher_tail": torch.where(kept, teacher.p[..., -1], 0.0),
    }
    sums = [fields[name].sum(dtype=torch.float64) for name in DistillationStats.FIELDS]
    coefficient = torch.where(kept[..., None], weight[..., None] * slope, 0.0)
    return Outputs(
        loss.to(x.logp.dtype), coefficient.to(x.logp.dtype).contiguous(), torch.stack(sums)
    )


def allocate(x: Inputs) -> Outputs:
    """Makes an empty loss, empty coefficients and empty statistics."""
    return Outputs(
        x.logp.new_empty(()),
        empty_like(x.logp),
        x.logp.new_empty(len(DistillationStats.FIELDS), dtype=torch.float64),
    )


class Sizes(NamedTuple):
    """The integers that C++ takes first."""

    dtype: int  # of every array
    token_count: int
    kept_count: int  # K


def sizes(x: Inputs) -> Sizes:
    """Tells C++ the dtype and the shape."""
    return Sizes(DTYPE_CODE[x.logp.dtype], x.weight.numel(), x.logp.shape[-1])


distillation_loss_op = Op(
    OP,
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    codes={"divergence": DIVERGENCES},
)


def _forward(x: Inputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    outputs = distillation_loss_op(x)
    return (outputs.loss, outputs.stats), Saved(outputs.coefficient)


def _backward(saved: Saved, grad_loss: Tensor) -> Gradients:
    return Gradients(grad_loss * saved.coefficient)


_distillation_loss = Differentiable(
    OP,
    inputs=Inputs,
    saved=Saved,
    differentiable=("logp",),
    forward=_forward,
    backward=_backward,
    constants=1,
)


def distillation_loss(
    logp: Tensor,
    teacher_logp: Tensor,
    weight: Tensor,
    *,
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl",
    beta: float = 0.5,
) -> tuple[Tensor, DistillationStats]:
    """The divergence of a student from its teacher over K kept tokens, weighted and summed.

    L = Σ weight · D. The divergence D is that of p, the student's distribution, from q, the
    teacher's, over the K tokens and one more bucket: all other tokens, with what is left of 1.

    Args:
        logp: Log-probs [..., K] of K tokens under the student, in nats, of a whole distribution:
            their probabilities sum to at most 1. No op checks the values of log-probs: where these
            sum to more, nothing is left for the other tokens. Any float dtype; differentiable.
        teacher_logp: The same tokens under the teacher, of the same shape; a constant.
        weight: [...], as from token_weights; a constant. Weight 0 masks a token: its log-probs are
            not read, and it has no gradient and is not counted.
        divergence: "reverse_kl" is KL(student ‖ teacher) = Σ p log(p / q), "forward_kl" is
            KL(teacher ‖ student) = Σ q log(q / p), "jsd" the generalised Jensen-Shannon divergence
            β KL(teacher ‖ m) + (1 − β) KL(student ‖ m) with m = (1 − β) p + β q.
        beta: β of "jsd", in (0, 1), as in GKD and TRL: near 0 it is forward_kl times β, near 1
            reverse_kl times 1 − β.

    Returns:
        (loss, stats): a scalar, fp32, or fp64 if an input is fp64; and `DistillationStats`. A
        bucket that is 0 in one of them alone has a log-ratio of ±20 in place of an infinite one; a
        log-prob of −inf has no gradient.

    Raises:
        TypeError: An argument is no tensor or number, or not of a floating dtype.
        ValueError: A shape or device does not fit, K is 0, divergence is unknown, or beta is not in
            (0, 1).

    Example:
        >>> logp = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
        >>> teacher_logp, weight = torch.tensor([[0.25, 0.5]]).log(), torch.ones(1)
        >>> loss, stats = fastpg.distillation_loss(logp, teacher_logp, weight)
        >>> loss.backward()
        >>> loss.item(), logp.grad
        (0.1732867956161499, tensor([[ 0.3466, -0.1733]]))

    Reference:
        Agarwal et al. 2024, "On-policy distillation of language models" (GKD), arXiv:2306.13649.
    """
    logp, teacher_logp = alike(OP, logp=logp, teacher_logp=teacher_logp)
    dtype = compute_dtype(OP, logp=logp, weight=weight)
    if logp.dim() == 0 or logp.shape[-1] == 0:
        raise ValueError(f"{OP}: logp must be [..., K] with K > 0, got {tuple(logp.shape)}")
    check_shape(OP, "weight", weight, logp, logp.shape[:-1])
    check_choice(OP, "divergence", divergence, DIVERGENCES)
    check_number(OP, "beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"{OP}: beta must be in (0, 1), got {beta}")
    inputs = Inputs(
        logp=cast(logp, dtype),
        teacher_logp=cast(teacher_logp.detach(), dtype),
        weight=cast(weight.detach(), dtype),
        divergence=divergence,
        beta=float(beta),
    )
    loss, stats = _distillation_loss(inputs)
    return loss, DistillationStats(stats)
