"""whiten on the GPU: the maths of csrc/credit/whiten.h, in fp64 as there.

Blocks of elements give their moments, or their sums of the gradient; these are merged in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..._library import empty_like
from ..._record import contiguous
from ..common.triton import (
    OPTIONS,
    block_moments,
    block_offsets,
    blocks_of,
    jit,
    load_kept,
    load_mask,
    merged_moments,
)
from .whiten import (
    BackwardInputs,
    Gradient,
    Inputs,
    MomentsInputs,
    MomentsOutputs,
    Outputs,
    allocate_gradient,
    allocate_moments,
)

COUNT = tl.constexpr(0)  # The places of the moments; in C++ they are struct Moments.
MEAN = tl.constexpr(1)
M2 = tl.constexpr(2)
MOMENTS = tl.constexpr(3)


@jit
def moments_kernel(x: tl.tensor, mask: tl.tensor, parts: tl.tensor, count: tl.int64):
    """The moments of a block."""
    offset = block_offsets()
    kept = load_mask(mask, offset, offset < count)
    n = tl.sum(kept.to(tl.float64), 0)
    mean, m2 = block_moments(load_kept(x, offset, kept), kept, n)
    part = parts + tl.program_id(0) * MOMENTS
    tl.store(part + COUNT, n)
    tl.store(part + MEAN, mean)
    tl.store(part + M2, m2)


@jit
def merge_kernel(parts: tl.tensor, moments: tl.tensor, blocks: tl.int32):
    """The moments of all blocks."""
    n, mean, m2 = merged_moments(parts, blocks, COUNT, MEAN, MOMENTS)
    tl.store(moments + COUNT, n)
    tl.store(moments + MEAN, mean)
    tl.store(moments + M2, m2)


@triton.jit
def statistics(moments: tl.tensor, eps: tl.tensor):
    """n, mean and 1 / sqrt(var + eps), which is 1 for a single value."""
    n, mean, m2 = tl.load(moments + COUNT), tl.load(moments + MEAN), tl.load(moments + M2)
    # The variance is unbiased; a single value has none, and is only centred.
    scale = 1.0 / tl.sqrt(m2 / tl.maximum(n - 1.0, 1.0) + eps)
    return n, mean, tl.where(n > 1.0, scale, 1.0)


@triton.jit
def deviation(x: tl.tensor, offset: tl.tensor, kept: tl.tensor, mean: tl.tensor):
    """x - mean in fp64; -mean where x is masked."""
    return load_kept(x, offset, kept).to(tl.float64) - mean


@jit
def whiten_kernel(
    x: tl.tensor,
    mask: tl.tensor,
    moments: tl.tensor,
    y: tl.tensor,
    count: tl.int64,
    eps: tl.float64,
    CENTER: tl.constexpr,
):
    offset = block_offsets()
    kept = load_mask(mask, offset, offset < count)
    _, mean, scale = statistics(moments, eps)
    # In fp64, as everything here: a large mean would cost a small deviation its digits.
    value = deviation(x, offset, kept, mean) * scale
    if not CENTER:
        value += mean
    tl.store(y + offset, tl.where(kept, value, 0.0), mask=offset < count)


@jit
def gradient_sums_kernel(
    grad_y: tl.tensor,
    x: tl.tensor,
    mask: tl.tensor,
    moments: tl.tensor,
    parts: tl.tensor,
    count: tl.int64,
):
    """The sums of grad_y and of grad_y (x - mean) over a block."""
    offset = block_offsets()
    kept = load_mask(mask, offset, offset < count)
    grad = load_kept(grad_y, offset, kept).to(tl.float64)
    # d is -mean at a masked element, where the gradient is 0: the product counts nothing.
    d = deviation(x, offset, kept, tl.load(moments + MEAN))
    part = parts + tl.program_id(0) * 2
    tl.store(part, tl.sum(grad, 0))
    tl.store(part + 1, tl.sum(grad * d, 0))


@jit
def gradient_kernel(
    grad_y: tl.tensor,
    x: tl.tensor,
    mask: tl.tensor,
    moments: tl.tensor,
    sums: tl.tensor,
    grad_x: tl.tensor,
    count: tl.int64,
    eps: tl.float64,
    CENTER: tl.constexpr,
):
    offset = block_offsets()
    kept = load_mask(mask, offset, offset < count)
    n, mean, scale = statistics(moments, eps)
    mean_grad = tl.load(sums) / tl.maximum(n, 1.0)
    # The part through the variance is proportional to the deviation, with this slope.
    slope = scale * scale * scale * tl.load(sums + 1) / tl.maximum(n - 1.0, 1.0)
    # The mean takes its part of the gradient off; without centring it also hands one back.
    constant = (-scale if CENTER else 1.0 - scale) * mean_grad
    grad = load_kept(grad_y, offset, kept).to(tl.float64)
    value = scale * grad + constant - slope * deviation(x, offset, kept, mean)
    tl.store(grad_x + offset, tl.where(kept, value, 0.0), mask=offset < count)


def whiten_moments(inputs: MomentsInputs) -> MomentsOutputs:
    """Launches a program for each block of elements, and one that merges what they found."""
    inputs, outputs = contiguous(inputs), allocate_moments(inputs)
    blocks = blocks_of(inputs.x)
    parts = inputs.x.new_empty((blocks, MOMENTS.value), dtype=torch.float64)
    if blocks:
        moments_kernel[(blocks,)](
            x=inputs.x, mask=inputs.mask, parts=parts, count=inputs.x.numel(), **OPTIONS
        )
    # It is launched for an empty batch too, whose moments have to be written.
    merge_kernel[(1,)](parts=parts, moments=outputs.moments, blocks=blocks, **OPTIONS)
    return outputs


def whiten(inputs: Inputs) -> Outputs:
    """Launches a program for each block of elements, after the moments are there."""
    inputs = contiguous(inputs)
    if inputs.moments is None:
        used = whiten_moments(MomentsInputs(inputs.x, inputs.mask)).moments
    else:
        # An operator of torch may not return its own input.
        used = inputs.moments.clone()
    y = empty_like(inputs.x)
    if blocks := blocks_of(inputs.x):
        whiten_kernel[(blocks,)](
            x=inputs.x,
            mask=inputs.mask,
            moments=used,
            y=y,
            count=inputs.x.numel(),
            eps=inputs.eps,
            CENTER=inputs.center,
            **OPTIONS,
        )
    return Outputs(y, used)


def whiten_backward(x: BackwardInputs) -> Gradient:
    """Launches a program for each block of elements, twice: the second needs sums over all."""
    inputs, gradient = contiguous(x.inputs), allocate_gradient(x)
    batch = {
        "grad_y": x.grad_y.contiguous(),
        "x": inputs.x,
        "mask": inputs.mask,
        "moments": inputs.moments,
        "count": inputs.x.numel(),
        **OPTIONS,
    }
    if blocks := blocks_of(inputs.x):
        parts = inputs.x.new_empty((blocks, 2), dtype=torch.float64)
        gradient_sums_kernel[(blocks,)](parts=parts, **batch)
        gradient_kernel[(blocks,)](
            sums=parts.sum(0),
            grad_x=gradient.grad_x,
            eps=inputs.eps,
            CENTER=inputs.center,
            **batch,
        )
    return gradient
