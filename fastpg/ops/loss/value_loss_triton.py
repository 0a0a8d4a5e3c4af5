"""value_loss on the GPU: the maths of csrc/value_loss.h, statistics in the order of ValueStats."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._library import contiguous
from ..common.triton import (
    BLOCK,
    CHUNK,
    OPTIONS,
    block_moments,
    block_offsets,
    blocks_of,
    jit,
    merged_moments,
    number,
    on_device,
)

FIELDS = tl.constexpr(8)
SUMS = tl.constexpr(4)  # count, weight, loss, clipped; then the moments of returns and residuals


@triton.jit
def held(value, old_values, at, kept, clip):
    """V within clip of the old one."""
    old = tl.load(old_values + at, mask=kept, other=0.0)
    bound = number(clip, value)
    low, high = old - bound, old + bound
    return tl.where(value < low, low, tl.where(value > high, high, value))


@jit
def forward_kernel(
    values, returns, weight, old_values, coefficient, parts, count: tl.int64, clip: tl.float64
):  # fmt: skip
    """The coefficients of a block, dL/dV, and its statistics."""
    at = block_offsets()
    w = tl.load(weight + at, mask=at < count, other=0.0)
    kept = w != 0
    value = tl.load(values + at, mask=kept, other=0.0)
    target = tl.load(returns + at, mask=kept, other=0.0)
    error = value - target
    clipped, taken = tl.zeros([BLOCK], tl.int1), error
    if old_values is not None:  # where clipping enlarges the error, V is held: no gradient
        taken = held(value, old_values, at, kept, clip) - target
        clipped = taken * taken > error * error
        taken = tl.where(clipped, taken, error)
    tl.store(coefficient + at, w * tl.where(clipped, 0.0, error), mask=at < count)
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    n = tl.sum(kept.to(tl.float64), 0)
    tl.store(part, n)
    tl.store(part + 1, tl.sum(w.to(tl.float64), 0))
    tl.store(part + 2, tl.sum((w * (0.5 * taken * taken)).to(tl.float64), 0))
    tl.store(part + 3, tl.sum(clipped.to(tl.float64), 0))
    mean, m2 = block_moments(target, kept, n)
    tl.store(part + 4, mean)
    tl.store(part + 5, m2)
    mean, m2 = block_moments(-error, kept, n)
    tl.store(part + 6, mean)
    tl.store(part + 7, m2)


@jit
def merge_kernel(parts, stats, loss, rows: tl.int32):
    total, field = tl.zeros([CHUNK, SUMS], tl.float64), tl.arange(0, SUMS)[None, :]
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)[:, None]
        at = row.to(tl.int64) * FIELDS + field
        total += tl.load(parts + at, mask=row < rows, other=0.0)
    sums = tl.sum(total, 0)
    tl.store(stats + tl.arange(0, SUMS), sums)
    tl.store(loss, tl.sum(tl.where(tl.arange(0, SUMS) == 2, sums, 0.0), 0))
    for mean in tl.static_range(SUMS, FIELDS, 2):
        _, mean_all, m2 = merged_moments(parts, rows, 0, mean, FIELDS)
        tl.store(stats + mean, mean_all)
        tl.store(stats + mean + 1, m2)


@on_device
def value_loss(values, returns, weight, old_values, clip):
    values, *rest = contiguous(values, returns, weight, old_values)
    blocks = blocks_of(values)
    parts = values.new_empty((blocks, FIELDS.value), dtype=torch.float64)
    loss, stats = values.new_empty(()), parts.new_empty(FIELDS.value)
    coefficient = torch.empty_like(values)
    if blocks:
        forward_kernel[(blocks,)](
            values, *rest, coefficient, parts, values.numel(), clip, **OPTIONS
        )
    merge_kernel[(1,)](parts, stats, loss, blocks, **OPTIONS)
    return loss, coefficient, stats
