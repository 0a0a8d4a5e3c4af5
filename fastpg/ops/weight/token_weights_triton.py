"""token_weights on the GPU: a program per sequence counts its tokens, one writes its weights."""

from __future__ import annotations

import torch
import triton.language as tl

from ..._record import contiguous
from ..common.triton import BLOCK, OPTIONS, jit, load_mask, sequence_bounds
from .token_weights import Inputs, Outputs, allocate, sizes


@jit
def length_kernel(
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    lengths: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
):
    """Counts the unmasked tokens of a sequence."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        count += load_mask(mask, token, token < end).to(tl.int32)
    tl.store(lengths + tl.program_id(0), tl.sum(count, 0))


@jit
def weight_kernel(
    mask: tl.tensor,
    cu_seqlens: tl.tensor,
    lengths: tl.tensor,
    denom: tl.tensor,
    weight: tl.tensor,
    length: tl.int64,
    tokens: tl.int64,
    PER_SEQUENCE: tl.constexpr,
):
    """Writes 1 / denom, or a share of it for each token of a sequence; 0 if denom is 0."""
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    # The quotient is taken in fp64 and rounded once, as in the reference.
    divisor = tl.load(denom).to(tl.float64)
    if PER_SEQUENCE:
        divisor *= tl.load(lengths + tl.program_id(0))
    share = tl.where(divisor == 0, 0.0, 1.0 / divisor).to(tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        kept = load_mask(mask, token, token < end)
        tl.store(weight + token, tl.where(kept, share, 0.0), mask=token < end)


def token_weights(x: Inputs) -> Outputs:
    """Launches a program for each sequence, twice: the second needs the count of all of them."""
    x, outputs = contiguous(x), allocate(x)
    if x.mask.numel() == 0:
        return outputs
    sequence_count, length = sizes(x)
    batch = {"mask": x.mask, "cu_seqlens": x.cu_seqlens, "length": length}
    batch |= {"tokens": x.mask.numel(), **OPTIONS}
    per_sequence = x.reduce == "sequence"
    lengths = x.mask.new_empty(sequence_count, dtype=torch.int32)
    # A denom that is given spares the counting, unless the lengths themselves are wanted.
    if x.denom is None or per_sequence:
        length_kernel[(sequence_count,)](lengths=lengths, **batch)
    denom = x.denom
    if denom is None:
        denom = lengths.sum() if x.reduce == "token" else lengths.count_nonzero()
    weight_kernel[(sequence_count,)](
        lengths=lengths, denom=denom, weight=outputs.weight, PER_SEQUENCE=per_sequence, **batch
    )
    return outputs
