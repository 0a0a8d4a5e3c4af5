"""importance_weights on the GPU: a program per block of tokens, or per sequence.

The maths is that of csrc/weight/importance_weights.h. Each program writes its own statistics to a
line of `parts`, in the order of ImportanceStats; merge_kernel adds the lines in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._record import contiguous
from ..common.stats import ImportanceStats
from ..common.triton import (
    BLOCK,
    CHUNK,
    INFINITY,
    MAX_LOG_RATIO,
    OPTIONS,
    block_offsets,
    blocks_of,
    bounded,
    column,
    exp_excess,
    field_of,
    jit,
    load_kept,
    load_mask,
    log_ratio,
    number,
    sequence_bounds,
)
from .importance_weights import Inputs, Outputs, allocate, reference, sizes

FIELDS = tl.constexpr(len(ImportanceStats.FIELDS))
TOKENS = field_of(ImportanceStats, "tokens")
K1 = field_of(ImportanceStats, "k1")
K3 = field_of(ImportanceStats, "k3")
COUNT = field_of(ImportanceStats, "count")
RATIO = field_of(ImportanceStats, "ratio")
WEIGHT = field_of(ImportanceStats, "weight")
WEIGHT_SQ = field_of(ImportanceStats, "weight_sq")
LOW = field_of(ImportanceStats, "low")
HIGH = field_of(ImportanceStats, "high")
RATIO_MIN = field_of(ImportanceStats, "ratio_min")
RATIO_MAX = field_of(ImportanceStats, "ratio_max")


@triton.jit
def weight_of(ratio: tl.tensor, low: tl.tensor, high: tl.tensor, ZERO: tl.constexpr):
    """The weight, and whether the ratio is below or above its bounds. NaN is neither."""
    low, high = number(low, ratio), number(high, ratio)
    below, above = ratio < low, ratio > high
    outside = tl.where(above, 0.0 if ZERO else high, ratio)
    return tl.where(below, 0.0 if ZERO else low, outside), below, above


@triton.jit
def log_ratios(
    logp: tl.tensor, behavior_logp: tl.tensor, mask: tl.tensor, token: tl.tensor, end: tl.tensor
):
    """d of these tokens, 0 where they are masked or not before `end`; and which are kept."""
    kept = load_mask(mask, token, token < end)
    d = log_ratio(load_kept(logp, token, kept), load_kept(behavior_logp, token, kept))
    return bounded(d, MAX_LOG_RATIO), kept


@triton.jit
def put_tokens(part: tl.tensor, d: tl.tensor, excess: tl.tensor, kept: tl.tensor):
    """Writes the statistics of tokens."""
    tl.store(part + TOKENS, tl.sum(kept.to(tl.float64), 0))
    tl.store(part + K1, -tl.sum(d.to(tl.float64), 0))
    tl.store(part + K3, tl.sum(excess.to(tl.float64), 0))


@triton.jit
def put_weights(
    part: tl.tensor,
    ratio: tl.tensor,
    weight: tl.tensor,
    below: tl.tensor,
    above: tl.tensor,
    counts: tl.tensor,
):
    """Writes the statistics of what has a weight of its own, and counts."""
    ratio, weight = ratio.to(tl.float64), weight.to(tl.float64)
    tl.store(part + COUNT, tl.sum(counts.to(tl.float64), 0))
    tl.store(part + RATIO, tl.sum(tl.where(counts, ratio, 0.0), 0))
    tl.store(part + WEIGHT, tl.sum(tl.where(counts, weight, 0.0), 0))
    tl.store(part + WEIGHT_SQ, tl.sum(tl.where(counts, weight * weight, 0.0), 0))
    tl.store(part + LOW, tl.sum((counts & below).to(tl.float64), 0))
    tl.store(part + HIGH, tl.sum((counts & above).to(tl.float64), 0))
    ordered = counts & (ratio == ratio)  # A NaN shows in the sum, where merge_kernel sees it.
    tl.store(part + RATIO_MIN, tl.min(tl.where(ordered, ratio, INFINITY), 0))
    tl.store(part + RATIO_MAX, tl.max(tl.where(ordered, ratio, -INFINITY), 0))


@jit
def token_kernel(
    logp: tl.tensor,
    behavior_logp: tl.tensor,
    mask: tl.tensor,
    weight: tl.tensor,
    parts: tl.tensor,
    count: tl.int64,
    low: tl.float64,
    high: tl.float64,
    ZERO: tl.constexpr,
):
    """The weights of a block of tokens, and its statistics."""
    token = block_offsets()
    # The estimates of the KL are of d; the weight and its own statistics are of its ratio.
    d, kept = log_ratios(logp, behavior_logp, mask, token, count)
    ratio, excess = exp_excess(d)
    weighed, below, above = weight_of(ratio, low, high, ZERO)
    tl.store(weight + token, tl.where(kept, weighed, 0.0), mask=token < count)
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    put_tokens(part, d, excess, kept)
    put_weights(part, ratio, weighed, below, above, kept)


@jit
def sequence_kernel(
    logp: tl.tensor,
    behavior_logp: tl.tensor,
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    weight: tl.tensor,
    parts: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
    low: tl.float64,
    high: tl.float64,
    MEAN: tl.constexpr,
    ZERO: tl.constexpr,
):
    """The weight of a sequence at all its tokens, and its statistics."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    total, excesses = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        d, kept = log_ratios(logp, behavior_logp, mask, start + tl.arange(0, BLOCK), end)
        _, excess = exp_excess(d)
        total, excesses = total + d.to(tl.float64), excesses + excess.to(tl.float64)
        count += kept.to(tl.int32)
    n = tl.sum(count, 0).to(tl.float64)  # An int32 counts exactly.
    exponent = tl.sum(total, 0) / tl.maximum(n, 1.0) if MEAN else tl.sum(total, 0)
    # A sequence is a block of one: the functions for tokens take it so.
    ratio = tl.exp(bounded(exponent, MAX_LOG_RATIO)) + tl.zeros([1], tl.float64)
    weighed, below, above = weight_of(ratio, low, high, ZERO)
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    put_tokens(part, total, excesses, count)
    put_weights(part, ratio, weighed, below, above, n + tl.zeros([1], tl.float64) > 0)
    # The sum over one element makes a scalar of it again.
    of_sequence = tl.sum(weighed, 0).to(weight.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        kept = load_mask(mask, token, token < end)
        tl.store(weight + token, tl.where(kept, of_sequence, 0.0), mask=token < end)


@jit
def merge_kernel(parts: tl.tensor, stats: tl.tensor, programs: tl.int32):
    """Adds the statistics of all programs; of the ratios also the extremes, unless one is NaN."""
    for field in tl.static_range(RATIO_MIN):  # The fields before the extremes are sums.
        total = tl.zeros([CHUNK], tl.float64)
        for start in range(0, programs, CHUNK):
            total += column(parts, field, start, programs, FIELDS)
        tl.store(stats + field, tl.sum(total, 0))
    least, most = tl.full([CHUNK], INFINITY, tl.float64), tl.full([CHUNK], -INFINITY, tl.float64)
    ratios = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        # Beyond the last program a load gives 0, which could pass for the least ratio.
        inside = start + tl.arange(0, CHUNK) < programs
        ratios += column(parts, RATIO, start, programs, FIELDS)
        lowest = column(parts, RATIO_MIN, start, programs, FIELDS)
        highest = column(parts, RATIO_MAX, start, programs, FIELDS)
        least = tl.minimum(least, tl.where(inside, lowest, INFINITY))
        most = tl.maximum(most, tl.where(inside, highest, -INFINITY))
    ratio = tl.sum(ratios, 0)
    tl.store(stats + RATIO_MIN, tl.where(ratio == ratio, tl.min(least, 0), ratio))
    tl.store(stats + RATIO_MAX, tl.where(ratio == ratio, tl.max(most, 0), ratio))


def importance_weights(x: Inputs) -> Outputs:
    """Launches a program for each block of tokens or each sequence, and one that merges them."""
    # An empty batch has no block to launch, but its statistics must be written all the same.
    if x.logp.numel() == 0:
        return reference(x)
    x, outputs = contiguous(x), allocate(x)
    _, sequence_count, length = sizes(x)
    programs = blocks_of(x.logp) if x.level == "token" else sequence_count
    parts = x.logp.new_empty((programs, FIELDS.value), dtype=torch.float64)
    batch = {
        "logp": x.logp,
        "behavior_logp": x.behavior_logp,
        "mask": x.mask,
        "weight": outputs.weight,
        "parts": parts,
        "low": x.low,
        "high": x.high,
        "ZERO": x.outside == "zero",
        **OPTIONS,
    }
    if x.level == "token":
        token_kernel[(programs,)](count=x.logp.numel(), **batch)
    else:
        sequence_kernel[(programs,)](
            cu_seqlens=x.cu_seqlens,
            length=length,
            tokens=x.logp.numel(),
            MEAN=x.level == "geometric",
            **batch,
        )
    # One program merges the parts in their order, so that no bit depends on the timing.
    merge_kernel[(1,)](parts=parts, stats=outputs.stats, programs=programs, **OPTIONS)
    return outputs
