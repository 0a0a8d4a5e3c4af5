"""value_loss on the GPU: the maths of csrc/loss/value_loss.h, a block of tokens to a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._record import contiguous
from ..common.stats import ValueStats
from ..common.triton import (
    BLOCK,
    CHUNK,
    OPTIONS,
    block_moments,
    block_offsets,
    blocks_of,
    field_of,
    jit,
    load_kept,
    merged_moments,
    number,
)
from .value_loss import Inputs, Outputs, allocate

FIELDS = tl.constexpr(len(ValueStats.FIELDS))
SUMS = tl.constexpr(len(ValueStats.SUMS))  # a power of 2, as tl.arange demands
COUNT = field_of(ValueStats, "count")
WEIGHT = field_of(ValueStats, "weight")
LOSS = field_of(ValueStats, "loss")
CLIPPED = field_of(ValueStats, "clipped")
RETURN_MEAN = field_of(ValueStats, "return_mean")
RETURN_M2 = field_of(ValueStats, "return_m2")
RESIDUAL_MEAN = field_of(ValueStats, "residual_mean")
RESIDUAL_M2 = field_of(ValueStats, "residual_m2")


@triton.jit
def clipped_value(value: tl.tensor, old: tl.tensor, clip: tl.tensor):
    """V within clip of the old one."""
    low, high = old - clip, old + clip
    return tl.where(value < low, low, tl.where(value > high, high, value))


@jit
def forward_kernel(
    values: tl.tensor,
    returns: tl.tensor,
    weight: tl.tensor,
    old_values: tl.tensor,
    coefficient: tl.tensor,
    parts: tl.tensor,
    count: tl.int64,
    clip: tl.float64,
):
    """The coefficients of a block, dL/dV, and its statistics."""
    offset = block_offsets()
    w = tl.load(weight + offset, mask=offset < count, other=0.0)
    kept = w != 0
    value = load_kept(values, offset, kept)
    target = load_kept(returns, offset, kept)
    # A masked token has loaded zeros, so that its error is 0, whatever its memory holds.
    error = value - target
    clipped, taken = tl.zeros([BLOCK], tl.int1), error
    if old_values is not None:  # Where clipping enlarges the error, V is held: it has no gradient.
        old = load_kept(old_values, offset, kept)
        taken = clipped_value(value, old, number(clip, value)) - target
        clipped = taken * taken > error * error
        taken = tl.where(clipped, taken, error)
    tl.store(coefficient + offset, w * tl.where(clipped, 0.0, error), mask=offset < count)
    part = parts + tl.program_id(0).to(tl.int64) * FIELDS
    n = tl.sum(kept.to(tl.float64), 0)
    tl.store(part + COUNT, n)
    tl.store(part + WEIGHT, tl.sum(w.to(tl.float64), 0))
    tl.store(part + LOSS, tl.sum((w * (0.5 * taken * taken)).to(tl.float64), 0))
    tl.store(part + CLIPPED, tl.sum(clipped.to(tl.float64), 0))
    # The explained variance compares how far the returns, and these residuals, spread.
    mean, m2 = block_moments(target, kept, n)
    tl.store(part + RETURN_MEAN, mean)
    tl.store(part + RETURN_M2, m2)
    mean, m2 = block_moments(-error, kept, n)
    tl.store(part + RESIDUAL_MEAN, mean)
    tl.store(part + RESIDUAL_M2, m2)


@jit
def merge_kernel(parts: tl.tensor, stats: tl.tensor, loss: tl.tensor, rows: tl.int32):
    """The statistics of all blocks, from a row of parts for each; and the loss among them."""
    total, field = tl.zeros([CHUNK, SUMS], tl.float64), tl.arange(0, SUMS)[None, :]
    for start in range(0, rows, CHUNK):
        row = start + tl.arange(0, CHUNK)[:, None]
        offset = row.to(tl.int64) * FIELDS + field
        total += tl.load(parts + offset, mask=row < rows, other=0.0)
    sums = tl.sum(total, 0)
    tl.store(stats + tl.arange(0, SUMS), sums)
    tl.store(loss, tl.sum(tl.where(tl.arange(0, SUMS) == LOSS, sums, 0.0), 0))
    # Means cannot be added: they merge together with their m2, weighted by the counts.
    for mean in tl.static_range(SUMS, FIELDS, 2):
        _, mean_all, m2 = merged_moments(parts, rows, COUNT, mean, FIELDS)
        tl.store(stats + mean, mean_all)
        tl.store(stats + mean + 1, m2)


def value_loss(x: Inputs) -> Outputs:
    """Launches a program for each block of tokens, then one that merges their statistics."""
    x, outputs = contiguous(x), allocate(x)
    blocks = blocks_of(x.values)
    parts = x.values.new_empty((blocks, FIELDS.value), dtype=torch.float64)
    if blocks:
        forward_kernel[(blocks,)](
            values=x.values,
            returns=x.returns,
            weight=x.weight,
            old_values=x.old_values,
            coefficient=outputs.coefficient,
            parts=parts,
            count=x.values.numel(),
            clip=x.clip,
            **OPTIONS,
        )
    merge_kernel[(1,)](parts, outputs.stats, outputs.loss, blocks, **OPTIONS)
    return outputs
