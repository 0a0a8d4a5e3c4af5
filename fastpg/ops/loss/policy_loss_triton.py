"""policy_loss on the GPU: one block of tokens a program, statistics in the order of PolicyStats."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..._library import REFERENCES, contiguous
from ..common.triton import (
    BLOCK,
    OPTIONS,
    block_offsets,
    blocks_of,
    jit,
    on_device,
    sequence_bounds,
)
from .surrogates_triton import log_ratio, options_of, token_loss

FIELDS = tl.constexpr(16)
INFINITY = tl.constexpr(math.inf)
SUMS = tl.constexpr(12)  # then three minima and a maximum
ROWS = tl.constexpr(64)  # partial results at a time: registers hold three times as many fields


@triton.jit
def load_kept(x, at, kept):
    return tl.load(x + at, mask=kept, other=0.0)


@triton.jit
def put_sum(part, field, x):
    tl.store(part + field, tl.sum(x.to(tl.float64), 0))


@triton.jit
def put_ratios(part, ratio, kept):
    """The statistics of the ratios that the surrogate took."""
    real = tl.where(kept, ratio, 0.0)
    put_sum(part, 4, real)
    put_sum(part, 5, real * real)
    ordered = kept & (ratio == ratio)  # merge_kernel sees a NaN in the sum
    tl.store(part + 12, tl.min(tl.where(ordered, ratio, INFINITY), 0))
    tl.store(part + 15, tl.max(tl.where(ordered, ratio, -INFINITY), 0))


@jit
def forward_kernel(
    logp, advantages, weight, old_logp, ratio, ref_logp, entropy, device_options, coefficient,
    parts, count: tl.int64, low: tl.float64, high: tl.float64, dual_clip: tl.float64,
    tau_positive: tl.float64, tau_negative: tl.float64, kl_coef: tl.float64,
    entropy_coef: tl.float64, SURROGATE: tl.constexpr, KL: tl.constexpr,
):  # fmt: skip
    """The coefficients of a block, dL/dlogp, and its statistics."""
    at = block_offsets()
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    w = tl.load(weight + at, mask=at < count, other=0.0)
    kept = w != 0
    x, a = load_kept(logp, at, kept), load_kept(advantages, at, kept)
    bounds, taus, kl_coef, entropy_coef = options_of(
        x, device_options, low, high, dual_clip, tau_positive, tau_negative, kl_coef, entropy_coef
    )
    old = None if old_logp is None else load_kept(old_logp, at, kept)
    held = None if ratio is None else load_kept(ratio, at, kept)
    ref = None if ref_logp is None else load_kept(ref_logp, at, kept)
    (value, too_low, too_high), (r, d, excess), ref_kl, slope = token_loss(
        x, a, old, held, ref, bounds, taus, kl_coef, SURROGATE, KL
    )
    loss, h = w * value, tl.zeros_like(x)
    put_sum(part, 3, loss)
    if ref_logp is not None:
        loss += w * kl_coef * ref_kl
    if entropy is not None:
        h = load_kept(entropy, at, kept)
        loss -= w * entropy_coef * h
    tl.store(coefficient + at, w * slope, mask=at < count)
    put_sum(part, 0, kept)
    put_sum(part, 1, w)
    put_sum(part, 2, loss)
    put_ratios(part, r, kept)
    put_sum(part, 6, -d)
    put_sum(part, 7, excess)
    put_sum(part, 8, too_low)
    put_sum(part, 9, too_high)
    put_sum(part, 10, ref_kl)
    put_sum(part, 11, h)
    tl.store(part + 13, 0.0 if ref_logp is None else 1.0)
    tl.store(part + 14, 0.0 if entropy is None else 1.0)


@jit
def merge_kernel(parts, stats, loss, rows: tl.int32):
    field = tl.arange(0, FIELDS)
    total = tl.zeros([ROWS, FIELDS], tl.float64)
    least, most = total + INFINITY, total - INFINITY
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        x = tl.load(parts + row.to(tl.int64) * FIELDS + field[None, :], mask=row < rows, other=0.0)
        total += x
        least = tl.minimum(least, tl.where(row < rows, x, INFINITY))
        most = tl.maximum(most, tl.where(row < rows, x, -INFINITY))
    sums = tl.sum(total, 0)
    ratios = tl.sum(tl.where(field == 4, sums, 0.0), 0)
    bound = tl.where(field == 15, tl.max(most, 0), tl.min(least, 0))
    # A NaN ratio must show: the minima and maxima left it out, the sum did not.
    ratios = tl.where((field == 12) | (field == 15), ratios, 0.0)
    bound = tl.where(ratios != ratios, ratios, bound)
    tl.store(stats + field, tl.where(field < SUMS, sums, bound))
    tl.store(loss, tl.sum(tl.where(field == 2, sums, 0.0), 0))


@on_device
def policy_loss(*args):
    logp, (name, kl, options), device_options = args[0], args[7:10], [*args[10:], None][0]
    if logp.numel() == 0:
        return REFERENCES[torch.ops.fastpg.policy_loss.default](*args)
    tensors, blocks = contiguous(*args[:7]), blocks_of(logp)
    parts = logp.new_empty((blocks, FIELDS.value), dtype=torch.float64)
    loss, stats = logp.new_empty(()), parts.new_empty(FIELDS.value)
    coefficient = torch.empty_like(tensors[0])
    numbers = options if device_options is None else [0.0] * 7
    forward_kernel[(blocks,)](
        *tensors, device_options, coefficient, parts, logp.numel(), *numbers, SURROGATE=name, KL=kl,
        **OPTIONS,
    )  # fmt: skip
    merge_kernel[(1,)](parts, stats, loss, blocks, **OPTIONS)
    return loss, coefficient, stats


@jit
def sequence_ratio_kernel(
    logp, old_logp, weight, cu_seqlens, ratio, length: tl.int64, tokens: tl.int64
):
    """exp(mean (logp - old_logp)) at the unmasked tokens of a sequence."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    total, count = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = tl.load(weight + at, mask=at < end, other=0.0) != 0
        x, old = load_kept(logp, at, kept), load_kept(old_logp, at, kept)
        total += x.to(tl.float64) - old.to(tl.float64)
        count += kept.to(tl.float64)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)
    of_sequence = tl.exp(log_ratio(mean, 0.0)).to(ratio.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = tl.load(weight + at, mask=at < end, other=0.0) != 0
        tl.store(ratio + at, tl.where(kept, of_sequence, 0.0), mask=at < end)


@on_device
def policy_loss_sequence_ratio(logp, old_logp, weight, cu_seqlens):
    tensors = contiguous(logp, old_logp, weight, cu_seqlens)
    ratio = torch.empty_like(tensors[0])
    sequences = len(logp) if cu_seqlens is None else len(cu_seqlens) - 1
    if ratio.numel():
        sequence_ratio_kernel[(sequences,)](
            *tensors, ratio, logp.shape[-1], logp.numel(), **OPTIONS
        )
    return ratio
