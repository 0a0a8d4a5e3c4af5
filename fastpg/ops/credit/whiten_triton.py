"""whiten on the GPU: the maths of csrc/whiten.h, in fp64 as there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.triton import (
    OPTIONS,
    block_moments,
    block_offsets,
    blocks_of,
    jit,
    merged_moments,
    on_device,
)


@triton.jit
def load_kept(x, kept, at):
    return tl.load(x + at, mask=kept, other=0.0).to(tl.float64)


@jit
def moments_kernel(x, mask, parts, count: tl.int64):
    """(n, mean, M2) of a block."""
    at = block_offsets()
    kept = tl.load(mask + at, mask=at < count, other=0).to(tl.int1)
    n = tl.sum(kept.to(tl.float64), 0)
    mean, m2 = block_moments(load_kept(x, kept, at), kept, n)
    part = parts + tl.program_id(0) * 3
    tl.store(part, n)
    tl.store(part + 1, mean)
    tl.store(part + 2, m2)


@jit
def merge_kernel(parts, moments, rows: tl.int32):
    n, mean, m2 = merged_moments(parts, rows, 0, 1, 3)
    tl.store(moments, n)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, m2)


@triton.jit
def statistics(moments, eps):
    """n, mean and 1 / sqrt(var + eps), which is 1 for a single value."""
    n, mean, m2 = tl.load(moments), tl.load(moments + 1), tl.load(moments + 2)
    scale = 1.0 / tl.sqrt(m2 / tl.maximum(n - 1.0, 1.0) + eps)
    return n, mean, tl.where(n > 1.0, scale, 1.0)


@jit
def whiten_kernel(
    x, mask, moments, y, count: tl.int64, eps: tl.float64, CENTER: tl.constexpr
):  # fmt: skip
    at = block_offsets()
    kept = tl.load(mask + at, mask=at < count, other=0).to(tl.int1)
    _, mean, scale = statistics(moments, eps)
    value = (load_kept(x, kept, at) - mean) * scale
    if not CENTER:
        value += mean
    tl.store(y + at, tl.where(kept, value, 0.0), mask=at < count)


@jit
def gradient_sums_kernel(grad, x, mask, moments, parts, count: tl.int64):
    """Sums of grad and of grad (x - mean), of a block."""
    at = block_offsets()
    kept = tl.load(mask + at, mask=at < count, other=0).to(tl.int1)
    g, d = load_kept(grad, kept, at), load_kept(x, kept, at) - tl.load(moments + 1)
    tl.store(parts + tl.program_id(0) * 2, tl.sum(g, 0))
    tl.store(parts + tl.program_id(0) * 2 + 1, tl.sum(g * d, 0))


@jit
def gradient_kernel(
    grad, x, mask, moments, sums, dx, count: tl.int64, eps: tl.float64, CENTER: tl.constexpr
):  # fmt: skip
    at = block_offsets()
    kept = tl.load(mask + at, mask=at < count, other=0).to(tl.int1)
    n, mean, scale = statistics(moments, eps)
    mean_grad = tl.load(sums) / tl.maximum(n, 1.0)
    slope = scale * scale * scale * tl.load(sums + 1) / tl.maximum(n - 1.0, 1.0)
    offset = (-scale if CENTER else 1.0 - scale) * mean_grad
    value = scale * load_kept(grad, kept, at) + offset - slope * (load_kept(x, kept, at) - mean)
    tl.store(dx + at, tl.where(kept, value, 0.0), mask=at < count)


@on_device
def whiten_moments(x, mask):
    x, mask, blocks = x.contiguous(), mask.contiguous(), blocks_of(x)
    parts = x.new_empty((blocks, 3), dtype=torch.float64)
    moments = x.new_empty(3, dtype=torch.float64)
    if blocks:
        moments_kernel[(blocks,)](x, mask, parts, x.numel(), **OPTIONS)
    merge_kernel[(1,)](parts, moments, blocks, **OPTIONS)
    return moments


@on_device
def whiten(x, mask, moments, center, eps):
    x, mask = x.contiguous(), mask.contiguous()
    y = torch.empty_like(x)
    if blocks := blocks_of(x):
        whiten_kernel[(blocks,)](x, mask, moments, y, x.numel(), eps, CENTER=center, **OPTIONS)
    return y


@on_device
def whiten_backward(grad, x, mask, moments, center, eps):
    grad, x, mask = grad.contiguous(), x.contiguous(), mask.contiguous()
    dx, blocks = torch.empty_like(x), blocks_of(x)
    if blocks:
        parts = x.new_empty((blocks, 2), dtype=torch.float64)
        gradient_sums_kernel[(blocks,)](grad, x, mask, moments, parts, x.numel(), **OPTIONS)
        gradient_kernel[(blocks,)](
            grad, x, mask, moments, parts.sum(0), dx, x.numel(), eps, CENTER=center, **OPTIONS
        )
    return dx
