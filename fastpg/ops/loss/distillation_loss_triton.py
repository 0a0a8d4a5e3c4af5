"""distillation_loss on the GPU: the maths of csrc/loss/distillation_loss.h, a token to a program.

Each program writes its statistics to a line of `parts`, whose sum torch takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._record import contiguous
from ..common.stats import DistillationStats
from ..common.triton import (
    INFINITY,
    MAX_LOG_RATIO,
    OPTIONS,
    bounded,
    exp_excess,
    field_of,
    jit,
    log_ratio,
    number,
)
from .distillation_loss import Inputs, Outputs, allocate

FIELDS = tl.constexpr(len(DistillationStats.FIELDS))
COUNT = field_of(DistillationStats, "count")
LOSS = field_of(DistillationStats, "loss")
DIVERGENCE = field_of(DistillationStats, "divergence")
STUDENT_TAIL = field_of(DistillationStats, "student_tail")
TEACHER_TAIL = field_of(DistillationStats, "teacher_tail")


@triton.jit
def tail_of(logp: tl.tensor, p: tl.tensor, place: tl.tensor):
    """What the kept tokens leave of 1: nothing cancels as it goes to 0."""
    top = tl.max(logp, 0)
    # This is the first of them, if there are several.
    likeliest = place == tl.min(tl.where(logp == top, place, place.shape[0]), 0)
    finite_top = tl.where(top == -INFINITY, 0.0, top)  # infinities would meet in the sum
    _, excess = exp_excess(finite_top)
    less = tl.where(top == -INFINITY, 1.0, -(excess + finite_top))  # 1 - p of the likeliest
    tail = less - tl.sum(tl.where(likeliest, 0.0, p), 0)
    return tl.where(tail < 0, 0.0, tail)


@triton.jit
def finite_log_ratio(log_p: tl.tensor, log_q: tl.tensor):
    """log(p / q), within the bound of log-ratios where only one of them is 0."""
    d = log_ratio(log_p, log_q)
    return tl.where(tl.abs(d) == INFINITY, bounded(d, MAX_LOG_RATIO), d)


@triton.jit
def divergence_of(
    p: tl.tensor,
    q: tl.tensor,
    log_p: tl.tensor,
    log_q: tl.tensor,
    beta: tl.tensor,
    KIND: tl.constexpr,
):
    """What buckets add to the divergence, and u of the page."""
    if KIND == "forward_kl":
        some = p != 0
        u = tl.where(some, -q / tl.where(some, p, 1.0), 0.0)
        return q * finite_log_ratio(log_q, log_p), u
    elif KIND == "reverse_kl":
        d = finite_log_ratio(log_p, log_q)
        return p * d, d
    else:
        # m is the mixture of both: it is 0 only where both are.
        log_m = tl.log((1.0 - beta) * p + beta * q)
        d = finite_log_ratio(log_p, log_m)
        of_teacher = q * finite_log_ratio(log_q, log_m)
        return beta * of_teacher + (1.0 - beta) * p * d, (1.0 - beta) * d


@jit
def forward_kernel(
    logp: tl.tensor,
    teacher_logp: tl.tensor,
    weight: tl.tensor,
    coefficient: tl.tensor,
    parts: tl.tensor,
    kept: tl.int64,
    beta: tl.float64,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The coefficients of a token, dL/dlogp, and its statistics."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    offset = token * kept + place
    w = tl.load(weight + token).to(tl.float64)
    live = place < tl.where(w != 0, kept, 0)  # nothing is read of a masked token
    log_p = tl.load(logp + offset, mask=live, other=-INFINITY).to(tl.float64)
    log_q = tl.load(teacher_logp + offset, mask=live, other=-INFINITY).to(tl.float64)
    p, q, share = tl.exp(log_p), tl.exp(log_q), number(beta, w)
    p_tail, q_tail = tail_of(log_p, p, place), tail_of(log_q, q, place)
    # All tokens that were not kept make one more bucket.
    tail, u_tail = divergence_of(p_tail, q_tail, tl.log(p_tail), tl.log(q_tail), share, KIND)
    terms, u = divergence_of(p, q, log_p, log_q, share, KIND)
    value = tl.sum(terms, 0) + tail
    pull = -q if KIND == "forward_kl" else p * u
    slope = tl.where(log_p == -INFINITY, 0.0, w * (pull - p * u_tail))
    tl.store(coefficient + offset, slope, mask=place < kept)
    part, counts = parts + token * FIELDS, w != 0
    tl.store(part + COUNT, counts.to(tl.float64))
    tl.store(part + LOSS, w * value)
    tl.store(part + DIVERGENCE, tl.where(counts, value, 0.0))
    tl.store(part + STUDENT_TAIL, tl.where(counts, p_tail, 0.0))
    tl.store(part + TEACHER_TAIL, tl.where(counts, q_tail, 0.0))


def distillation_loss(x: Inputs) -> Outputs:
    """Launches a program for each token, and adds up what they have left."""
    x, outputs = contiguous(x), allocate(x)
    count, kept = x.weight.numel(), x.logp.shape[-1]
    parts = x.logp.new_empty((count, FIELDS.value), dtype=torch.float64)
    if count:
        forward_kernel[(count,)](
            logp=x.logp,
            teacher_logp=x.teacher_logp,
            weight=x.weight,
            coefficient=outputs.coefficient,
            parts=parts,
            kept=kept,
            beta=x.beta,
            KIND=x.divergence,
            BLOCK=triton.next_power_of_2(kept),
            **OPTIONS,
        )
    stats = parts.sum(0)
    return Outputs(stats[LOSS.value].to(x.logp.dtype, copy=True), outputs.coefficient, stats)
