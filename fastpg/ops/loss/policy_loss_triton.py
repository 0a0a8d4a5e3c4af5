"""policy_loss on the GPU: the maths of csrc/loss/policy_loss.h, a block of tokens to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._record import contiguous
from ..common.stats import PolicyStats
from ..common.triton import (
    BLOCK,
    INFINITY,
    MAX_LOG_RATIO,
    OPTIONS,
    block_offsets,
    blocks_of,
    bounded,
    field_of,
    jit,
    load_kept,
    log_ratio,
    sequence_bounds,
)
from .policy_loss import (
    Inputs,
    LogRatio,
    LogRatioInputs,
    Outputs,
    allocate,
    allocate_log_ratio,
)
from .surrogates_triton import options_of, token_loss

# The warps of forward_kernel: with 4, a thread's registers do not hold all terms of its tokens.
WARPS = 8
# merge_kernel takes so many partial results at a time: registers hold three times as many fields.
ROWS = tl.constexpr(64)

FIELDS = tl.constexpr(len(PolicyStats.FIELDS))  # a power of 2, as tl.arange demands
SUMS = tl.constexpr(len(PolicyStats.SUMS))  # the sums come first, then the minima, then the maxima
MINIMA_END = tl.constexpr(len(PolicyStats.SUMS + PolicyStats.MINIMA))
COUNT = field_of(PolicyStats, "count")
LOSS = field_of(PolicyStats, "loss")
SURROGATE_LOSS = field_of(PolicyStats, "surrogate")
RATIO = field_of(PolicyStats, "ratio")
RATIO_SQ = field_of(PolicyStats, "ratio_sq")
K1 = field_of(PolicyStats, "k1")
K3 = field_of(PolicyStats, "k3")
CLIPPED_LOW = field_of(PolicyStats, "clipped_low")
CLIPPED_HIGH = field_of(PolicyStats, "clipped_high")
CLIPPED_DUAL = field_of(PolicyStats, "clipped_dual")
REF_KL = field_of(PolicyStats, "ref_kl")
ENTROPY = field_of(PolicyStats, "entropy")
RATIO_MIN = field_of(PolicyStats, "ratio_min")
HAS_REF_KL = field_of(PolicyStats, "has_ref_kl")
HAS_ENTROPY = field_of(PolicyStats, "has_entropy")
RATIO_MAX = field_of(PolicyStats, "ratio_max")


@triton.jit
def put_sum(part: tl.tensor, field: tl.constexpr, x: tl.tensor):
    """Writes the sum of a block, in fp64 as every partial result."""
    tl.store(part + field, tl.sum(x.to(tl.float64), 0))


@triton.jit
def put_ratios(part: tl.tensor, ratio: tl.tensor, kept: tl.tensor):
    """The statistics of the ratios that the surrogate took."""
    real = tl.where(kept, ratio, 0.0)
    put_sum(part, RATIO, real)
    put_sum(part, RATIO_SQ, real * real)
    ordered = kept & (ratio == ratio)  # merge_kernel sees a NaN in the sum
    tl.store(part + RATIO_MIN, tl.min(tl.where(ordered, ratio, INFINITY), 0))
    tl.store(part + RATIO_MAX, tl.max(tl.where(ordered, ratio, -INFINITY), 0))


@jit
def forward_kernel(
    logp: tl.tensor,
    advantages: tl.tensor,
    weight: tl.tensor,
    old_logp: tl.tensor,
    sequence_log_ratio: tl.tensor,
    ref_logp: tl.tensor,
    entropy: tl.tensor,
    traced_options: tl.tensor,
    coefficient: tl.tensor,
    parts: tl.tensor,
    count: tl.int64,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    tau_positive: tl.float64,
    tau_negative: tl.float64,
    kl_coef: tl.float64,
    entropy_coef: tl.float64,
    max_log_ratio: tl.float64,
    beyond: tl.float64,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
):
    """The coefficients of a block, dL/dlogp, and its statistics."""
    offset = block_offsets()
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    w = tl.load(weight + offset, mask=offset < count, other=0.0)
    kept = w != 0
    x, a = load_kept(logp, offset, kept), load_kept(advantages, offset, kept)
    options = (  # in the order of LossOptions
        low, high, dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef, max_log_ratio,
        beyond,
    )  # fmt: skip
    bounds, taus, kl_coef, entropy_coef, log_ratios = options_of(x, traced_options, options)
    old = None if old_logp is None else load_kept(old_logp, offset, kept)
    mean = None if sequence_log_ratio is None else load_kept(sequence_log_ratio, offset, kept)
    ref = None if ref_logp is None else load_kept(ref_logp, offset, kept)
    # Triton 3.6 cannot compile a tuple that is unpacked within a tuple.
    term, ratios, ref_kl, slope = token_loss(
        x, a, old, mean, ref, bounds, taus, kl_coef, log_ratios, SURROGATE, KL
    )
    value, too_low, too_high, dual = term
    r, d, excess = ratios
    loss, h = w * value, tl.zeros_like(x)
    put_sum(part, SURROGATE_LOSS, loss)
    if ref_logp is not None:
        loss += w * kl_coef * ref_kl
    if entropy is not None:
        h = load_kept(entropy, offset, kept)
        loss -= w * entropy_coef * h
    tl.store(coefficient + offset, w * slope, mask=offset < count)
    put_sum(part, COUNT, kept)
    put_sum(part, LOSS, loss)
    put_ratios(part, r, kept)
    put_sum(part, K1, -d)
    put_sum(part, K3, excess)
    put_sum(part, CLIPPED_LOW, too_low)
    put_sum(part, CLIPPED_HIGH, too_high)
    put_sum(part, CLIPPED_DUAL, dual)
    put_sum(part, REF_KL, ref_kl)
    put_sum(part, ENTROPY, h)
    # Whether these two sums were computed is for merge_stats to know: 0 is a sum as well.
    tl.store(part + HAS_REF_KL, 0.0 if ref_logp is None else 1.0)
    tl.store(part + HAS_ENTROPY, 0.0 if entropy is None else 1.0)


@jit
def merge_kernel(parts: tl.tensor, stats: tl.tensor, loss: tl.tensor, rows: tl.int32):
    """The statistics of all blocks, from a row of parts for each; and the loss among them."""
    field = tl.arange(0, FIELDS)
    total = tl.zeros([ROWS, FIELDS], tl.float64)
    # Of every field the sum and the extremes are taken: at the end each keeps the one it wants.
    least, most = total + INFINITY, total - INFINITY
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        x = tl.load(parts + row.to(tl.int64) * FIELDS + field[None, :], mask=row < rows, other=0.0)
        total += x
        least = tl.minimum(least, tl.where(row < rows, x, INFINITY))
        most = tl.maximum(most, tl.where(row < rows, x, -INFINITY))
    sums = tl.sum(total, 0)
    ratios = tl.sum(tl.where(field == RATIO, sums, 0.0), 0)
    bound = tl.where(field < MINIMA_END, tl.min(least, 0), tl.max(most, 0))
    # A NaN ratio must show: the minima and maxima left it out, the sum did not.
    ratios = tl.where((field == RATIO_MIN) | (field == RATIO_MAX), ratios, 0.0)
    bound = tl.where(ratios != ratios, ratios, bound)
    tl.store(stats + field, tl.where(field < SUMS, sums, bound))
    tl.store(loss, tl.sum(tl.where(field == LOSS, sums, 0.0), 0))


def policy_loss(x: Inputs) -> Outputs:
    """Launches a program for each block of tokens, then one that merges their statistics."""
    x, outputs = contiguous(x), allocate(x)
    blocks = max(1, blocks_of(x.logp))  # one of no tokens says which of the sums were computed
    parts = x.logp.new_empty((blocks, FIELDS.value), dtype=torch.float64)
    forward_kernel[(blocks,)](
        logp=x.logp,
        advantages=x.advantages,
        weight=x.weight,
        old_logp=x.old_logp,
        sequence_log_ratio=x.sequence_log_ratio,
        ref_logp=x.ref_logp,
        entropy=x.entropy,
        traced_options=x.traced_options,
        coefficient=outputs.coefficient,
        parts=parts,
        count=x.logp.numel(),
        **x.options._asdict(),
        SURROGATE=x.surrogate,
        KL=x.kl,
        num_warps=WARPS,
        **OPTIONS,
    )
    merge_kernel[(1,)](parts, outputs.stats, outputs.loss, blocks, **OPTIONS)
    return outputs


@jit
def sequence_log_ratio_kernel(
    logp: tl.tensor,
    old_logp: tl.tensor,
    weight: tl.tensor,
    cu_seqlens: tl.tensor,
    mean: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
):
    """The mean of logp - old_logp at the unmasked tokens of a sequence."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    total, count = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        kept = tl.load(weight + offset, mask=offset < end, other=0.0) != 0
        x, old = load_kept(logp, offset, kept), load_kept(old_logp, offset, kept)
        d = log_ratio(x.to(tl.float64), old.to(tl.float64))
        # The mean is bounded, not its terms: log-ratios of a long sequence cancel in it.
        total += tl.where(tl.abs(d) == INFINITY, bounded(d, MAX_LOG_RATIO), d)
        count += kept.to(tl.float64)
    of_sequence = (tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)).to(mean.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        kept = tl.load(weight + offset, mask=offset < end, other=0.0) != 0
        tl.store(mean + offset, tl.where(kept, of_sequence, 0.0), mask=offset < end)


def policy_loss_sequence_log_ratio(x: LogRatioInputs) -> LogRatio:
    """Launches a program for each sequence."""
    x, outputs = contiguous(x), allocate_log_ratio(x)
    if x.logp.numel():
        sequences = len(x.logp) if x.cu_seqlens is None else len(x.cu_seqlens) - 1
        sequence_log_ratio_kernel[(sequences,)](
            logp=x.logp,
            old_logp=x.old_logp,
            weight=x.weight,
            cu_seqlens=x.cu_seqlens,
            mean=outputs.log_ratio,
            length=x.logp.shape[-1],
            tokens=x.logp.numel(),
            **OPTIONS,
        )
    return outputs
