"""importance_weights on the GPU: a program per block of tokens, or per sequence.

The maths is that of csrc/importance_weights.h, the statistics in the order of ImportanceStats.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..._library import REFERENCES, contiguous
from ..common.triton import (
    BLOCK,
    CHUNK,
    OPTIONS,
    block_offsets,
    blocks_of,
    column,
    exp_excess,
    jit,
    number,
    on_device,
    sequence_bounds,
)
from ..loss.surrogates_triton import log_ratio

FIELDS = tl.constexpr(11)
SUMS = tl.constexpr(9)  # then a minimum and a maximum
INFINITY = tl.constexpr(math.inf)


@triton.jit
def bounded(ratio, low, high, ZERO: tl.constexpr):
    """The weight, and whether the ratio is below or above its bounds. NaN is neither."""
    low, high = number(low, ratio), number(high, ratio)
    below, above = ratio < low, ratio > high
    held = tl.where(below, 0.0 if ZERO else low, tl.where(above, 0.0 if ZERO else high, ratio))
    return held, below, above


@triton.jit
def log_ratios(logp, behavior_logp, mask, at, end):
    """d of the tokens in [at, end), 0 where they are masked; and which are not."""
    kept = tl.load(mask + at, mask=at < end, other=0).to(tl.int1)
    x = tl.load(logp + at, mask=kept, other=0.0)
    return log_ratio(x, tl.load(behavior_logp + at, mask=kept, other=0.0)), kept


@triton.jit
def put_tokens(part, d, excess, kept):
    tl.store(part, tl.sum(kept.to(tl.float64), 0))
    tl.store(part + 1, -tl.sum(d.to(tl.float64), 0))
    tl.store(part + 2, tl.sum(excess.to(tl.float64), 0))


@triton.jit
def put_weights(part, ratio, weight, below, above, counts):
    """The statistics of what has a weight of its own, [n]; 0 where it does not count."""
    ratio, weight = ratio.to(tl.float64), weight.to(tl.float64)
    tl.store(part + 3, tl.sum(counts.to(tl.float64), 0))
    tl.store(part + 4, tl.sum(tl.where(counts, ratio, 0.0), 0))
    tl.store(part + 5, tl.sum(tl.where(counts, weight, 0.0), 0))
    tl.store(part + 6, tl.sum(tl.where(counts, weight * weight, 0.0), 0))
    tl.store(part + 7, tl.sum((counts & below).to(tl.float64), 0))
    tl.store(part + 8, tl.sum((counts & above).to(tl.float64), 0))
    ordered = counts & (ratio == ratio)  # merge_kernel sees a NaN in the sum
    tl.store(part + 9, tl.min(tl.where(ordered, ratio, INFINITY), 0))
    tl.store(part + 10, tl.max(tl.where(ordered, ratio, -INFINITY), 0))


@jit
def token_kernel(
    logp, behavior_logp, mask, weight, parts, count: tl.int64, low: tl.float64, high: tl.float64,
    ZERO: tl.constexpr,
):  # fmt: skip
    """The weights of a block of tokens, and its statistics."""
    at = block_offsets()
    d, kept = log_ratios(logp, behavior_logp, mask, at, count)
    ratio, excess = exp_excess(d)
    held, below, above = bounded(ratio, low, high, ZERO)
    tl.store(weight + at, tl.where(kept, held, 0.0), mask=at < count)
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    put_tokens(part, d, excess, kept)
    put_weights(part, ratio, held, below, above, kept)


@jit
def sequence_kernel(
    logp, behavior_logp, mask, cu_seqlens, weight, parts, length: tl.int64, tokens: tl.int64,
    low: tl.float64, high: tl.float64, MEAN: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The weight of a sequence at all its tokens, and its statistics."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    total, excesses = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        d, kept = log_ratios(logp, behavior_logp, mask, start + tl.arange(0, BLOCK), end)
        _, excess = exp_excess(d)
        total, excesses = total + d.to(tl.float64), excesses + excess.to(tl.float64)
        count += kept.to(tl.int32)
    n = tl.sum(count, 0).to(tl.float64)
    log = tl.sum(total, 0) / tl.maximum(n, 1.0) if MEAN else tl.sum(total, 0)
    ratio = tl.exp(log_ratio(log, 0.0)) + tl.zeros([1], tl.float64)
    held, below, above = bounded(ratio, low, high, ZERO)
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    put_tokens(part, total, excesses, count)
    put_weights(part, ratio, held, below, above, n + tl.zeros([1], tl.float64) > 0)
    of_sequence = tl.sum(held, 0).to(weight.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = tl.load(mask + at, mask=at < end, other=0).to(tl.int1)
        tl.store(weight + at, tl.where(kept, of_sequence, 0.0), mask=at < end)


@jit
def merge_kernel(parts, stats, rows: tl.int32):
    for field in tl.static_range(SUMS):
        total = tl.zeros([CHUNK], tl.float64)
        for start in range(0, rows, CHUNK):
            total += column(parts, field, start, rows, FIELDS)
        tl.store(stats + field, tl.sum(total, 0))
    least, most = tl.full([CHUNK], INFINITY, tl.float64), tl.full([CHUNK], -INFINITY, tl.float64)
    ratios = tl.zeros([CHUNK], tl.float64)
    for start in range(0, rows, CHUNK):
        inside = start + tl.arange(0, CHUNK) < rows
        ratios += column(parts, 4, start, rows, FIELDS)
        least = tl.minimum(
            least, tl.where(inside, column(parts, SUMS, start, rows, FIELDS), INFINITY)
        )
        most = tl.maximum(
            most, tl.where(inside, column(parts, SUMS + 1, start, rows, FIELDS), -INFINITY)
        )
    ratio = tl.sum(ratios, 0)  # a NaN must show
    tl.store(stats + SUMS, tl.where(ratio == ratio, tl.min(least, 0), ratio))
    tl.store(stats + SUMS + 1, tl.where(ratio == ratio, tl.max(most, 0), ratio))


@on_device
def importance_weights(logp, behavior_logp, mask, cu_seqlens, level, low, high, outside):
    if logp.numel() == 0:
        reference = REFERENCES[torch.ops.fastpg.importance_weights.default]
        return reference(logp, behavior_logp, mask, cu_seqlens, level, low, high, outside)
    *tensors, cu_seqlens = contiguous(logp, behavior_logp, mask, cu_seqlens)
    sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    programs = blocks_of(logp) if level == "token" else sequences
    parts = logp.new_empty((programs, FIELDS.value), dtype=torch.float64)
    weight, stats = torch.empty_like(tensors[0]), parts.new_empty(FIELDS.value)
    options = {"ZERO": outside == "zero", **OPTIONS}
    if level == "token":
        token_kernel[(programs,)](*tensors, weight, parts, logp.numel(), low, high, **options)
    else:
        sequence_kernel[(programs,)](
            *tensors, cu_seqlens, weight, parts, mask.shape[-1], logp.numel(), low, high,
            MEAN=level == "geometric", **options,
        )  # fmt: skip
    merge_kernel[(1,)](parts, stats, programs, **OPTIONS)
    return weight, stats
