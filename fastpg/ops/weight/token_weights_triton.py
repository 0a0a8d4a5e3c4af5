"""token_weights on the GPU: a program per sequence counts its tokens, one writes its weights."""

from __future__ import annotations

import torch
import triton.language as tl

from ..._library import contiguous
from ..common.triton import BLOCK, OPTIONS, jit, on_device, sequence_bounds


@jit
def length_kernel(mask, cu_seqlens, lengths, length: tl.int64, tokens: tl.int64):
    """The unmasked tokens of a sequence."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count += tl.load(mask + at, mask=at < end, other=0).to(tl.int32)
    tl.store(lengths + tl.program_id(0), tl.sum(count, 0))


@jit
def weight_kernel(
    mask, cu_seqlens, lengths, denom, out, length: tl.int64, tokens: tl.int64,
    PER_SEQUENCE: tl.constexpr
):  # fmt: skip
    """1 / denom, or a share of it for each token of a sequence; 0 if denom is 0."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    divisor = tl.load(denom).to(tl.float64)
    if PER_SEQUENCE:
        divisor *= tl.load(lengths + tl.program_id(0))
    weight = tl.where(divisor == 0, 0.0, 1.0 / divisor).to(tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = tl.load(mask + at, mask=at < end, other=0)
        tl.store(out + at, tl.where(kept, weight, 0.0), mask=at < end)


@on_device
def token_weights(mask, denom, cu_seqlens, reduce):
    mask, cu_seqlens = contiguous(mask, cu_seqlens)
    sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    out = torch.empty_like(mask, dtype=torch.float32)
    if out.numel() == 0:
        return out
    shape, grid = (mask.shape[-1], mask.numel()), (sequences,)
    lengths = mask.new_empty(sequences, dtype=torch.int32)
    if denom is None or reduce == 1:
        length_kernel[grid](mask, cu_seqlens, lengths, *shape, **OPTIONS)
    if denom is None:
        denom = lengths.sum() if reduce == 0 else lengths.count_nonzero()
    weight_kernel[grid](
        mask, cu_seqlens, lengths, denom, out, *shape, PER_SEQUENCE=reduce == 1, **OPTIONS
    )
    return out
