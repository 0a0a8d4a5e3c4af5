"""token_rewards on the GPU: one program per sequence, which finds its last unmasked token first."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._library import contiguous
from ..common.triton import BLOCK, OPTIONS, jit, number, on_device, sequence_bounds


@triton.jit
def last_kept(mask, begin, end):
    """The last unmasked token of [begin, end), or -1."""
    last = tl.full([BLOCK], -1, tl.int64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        last = tl.where(tl.load(mask + at, mask=at < end, other=0), at, last)
    return tl.max(last, 0)


@jit
def forward_kernel(
    scores, kl, mask, cu_seqlens, rewards, length: tl.int64, tokens: tl.int64,
    kl_coef: tl.float64
):  # fmt: skip
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    last = last_kept(mask, begin, end)
    score = tl.load(scores + tl.program_id(0), mask=last >= 0, other=0.0)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        reward = tl.where(at == last, score, 0.0)
        if kl is not None:
            kept = tl.load(mask + at, mask=at < end, other=0)
            reward -= number(kl_coef, score) * tl.load(kl + at, mask=kept, other=0.0)
        tl.store(rewards + at, reward, mask=at < end)


@jit
def backward_kernel(
    grad, mask, cu_seqlens, grad_scores, grad_kl, length: tl.int64, tokens: tl.int64,
    kl_coef: tl.float64
):  # fmt: skip
    begin, end = sequence_bounds(tl.program_id(0), length, tokens, cu_seqlens)
    last = last_kept(mask, begin, end)
    at_last = tl.load(grad + last, mask=last >= 0, other=0.0)
    tl.store(grad_scores + tl.program_id(0), at_last)
    if grad_kl is not None:
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            kept = tl.load(mask + at, mask=at < end, other=0)
            g = tl.load(grad + at, mask=kept, other=0.0)
            tl.store(grad_kl + at, -number(kl_coef, at_last) * g, mask=at < end)


@on_device
def token_rewards(scores, kl, mask, cu_seqlens, kl_coef):
    tensors = contiguous(scores, kl, mask, cu_seqlens)
    rewards = scores.new_empty(mask.shape)
    if len(scores):
        forward_kernel[(len(scores),)](
            *tensors, rewards, mask.shape[-1], mask.numel(), kl_coef, **OPTIONS
        )
    return rewards


@on_device
def token_rewards_backward(grad, scores, kl, mask, cu_seqlens, kl_coef):
    tensors = contiguous(grad, mask, cu_seqlens)
    grad_scores = scores.new_empty(scores.shape)
    grad_kl = None if kl is None else scores.new_empty(kl.shape)
    if len(scores):
        backward_kernel[(len(scores),)](
            *tensors, grad_scores, grad_kl, mask.shape[-1], mask.numel(), kl_coef, **OPTIONS
        )
    return grad_scores, scores.new_empty(0) if grad_kl is None else grad_kl
